"""The local backend's own options: activation checkpointing and torch.compile change memory and speed, not what is
computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch._dynamo.utils import counters

from weftrain.backends.common.registry import get_backend
from weftrain.core.backend import Job, Plan
from weftrain.core.config import Recipe
from weftrain.core.order.synthetic import synthetic_source


def gradients(recipe: Recipe) -> tuple[float, dict[str, torch.Tensor]]:
    backend = get_backend("local")
    run = backend.prepare(Job(recipe, Plan(0, 1), backend.options.model_validate(recipe.backend.options)))
    source = synthetic_source(
        recipe.model.vocab_size, recipe.data.sequence_length, 12, recipe.batch.global_batch_size, 5
    )
    return run.gradients(source.rows(0, 0, recipe.batch.global_batch_size))


def test_activation_checkpointing_recomputes_the_same_bits(tiny_recipe: Callable[..., Recipe]) -> None:
    loss, plain = gradients(tiny_recipe("crystal"))
    loss_again, recomputed = gradients(tiny_recipe("crystal", "backend.options.activation_checkpointing=full"))
    assert loss_again == loss
    assert all(torch.equal(recomputed[name], plain[name]) for name in plain)


def test_all_blocks_share_one_graph(tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs from layer to layer must not be read in a block: beyond 8 graphs torch.compile runs eagerly, without
    a word.
    """
    # graphs are captured, no code is generated
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for layers, dropout in ((12, 0.0), (32, 0.1)):
        torch._dynamo.reset()
        counters.clear()
        overrides = (f"model.num_layers={layers}", f"model.dropout={dropout}", "backend.options.compile=true")
        gradients(tiny_recipe("crystal", *overrides, "batch.global_batch_size=2", "batch.micro_batch_size=2"))
        assert counters["stats"]["unique_graphs"] == 2, (layers, dropout)  # a block's and the head's


@pytest.mark.prove
def test_compiled_gradients_agree_with_eager_ones(tiny_recipe: Callable[..., Recipe]) -> None:
    loss, plain = gradients(tiny_recipe("crystal"))
    options = ["backend.options.compile=true", "backend.options.activation_checkpointing=full"]
    for given in (options[:1], options):
        loss_compiled, compiled = gradients(tiny_recipe("crystal", *given))
        assert abs(loss_compiled - loss) < 1e-5 * loss
        for name, gradient in plain.items():  # fp32, other orders of summation
            assert (compiled[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-6, name


def test_threads_of_the_job_come_before_those_of_the_options(tiny_recipe: Callable[..., Recipe]) -> None:
    backend = get_backend("local")
    recipe = tiny_recipe("amber", "backend.options.threads=1")
    for asked, threads in ((None, 1), (2, 2)):
        job = Job(recipe, Plan(0, 1), backend.options.model_validate(recipe.backend.options), threads=asked)
        assert backend.prepare(job).fingerprint().threads == threads
