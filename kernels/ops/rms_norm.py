"""RMS normalisation over the last dimension. The formula is `kernels/reference.py:rms_norm`."""

from __future__ import annotations

from torch import Tensor

from weftrain.kernels import reference
from weftrain.kernels.contract import Arguments, Cost, Op
from weftrain.kernels.ops._changes import NORM_EDGES, WRONG_NORM, one_column
from weftrain.kernels.ops._parts import (
    elements,
    in_float32,
    moved,
    norm,
    norm_attributes,
    norm_examples,
    norm_sizes,
    read_all_write_like,
    size_bytes,
)


def backward_cost(arguments: Arguments) -> tuple[int, int]:
    """x, dy, weight -> dx, dweight. An element: x r, dy w, their product summed (2), dx = r (dy w - x r c) (3), dweight
    (2).
    """
    x, weight = arguments["x"], arguments["weight"]
    return 3 * size_bytes(x) + 2 * size_bytes(weight), 9 * x.numel()


def exact(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


OP = Op(
    reference.rms_norm,
    exact,
    differentiable=("x", "weight"),
    examples={
        **norm_examples(bias=False),
        "amber_7b": norm((2048,), 4096, bias=False, eps=1e-6),
        "amber_7b_16k": norm((16384,), 4096, bias=False, eps=1e-6),
    },
    bytes_moved=read_all_write_like("x"),
    flops=elements("x", 4),
    backward_cost=backward_cost,
    attributes={"hidden_size": 4096, "eps": 1e-6},
    attributes_of=norm_attributes,
    wrong=WRONG_NORM,
    edges={**NORM_EDGES, "one column": one_column("x", "weight")},
    sizes=norm_sizes(bias=False),
    ranges={"a mean of 3000": moved("x", by=3000.0), "values of 10000": moved("x", times=1e4)},
    cost=Cost(
        norm((512,), 1024, bias=False, eps=1e-5),
        kept_bytes=lambda arguments: 2 * in_float32(arguments, "x"),
        peak_bytes=lambda arguments: 8 * in_float32(arguments, "x"),
    ),
)
