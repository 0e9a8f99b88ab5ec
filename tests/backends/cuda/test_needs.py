"""A rank's computed memory, against what an allocator hands out in a step of FSDP: fake tensors, fake collectives, the real
fully_shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from allocator_trace import AllocatorTrace, as_on_a_gpu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from weftrain.backends.common import decoder, device_memory
from weftrain.backends.common.decoder import compute_dtype, select_kernels
from weftrain.backends.cuda.degrees import degrees
from weftrain.backends.cuda.models import freeze
from weftrain.backends.cuda.needs import needs
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.parallel import Meshes, blocks_of, compile_blocks
from weftrain.backends.cuda.rendezvous import leave
from weftrain.backends.cuda.sharded import Sharded
from weftrain.backends.cuda.stage import RankTokens, whole_part
from weftrain.core.config import Recipe
from weftrain.core.lora import attach_adapters
from weftrain.core.model import Decoder
from weftrain.core.recipe_file import load_recipe

OUTSIDE = ("program", "fragments")  # of torch's allocator
RANKS, CPU = 8, torch.device("cpu")
LORA = {"lora": {"rank": 16, "alpha": 32, "dropout": 0.0, "targets": ["layers.*_proj"]}}


@pytest.fixture(autouse=True)
def ranks() -> Iterator[None]:
    leave()  # a world of a test that went before in this process
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield
    leave()


def traced(recipe: Recipe, options: CudaOptions, monkeypatch: pytest.MonkeyPatch) -> int:
    """Peak bytes of rank 0 in a step without its update."""
    monkeypatch.setattr(decoder, "select", as_on_a_gpu)
    shape, resize = degrees(options, recipe, RANKS, RANKS), torch.UntypedStorage.resize_
    meshes, trace = Meshes.of(shape, recipe.model.num_kv_heads, "cpu", 60), AllocatorTrace()

    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        found = resize(storage, size)
        trace.resized(storage)
        return found

    kernels = select_kernels(recipe, "cpu", "cpu", "cpu", also_on={"cpu"})
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Decoder(recipe.model, kernels.selection, residual_dtype=torch.float32)
        attach_adapters(model, recipe.parameters, recipe.tuning.lora)
        monkeypatch.setattr(model, "to_empty", lambda device: model)
        compile_blocks(blocks_of(model), options)
        freeze(model, recipe.parameters, compute_dtype(recipe))
        sharded = Sharded(model, [whole_part(model)], recipe.parameters, meshes, options, compute_dtype(recipe), CPU)
        monkeypatch.setattr(torch.UntypedStorage, "resize_", resized)
        with trace:
            trace.count(*sharded.weights.values(), *model.buffers())
            trained = [sharded.weights[spec.name] for spec in recipe.parameters if spec.trained]
            moments = [torch.zeros_like(weight) for weight in trained for _ in range(2)]
            trace.peak_bytes = trace.live_bytes
            micro, length = recipe.batch.micro_batch_size, recipe.data.sequence_length
            ids, count = torch.zeros(micro, length, dtype=torch.int64), recipe.batch.accumulation_steps
            for number in range(count):
                with sharded.micro_batch(last=number == count - 1):
                    sharded.loss(RankTokens(ids, ids, None, None, model.rotary(length)), None).backward()
            gradients = sharded.take_gradients()
        del moments, gradients
    return trace.peak_bytes


@pytest.mark.parametrize(
    ("layers", "micro", "accumulated", "options", "tuning"),
    [
        (4, 2, 1, {"activation_checkpointing": "full"}, {}),
        (4, 2, 1, {"activation_checkpointing": "none"}, {}),
        (4, 2, 2, {"activation_checkpointing": "full"}, {}),
        (4, 8, 1, {"activation_checkpointing": "full"}, {}),
        (8, 4, 1, {"activation_checkpointing": "selective"}, {}),
        (4, 4, 1, {"activation_checkpointing": "none", "reshard_after_forward": False}, {}),
        (4, 2, 2, {"activation_checkpointing": "full", "reduce_every_micro_batch": True}, {}),
        (4, 2, 1, {"activation_checkpointing": "full"}, LORA),
        (4, 2, 2, {"activation_checkpointing": "none"}, LORA),
        (4, 2, 1, {"activation_checkpointing": "full"}, {"freeze": ["embedding", "head", "layers.*.ffn"]}),
    ],
)
def test_within_a_tenth_of_what_an_allocator_hands_out(
    layers: int,
    micro: int,
    accumulated: int,
    options: dict[str, Any],
    tuning: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = {"replicas": RANKS, "micro_batch_size": micro, "global_batch_size": micro * accumulated * RANKS}
    overrides = ["data.chunks=null", "precision.compute=bfloat16", f"model.num_layers={layers}"]
    overrides += [f"batch.{name}={value}" for name, value in batch.items()]
    overrides.append(f"tuning={json.dumps(tuning)}")
    recipe, chosen = load_recipe("amber_7b", overrides, "cuda").recipe, CudaOptions.model_validate(options)
    found = traced(recipe, chosen, monkeypatch)
    # a trace sees what an operator returns, and not the chunk of logits inside of it
    monkeypatch.setitem(device_memory._HEADS, "triton", (0, 2, 8))
    parts = needs(recipe, chosen, degrees(chosen, recipe, RANKS, RANKS), "cuda").memory_bytes
    computed = sum(size for part, size in parts.items() if part not in OUTSIDE)
    assert computed == pytest.approx(found, rel=0.1), parts
