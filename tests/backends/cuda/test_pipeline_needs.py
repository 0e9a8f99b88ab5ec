"""The computed memory of a pipeline's ranks, against what an allocator hands out in a step of torch's schedules: fake
tensors, fake sends, the stages and fully_shard of the cuda backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from allocator_trace import AllocatorTrace, as_on_a_gpu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torch.distributed.pipelining.stage import InferenceMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from weftrain.backends.common import decoder, device_memory
from weftrain.backends.common.decoder import Kernels, select_kernels
from weftrain.backends.common.phase_clock import PhaseClock
from weftrain.backends.cuda import models
from weftrain.backends.cuda.degrees import degrees
from weftrain.backends.cuda.models import build
from weftrain.backends.cuda.needs import needs_of_ranks
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.parallel import Meshes
from weftrain.backends.cuda.pipeline import Pipeline
from weftrain.backends.cuda.rendezvous import leave
from weftrain.backends.cuda.stage import MicroBatch, RankTokens
from weftrain.core.config import Recipe
from weftrain.core.model import Decoder
from weftrain.core.recipe_file import load_recipe

STAGES, CPU = 4, torch.device("cpu")
OUTSIDE = ("program", "fragments")  # of torch's allocator


@pytest.fixture(autouse=True)
def no_world() -> Iterator[None]:
    leave()
    yield
    leave()


def traced(recipe: Recipe, options: CudaOptions, rank: int, ranks: int, patch: pytest.MonkeyPatch) -> int:
    """Peak bytes of a rank in a step without its update."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    shape, resize, trace = degrees(options, recipe, ranks, ranks), torch.UntypedStorage.resize_, AllocatorTrace()

    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        found = resize(storage, size)
        trace.resized(storage)
        return found

    def not_on_meta(recipe: Recipe, kernels: Kernels) -> Decoder:
        return Decoder(recipe.model, kernels.selection, torch.float32)

    def shapes_are_known(schedule: _PipelineSchedule, stages: list[Any], *rest: Any) -> None:
        """In place of an exchange of numbers, which fake ranks do not send."""
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    patch.setattr(decoder, "select", as_on_a_gpu)
    patch.setattr(models, "decoder_on_meta", not_on_meta)
    patch.setattr(torch.nn.Module, "to_empty", lambda module, **options: module)
    patch.setattr(_PipelineSchedule, "_warmup_p2p", shapes_are_known)
    meshes = Meshes.of(shape, recipe.model.num_kv_heads, "cpu", 60)
    kernels = select_kernels(recipe, "cpu", "cpu", "cpu", also_on={"cpu"})
    with FakeTensorMode(allow_non_fake_inputs=True):
        built = build(recipe, options, kernels, shape, meshes, CPU)
        patch.setattr(torch.UntypedStorage, "resize_", resized)
        with trace:
            state = [*built.model.weights.values(), *built.model.copies.values()]
            trace.count(*state, *built.decoder.buffers())
            moments = [torch.zeros_like(weight) for weight in built.model.weights.values() for _ in range(2)]
            trace.peak_bytes = trace.live_bytes
            length = recipe.data.sequence_length
            ids = torch.zeros(recipe.batch.micro_batch_size, length, dtype=torch.int64)
            tokens = RankTokens(ids, ids, None, None, built.decoder.rotary(length))
            assert meshes.pipeline is not None
            step = built.stages, built.model, recipe, options, meshes.pipeline, length, CPU, PhaseClock(CPU, False)
            Pipeline(*step).step([MicroBatch(tokens, None)] * recipe.batch.accumulation_steps)
            gradients = built.model.take_gradients()
        del moments, gradients
    leave()
    patch.undo()
    return trace.peak_bytes


ZBV = {"pipeline_schedule": "zbv", "pipeline_virtual_stages": 2, "parallel": "ddp"}
GPIPE = {"pipeline_schedule": "gpipe", "activation_checkpointing": "full"}


@pytest.mark.parametrize(
    ("options", "stage", "replicas"),
    [
        # streams are most of what a stage of one layer keeps: of the first rank those that it gave on, of a middle one
        # those that it received, which lie in the schedule's buffers
        (GPIPE, 0, 1),
        pytest.param(GPIPE, 1, 1, marks=pytest.mark.soak),
        pytest.param({}, 0, 1, marks=pytest.mark.soak),
        pytest.param({}, 2, 1, marks=pytest.mark.prove),
        pytest.param({}, 3, 1, marks=pytest.mark.soak),
        # two ranks a stage, which have a half of its weights each
        pytest.param({}, 0, 2, marks=pytest.mark.prove),
        pytest.param(GPIPE, 1, 2, marks=pytest.mark.soak),
        pytest.param({}, 3, 2, marks=pytest.mark.soak),
        # the last rank puts off the most gradients of weights
        pytest.param(ZBV, 0, 1, marks=pytest.mark.soak),
        pytest.param(ZBV, 3, 1, marks=pytest.mark.prove),
    ],
)
def test_near_what_an_allocator_hands_out(
    options: dict[str, Any], stage: int, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, ranks = 8 if "pipeline_virtual_stages" in options else 4, STAGES * replicas
    words = ["data.chunks=null", "precision.compute=bfloat16", f"model.num_layers={layers}", "model.vocab_size=4096"]
    batch = ["batch.micro_batch_size=4", f"batch.global_batch_size={32 * replicas}", f"batch.replicas={replicas}"]
    recipe = load_recipe("amber_7b", words + batch, "cuda").recipe
    chosen = CudaOptions.model_validate({"pipeline_parallel": STAGES, **options})
    found = traced(recipe, chosen, stage * replicas, ranks, monkeypatch)
    # a trace sees what an operator returns, and not the chunk of logits inside of it
    monkeypatch.setitem(device_memory._HEADS, "triton", (0, 2, 8))
    parts = needs_of_ranks(recipe, chosen, degrees(chosen, recipe, ranks, ranks), "cuda")[stage].memory_bytes
    computed = sum(size for part, size in parts.items() if part not in OUTSIDE)
    print(options, stage, replicas, f"{computed / found - 1:+.1%}", {k: round(v / 2**30, 2) for k, v in parts.items()})
    assert computed == pytest.approx(found, rel=0.06), parts
