"""A failed allocation: one message, whoever raised it, and nothing that was saved is lost."""

from __future__ import annotations

import pytest
import torch

from weftrain.backends.common.out_of_memory import naming_memory
from weftrain.core.errors import CheckpointError, OutOfMemoryError, is_out_of_memory

GIB = 1 << 30
RAISED = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.91 GiB. GPU 0 has a total capacity of 139.8 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
    ),  # page-locked memory
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError("Unable to allocate 3.00 TiB for an array with shape (3,)"),
]


@pytest.mark.parametrize("raised", RAISED, ids=lambda error: type(error).__name__)
def test_every_allocator_gives_one_line_with_parts_and_options(raised: Exception) -> None:
    parts = {"optimizer": 50 * GIB, "activations": 20 * GIB, "rotary tables": 1 << 20}
    with (
        pytest.raises(OutOfMemoryError) as told,
        naming_memory(
            "step 7", torch.device("cpu"), lambda: (parts, ["batch.micro_batch_size=4", "the streaming backend"])
        ),
    ):
        raise raised
    words = str(told.value)
    assert "\n" not in words
    assert "step 7" in words
    assert "optimizer 50.00 GiB, activations 20.00 GiB; the last checkpoint is whole" in words
    assert words.endswith("try batch.micro_batch_size=4; the streaming backend")
    assert "rotary" not in words


def test_other_errors_stay_what_they_are() -> None:
    for error in (
        RuntimeError("shapes do not match"),
        CheckpointError("disk: out of memory"),
        ValueError("not enough memory"),
    ):
        assert not is_out_of_memory(error)
        with pytest.raises(type(error)), naming_memory("step 7", torch.device("cpu"), lambda: ({}, [])):
            raise error
