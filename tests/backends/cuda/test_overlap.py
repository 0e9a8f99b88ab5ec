"""Gathering ahead and other sizes of buckets change no bit, and what they need is planned and refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import larger_weights, on_ranks, source_of
from torch.distributed.fsdp import FSDPModule

from weftrain.backends.cuda.needs import needs
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.overlap import check_async_tensor_parallel, use_async_tensor_parallel
from weftrain.backends.cuda.planner import degrees_of
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError

Tiny = Callable[..., Recipe]


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({}, {"gather_blocks_ahead": 3}),
        ({"parallel": "hsdp", "shard_group": 2, "activation_checkpointing": "full"}, {"gather_blocks_ahead": 2}),
        ({"parallel": "ddp"}, {"bucket_mib": 1}),
    ],
    ids=["fsdp", "hsdp", "ddp"],
)
def test_no_bit_changes(options: dict[str, Any], changed: dict[str, Any], tiny_recipe: Tiny) -> None:
    sizes = ["model.num_layers=5", "batch.global_batch_size=8", "batch.micro_batch_size=1", "schedule.steps=2"]
    recipe = tiny_recipe("amber", *sizes)
    weights, found = larger_weights(recipe), []
    for more in ({}, changed):
        run = on_ranks(recipe, weights, **options, **more)
        if "gather_blocks_ahead" in more:
            states = [block._get_fsdp_state() for block in run._decoder.layers if isinstance(block, FSDPModule)]
            count = more["gather_blocks_ahead"]
            assert states[0]._states_to_forward_prefetch == states[1 : 1 + count]
            assert states[4]._states_to_backward_prefetch == states[4 - count : 4][::-1]
        losses = [(float(one.loss), float(one.grad_norm)) for one in run.train(source_of(recipe))]
        tensors = run.export_state().tensors
        found.append((losses, {name: tensors[name].clone() for name in tensors}))
        run.close()
    (losses, state), (wanted_losses, wanted) = found
    assert losses == wanted_losses
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_each_block_ahead_is_planned(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber", "model.num_layers=8", "batch.replicas=4", "batch.global_batch_size=16")
    each = [
        needs(recipe, options, degrees_of(recipe, options), "cuda").memory_bytes["gathered weights"]
        for options in (CudaOptions(gather_blocks_ahead=count) for count in (1, 2, 3, 50))
    ]
    assert each[1] - each[0] == each[2] - each[1] > 0
    whole = needs(recipe, CudaOptions(reshard_after_forward=False), degrees_of(recipe, CudaOptions()), "cuda")
    assert each[3] == whole.memory_bytes["gathered weights"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parallel": "ddp", "gather_blocks_ahead": 2}, "gather_blocks_ahead needs parallel=fsdp or hsdp"),
        ({"bucket_mib": 50}, "bucket_mib needs parallel=ddp without a pipeline"),
        ({"parallel": "ddp", "pipeline_parallel": 2, "bucket_mib": 50}, "bucket_mib needs parallel=ddp without"),
        ({"gather_blocks_ahead": 0}, "gather_blocks_ahead"),
        ({"async_tensor_parallel": True, "compile": True}, "async_tensor_parallel needs tensor_parallel above 1"),
        ({"async_tensor_parallel": True, "tensor_parallel": 2}, "and compile=true"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CudaOptions.model_validate(options)


def test_asynchronous_tensor_parallel_is_the_compilers_switch_and_needs_a_gpu() -> None:
    from torch._inductor import config

    options = CudaOptions(async_tensor_parallel=True, tensor_parallel=2, compile=True)
    with pytest.raises(BackendError, match="over NVLink, and the device is cpu: set async_tensor_parallel=false"):
        check_async_tensor_parallel(options, torch.device("cpu"))
    check_async_tensor_parallel(options, torch.device("cuda", 0))
    with config.patch(_micro_pipeline_tp=False):  # pytest's monkeypatch would delete it afterwards
        use_async_tensor_parallel(CudaOptions())
        assert not config._micro_pipeline_tp
        use_async_tensor_parallel(options)
        assert config._micro_pipeline_tp
    assert not config._micro_pipeline_tp
