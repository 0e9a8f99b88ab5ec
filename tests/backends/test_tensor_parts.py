"""`precision.tensor_parts`: linear maps in parts, with the bits of one process on any tensor degree that divides them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ranks import world_of
from replayable_runs import differing, train

from weftrain.backends.cuda.rendezvous import leave
from weftrain.core.backend import State
from weftrain.core.config import Recipe

Tiny = Callable[..., Recipe]
Trained = tuple[State, list[tuple[float, float]]]
STEPS = 2


def in_parts(tiny_recipe: Tiny, family: str, compute: str, replicas: int = 1, **options: Any) -> Recipe:
    """Rows of 13 tokens, which no degree divides, and weights of which a part begins at no multiple of 64 bytes."""
    demo, more = FAMILIES[family]
    options = {"device": "cpu", "threads": 1, "parallel": "fsdp", **options}
    told = ", ".join(f"{name}: {str(value).lower()}" for name, value in options.items())
    return tiny_recipe(
        demo,
        f"precision={{compute: {compute}, numerics: replayable, tensor_parts: 4}}",
        "model.num_heads=4",
        "model.hidden_size=40",
        "model.intermediate_size=68",
        "optimizer.clip_norm=0.05",
        "batch.global_batch_size=4",
        "batch.micro_batch_size=1",
        f"batch.replicas={replicas}",
        "backend.name=cuda",
        f"backend.options={{{told}}}",
        *more,
    )


FAMILIES = {
    "crystal": ("crystal", ("model.rotary_dim=4", "model.dropout=0.1")),
    # heads that share keys, norms of each head that all parts share, and biases before and behind the parts
    "qwen": (
        "qwen",
        (
            "model.num_heads=8",
            "model.num_kv_heads=4",
            "model.qkv_bias=true",
            "model.linear_bias=true",
            "model.dropout=0.1",
        ),
    ),
    "llama": ("llama", ("model.num_kv_heads=4", "model.head_dim=12", "model.rotary_dim=12")),
}


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    leave()
    with world_of(4):
        yield


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], Trained]:
    """What one process trains."""
    return {}


def wanted(alone: dict[tuple[str, str], Trained], tiny_recipe: Tiny, family: str, compute: str) -> Trained:
    torch.set_num_threads(1)
    if (family, compute) not in alone:
        alone[family, compute] = train("local", in_parts(tiny_recipe, family, compute), 0, STEPS)
        assert all(norm > 0.05 for _, norm in alone[family, compute][1]), "nothing is clipped"
    return alone[family, compute]


@pytest.mark.parametrize(
    ("family", "compute", "replicas", "options"),
    [
        ("crystal", "bfloat16", 2, {"tensor_parallel": 2}),
        ("qwen", "float32", 2, {"tensor_parallel": 2, "activation_checkpointing": "full"}),
        ("qwen", "bfloat16", 1, {"tensor_parallel": 4}),
        ("crystal", "float32", 2, {"tensor_parallel": 2, "parallel": "hsdp", "shard_group": 1}),
        ("crystal", "float32", 4, {"parallel": "ddp"}),
        ("qwen", "float32", 2, {"tensor_parallel": 2, "activation_checkpointing": "selective"}),
        ("llama", "float32", 1, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    ],
)
def test_any_tensor_degree_has_the_bits_of_one_process(
    family: str,
    compute: str,
    replicas: int,
    options: dict[str, Any],
    tiny_recipe: Tiny,
    world: None,
    alone: dict[tuple[str, str], Trained],
) -> None:
    """Losses, norms, weights and both moments; dropout, clipping, biases and norms of heads among them."""
    state, seen = wanted(alone, tiny_recipe, family, compute)
    found, found_seen = train("cuda", in_parts(tiny_recipe, family, compute, replicas, **options), 0, STEPS)
    assert (found_seen, differing(found, state)) == (seen, [])
