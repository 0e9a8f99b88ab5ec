"""A training step of a two-layer Amber and CrystalCoder with every op from Triton, against the same step with every op
from the reference.

Gradients are compared tensor by tensor, then the updated weights and moments. bf16 is held to the error that the
reference's own bf16 step has against its fp32 step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from weftrain.backends.local import LocalBackend, LocalOptions
from weftrain.core.backend import Job, Plan
from weftrain.core.config import Recipe
from weftrain.core.order.batch import Batch
from weftrain.core.order.synthetic import synthetic_source


def step(recipe: Recipe) -> tuple[dict[str, torch.Tensor], Mapping[str, torch.Tensor], set[str]]:
    """(gradients of one batch, state after one step, the sources that the manifest names)."""
    run = LocalBackend().prepare(Job(recipe, Plan(0, 1), LocalOptions(device="cpu", threads=2)))
    source = synthetic_source(
        recipe.model.vocab_size, recipe.data.sequence_length, 8, recipe.batch.global_batch_size, 0
    )
    batch: Batch = source.rows(0, 0, recipe.batch.global_batch_size)
    _, gradients = run.gradients(batch)
    for result in run.train(source):
        assert not result.skipped
    manifest = run.fingerprint().kernels
    return (
        gradients,
        run.export_state().tensors,
        {entry["source"] for entries in manifest["ops"].values() for entry in entries},
    )


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9))


@pytest.mark.parametrize("family", [pytest.param("amber", marks=pytest.mark.prove), "crystal"])
def test_a_step_with_triton_is_the_reference_step(family: str, tiny_recipe: Callable[..., Recipe]) -> None:
    rate = "schedule.learning_rate=[{shape: constant, steps: 1000, start: 0.01}]"

    def make(source: str, dtype: str) -> Recipe:
        return tiny_recipe(family, f"kernels.preferences=[{source}]", f"precision.compute={dtype}", rate)

    exact_gradients, exact_state, _ = step(make("reference", "float32"))
    gradients, state, sources = step(make("triton", "float32"))
    assert sources == {"triton"}
    assert gradients.keys() == exact_gradients.keys()
    for name, gradient in gradients.items():
        assert error(gradient, exact_gradients[name]) < 2e-5, name
    for name, tensor in state.items():
        # The first update is the sign of the gradient where that is far from 0: a gradient near 0 may turn, so weights
        # get a wider bound.
        assert error(tensor, exact_state[name]) < (1e-3 if name.startswith("weights/") else 4e-5), name

    rounded_gradients, rounded_state, _ = step(make("reference", "bfloat16"))
    gradients, state, sources = step(make("triton", "bfloat16"))
    assert sources == {"triton"}
    for name, gradient in gradients.items():
        own = error(rounded_gradients[name], exact_gradients[name])
        assert error(gradient, exact_gradients[name]) < 3 * max(own, 2e-3), name
    for name, tensor in state.items():
        if not name.startswith("weights/"):
            own = error(rounded_state[name], exact_state[name])
            assert error(tensor, exact_state[name]) < 3 * max(own, 4e-3), name
