"""The residual sum and its RMS norm in one pass. The formula is `kernels/reference.py:add_rms_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from weftrain.kernels import reference
from weftrain.kernels.contract import Arguments, Cost, Op
from weftrain.kernels.ops import rms_norm
from weftrain.kernels.ops._changes import ADD_NORM_EDGES, WRONG_ADD_NORM, one_column
from weftrain.kernels.ops._parts import (
    add_norm,
    add_norm_backward_bytes,
    add_norm_bytes,
    add_norm_examples,
    add_norm_sizes,
    elements,
    in_float32,
    moved,
    norm_attributes,
)


def backward_cost(arguments: Arguments) -> tuple[int, int]:
    """sum, dsum, dnormed, weight -> dresidual, dbranch, dweight: rms_norm's, and the gradient of the sum added."""
    return add_norm_backward_bytes(arguments), 10 * arguments["residual"].numel()


def exact(residual: Tensor, branch: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return residual + branch, rms_norm.exact(residual + branch, weight, eps)


OP = Op(
    reference.add_rms_norm,
    exact,
    differentiable=("residual", "branch", "weight"),
    outputs=("sum", "normed"),
    examples={
        **add_norm_examples(bias=False),
        "amber_7b": add_norm((2048,), 4096, bias=False, eps=1e-6),
        "amber_7b_16k": add_norm((16384,), 4096, bias=False, eps=1e-6),
    },
    bytes_moved=add_norm_bytes,
    flops=elements("residual", 5),
    backward_cost=backward_cost,
    attributes={"hidden_size": 4096, "eps": 1e-6},
    attributes_of=norm_attributes,
    wrong=WRONG_ADD_NORM,
    edges={**ADD_NORM_EDGES, "one column": one_column("residual", "branch", "weight")},
    sizes=add_norm_sizes(bias=False),
    ranges={
        "a mean of 3000": moved("residual", by=3000.0),
        "values of 10000": moved("residual", "branch", times=1e4),
    },
    cost=Cost(
        add_norm((512,), 1024, bias=False, eps=1e-5),
        kept_bytes=lambda arguments: 2 * in_float32(arguments, "residual"),
        peak_bytes=lambda arguments: 8 * in_float32(arguments, "residual"),
    ),
)
