"""However a model lies over four ranks, its gradients, loss, norm and weights are those of the local backend in one
process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ranks import LAYOUTS, alone, apart, on_ranks, source_of, started

from weftrain.core.config import Recipe
from weftrain.core.order.batch import Batch

Tiny = Callable[..., Recipe]

# 4 heads, 12 tokens and 72 inner features can be divided by 4 and by 2.
SHAPE = ["model.num_heads=4", "model.intermediate_size=72", "data.sequence_length=12", "model.rotary_dim=4"]

# Each layout with one of the two models. In the quick suite: ddp, and tensor with context ranks in test_families.py.
QUICK = ("ddp",)
CASES = [
    pytest.param(layout, ("crystal", "amber")[number % 2], marks=() if layout in QUICK else pytest.mark.prove)
    for number, layout in enumerate(LAYOUTS)
]


@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(("layout", "family"), CASES)
def test_the_same_as_one_process(layout: str, family: str, tiny_recipe: Tiny) -> None:
    """Rows with loss masks and documents that are cut between ranks; then three steps, clipped and accumulated."""
    micro = 1 if layout in ("fsdp_every_micro_batch", "ddp", "tensor_2") else 2
    recipe = tiny_recipe(
        family, *SHAPE, f"batch.micro_batch_size={micro}", "batch.global_batch_size=8", "schedule.steps=3"
    )
    many, one = on_ranks(recipe, **LAYOUTS[layout]), alone(recipe)
    for run in (many, one):
        run.import_state(started(recipe))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 97, (8, 13))
    start = np.where(np.arange(12) < 5, 0, 5).astype(np.int32)[None].repeat(8, 0)
    for batch in (Batch(ids), Batch(ids, loss_mask=rng.random((8, 12)) > 0.3, document_start=start)):
        loss, gradients = many.gradients(batch)
        wanted_loss, wanted = one.gradients(batch)
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
        for name, gradient in wanted.items():
            if not name.endswith("k_proj.bias"):  # all but zero: see the conformance suite
                assert apart(gradients[name], gradient) < 2e-5, name
    for found, expected in zip(many.train(source_of(recipe)), one.train(source_of(recipe)), strict=True):
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)
        assert float(found.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-4)
    a, b = many.export_state(), one.export_state()
    for name, tensor in b.tensors.items():
        if name.startswith("weights/") and not name.endswith("k_proj.bias"):
            assert apart(a.tensors[name], tensor) < 1e-4, name
    many.close()


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(("layout", "reduce"), [("fsdp", "bfloat16"), ("ddp", "float32")])
def test_bf16(layout: str, reduce: str, tiny_recipe: Tiny) -> None:
    """Accumulated, so that sums of micro-batches are in it: bf16 has 8 bits, measured 0.005 to 0.02."""
    recipe = tiny_recipe(
        "crystal", *SHAPE, "batch.micro_batch_size=1", "batch.global_batch_size=8", "precision.compute=bfloat16"
    )
    many, one = (
        on_ranks(recipe, reduce=reduce, **LAYOUTS[layout]),
        alone(tiny_recipe("crystal", *SHAPE, "batch.global_batch_size=8")),
    )
    for run in (many, one):
        run.import_state(started(recipe))
    batch = source_of(recipe).rows(0, 0, 8)
    (loss, gradients), (wanted_loss, wanted) = many.gradients(batch), one.gradients(batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-2)
    for name, gradient in wanted.items():
        if not name.endswith("k_proj.bias"):
            assert apart(gradients[name], gradient) < 0.05, name
    many.close()


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(
    "options", [{"activation_checkpointing": "selective"}, pytest.param({"tensor_parallel": 2}, marks=pytest.mark.soak)]
)
def test_compiled(options: dict[str, Any], tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber", *SHAPE, "batch.global_batch_size=8")
    many, one = on_ranks(recipe, compile=True, **options), alone(recipe)
    batch = source_of(recipe).rows(0, 0, 8)
    (loss, gradients), (wanted_loss, wanted) = many.gradients(batch), one.gradients(batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert max(apart(gradients[name], gradient) for name, gradient in wanted.items()) < 2e-5
    many.close()


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(
    ("options", "operation", "times"),
    [
        ({}, "_reduce_scatter", 1),
        ({"reduce_every_micro_batch": True}, "_reduce_scatter", 4),
        ({"parallel": "ddp"}, "allreduce", 1),
    ],
)
def test_accumulation_adds_over_the_ranks_once(
    options: dict[str, Any], operation: str, times: int, tiny_recipe: Tiny
) -> None:
    """Four micro-batches a rank take as many reductions as one, unless they are asked for; that no number of a result
    tells.
    """
    counts = []
    for rows in (4, 16):
        recipe = tiny_recipe("amber", *SHAPE, "batch.micro_batch_size=1", f"batch.global_batch_size={rows}")
        run = on_ranks(recipe, **options)
        run.gradients(source_of(recipe).rows(0, 0, rows))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            run.gradients(source_of(recipe).rows(0, 0, rows))
        counts.append(sum(event.count for event in seen.key_averages() if event.key.startswith(f"c10d::{operation}")))
        run.close()
    assert counts[0] > 0, [event.key for event in seen.key_averages()]
    # ddp: beside the sum of loss and norm
    reductions = [count - (1 if options.get("parallel") == "ddp" else 0) for count in counts]
    assert reductions[1] == times * reductions[0], counts


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
def test_the_dtype_in_which_ddp_adds_is_the_one_asked_for(tiny_recipe: Tiny) -> None:
    """fp32 compute, added in bf16: off by what eight bits are, so it was not added in fp32 instead."""
    recipe = tiny_recipe("amber", *SHAPE, "batch.global_batch_size=4", "batch.micro_batch_size=1")
    run = on_ranks(recipe, parallel="ddp", reduce="bfloat16")
    batch = source_of(recipe).rows(0, 0, 4)
    (_, gradients), (_, wanted) = run.gradients(batch), alone(recipe).gradients(batch)
    differences = [apart(gradients[name], gradient) for name, gradient in wanted.items()]
    assert min(differences) > 1e-4
    assert max(differences) < 2e-2
    run.close()
