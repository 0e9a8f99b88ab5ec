"""The open families over four ranks: gradients, loss and norm are those of the local backend in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from families import FAMILIES
from faults import FAULTS, planted
from model_cases import large_weights
from ranks import LAYOUTS, alone, apart, larger_weights, on_ranks, source_of

from weftrain.core.backend import Run
from weftrain.core.config import Recipe
from weftrain.core.order.batch import Batch

Tiny = Callable[..., Recipe]
# One that has the most to go wrong, on two tensor and two context ranks: one key head for four ranks, a norm over all
# heads of q and k, norms after their branch, windows, yarn on some layers.
OLMO3_MULTI_QUERY = FAMILIES["olmo3"].ours.model_copy(update={"num_kv_heads": 1, "num_layers": 2})
MODELS = {"olmo3_multi_query": OLMO3_MULTI_QUERY} | {name: family.ours for name, family in FAMILIES.items()}
SPLIT = ("tensor_2", "tensor_4", "context_2", "context_4", "tensor_2_context_2")
OTHERS = ("fsdp", "ddp", "hsdp_tensor_2", "selective", "full_tensor_2", "offload")  # one or two for each family
CASES = [("olmo3_multi_query", layout) for layout in SPLIT]
CASES += [(family, layout) for family in FAMILIES for layout in SPLIT[:4]]
CASES += [(family, OTHERS[(number + more) % 6]) for number, family in enumerate(FAMILIES) for more in (0, 3)]


# `make test` takes one case and `make prove` every seventh, which meet each family or layout; `make soak` takes the rest
def _mark(number: int) -> Any:
    if number == 4:
        return ()
    return pytest.mark.prove if number % 7 == 3 else (pytest.mark.prove, pytest.mark.soak)


def recipe_of(family: str, tiny_recipe: Tiny, *overrides: str) -> Recipe:
    base = tiny_recipe(
        "amber", "batch.micro_batch_size=2", "batch.global_batch_size=8", "schedule.steps=2", *overrides
    ).model_dump()
    base["data"]["sequence_length"] = 12
    return Recipe.model_validate({**base, "model": MODELS[family].model_dump()})


def both(recipe: Recipe, **options: Any) -> tuple[Run, Run]:
    weights = large_weights(recipe.model)
    return on_ranks(recipe, weights, **options), alone(recipe, weights)


def documents() -> Batch:
    """The second is longer than the windows, and begins within the first rank's tokens."""
    rng = np.random.default_rng(0)
    start = np.where(np.arange(12) < 2, 0, 2).astype(np.int32)[None].repeat(8, 0)
    return Batch(rng.integers(0, 97, (8, 13)), loss_mask=rng.random((8, 12)) > 0.3, document_start=start)


@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(
    ("family", "layout"),
    [pytest.param(*case, marks=_mark(number)) for number, case in enumerate(CASES)],
)
def test_a_family_over_ranks_equals_one_process(family: str, layout: str, tiny_recipe: Tiny) -> None:
    recipe = recipe_of(family, tiny_recipe)
    many, one = both(recipe, **LAYOUTS[layout])
    (loss, gradients), (wanted_loss, wanted) = many.gradients(documents()), one.gradients(documents())
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    off = {name: apart(gradients[name], wanted[name]) for name in wanted}
    # measured up to 3e-5 with weights of this size; what a fault does is in tenths
    assert {name: value for name, value in off.items() if value > 1e-4} == {}
    for found, expected in zip(many.train(source_of(recipe)), one.train(source_of(recipe)), strict=True):
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)
        assert float(found.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-4)
    many.close()


# a fault -> the model and the layout in which it would show
SHOWN_BY = {
    "k_not_summed": ("llama31", "tensor_4"),
    "head_order": ("llama31", "tensor_4"),
    "statistics_not_summed": ("olmo3", "tensor_2"),
    "own_statistics": ("olmo3", "tensor_2"),
    "norm_weights": ("olmo3", "tensor_2"),
    "k_norm_not_summed": ("qwen3", "tensor_2"),
    "norm_after_not_summed": ("olmo3", "tensor_2"),
    "dealt_in_turn": ("llama31", "context_4"),
    "window_forgotten": ("mistral", "context_2"),
    "positions": ("smollm3", "context_2"),
}


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows(fault: str, tiny_recipe: Tiny) -> None:
    """In all ranks alike, so that none waits for another: in some gradient, by a hundred times what rounding does."""
    family, layout = SHOWN_BY[fault]
    with planted():
        many, one = both(recipe_of(family, tiny_recipe, f"name={fault}"), **LAYOUTS[layout])
        (_, gradients), (_, wanted) = many.gradients(documents()), one.gradients(documents())
        many.close()
    assert max(apart(gradients[name], wanted[name]) for name in wanted) > 1e-2


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(("family", "layout"), [("olmo3", "tensor_4"), ("llama_multi_query", "context_4")])
def test_bf16(family: str, layout: str, tiny_recipe: Tiny) -> None:
    recipe = recipe_of(family, tiny_recipe, "precision.compute=bfloat16")
    weights = larger_weights(recipe)
    many, one = on_ranks(recipe, weights, **LAYOUTS[layout]), alone(recipe_of(family, tiny_recipe), weights)
    (loss, gradients), (wanted_loss, wanted) = many.gradients(documents()), one.gradients(documents())
    assert loss == pytest.approx(wanted_loss, rel=1e-2)
    assert max(apart(gradients[name], wanted[name]) for name in wanted) < 0.05
    many.close()


@pytest.mark.soak  # of the layouts, test_layouts.py compiles one in CI
@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(
    ("family", "layout"),
    [("qwen3", "fsdp"), ("olmo3_multi_query", "tensor_2_context_2")],
)
def test_compiled(family: str, layout: str, tiny_recipe: Tiny) -> None:
    many, one = both(recipe_of(family, tiny_recipe), compile=True, **LAYOUTS[layout])
    (loss, gradients), (wanted_loss, wanted) = many.gradients(documents()), one.gradients(documents())
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert max(apart(gradients[name], wanted[name]) for name in wanted) < 1e-4
    many.close()


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
def test_float8_on_ranks_that_share_a_head(tiny_recipe: Tiny) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed: pip install 'weftrain[float8]'")
    recipe = recipe_of("qwen3", tiny_recipe, "precision.compute=bfloat16")
    found = []
    for float8 in (True, False):
        run = on_ranks(recipe, larger_weights(recipe), float8=float8, tensor_parallel=4)
        found.append(run.gradients(documents())[1])
        run.close()
    off = {name: apart(found[0][name], found[1][name]) for name in found[0] if "k_proj" in name or "q_proj" in name}
    assert min(off.values()) > 0.0125, off
    assert max(off.values()) < 0.5, off
