"""How many ranks each dimension of parallelism has, and numbers that do not divide."""

from __future__ import annotations

import pytest

from weftrain.backends.cuda.degrees import Degrees, degrees, shared_heads
from weftrain.backends.cuda.options import CudaOptions
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.recipe_file import load_recipe


def amber(replicas: int) -> Recipe:
    batch = ["batch.global_batch_size=240", "batch.micro_batch_size=1", f"batch.replicas={replicas}"]
    return load_recipe("amber_7b", batch, "cuda").recipe


@pytest.mark.parametrize(
    ("size", "replicas", "changes", "words"),
    [
        (
            2,
            1,
            {"tensor_parallel": 4},
            "2 ranks are no multiple of tensor_parallel x context_parallel = 4 x 1: start a multiple of 4",
        ),
        (
            4,
            4,
            {"tensor_parallel": 2},
            "4 ranks make 2 data-parallel replicas of 2 ranks each, and batch.replicas is 4: set batch.replicas=2",
        ),
        (6, 6, {"parallel": "hsdp", "shard_group": 4}, "6 data-parallel replicas are no multiple of shard_group 4"),
        (3, 1, {"tensor_parallel": 3}, "model.num_heads 32 is no multiple"),
    ],
)
def test_numbers_that_do_not_divide(size: int, replicas: int, changes: dict[str, object], words: str) -> None:
    recipe = amber(replicas)
    with pytest.raises(BackendError, match=words):
        degrees(CudaOptions.model_validate(changes), recipe, size, 8)


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        ({"num_heads": 24, "num_kv_heads": 6}, {"tensor_parallel": 4}, "model.num_kv_heads 6 does not go into tensor"),
        (
            {"num_heads": 36, "num_kv_heads": 6},
            {"tensor_parallel": 3, "context_parallel": 3},
            "num_kv_heads 6 does not go into tensor_parallel 3 and then context_parallel 3: ",
        ),
        (
            {"num_heads": 16, "num_kv_heads": 1, "head_dim": 40, "rotary_dim": 40},
            {"tensor_parallel": 16},
            "model.head_dim 40 is no multiple of the 16 tensor-parallel ranks that share one of model.num_kv_heads 1",
        ),
    ],
)
def test_heads_that_ranks_cannot_share(model: dict[str, int], changes: dict[str, int], words: str) -> None:
    overrides = [f"model.{name}={value}" for name, value in {"hidden_size": 4608, **model}.items()]
    recipe = load_recipe("amber_7b", [*overrides, "batch.replicas=1", "batch.global_batch_size=10"], "cuda").recipe
    size = changes["tensor_parallel"] * changes.get("context_parallel", 1)
    with pytest.raises(BackendError, match=words):
        degrees(CudaOptions.model_validate(changes), recipe, size, 8)


def test_a_shared_key_head_is_told() -> None:
    model = amber(1).model.model_copy(update={"num_kv_heads": 2})
    told = shared_heads(model, Degrees(1, 1, 2, 4))
    assert told is not None
    assert "model.num_kv_heads 2 on 8 tensor and context parallel ranks: each key and value head is on 4" in told
    assert shared_heads(model, Degrees(1, 8, 1, 2)) is None


def test_degrees() -> None:
    recipe = amber(2)
    assert degrees(CudaOptions(tensor_parallel=4, context_parallel=2), recipe, 16, 8) == Degrees(1, 2, 2, 4)
    replicas = amber(16)
    assert degrees(CudaOptions(parallel="hsdp"), replicas, 16, 8) == Degrees(2, 8, 1, 1)
    assert degrees(CudaOptions(parallel="ddp"), replicas, 16, 8) == Degrees(16, 1, 1, 1)
