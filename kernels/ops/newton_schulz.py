"""Singular values towards 1, the product of Muon's update. The formula is `kernels/reference.py:newton_schulz`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from weftrain.kernels import reference
from weftrain.kernels.contract import Arguments, Cost, Op, Size
from weftrain.kernels.ops._changes import replaced
from weftrain.kernels.ops._parts import Draw, size_bytes

_QUINTIC = {"a": 3.4445, "b": -4.775, "c": 2.0315}


def example(*shape: int, iterations: int = 5, std: float = 1e-3) -> Callable[[str, torch.dtype], Arguments]:
    def build(device: str, dtype: torch.dtype) -> Arguments:
        x = Draw(device, dtype).normal(*shape, std=std)
        return {"x": x, **_QUINTIC, "iterations": iterations, "eps": 1e-7}

    return build


def exact(x: Tensor, *, a: float, b: float, c: float, iterations: int, eps: float) -> Tensor:
    """By the singular values themselves. A norm that is not finite leaves nothing that is."""
    if not x.isfinite().all():
        return torch.full_like(x, float("nan"))
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    values = values / values.square().sum(-1, keepdim=True).sqrt().clamp(min=eps)
    for _ in range(iterations):
        values = a * values + b * values**3 + c * values**5
    result: Tensor = left * values.unsqueeze(-2) @ right
    return result


def flops(arguments: Arguments) -> int:
    """Two products of the smaller side's square, which the first makes from the matrix, and one with the matrix."""
    *stack, rows, columns = arguments["x"].shape
    short, long = sorted((rows, columns))
    once = 2 * (2 * short * short * long + short**3)
    return math.prod(stack) * arguments["iterations"] * once


OP = Op(
    reference.newton_schulz,
    exact,
    differentiable=(),
    inputs=("x",),
    examples={
        "odd": example(33, 17),
        "odd_wide": example(5, 77),
        "odd_stack": example(3, 7, 5),
        "odd_one_iteration": example(19, 31, iterations=1),
        "edge": example(128, 64),
        "edge_square": example(65, 65),
        "amber_7b_up": example(11008, 4096),
    },
    bytes_moved=lambda arguments: 2 * size_bytes(arguments["x"]),
    flops=flops,
    # Five iterations raise the smallest singular values by up to 3.4445^5 = 485, and rounding errors with them.
    caps={torch.float32: 5e-6, torch.bfloat16: 5e-2, torch.float16: 5e-3},
    wrong={
        "a vector": replaced("x", lambda x: x.flatten()),
        "integers": replaced("x", torch.Tensor.int),
        "no iteration": replaced("iterations", lambda _: 0),
        "an eps of zero": replaced("eps", lambda _: 0.0),
    },
    edges={
        "zeros only": replaced("x", torch.zeros_like),
        "one column": replaced("x", lambda x: x[..., :1]),
        "a transposed matrix": replaced("x", lambda x: x.mT),
    },
    sizes={
        "elements": Size(lambda n: example(7, -(-n // 7)), (70_000,), (2_000_003,)),
        "side": Size(lambda n: example(n, n + 9, iterations=1), (150,), (1_100,)),
    },
    ranges={
        "values of 1000": replaced("x", lambda x: x * 1e6),
        "values of 1e-12": replaced("x", lambda x: x.float().mul(1e-9).to(x.dtype)),
    },
    cost=Cost(
        example(600, 500),
        kept_bytes=lambda arguments: 0,
        peak_bytes=lambda arguments: 5 * size_bytes(arguments["x"]) + 65_536,
    ),
)
