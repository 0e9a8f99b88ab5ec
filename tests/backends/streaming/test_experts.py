"""Experts that no token reached are not copied to a device for backward: fewer bytes, and the bits of `local`. Biases of
routers, which loads move, are part of a step's transaction.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from streaming_runs import abandon_after_drain, assert_same, prepare, resumed, source_of, streaming, trained

from weftrain.core.config import Recipe

Tiny = Callable[..., Recipe]
FOUR_LAYERS = ("model.num_layers=4", "schedule.steps=3", "model.experts.dense_layers=0")
MANY = ("model.experts.count=32", "model.experts.top_k=1", "model.experts.renormalize=false")
FEW_TOKENS = ("batch.global_batch_size=2", "batch.micro_batch_size=1")


@pytest.mark.parametrize(
    ("tier", "activations", "compute"), [("ram", "keep", "bfloat16"), ("direct", "recompute", "float32")]
)
def test_weights_of_experts_without_tokens_are_not_copied_again(
    tier: str, activations: str, compute: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    """A slot holds NaN where nothing was copied, and the direct tier's tiles end within experts."""
    recipe = tiny_recipe("moe", *FOUR_LAYERS, *MANY, *FEW_TOKENS, f"precision.compute={compute}")
    one = prepare(recipe, steps=3, threads=1)
    apart = {"device_memory_limit_mib": 2048, "layers_on_device": 0, "poison_freed_slots": True}
    options = {"activations": activations, "tile_elements": 16384, "threads": 1, **apart}
    run = streaming(recipe, tmp_path, tier, 3, **options)
    plan = run.executor.schedule("step").to_device_bytes
    again = 2 * run.store.layout.records[1].compute_bytes  # two of four layers lie in their slots until backward
    experts, reached = run.executor._experts, []
    for found, wanted in zip(run.train(source_of(recipe)), one.train(source_of(recipe)), strict=True):
        assert (found.loss, found.grad_norm) == (wanted.loss, wanted.grad_norm)
        reached += [sum(known) for known in experts._known.values()]
        if found.step < 2:  # behind the last step comes the pass of its update
            assert len(experts._known) == 2
            assert plan - again < run.stats()["to_device_bytes"] == plan - experts.left_out_bytes < plan - again // 4
    assert 1 <= min(reached) <= max(reached) < 24
    assert_same(run.export_state(), one.export_state())
    run.close()


def test_a_killed_run_moves_biases_once(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """After two steps the second one's update is pending, that of the biases with it."""
    recipe = tiny_recipe("moe", "model.experts.bias_update=0.01", "schedule.steps=3")
    wanted = trained(prepare(recipe, steps=3, threads=1), recipe)[2]
    run = streaming(recipe, tmp_path, "mapped", 3, threads=1)
    steps = run.train(source_of(recipe))
    next(steps), next(steps)
    assert run.store.committed.pending is not None
    abandon_after_drain(run)
    stood, state = resumed(recipe, tmp_path, "mapped", threads=1)
    assert stood == 2
    assert_same(state, wanted)
    assert wanted.tensors["weights/layers.1.ffn.router.bias"].abs().max() > 0.005
