"""A pipeline's stages compute what one process does: gradients, loss, norm, weights and moments, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from eight_bits import SIZES
from float64_reference import state_with
from ranks import alone, apart, larger_weights, on_ranks, source_of, started

from weftrain.backends.cuda.pipeline import waiting_share
from weftrain.core.backend import Run, State
from weftrain.core.config import Recipe
from weftrain.core.order.batch import Batch

Tiny = Callable[..., Recipe]
SHAPE = ["model.num_heads=4", "model.intermediate_size=72", "data.sequence_length=12", "model.rotary_dim=4"]
BATCH = ["batch.micro_batch_size=1", "batch.global_batch_size=8", "schedule.steps=3"]
# Number of layers, options. Each has something besides that a rank's gradients must survive: groups of replicas,
# recomputation, weights in the host's memory, gradients that are reduced after every micro-batch.
PIPELINES: dict[str, tuple[int, dict[str, Any]]] = {
    "1f1b_fsdp": (3, {"pipeline_parallel": 2}),
    "1f1b_four_stages": (5, {"pipeline_parallel": 4}),
    "1f1b_ddp": (2, {"pipeline_parallel": 2, "parallel": "ddp", "activation_checkpointing": "full"}),
    "1f1b_offload": (2, {"pipeline_parallel": 2, "cpu_offload": True, "activation_checkpointing": "selective"}),
    "1f1b_tensor": (2, {"pipeline_parallel": 2, "tensor_parallel": 2, "reduce_every_micro_batch": True}),
    "gpipe_context": (
        2,
        {
            "pipeline_parallel": 2,
            "pipeline_schedule": "gpipe",
            "context_parallel": 2,
            "activation_checkpointing": "full",
            "reshard_after_forward": False,
        },
    ),
    "interleaved": (
        5,
        {
            "pipeline_parallel": 2,
            "pipeline_schedule": "interleaved_1f1b",
            "pipeline_virtual_stages": 2,
            "parallel": "hsdp",
            "shard_group": 1,
            "gather_blocks_ahead": 2,
        },
    ),
    "interleaved_zero_bubble": (
        4,
        {
            "pipeline_parallel": 2,
            "pipeline_schedule": "interleaved_zero_bubble",
            "pipeline_virtual_stages": 2,
            "parallel": "ddp",
        },
    ),
    "zbv": (
        4,
        {"pipeline_parallel": 2, "pipeline_schedule": "zbv", "pipeline_virtual_stages": 2, "parallel": "ddp"},
    ),
}
UNTIED = ["model.num_layers=4", "model.tie_embeddings=false"]
INTERLEAVED = {"pipeline_parallel": 2, "pipeline_schedule": "interleaved_1f1b", "pipeline_virtual_stages": 2}
ZBV = {"pipeline_parallel": 2, "pipeline_schedule": "zbv", "pipeline_virtual_stages": 2, "parallel": "ddp"}
# of tied embeddings: what lies between the two stages, pieces, copies, and stages that share no rank
TIED: dict[str, tuple[int, dict[str, Any]]] = {
    "tied_fsdp": (2, {"pipeline_parallel": 2, "activation_checkpointing": "full"}),
    "tied_four_stages": (4, {"pipeline_parallel": 4, "pipeline_schedule": "gpipe"}),
    "tied_tensor_offload": (2, {"pipeline_parallel": 2, "tensor_parallel": 2, "cpu_offload": True}),
    "tied_interleaved_ddp": PIPELINES["interleaved_zero_bubble"],
    "tied_hsdp": PIPELINES["interleaved"],
}
QUICK = ("1f1b_fsdp", "tied_fsdp")
CASES = [pytest.param(layout, marks=() if layout in QUICK else pytest.mark.prove) for layout in PIPELINES | TIED]


@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize("layout", CASES)
def test_the_same_as_one_process(layout: str, tiny_recipe: Tiny) -> None:
    layers, options = (PIPELINES | TIED)[layout]
    words = [f"model.num_layers={layers}", f"model.tie_embeddings={str(layout in TIED).lower()}"]
    # the rows of training: of each another number of tokens bears a loss, and of some none
    words += ["name=masked", "objective.normalizer=bearing_tokens"]
    recipe = tiny_recipe("crystal", *SHAPE, *BATCH, *words)
    many, one = on_ranks(recipe, **options), alone(recipe)
    for run in (many, one):
        run.import_state(started(recipe))
    rng = np.random.default_rng(0)
    start = np.where(np.arange(12) < 5, 0, 5).astype(np.int32)[None].repeat(8, 0)
    batch = Batch(rng.integers(0, 97, (8, 13)), loss_mask=rng.random((8, 12)) > 0.3, document_start=start)
    (loss, gradients), (wanted_loss, wanted) = many.gradients(batch), one.gradients(batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        if not name.endswith("k_proj.bias"):  # all but zero: see the conformance suite
            assert apart(gradients[name], gradient) < 2e-5, name
    for found, expected in zip(many.train(source_of(recipe)), one.train(source_of(recipe)), strict=True):
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)
        assert float(found.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-4)
    a, b = many.export_state(), one.export_state()
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in b.tensors.items():
        if not name.endswith("k_proj.bias"):
            assert apart(a.tensors[name], tensor) < 1e-4, name
    many.close()


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(
    "options",
    [
        {"pipeline_parallel": 2, "parallel": "ddp", "reduce": "bfloat16"},
        {"pipeline_parallel": 2, "tensor_parallel": 2},
        pytest.param({"pipeline_parallel": 2, "reduce": "bfloat16"}, marks=pytest.mark.soak),
        pytest.param(ZBV, marks=pytest.mark.soak),
    ],
    ids=["ddp", "tensor", "fsdp", "zbv"],
)
def test_bf16(options: dict[str, Any], tiny_recipe: Tiny) -> None:
    """Against fp32: bf16 has 8 bits, measured 0.01. Norms are summed in fp32, and all ranks sum the same first."""
    words = [*SHAPE, *BATCH, *UNTIED]
    many = on_ranks(tiny_recipe("crystal", *words, "precision.compute=bfloat16"), **options)
    recipe = tiny_recipe("crystal", *words)
    one = alone(recipe)
    for run in (many, one):
        run.import_state(started(recipe))
    batch = source_of(recipe).rows(0, 0, 8)
    (loss, gradients), (wanted_loss, wanted) = many.gradients(batch), one.gradients(batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-2)
    for name, gradient in wanted.items():
        if not name.endswith("k_proj.bias"):
            assert apart(gradients[name], gradient) < 0.05, name
    for found, expected in zip(many.train(source_of(recipe)), one.train(source_of(recipe)), strict=True):
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-2)
    many.close()


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(
    "options",
    [
        {"pipeline_parallel": 2, "parallel": "ddp"},
        pytest.param({"pipeline_parallel": 2, "activation_checkpointing": "selective"}, marks=pytest.mark.soak),
        pytest.param(INTERLEAVED, marks=pytest.mark.soak),
    ],
    ids=["ddp", "selective", "interleaved"],
)
def test_compiled(options: dict[str, Any], tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber", *SHAPE, *BATCH, *UNTIED, "batch.global_batch_size=4", "schedule.steps=1")
    many, one = on_ranks(recipe, compile=True, **options), alone(recipe)
    batch = source_of(recipe).rows(0, 0, 4)
    (loss, gradients), (wanted_loss, wanted) = many.gradients(batch), one.gradients(batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert max(apart(gradients[name], gradient) for name, gradient in wanted.items()) < 2e-5
    many.close()


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(
    "options",
    [
        {"pipeline_parallel": 2, "float8": "tensorwise", "float8_gather": True},
        pytest.param({**INTERLEAVED, "float8": "rowwise", "parallel": "ddp"}, marks=pytest.mark.soak),
    ],
    ids=["gathered", "interleaved_ddp"],
)
def test_float8(options: dict[str, Any], tiny_recipe: Tiny) -> None:
    """The numbers of the same ranks without a pipeline: scales are those of whole tensors, which no stage cuts."""
    pytest.importorskip("torchao", reason="torchao is not installed: pip install 'weftrain[float8]'")
    words = [*SIZES, *BATCH, *UNTIED, "precision.compute=float32", "schedule.steps=2"]
    recipe, found = tiny_recipe("amber", *words), []
    plain = {name: value for name, value in options.items() if not name.startswith("pipeline")}
    for layout in (options, plain):
        run = on_ranks(recipe, larger_weights(recipe), **layout)
        _, gradients = run.gradients(source_of(recipe).rows(0, 0, 8))
        found.append((gradients, [float(result.loss) for result in run.train(source_of(recipe))]))
        run.close()
    (gradients, losses), (wanted, wanted_losses) = found
    assert max(apart(gradients[name], gradient) for name, gradient in wanted.items()) < 1e-5
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    exact = alone(recipe, larger_weights(recipe)).gradients(source_of(recipe).rows(0, 0, 8))[1]
    assert max(apart(gradients[name], gradient) for name, gradient in exact.items()) > 1e-2  # eight bits were used


DPO = "{name: dpo, beta: 0.3, label_smoothing: 0.1, length_normalized: true, reference: base}"


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(
    "options",
    [{"pipeline_parallel": 2}, {"pipeline_parallel": 4}, {**INTERLEAVED, "parallel": "ddp"}, INTERLEAVED, ZBV],
    ids=["1f1b", "four_stages", "interleaved_ddp", "interleaved_fsdp", "zbv"],
)
def test_replayable_has_the_bits_of_one_process(options: dict[str, Any], tiny_recipe: Tiny) -> None:
    more = ["precision.numerics=replayable", "model.dropout=0.1", "schedule.steps=2"]
    recipe = tiny_recipe("crystal", *SHAPE, *BATCH, *UNTIED, *more)
    torch.set_num_threads(1)
    many, one = on_ranks(recipe, threads=1, **options), alone(recipe)
    for run in (many, one):
        run.import_state(started(recipe))
    for found, expected in zip(many.train(source_of(recipe)), one.train(source_of(recipe)), strict=True):
        assert (float(found.loss), float(found.grad_norm)) == (float(expected.loss), float(expected.grad_norm))
    a, b = many.export_state(), one.export_state()
    assert [name for name, tensor in b.tensors.items() if not torch.equal(a.tensors[name], tensor)] == []
    many.close()


class HeldOut:
    """5 rows, of which the last round is not full."""

    name, sequence_length, num_rows, dataset_id = "held", 12, 5, "x"

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self._ids, self._mask = rng.integers(0, 97, (5, 13)), rng.random((5, 12)) > 0.5

    def rows(self, first: int, count: int) -> Batch:
        return Batch(self._ids[first : first + count], self._mask[first : first + count])


def held_out_loss(run: Run) -> tuple[float, int]:
    found = run.evaluate(HeldOut())
    return found.loss, found.tokens


LORA = "tuning={lora: {rank: 4, alpha: 8, dropout: 0.0, targets: ['layers.*_proj']}}"
LOW = "tuning={freeze: [embedding, layers.0]}"  # nothing is differentiated below block 1, in a stage that has both


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(
    ("tuning", "options", "ties"),
    [
        (LORA, {"pipeline_parallel": 2}, "false"),
        (LOW, {"pipeline_parallel": 2, "parallel": "ddp"}, "true"),
        pytest.param(LORA, {**INTERLEAVED, "parallel": "ddp"}, "true", marks=pytest.mark.soak),
        pytest.param(
            LOW, {"pipeline_parallel": 2, "activation_checkpointing": "full"}, "false", marks=pytest.mark.soak
        ),
    ],
)
def test_frozen_parameters(tuning: str, options: dict[str, Any], ties: str, tiny_recipe: Tiny) -> None:
    """Gradients and steps are those of one process, and what is frozen keeps its bits."""
    words = [*SHAPE, *BATCH, *UNTIED, f"model.tie_embeddings={ties}", tuning, "schedule.steps=2"]
    recipe = tiny_recipe("amber", *words)
    many, one = on_ranks(recipe, **options), alone(recipe)
    initial = {name: tensor.clone() for name, tensor in one.export_state().tensors.items()}
    rows = source_of(recipe).rows(0, 0, 8)
    (loss, gradients), (wanted_loss, wanted) = many.gradients(rows), one.gradients(rows)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert gradients.keys() == wanted.keys() == {spec.name for spec in recipe.parameters if spec.trained}
    assert max(apart(gradients[name], gradient) for name, gradient in wanted.items()) < 2e-5
    for found, expected in zip(many.train(source_of(recipe)), one.train(source_of(recipe)), strict=True):
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)
        assert float(found.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-4)
    state, theirs = many.export_state().tensors, one.export_state().tensors
    assert state.keys() == theirs.keys()
    for spec in recipe.parameters:
        weight = state[name := f"weights/{spec.name}"]
        assert spec.trained or torch.equal(weight, initial[name]), name
        assert apart(weight, theirs[name]) < 1e-4, name
    many.close()


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize("tied", [False, True])
def test_a_run_goes_on_in_other_layouts(tied: bool, tiny_recipe: Tiny) -> None:
    """One process, then stages with FSDP, then four stages, then V-shaped ones, then one process; held-out loss too."""
    ties = ["model.tie_embeddings=true"] if tied else []
    recipe = tiny_recipe("amber", *SHAPE, *BATCH, *UNTIED, *ties, "schedule.steps=5")
    source, one = source_of(recipe), alone(recipe)
    one.import_state(started(recipe))
    steps = one.train(source)
    state = started(recipe)
    layouts: list[dict[str, Any]] = [
        {},
        {"pipeline_parallel": 2},
        {"pipeline_parallel": 4},
        INTERLEAVED if tied else ZBV,
        {},
    ]
    for number, options in enumerate(layouts):
        wanted = next(steps)
        run = on_ranks(recipe, **options) if options else alone(recipe)
        run.import_state(state)
        found = next(run.train(source))
        assert float(found.loss) == pytest.approx(float(wanted.loss), rel=1e-5)
        loss, tokens = held_out_loss(run)
        wanted_loss, wanted_tokens = held_out_loss(one)
        assert (tokens, loss) == (wanted_tokens, pytest.approx(wanted_loss, rel=1e-5)), options
        exported = run.export_state()
        state = State(exported.step, exported.optimizer_updates, dict(exported.tensors.items()))
        run.close()
        for name, tensor in one.export_state().tensors.items():
            assert apart(state.tensors[name], tensor) < 1e-4, (number, name)


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(
    "options",
    [{"pipeline_parallel": 2, "tensor_parallel": 2}, {**INTERLEAVED, "parallel": "ddp"}],
    ids=["tensor", "ddp"],
)
def test_pairs(options: dict[str, Any], tiny_recipe: Tiny) -> None:
    """Objective dpo: the head's table of measures is on the last stage alone."""
    batch = ("batch.micro_batch_size=2", "batch.global_batch_size=8", "schedule.steps=2")
    recipe = tiny_recipe("amber", "name=pairs", *SHAPE, *batch, *UNTIED, f"objective={DPO}")
    many, one = on_ranks(recipe, **options), alone(recipe)
    for run in (many, one):
        run.import_state(started(recipe))
    rows = source_of(recipe).rows(0, 0, 8)
    (loss, gradients), (wanted_loss, wanted) = many.gradients(rows), one.gradients(rows)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert max(apart(gradients[name], gradient) for name, gradient in wanted.items()) < 2e-5
    for found, expected in zip(many.train(source_of(recipe)), one.train(source_of(recipe)), strict=True):
        measures = {name: float(value) for name, value in expected.measures.items()}
        assert {name: float(value) for name, value in found.measures.items()} == pytest.approx(measures, rel=1e-4)
    many.close()


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
def test_muon_and_a_step_that_is_skipped(tiny_recipe: Tiny) -> None:
    """Each stage's matrices are computed by its ranks; a batch without any bearing token changes nothing anywhere."""
    muon = ("optimizer.name=muon", "optimizer.muon={compute: float32}", "optimizer.non_finite=skip")
    recipe = tiny_recipe("amber", "name=empty", *SHAPE, *BATCH, *UNTIED, *muon, "batch.global_batch_size=4")
    many, one, weights = on_ranks(recipe, pipeline_parallel=2), alone(recipe), larger_weights(recipe)
    for run in (many, one):
        run.import_state(state_with(weights, recipe=recipe))
    seen = [
        (found.skipped, expected.skipped)
        for found, expected in zip(many.train(source_of(recipe)), one.train(source_of(recipe)), strict=True)
    ]
    assert seen == [(False, False), (True, True), (False, False)]
    mine, wanted = many.export_state().tensors, one.export_state().tensors
    for spec in recipe.parameters:
        moved = (tensors[f"weights/{spec.name}"] - weights[spec.name] for tensors in (mine, wanted))
        assert apart(*moved) < (2e-3 if spec.optimizer == "muon" else 2e-4), spec.name
    many.close()


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
def test_the_bubble_is_measured_on_all_ranks(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber", *SHAPE, *BATCH, *UNTIED)
    run = on_ranks(recipe, time_phases=True, pipeline_parallel=4)
    phases = [result.phases_ms for result in run.train(source_of(recipe))]
    stats = run.stats()
    waited, computed = (
        sum(one[name] for one in phases[1:] if one is not None for name in names)
        for names in (("pipeline",), ("forward", "backward"))
    )
    assert 0 < stats["pipeline_bubble_share"] <= stats["pipeline_bubble_max_share"] < 1
    assert waited / (waited + computed) <= stats["pipeline_bubble_max_share"] + 1e-9
    assert stats["pipeline_bubble_predicted_share"] == 3 / (8 + 3)
    run.close()


def test_the_first_step_does_not_count() -> None:
    assert waiting_share([(100.0, 1.0), (1.0, 3.0), (2.0, 6.0)]) == 0.25
    assert waiting_share([(100.0, 1.0)]) is None
