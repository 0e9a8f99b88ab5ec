"""The same suite over every backend that is found: gradients tensor by tensor, then losses, state, resume and the NaN
policy.

The reference is independent of every backend: float64_reference.py, and torch's AdamW.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conformance_cases import FOUND, TRAINERS, Tiny, of, prepare, same_state, weights_of
from float64_reference import initial, reference, relative, state_with
from ranks import source_of

from weftrain.backends.common.registry import get_backend
from weftrain.core.backend import State
from weftrain.core.config import Recipe
from weftrain.core.dropout import row_keys
from weftrain.core.errors import BackendError, CheckpointError, NonFiniteError
from weftrain.core.optim import group_learning_rates, parameter_groups
from weftrain.core.order.batch import Batch


def test_the_suite_covers_every_backend_but_the_one_in_another_process() -> None:
    """cerebras answers to the same questions in tests/backends/cerebras/test_vendor.py, where its environment is made
    first.
    """
    assert "local" in TRAINERS
    assert {name for name, backend in FOUND.items() if not backend.returns_gradients} == {"null", "cerebras"}


# fp32: measured 3e-7 to 3e-6 here. bf16: 8 bits of mantissa, measured 0.004 to 0.03.
@pytest.mark.parametrize(("compute", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.06)])
@pytest.mark.parametrize("family", ["crystal", "llama", "qwen"])
def test_gradients(name: str, family: str, compute: str, tolerance: float, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe(family, f"precision.compute={compute}")
    run = prepare(name, recipe)
    weights = initial(recipe, 2.0)
    run.import_state(state_with(weights))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 97, (4, 14))
    mask = rng.random((4, 13)) > 0.2
    start = np.where(np.arange(13) < 6, 0, 6).astype(np.int32)[None].repeat(4, 0)
    for batch in (Batch(ids), Batch(ids, loss_mask=mask), Batch(ids, document_start=start)):
        loss, gradients = run.gradients(batch)
        wanted_loss, wanted = reference(recipe, weights, batch)
        assert gradients.keys() == wanted.keys()
        errors = {key: relative(gradients[key], wanted[key]) for key in wanted if not key.endswith("k_proj.bias")}
        assert max(errors.values()) < tolerance, max(errors.items(), key=lambda item: item[1])
        assert loss == pytest.approx(wanted_loss, rel=tolerance)
        # A key's bias shifts all scores of a query alike, so its gradient is zero but for rotation: bound it
        # absolutely.
        for key in wanted.keys() - errors.keys():
            scale = wanted[key.replace("k_proj.bias", "q_proj.bias")].norm()
            assert (gradients[key] - wanted[key]).norm() < tolerance * max(scale, wanted[key].norm())


@pytest.mark.parametrize("family", ["crystal", "amber"])
def test_dropout_drops_what_the_core_says_or_is_refused(name: str, family: str, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe(family, "model.dropout=0.2", "batch.micro_batch_size=2")
    if "dropout" in FOUND[of(name)].unsupported:
        with pytest.raises(BackendError, match=r"model\.dropout"):
            prepare(name, recipe)
        return
    run, weights = prepare(name, recipe, start=3), initial(recipe, 2.0)
    run.import_state(state_with(weights, step=3))
    batch = Batch(np.random.default_rng(0).integers(0, 97, (4, 14)))
    loss, gradients = run.gradients(batch)
    wanted_loss, wanted = reference(recipe, weights, batch, row_keys(recipe.seed, 3, 0, 4, 4, torch.device("cpu")))
    assert loss == pytest.approx(wanted_loss, rel=2e-5)
    errors = {key: relative(gradients[key], wanted[key]) for key in wanted if not key.endswith("k_proj.bias")}
    assert max(errors.values()) < 2e-5, max(errors.items(), key=lambda item: item[1])
    assert reference(recipe, weights, batch)[0] != pytest.approx(wanted_loss, rel=1e-3)


def test_a_gradient_off_by_one_percent_is_seen(name: str, tiny_recipe: Tiny) -> None:
    """The comparison has teeth: the tolerance of the fp32 test lies far below a gradient scaled by 1.01."""
    recipe = tiny_recipe()
    run = prepare(name, recipe)
    batch = source_of(recipe).rows(0, 0, 4)
    _, gradients = run.gradients(batch)
    _, wanted = reference(recipe, weights_of(run.export_state()), batch)
    key = "layers.1.ffn.down_proj.weight"
    assert relative(gradients[key] * 1.01, wanted[key]) > 100 * 2e-5


def test_gradients_leave_no_trace(name: str, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe()
    run, untouched = prepare(name, recipe), prepare(name, recipe)
    run.gradients(source_of(recipe).rows(3, 0, 4))
    for one in (run, untouched):
        list(one.train(source_of(recipe)))
    assert same_state(run.export_state(), untouched.export_state())


@pytest.mark.parametrize(("normalizer", "micro"), [("bearing_tokens", 1), ("bearing_tokens", 2), ("all_positions", 2)])
def test_accumulation_of_masked_rows_equals_the_large_batch(
    name: str, normalizer: str, micro: int, tiny_recipe: Tiny
) -> None:
    """Rows with 13, 3, 0 and 5 bearing tokens, one a micro-batch or rank: the large batch's gradient, and the mean over
    bearing tokens.
    """
    recipe = tiny_recipe(
        "amber", "name=masked", f"objective.normalizer={normalizer}", f"batch.micro_batch_size={micro}"
    )
    source, run, weights = source_of(recipe), prepare(name, recipe, steps=1), initial(recipe, 2.0)
    run.import_state(state_with(weights))
    batch = source.rows(0, 0, 4)
    wanted_loss, wanted = reference(recipe, weights, batch)
    loss, gradients = run.gradients(batch)
    assert loss == pytest.approx(wanted_loss, rel=2e-5)
    assert max(relative(gradients[key], wanted[key]) for key in wanted) < 2e-5
    (result,) = run.train(source)
    assert (result.tokens, result.bearing_tokens) == (52, 21)
    assert float(result.loss) == pytest.approx(wanted_loss, rel=2e-5)
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm().item()
    assert float(result.grad_norm) == pytest.approx(norm, rel=2e-5)


def test_where_no_row_is_masked_the_normalizers_give_the_same_bits(tiny_recipe: Tiny) -> None:
    states = []
    for normalizer in ("bearing_tokens", "all_positions"):
        recipe = tiny_recipe(
            "crystal", f"objective.normalizer={normalizer}", "batch.micro_batch_size=2", "schedule.steps=2"
        )
        run = prepare("local", recipe)
        losses = [float(result.loss) for result in run.train(source_of(recipe))]
        states.append((losses, run.export_state()))
    assert states[0][0] == states[1][0]
    assert same_state(states[0][1], states[1][1])


@pytest.mark.parametrize("normalizer", ["bearing_tokens", "all_positions"])
def test_a_batch_in_which_nothing_bears_a_loss_is_never_a_step(name: str, normalizer: str, tiny_recipe: Tiny) -> None:
    """Halt: an error that names step and samples. Skip: a skipped step. In neither case a loss of 0."""
    recipe = tiny_recipe(
        "crystal", "name=empty", f"objective.normalizer={normalizer}", "schedule.steps=3", "optimizer.non_finite=skip"
    )
    skipping = prepare(name, recipe)
    results = list(skipping.train(source_of(recipe)))
    assert [result.skipped for result in results] == [False, True, False]
    assert [result.bearing_tokens for result in results] == [21, 0, 22]
    assert np.isnan(float(results[1].loss))
    assert skipping.export_state().optimizer_updates == 2
    if normalizer == "all_positions":
        return  # how an error comes of it is alike
    recipe = tiny_recipe("crystal", "name=empty", f"objective.normalizer={normalizer}", "schedule.steps=3")
    with pytest.raises(
        NonFiniteError, match=r"step 1: no token of the global batch bears a loss.*samples: synthetic:4, .*synthetic:7;"
    ):
        list(prepare(name, recipe).train(source_of(recipe)))


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_losses_and_weights_follow_torch_adamw(name: str, family: str, tiny_recipe: Tiny) -> None:
    """Six steps against float64 autograd, torch's clip and torch's AdamW."""
    recipe = tiny_recipe(family)
    source, run = source_of(recipe), prepare(name, recipe)
    weights = {key: tensor.double() for key, tensor in weights_of(run.export_state()).items()}
    groups = parameter_groups(recipe.model, recipe.optimizer)
    parameters = {key: torch.nn.Parameter(tensor) for key, tensor in weights.items()}
    adamw = torch.optim.AdamW(
        [
            {"params": [parameters[key] for key in group.parameters], "weight_decay": group.weight_decay}
            for group in groups
        ],
        betas=(recipe.optimizer.beta1, recipe.optimizer.beta2),
        eps=recipe.optimizer.eps,
    )
    for result in run.train(source):
        loss, gradients = reference(
            recipe, {key: value.detach() for key, value in parameters.items()}, source.rows(result.step, 0, 4)
        )
        for key, parameter in parameters.items():
            parameter.grad = gradients[key]
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), recipe.optimizer.clip_norm or 0)
        rates = group_learning_rates(groups, recipe.schedule, result.step)
        for group, torch_group in zip(groups, adamw.param_groups, strict=True):
            torch_group["lr"] = rates[group.name]
        adamw.step()
        assert float(result.loss) == pytest.approx(loss, rel=1e-5)
        assert float(result.grad_norm) == pytest.approx(norm.item(), rel=1e-4)
        assert result.learning_rates == rates
        assert result.tokens == 4 * 13
    for key, tensor in weights_of(run.export_state()).items():
        assert relative(tensor, parameters[key].detach()) < 2e-5, key


def test_state_moves_between_backends(name: str, tiny_recipe: Tiny) -> None:
    """To and from every other backend, and from one run to another of itself."""
    recipe = tiny_recipe()
    # In a world of several ranks a backend by itself would be prepared on one of them: its counterparts are the others.
    others = [other for other in TRAINERS if other != of(name)]
    own = trained(name, recipe)
    takers = {other: prepare(other, recipe, start=3) for other in (name, *others)}
    for giver, state in [(name, own), *((other, trained(other, recipe)) for other in others)]:
        assert (state.step, state.optimizer_updates) == (3, 3)
        for taker in takers if giver == name else [name]:
            takers[taker].import_state(state)
            assert same_state(takers[taker].export_state(), state), (giver, taker)


def trained(name: str, recipe: Recipe) -> State:
    run = prepare(name, recipe, steps=3)
    list(run.train(source_of(recipe)))
    return run.export_state()


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_resume_gives_the_same_bits(name: str, compute: str, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("crystal", f"precision.compute={compute}", "batch.micro_batch_size=2")
    straight = prepare(name, recipe)
    losses = [float(result.loss) for result in straight.train(source_of(recipe))]
    first = prepare(name, recipe, steps=2)
    losses_again = [float(result.loss) for result in first.train(source_of(recipe))]
    second = prepare(name, recipe, start=2)
    second.import_state(first.export_state())
    losses_again += [float(result.loss) for result in second.train(source_of(recipe))]
    assert losses_again == losses
    assert same_state(second.export_state(), straight.export_state())


def test_bits_do_not_depend_on_what_ran_before_in_the_process(name: str, tiny_recipe: Tiny) -> None:
    """Code that is generated for a first size must not compute another model differently afterwards."""
    states = []
    for _ in range(2):
        recipe = tiny_recipe("crystal", "schedule.steps=3", "precision.compute=bfloat16")
        run = prepare(name, recipe)
        list(run.train(source_of(recipe)))
        states.append(run.export_state())
        for width in (96, 144, 240):
            other = tiny_recipe(
                "amber", f"model.hidden_size={width}", f"model.vocab_size={width + 5}", "schedule.steps=2"
            )
            list(prepare(name, other).train(source_of(other)))
    assert same_state(*states)


def test_exported_state_is_a_copy(name: str, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe()
    run = prepare(name, recipe)
    steps = run.train(source_of(recipe))
    next(steps), next(steps)
    state = run.export_state()
    before = {key: tensor.clone() for key, tensor in state.tensors.items()}
    list(steps)
    assert all(torch.equal(before[key], tensor) for key, tensor in state.tensors.items())
    assert not same_state(run.export_state(), state)


def test_state_that_does_not_fit_is_refused_whole(name: str, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe()
    run = prepare(name, recipe)
    before = run.export_state()
    broken: list[dict[str, Any]] = [dict(before.tensors) for _ in range(4)]
    del broken[0]["exp_avg/final_norm.weight"]
    broken[1]["weights/extra"] = torch.zeros(1)
    broken[2]["weights/final_norm.bias"] = torch.zeros(3)
    broken[3]["weights/final_norm.bias"] = torch.zeros(48, dtype=torch.bfloat16)
    for tensors in broken:
        with pytest.raises(CheckpointError):
            run.import_state(State(1, 1, tensors))
        assert same_state(run.export_state(), before)


def test_non_finite_halts_and_changes_nothing(name: str, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe()
    run = prepare(name, recipe)
    weights = initial(recipe)
    weights["layers.1.ffn.down_proj.weight"][0, 0] = torch.inf
    run.import_state(state_with(weights, step=1))
    before = run.export_state()
    with pytest.raises(NonFiniteError, match=r"step 1: .*samples: synthetic:4, synthetic:5, synthetic:6, synthetic:7;"):
        list(run.train(source_of(recipe)))
    assert same_state(run.export_state(), before)


def test_non_finite_skips_where_the_recipe_says_so(name: str, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("crystal", "optimizer.non_finite=skip")
    run = prepare(name, recipe)
    weights = initial(recipe)
    # only batches that hold id 11 are poisoned (the tied head sees it: all are)
    weights["embedding.weight"][11] = torch.nan
    run.import_state(state_with(weights))
    before = run.export_state()
    results = list(run.train(source_of(recipe)))
    assert [result.skipped for result in results] == [True] * 6
    after = run.export_state()
    assert (after.step, after.optimizer_updates) == (6, 0)
    assert all(
        torch.equal(after.tensors[key], tensor) or torch.isnan(tensor).any() for key, tensor in before.tensors.items()
    )


def test_clip(name: str, tiny_recipe: Tiny) -> None:
    """With clipping far below the norm the moments hold the clipped gradient: their norm is (1 - beta1) x clip_norm."""
    recipe = tiny_recipe("crystal", "optimizer.clip_norm=0.01", "schedule.steps=1")
    run = prepare(name, recipe)
    list(run.train(source_of(recipe)))
    moments = [tensor for key, tensor in run.export_state().tensors.items() if key.startswith("exp_avg/")]
    assert torch.stack([moment.norm() for moment in moments]).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_evaluation_is_the_mean_over_tokens(name: str, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber", "batch.micro_batch_size=2")
    run = prepare(name, recipe)
    ids = np.random.default_rng(1).integers(0, 97, (5, 14))  # 5 rows in micro-batches of 2: the last one is smaller
    mask = np.random.default_rng(2).random((5, 13)) > 0.5

    class HeldOut:
        name, sequence_length, num_rows, dataset_id = "held", 13, 5, "x"

        def rows(self, first: int, count: int) -> Batch:
            return Batch(ids[first : first + count], mask[first : first + count])

    found = run.evaluate(HeldOut())
    loss, _ = reference(recipe, weights_of(run.export_state()), Batch(ids, mask))
    assert found.tokens == mask.sum()
    assert found.loss == pytest.approx(loss, rel=1e-5)


def test_protocol_of_null(tiny_recipe: Tiny) -> None:
    test_protocol("null", tiny_recipe)


def test_protocol(name: str, tiny_recipe: Tiny) -> None:
    """Steps, plan, state in and out, statistics with units, a fingerprint that JSON can hold."""
    import json

    recipe = tiny_recipe()
    run = prepare(name, recipe)
    results = list(run.train(source_of(recipe)))
    assert [result.step for result in results] == list(range(6))
    state = run.export_state()
    assert state.step == 6
    other = prepare(name, recipe)
    other.import_state(state)
    assert same_state(other.export_state(), state)
    assert json.loads(json.dumps(run.fingerprint().as_json()))["backend"] == of(name)
    assert all(
        key.rpartition("_")[2] in ("bytes", "ms", "share") or key.endswith("_memory_bytes") for key in run.stats()
    )
    run.close()


def test_backend_by_a_wrong_name() -> None:
    with pytest.raises(BackendError, match="did you mean 'local'"):
        get_backend("locale")
