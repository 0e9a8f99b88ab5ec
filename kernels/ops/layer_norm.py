"""Layer normalisation over the last dimension. The formula is `kernels/reference.py:layer_norm`."""

from __future__ import annotations

from torch import Tensor

from weftrain.kernels import reference
from weftrain.kernels.contract import Arguments, Cost, Op
from weftrain.kernels.ops._changes import NORM_EDGES, WRONG_NORM, on_meta, one_column, replaced, shorter
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
    """x, dy, weight -> dx, dweight, dbias. An element: (x - mean) r (2), dy w, two sums (3), dx (4), dweight (2), dbias
    (1).
    """
    x, weight, bias = arguments["x"], arguments["weight"], arguments["bias"]
    return 3 * size_bytes(x) + 2 * size_bytes(weight) + size_bytes(bias), 13 * x.numel()


def exact(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return centred / ((centred * centred).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight + bias


OP = Op(
    reference.layer_norm,
    exact,
    differentiable=("x", "weight", "bias"),
    examples={
        **norm_examples(bias=True),
        "crystalcoder_7b": norm((2048,), 4096, bias=True, eps=1e-5),
        "crystalcoder_7b_16k": norm((16384,), 4096, bias=True, eps=1e-5),
    },
    bytes_moved=read_all_write_like("x"),
    flops=elements("x", 7),
    backward_cost=backward_cost,
    attributes={"hidden_size": 4096, "eps": 1e-5},
    attributes_of=norm_attributes,
    wrong={
        **WRONG_NORM,
        "bias too short": replaced("bias", shorter),
        "bias on another device": replaced("bias", on_meta),
    },
    edges={**NORM_EDGES, "one column": one_column("x", "weight", "bias")},
    sizes=norm_sizes(bias=True),
    ranges={"a mean of 3000": moved("x", by=3000.0), "values of 10000": moved("x", times=1e4)},
    cost=Cost(
        norm((512,), 1024, bias=True, eps=1e-5),
        kept_bytes=lambda arguments: 2 * in_float32(arguments, "x"),
        peak_bytes=lambda arguments: 8 * in_float32(arguments, "x"),
    ),
)
