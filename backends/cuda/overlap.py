"""What runs beside the arithmetic: how many blocks' weights are gathered ahead, and products cut so that tokens arrive
while others are multiplied. The first changes no bit, the second the order in which a cut product is added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from weftrain.backends.cuda.options import CudaOptions
from weftrain.core.errors import BackendError


def gather_ahead(blocks: Sequence[nn.Module], count: int) -> None:
    """Let each sharded block gather the weights of the `count` that run after it, in both directions.

    1 is what FSDP2 does by itself. More hide gathers that take longer than a block computes, for as many whole blocks
    of memory.
    """
    if count == 1:
        return
    sharded: list[FSDPModule] = [block for block in blocks if isinstance(block, FSDPModule)]
    for place, block in enumerate(sharded):
        block.set_modules_to_forward_prefetch(sharded[place + 1 : place + 1 + count])
        block.set_modules_to_backward_prefetch(sharded[max(0, place - count) : place][::-1])


def check_async_tensor_parallel(options: CudaOptions, device: torch.device) -> None:
    """Raises BackendError for a device between whose ranks no rank can read another's memory."""
    if options.async_tensor_parallel and device.type != "cuda":
        raise BackendError(
            f"backend.options.async_tensor_parallel reads other ranks' memory over NVLink, and the device is "
            f"{device.type}: set async_tensor_parallel=false"
        )


def use_async_tensor_parallel(options: CudaOptions) -> None:
    """Have the compiler cut the products around the tensor ranks' gathers and scatters, for this process.

    torch's switch is private and has stood under this name since 2.5.
    """
    if options.async_tensor_parallel:
        from torch._inductor import config

        config._micro_pipeline_tp = True
