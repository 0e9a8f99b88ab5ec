"""The computed memory of a run on one device, against what an allocator hands out in a step of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from allocator_trace import AllocatorTrace, as_on_a_gpu
from torch._subclasses.fake_tensor import FakeTensorMode

from weftrain.backends.common import decoder, device_memory
from weftrain.backends.common.device_memory import alone_needs, alternatives, check_memory, head_bytes
from weftrain.backends.cuda.degrees import Degrees
from weftrain.backends.cuda.needs import needs
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.local import LocalOptions, LocalRun
from weftrain.core import parts as linear_parts
from weftrain.core.backend import Job, Plan
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.order.synthetic import synthetic_source
from weftrain.core.recipe_file import load_recipe
from weftrain.kernels.torch_ops.linear_cross_entropy import _loss_and_gradients

BASE = ["batch.replicas=1", "data.chunks=null", "precision.compute=bfloat16"]
LORA = "tuning.lora={{rank: 16, alpha: 32, dropout: {dropout}, targets: ['layers.*_proj']}}"
OUTSIDE = ("program", "fragments")  # of torch's allocator


def traced(recipe: Recipe, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Peak bytes of a step of the local backend without its update."""
    monkeypatch.setattr(decoder, "select", as_on_a_gpu)
    monkeypatch.setattr(linear_parts, "_aligned", lambda piece: piece)  # a fake tensor lies nowhere
    monkeypatch.setattr(decoder, "at_rest", lambda weight: weight.bfloat16())  # fake tensors have no values to compare
    chosen, batch = LocalOptions.model_validate(options), recipe.batch
    rows = batch.global_batch_size
    source = synthetic_source(recipe.model.vocab_size, recipe.data.sequence_length, rows, rows, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = {spec.name: torch.empty(spec.shape) for spec in recipe.parameters}
        with AllocatorTrace() as trace:
            run = LocalRun(Job(recipe, Plan(0, 1), chosen, weights), chosen, torch.device("cpu"))
            weights.clear()  # the run has copies
            trace.peak_bytes = trace.live_bytes
            run._forward_backward(partial(source.rows, 0))
            run._take_gradients()
    return trace.peak_bytes


def case(name: str, layers: int, micro: int, accumulated: int, kind: str, *more: str) -> Any:
    return pytest.param(name, layers, micro, accumulated, kind, more, id=f"{name}-{micro}x{accumulated}-{kind}")


@pytest.mark.prove
@pytest.mark.parametrize(
    ("name", "layers", "micro", "accumulated", "kind", "more"),
    [
        case("amber_7b", 4, 8, 1, "none"),
        case("amber_7b", 4, 8, 1, "selective"),
        case("amber_7b", 4, 8, 1, "full"),
        case("amber_7b", 4, 2, 2, "none"),
        case("amber_7b", 4, 1, 4, "full", "precision.numerics=replayable"),
        case("amber_7b", 4, 2, 1, "full", "precision.numerics=replayable", "precision.tensor_parts=4"),
        case("crystalcoder_7b_phase1", 4, 4, 1, "none"),
        case("llama31_8b", 4, 2, 1, "selective"),
        case("qwen3_8b", 4, 2, 2, "selective"),
        case("pythia_6_9b", 4, 4, 1, "none"),
        case("olmo3_7b", 4, 2, 1, "full"),
        case("qwen3_0_6b", 8, 4, 1, "none"),
        case("amber_7b", 4, 2, 1, "none", LORA.format(dropout=0.0)),
        case("amber_7b", 4, 2, 1, "none", LORA.format(dropout=0.05)),
        case("amber_7b", 4, 2, 2, "full", LORA.format(dropout=0.05)),
        case("amber_7b", 4, 2, 1, "selective", "tuning.freeze=[embedding, head, 'layers.*.ffn']"),
    ],
)
def test_within_a_tenth_of_what_an_allocator_hands_out(
    name: str,
    layers: int,
    micro: int,
    accumulated: int,
    kind: str,
    more: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = [f"model.num_layers={layers}", f"batch.micro_batch_size={micro}"]
    overrides = [*BASE, *sizes, f"batch.global_batch_size={micro * accumulated}", *more]
    recipe = load_recipe(name, overrides, "local").recipe
    found = traced(recipe, {"activation_checkpointing": kind}, monkeypatch)
    # a trace sees what an operator returns, and not the chunk of logits inside of it
    monkeypatch.setitem(device_memory._HEADS, "triton", (0, 2, 8))
    parts = alone_needs(recipe, kind, False, "cuda")
    computed = sum(size for part, size in parts.items() if part not in OUTSIDE)
    assert computed == pytest.approx(found, rel=0.1), parts


def test_adapters_of_a_7b_model_train_on_a_device_of_24_gb() -> None:
    """In bf16, one sequence at a time, with recomputation: on the local backend and in a world of one rank."""
    sizes = ["batch.micro_batch_size=1", "batch.global_batch_size=16", LORA.format(dropout=0.05)]
    recipe = load_recipe("amber_7b", [*BASE, *sizes], "local").recipe
    alone = alone_needs(recipe, "full", False, "cuda")
    assert sum(alone.values()) < 24e9
    assert alone["weights, fp32"] + alone["optimizer"] < 1e9
    options = CudaOptions.model_validate({"activation_checkpointing": "full"})
    assert needs(recipe, options, Degrees(1, 1, 1, 1), "cuda").total_memory_bytes < 24e9
    whole = load_recipe("amber_7b", [*BASE, *sizes[:2]], "local").recipe
    assert sum(alone_needs(whole, "full", False, "cuda").values()) > 80e9


def test_the_logits_of_the_chunked_head_are_counted() -> None:
    """torch's head computes several passes over a chunk of 2^24 logits on a CPU, and of 2^27 on a GPU."""
    recipe = load_recipe("amber_7b", [*BASE, "kernels.preferences=[torch,reference]"], "local").recipe
    tokens, model = 2048, recipe.model
    with FakeTensorMode(), AllocatorTrace() as trace:
        hidden, weight = (
            torch.empty(rows, model.hidden_size, dtype=torch.bfloat16) for rows in (tokens, model.vocab_size)
        )
        held = trace.live_bytes
        _loss_and_gradients(
            hidden, weight, torch.zeros(tokens, dtype=torch.int64), None, 1.0, -100, 0.0, None, 0.0, True, True
        )
    assert trace.peak_bytes - held == pytest.approx(head_bytes(recipe, tokens, "cpu"), rel=0.2)
    more = head_bytes(recipe, tokens, "cuda") - head_bytes(recipe, tokens, "cpu")
    assert more == 14 * (tokens * 32000 - 2**24)  # all logits of 2048 tokens are one chunk on a GPU


def test_the_chunk_of_the_fused_head_is_its_own() -> None:
    from weftrain.kernels.triton_ops.linear_cross_entropy import CHUNK_ELEMENTS

    assert device_memory._HEADS["triton"][0] == CHUNK_ELEMENTS


def test_a_run_that_does_not_fit_a_gpu_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("amber_7b", [*BASE, "batch.global_batch_size=16", "batch.micro_batch_size=16"], "local").recipe
    device = torch.device("cuda")
    for capacity, words in ((141e9, "activation_checkpointing=full"), (80e9, "would fit: the cuda backend")):
        monkeypatch.setattr(device_memory, "available", lambda *_, c=capacity: (c, "a GPU"))
        with pytest.raises(BackendError, match=r"optimizer 50\.") as refused:
            check_memory(recipe, "none", False, device)
        assert words in str(refused.value)
    monkeypatch.setattr(device_memory, "available", lambda *_: (1e12, "a GPU"))
    check_memory(recipe, "none", False, device)
    assert dict(alternatives(recipe, "none", False, "cuda"))["batch.micro_batch_size=8"] > 100e9
