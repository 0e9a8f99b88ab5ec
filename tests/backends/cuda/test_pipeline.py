"""A pipeline's stages compute what one process does: gradients, loss, norm, weights and moments, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ranks import alone, apart, on_ranks, source_of, started

from weftrain.core.config import Recipe
from weftrain.core.order.batch import Batch

Tiny = Callable[..., Recipe]
SHAPE = ["model.num_heads=4", "model.intermediate_size=72", "data.sequence_length=12", "model.rotary_dim=4"]
BATCH = ["batch.micro_batch_size=1", "batch.global_batch_size=8", "schedule.steps=3"]
PIPELINES: dict[str, tuple[int, dict[str, Any]]] = {
    "1f1b_fsdp": (3, {"pipeline_parallel": 2}),
    "1f1b_four_stages": (5, {"pipeline_parallel": 4}),
    "1f1b_ddp": (2, {"pipeline_parallel": 2, "parallel": "ddp"}),
    "1f1b_tensor": (2, {"pipeline_parallel": 2, "tensor_parallel": 2}),
    "gpipe_context": (2, {"pipeline_parallel": 2, "pipeline_schedule": "gpipe", "context_parallel": 2}),
    "interleaved": (
        5,
        {"pipeline_parallel": 2, "pipeline_schedule": "interleaved_1f1b", "pipeline_virtual_stages": 2},
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
QUICK = ("1f1b_fsdp",)
CASES = [pytest.param(layout, marks=() if layout in QUICK else pytest.mark.prove) for layout in PIPELINES]


@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize("layout", CASES)
def test_the_same_as_one_process(layout: str, tiny_recipe: Tiny) -> None:
    layers, options = PIPELINES[layout]
    recipe = tiny_recipe("crystal", *SHAPE, *BATCH, f"model.num_layers={layers}", "model.tie_embeddings=false")
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
