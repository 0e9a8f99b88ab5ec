"""Frozen parameters on ranks that share rows: gradients and steps of what is trained are those of one process, and what
is frozen keeps its bits.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from float64_reference import state_with
from ranks import LAYOUTS, alone, apart, larger_weights, on_ranks, source_of

from weftrain.core.config import Recipe

Tiny = Callable[..., Recipe]
pytestmark = pytest.mark.prove
SHAPE = ["model.num_heads=4", "model.intermediate_size=72", "data.sequence_length=12", "model.rotary_dim=4"]
BATCH = ("batch.micro_batch_size=2", "batch.global_batch_size=8", "schedule.steps=2")
LOW = "tuning.freeze=[embedding, layers.0, head]"  # nothing is differentiated below block 1
PARTS = "tuning.freeze=['*_norm', layers.*.ffn.down_proj, layers.1.attention.q_proj]"


@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(
    ("layout", "freeze", "compute"),
    [
        ("tensor_2", LOW, "float32"),
        ("tensor_2", PARTS, "bfloat16"),
        ("tensor_4", PARTS, "float32"),
        ("tensor_2_context_2", PARTS, "float32"),
        ("hsdp_tensor_2", LOW, "bfloat16"),
        ("full_tensor_2", LOW, "float32"),
        ("offload", PARTS, "bfloat16"),
    ],
)
def test_the_same_as_one_process(layout: str, freeze: str, compute: str, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber", *SHAPE, *BATCH, freeze, f"precision.compute={compute}")
    many, one = on_ranks(recipe, **LAYOUTS[layout]), alone(recipe)
    weights = larger_weights(recipe)
    for run in (many, one):
        run.import_state(state_with(weights, recipe=recipe))
    tolerance = 2e-5 if compute == "float32" else 0.06
    rows = source_of(recipe).rows(0, 0, 8)
    (loss, gradients), (wanted_loss, wanted) = many.gradients(rows), one.gradients(rows)
    assert loss == pytest.approx(wanted_loss, rel=tolerance)
    assert gradients.keys() == wanted.keys() == {spec.name for spec in recipe.parameters if spec.trained}
    assert max(apart(gradients[name], gradient) for name, gradient in wanted.items()) < tolerance
    for found, expected in zip(many.train(source_of(recipe)), one.train(source_of(recipe)), strict=True):
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=tolerance)
        assert float(found.grad_norm) == pytest.approx(float(expected.grad_norm), rel=tolerance)
    state = many.export_state()
    for spec in recipe.parameters:
        same = torch.equal(state.tensors[f"weights/{spec.name}"], weights[spec.name])
        assert same is not spec.trained, spec.name
        assert (f"exp_avg/{spec.name}" in state.tensors) is spec.trained
    many.close()
