"""Model FLOPs of a step against counts by hand, and against what torch counts of the products that are computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ranks import source_of
from torch.utils.flop_counter import FlopCounterMode

from weftrain.backends.common.registry import get_backend
from weftrain.core.backend import Job, Plan
from weftrain.core.config import Recipe
from weftrain.core.flops import TokenFlops, training_flops
from weftrain.core.parameters import flops_per_token
from weftrain.core.recipe_file import builtin_recipes, load_recipe

Tiny = Callable[..., Recipe]
LORA = "tuning.lora={rank: 3, alpha: 6, targets: ['layers.1.attention.v_proj']}"
# amber at width 48, inner width 70, two layers, 97 ids, rows of 13
C, INNER, V = 48, 70, 97
BLOCK, ATTENTION, HEAD = 4 * C * C + 3 * C * INNER, 2 * C * 13, V * C


@pytest.mark.parametrize("name", builtin_recipes())
def test_a_recipe_that_trains_everything_has_the_formula_of_palm(name: str) -> None:
    recipe = load_recipe(name).recipe
    found, all_trained = training_flops(recipe), flops_per_token(recipe.model, recipe.data.sequence_length)
    assert found.total == all_trained if all(spec.trained for spec in recipe.parameters) else found.total < all_trained


def test_by_hand(tiny_recipe: Tiny) -> None:
    def found(*words: str) -> TokenFlops:
        return training_flops(tiny_recipe("amber", *words))

    forward = 2 * (2 * BLOCK + HEAD) + 2 * 2 * ATTENTION
    # all: each matrix thrice, attention's backward twice its forward
    backward = 2 * (2 * BLOCK + HEAD) + 2 * 2 * 2 * ATTENTION
    assert found() == (forward, backward, 2 * (2 * BLOCK + HEAD), forward - 2 * HEAD)
    # nothing is differentiated below block 1, whose norm is trained; the head has no gradient of its own
    half = 2 * (BLOCK + HEAD) + 2 * 2 * ATTENTION
    assert found("tuning.freeze=[embedding, layers.0, head]") == (forward, half, 2 * BLOCK, 2 * BLOCK + 2 * ATTENTION)
    # the head alone: there is no gradient but its own
    assert found("tuning.freeze=[embedding, layers, final_norm]") == (forward, 0, 2 * HEAD, 0)
    # down_proj of block 1 alone: the gradients of the head's input
    parts = "layers.1.attention*, layers.1.ffn_norm, layers.1.ffn.gate_proj, layers.1.ffn.up_proj"
    last = f"tuning.freeze=[embedding, layers.0, {parts}, final_norm, head]"
    assert found(last) == (forward, 2 * HEAD, 2 * C * INNER, 2 * BLOCK + 2 * ATTENTION)
    # an adapter of v_proj in block 1: B's input, attention's values, o_proj, the feed-forward and the head
    adapter = 2 * 3 * (C + C)
    above = 2 * 3 * C + ATTENTION + 2 * (C * C + 3 * C * INNER) + 2 * HEAD
    assert found(LORA) == (forward + adapter, above, adapter, 2 * BLOCK + 2 * ATTENTION + adapter)


@pytest.mark.parametrize(
    ("family", "words", "head_passes"),
    [
        ("amber", (), 0),
        ("amber", ("tuning.freeze=[embedding, layers.0, head]",), 0),
        ("amber", (LORA,), 0),
        ("amber", ("tuning.freeze=['*_norm', layers.*.ffn.down_proj, layers.1.attention.q_proj]",), 0),
        ("crystal", ("tuning.freeze=[embedding, layers.0.attention*, 'layers.0.ffn.down_proj']",), 0),
        ("qwen", ("tuning.freeze=[embedding, layers.0.attention.q_proj, layers.0.attention_norm]",), 0),
        ("amber", ("model.norm_placement=after", "tuning.freeze=[embedding, 'layers.0.*_proj', layers.1.ffn]"), 0),
        ("amber", ("model.residual=parallel", "tuning.freeze=[embedding, layers.0.ffn*, layers.0.attention_norm]"), 0),
        ("amber", ("name=pairs", "objective={name: dpo, beta: 0.1, reference: base}"), 1),
    ],
)
def test_what_the_local_backend_computes(
    family: str, words: tuple[str, ...], head_passes: int, tiny_recipe: Tiny
) -> None:
    """head_passes: of the head beyond the formula: what objective dpo finds the slopes with."""
    recipe = tiny_recipe(family, *words, "kernels.preferences=[reference]")
    backend = get_backend("local")
    run = backend.prepare(Job(recipe, Plan(0, 1), backend.options.model_validate({"device": "cpu", "threads": 1})))
    rows = source_of(recipe).rows(0, 0, 4)
    with FlopCounterMode(display=False) as counted:
        run.gradients(rows)
    more = head_passes * 2 * recipe.model.vocab_size * recipe.model.hidden_size
    assert counted.get_total_flops() == (training_flops(recipe).total + more) * recipe.tokens_per_step
