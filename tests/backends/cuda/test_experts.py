"""Mixtures of experts over ranks: gradients, losses of routers, biases and metrics are those of one process, however the
model lies over the ranks, and the same bits where that is promised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from float64_reference import state_with
from ranks import EXPERT_LAYOUTS, LAYOUTS, PIPELINED_EXPERTS, alone, apart, larger_weights, on_ranks, source_of

from weftrain.backends.cuda.degrees import degrees
from weftrain.backends.cuda.needs import needs_of_ranks
from weftrain.backends.cuda.options import CudaOptions
from weftrain.core.backend import State
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.experts_section import ROUTER_MEASURES
from weftrain.core.parameters import PLANES

Tiny = Callable[..., Recipe]
MORE = ("model.experts.bias_update=0.01", "model.experts.aux_loss=0.5", "model.experts.z_loss=0.1")
LAYOUTS_OF_ROWS = ("ddp", "fsdp", "hsdp", "offload")
SPLIT_ROWS = ("tensor_2", "context_4", "tensor_2_context_2", "hsdp_tensor_2", "full_tensor_2")
SOAKED = (
    "tensor_2_context_2",
    "hsdp_tensor_2",
    "full_tensor_2",
    "tensor_2_expert_4",
    "context_2_expert_2",
    "pipeline_2",
)
CASES = [
    pytest.param(layout, marks=pytest.mark.soak if layout in SOAKED else ())
    for layout in (*LAYOUTS_OF_ROWS, *SPLIT_ROWS, *EXPERT_LAYOUTS, *PIPELINED_EXPERTS)
]
# so that all ranks hold as much
EVEN = ("model.vocab_size=96", "model.intermediate_size=72", "data.sequence_length=12")
BATCH = ("batch.micro_batch_size=1", "batch.global_batch_size=8", "schedule.steps=2")


@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize("layout", CASES)
def test_the_same_as_one_process(layout: str, tiny_recipe: Tiny) -> None:
    uneven = ["model.experts.count=6"] if layout in ("fsdp", "expert_2") else []  # cut by their second dimension
    rows = ["batch.micro_batch_size=2"] if "tensor" in layout or "context" in layout else []
    # of two stages with a layer each the first, which is dense, has no experts
    layers = ["model.num_layers=4"] if "pipeline" in layout and layout != "pipeline_2_expert_2" else []
    recipe = tiny_recipe("moe", *MORE, *BATCH, *EVEN, *uneven, *rows, *layers)
    many, one = on_ranks(recipe, **(LAYOUTS | EXPERT_LAYOUTS | PIPELINED_EXPERTS)[layout]), alone(recipe)
    for run in (many, one):
        run.import_state(state_with(larger_weights(recipe), recipe=recipe))
    batch = source_of(recipe).rows(0, 0, 8)
    (loss, gradients), (wanted_loss, wanted) = many.gradients(batch), one.gradients(batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert apart(gradients[name], gradient) < 2e-5, name
    for found, expected in zip(many.train(source_of(recipe)), one.train(source_of(recipe)), strict=True):
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)
        assert set(ROUTER_MEASURES) <= found.measures.keys()
        for name in ROUTER_MEASURES:
            assert float(found.measures[name]) == pytest.approx(float(expected.measures[name]), abs=2e-5), name
    mine, theirs = many.export_state().tensors, one.export_state().tensors
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name.endswith("router.bias"):
            assert torch.equal(mine[name], tensor), name
        elif name.startswith("weights/"):
            assert apart(mine[name], tensor) < 1e-4, name
    held = {plane: sum(one.nbytes for one in many._planes[plane].values()) for plane in PLANES}
    options, shape = many._options, many._degrees
    asked = many._recipe, options.model_copy(update={"cpu_offload": False}), shape, "cpu"
    needed = needs_of_ranks(*asked)[0].memory_bytes
    assert (needed["weights, fp32"], needed["optimizer"]) == (held["weights"], held["exp_avg"] + held["exp_avg_sq"])
    many.close()


@pytest.mark.usefixtures("four_ranks")
def test_replayable_bits_are_those_of_one_process(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("moe", *MORE, *BATCH, "precision.numerics=replayable")
    one = alone(recipe)
    wanted = list(one.train(source_of(recipe)))
    state = one.export_state().tensors
    for layout in (LAYOUTS["ddp"], LAYOUTS["fsdp"], PIPELINED_EXPERTS["pipeline_2"]):
        many = on_ranks(recipe, **layout)
        for found, expected in zip(many.train(source_of(recipe)), wanted, strict=True):
            assert torch.equal(found.loss, expected.loss)
            assert torch.equal(found.grad_norm, expected.grad_norm)
            assert all(torch.equal(found.measures[name], expected.measures[name]) for name in ROUTER_MEASURES)
        mine = many.export_state().tensors
        assert all(torch.equal(mine[name], tensor) for name, tensor in state.items())
        many.close()


@pytest.mark.usefixtures("four_ranks")
def test_a_run_goes_on_with_experts_divided_otherwise(tiny_recipe: Tiny) -> None:
    """One process, then 2 stages with 2 ranks for the experts, then 4 with the tokens of a row divided too, and back."""
    recipe = tiny_recipe("moe", *MORE, *BATCH, *EVEN, "schedule.steps=4")
    straight = alone(recipe)
    losses = [float(result.loss) for result in straight.train(source_of(recipe))]
    state, found = alone(recipe).export_state(), []
    for layout in (None, "pipeline_2_expert_2", "tensor_2_expert_4", None):
        run = alone(recipe) if layout is None else on_ranks(recipe, **(EXPERT_LAYOUTS | PIPELINED_EXPERTS)[layout])
        run.import_state(state)
        found.append(float(next(run.train(source_of(recipe))).loss))
        tensors = run.export_state()
        state = State(tensors.step, tensors.optimizer_updates, dict(tensors.tensors.items()))
        run.close()
    assert found == pytest.approx(losses, rel=1e-5)
    for name, tensor in straight.export_state().tensors.items():
        if name.startswith("weights/"):
            assert apart(state.tensors[name], tensor) < 1e-4, name


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
def test_bf16(tiny_recipe: Tiny) -> None:
    """The rows that ranks exchange are bf16; the router is fp32, and picks the same experts for nearly all tokens."""
    recipe = tiny_recipe("moe", *MORE, *BATCH, "precision.compute=bfloat16")
    many, one = on_ranks(recipe, **EXPERT_LAYOUTS["expert_2"]), alone(recipe)
    for run in (many, one):
        run.import_state(state_with(larger_weights(recipe), recipe=recipe))
    batch = source_of(recipe).rows(0, 0, 8)
    (loss, gradients), (wanted_loss, wanted) = many.gradients(batch), one.gradients(batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-3)
    assert all(apart(gradients[name], gradient) < 0.03 for name, gradient in wanted.items())
    many.close()


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({}, ["model.experts.count=6"], "count 6 is no multiple of backend.options.expert_parallel 4: set backend"),
        (
            {"parallel": "hsdp", "shard_group": 2},
            [],
            "2 ranks that share one copy of the model are no multiple of backend.options.expert_parallel 4: set",
        ),
        ({}, ["model.experts=null"], "expert_parallel is 4, and the recipe has no model.experts: set"),
        (
            {"expert_parallel": 2},
            ["batch.replicas=8", "model.experts.count=6", "model.experts.intermediate_size=22"],
            "2 leaves 3 of 6 experts to 4 ranks, and neither they nor model.experts.intermediate_size 22, model.hidden",
        ),
        ({}, ["precision.numerics=replayable"], "expert_parallel is 4: a product or a sum over tokens that is cut"),
    ],
)
def test_experts_that_ranks_cannot_share(
    changes: dict[str, Any], more: list[str], words: str, tiny_recipe: Tiny
) -> None:
    recipe = tiny_recipe("moe", "batch.global_batch_size=8", "batch.micro_batch_size=1", "batch.replicas=4", *more)
    with pytest.raises(BackendError, match=words):
        degrees(CudaOptions.model_validate({"expert_parallel": 4, **changes}), recipe, recipe.batch.replicas, 8)


def test_experts_are_not_divided_with_ddp() -> None:
    with pytest.raises(ValueError, match="expert_parallel needs parallel=fsdp or hsdp"):
        CudaOptions(parallel="ddp", expert_parallel=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"float8": True}, "backend.options.float8 is tensorwise: the products of experts have no float8: set false"),
        ({"compile": True}, "backend.options.compile is true: experts, which are not compiled, were not tried"),
    ],
)
def test_what_experts_cannot_have(changes: dict[str, Any], words: str, tiny_recipe: Tiny) -> None:
    with pytest.raises(BackendError, match=r"model\.experts is given and " + words):
        degrees(CudaOptions.model_validate(changes), tiny_recipe("moe"), 4, 4)


@pytest.mark.parametrize("name", ["tensor_parallel", "context_parallel"])
def test_parts_of_rows_are_not_replayable(name: str, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("moe", "precision.numerics=replayable")
    with pytest.raises(BackendError, match=f"replayable and backend.options.{name} is 2: .* set {name}=1, or prec"):
        degrees(CudaOptions.model_validate({name: 2}), recipe, 4, 4)
