"""Rows times the matrix of the group that they are in. The formula is `kernels/reference.py:grouped_gemm`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from weftrain.kernels import reference
from weftrain.kernels.contract import Arguments, Cost, Op, Size
from weftrain.kernels.ops._changes import element_set, on_meta, other_dtype, replaced, shorter
from weftrain.kernels.ops._parts import Draw, in_float32, moved, read_all, size_bytes


def example(sizes: Sequence[int], outputs: int, inputs: int) -> Callable[[str, torch.dtype], Arguments]:
    """sizes: rows of each group."""

    def build(device: str, dtype: torch.dtype) -> Arguments:
        draw = Draw(device, dtype)
        return {
            "x": draw.normal(sum(sizes), inputs),
            "weight": draw.normal(len(sizes), outputs, inputs, std=inputs**-0.5),
            "ends": torch.tensor(sizes).cumsum(0).int().to(device),
        }

    return build


def _even(groups: int, rows: int, outputs: int, inputs: int) -> Callable[[str, torch.dtype], Arguments]:
    return example([rows] * groups, outputs, inputs)


def flops(arguments: Arguments) -> int:
    return 2 * arguments["x"].numel() * arguments["weight"].shape[1]


def bytes_moved(arguments: Arguments) -> int:
    x, weight = arguments["x"], arguments["weight"]
    return read_all(arguments) + len(x) * weight.shape[1] * x.element_size()


def backward_cost(arguments: Arguments) -> tuple[int, int]:
    """x, weight, dy -> dx = dy weight, dweight = dy^T x, of each group."""
    x, weight = arguments["x"], arguments["weight"]
    dy = len(x) * weight.shape[1] * x.element_size()
    return 2 * (size_bytes(x) + size_bytes(weight)) + dy, 2 * flops(arguments)


def exact(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    groups = torch.searchsorted(ends.long(), torch.arange(len(x), device=x.device), right=True).tolist()
    nothing = x.new_zeros(weight.shape[1])
    rows = [
        nothing if group == len(weight) else (weight[group] * row).sum(1) for row, group in zip(x, groups, strict=True)
    ]
    return torch.stack(rows) if rows else x @ weight[0].t()


def _all_in_one(arguments: Arguments) -> Arguments:
    """Every row in the last group."""
    ends = arguments["ends"].clone()
    ends[:-1] = 0
    return {**arguments, "ends": ends}


OP = Op(
    reference.grouped_gemm,
    exact,
    differentiable=("x", "weight"),
    examples={
        "odd": example([5, 0, 17, 1, 10], 13, 21),
        "odd_first_empty": example([0, 0, 7], 5, 9),
        "odd_one_group": example([33], 17, 12),
        "edge": example([16, 32, 0, 16], 32, 64),
        "edge_above": example([129, 1, 65], 65, 33),
        "olmoe_1b_7b": _even(64, 256, 1024, 2048),  # 2,048 tokens, each in 8 of 64 experts
        "olmoe_1b_7b_16k": _even(64, 2048, 1024, 2048),
    },
    bytes_moved=bytes_moved,
    flops=flops,
    backward_cost=backward_cost,
    attributes={"inner_size": 2048, "experts": 64},
    attributes_of=lambda arguments: {"inner_size": arguments["x"].shape[1], "experts": len(arguments["weight"])},
    wrong={
        "x of rank 3": replaced("x", lambda x: x[None]),
        "weight of other columns": replaced("weight", shorter),
        "weight of another dtype": replaced("weight", other_dtype),
        "weight on another device": replaced("weight", on_meta),
        "ends of int64": replaced("ends", torch.Tensor.long),
        "ends of too few groups": replaced("ends", shorter),
    },
    wrong_values={
        "ends beyond the rows": replaced("ends", element_set(-1, 10**6)),
        "ends that fall": replaced("ends", element_set(0, 10**6)),
    },
    edges={
        "rows of no group": lambda a: {**a, "ends": (a["ends"] - 3).clamp(min=0)},
        "no rows": lambda a: {**a, "x": a["x"][:0], "ends": torch.zeros_like(a["ends"])},
        "all rows in one group": _all_in_one,
    },
    sizes={
        "rows": Size(lambda n: example([n // 2, 0, n - n // 2], 24, 16), (1_100,), (20_001,), accumulates=True),
        "groups": Size(lambda n: example([k % 3 for k in range(n)], 8, 16), (130,)),
        "inner_size": Size(lambda n: example([3, 5], 8, n), (2_100,)),
        "outputs": Size(lambda n: example([3, 5], n, 8), (2_100,)),
    },
    ranges={"values of 100": moved("x", times=100.0)},
    cost=Cost(
        example([256, 0, 256], 256, 256),
        kept_bytes=lambda arguments: 2 * in_float32(arguments, "x", "weight"),
        peak_bytes=lambda arguments: 6 * in_float32(arguments, "x", "weight"),
    ),
)
