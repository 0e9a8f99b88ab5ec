"""The global L2 norm of gradients. The formula is `kernels/reference.py:grad_norm`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from weftrain.kernels import reference
from weftrain.kernels.contract import Arguments, Cost, Op, Size
from weftrain.kernels.ops._changes import empty_tensor, first_replaced, on_meta, replaced
from weftrain.kernels.ops._parts import EDGE_SIZES, LAYER_7B, ODD_SIZES, Draw, all_moved, read_all, total_elements


def example(sizes: tuple[tuple[int, ...], ...]) -> Callable[[str, torch.dtype], Arguments]:
    def build(device: str, dtype: torch.dtype) -> Arguments:
        draw = Draw(device, dtype)
        return {"gradients": [draw.normal(*size, std=1e-3) for size in sizes]}

    return build


def exact(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients]).square().sum().sqrt()


OP = Op(
    reference.grad_norm,
    exact,
    differentiable=(),
    inputs=("gradients",),
    examples={
        "odd": example(ODD_SIZES),
        "edge": example((*EDGE_SIZES, (3, 4099))),
        "amber_7b_layer": example(LAYER_7B),
    },
    bytes_moved=lambda arguments: read_all(arguments) + 4,
    flops=total_elements("gradients", 2),
    # torch.linalg.vector_norm adds all squares of a lane into one fp32 accumulator: its error grows with the size.
    caps={torch.float32: 1e-5},
    wrong={
        "no gradients": replaced("gradients", lambda _: []),
        "a gradient of integers": first_replaced("gradients", torch.Tensor.int),
        "a gradient on another device": replaced("gradients", lambda tensors: [*tensors[:-1], on_meta(tensors[-1])]),
    },
    edges={
        "a tensor without elements": empty_tensor,
        "zeros only": replaced("gradients", lambda tensors: [torch.zeros_like(tensor) for tensor in tensors]),
        "one element": replaced("gradients", lambda tensors: [tensors[0].flatten()[:1]]),
    },
    sizes={
        "elements": Size(lambda n: example(((n,),)), (70_000,), (2_000_003,), accumulates=True),
        "tensors": Size(lambda n: example(((3,),) * n), (70,), (1_100,)),
    },
    ranges={"gradients of 10000": all_moved("gradients", 1e7)},
    cost=Cost(
        example(((300_000,), (300_000,))),
        kept_bytes=lambda arguments: 0,
        peak_bytes=lambda arguments: 4 * 300_000 + 65_536,
    ),
)
