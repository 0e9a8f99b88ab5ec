"""The gated activation silu(gate) * up. The formula is `kernels/reference.py:swiglu`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weftrain.kernels import reference
from weftrain.kernels.contract import Arguments, Cost, Op, Size
from weftrain.kernels.ops._changes import no_rows, on_meta, other_dtype, replaced, shorter
from weftrain.kernels.ops._parts import Draw, elements, in_float32, moved, read_all_write_like, size_bytes


def example(rows: int, hidden: int) -> Callable[[str, torch.dtype], Arguments]:
    def build(device: str, dtype: torch.dtype) -> Arguments:
        draw = Draw(device, dtype)
        return {"gate": draw.normal(rows, hidden), "up": draw.normal(rows, hidden)}

    return build


def backward_cost(arguments: Arguments) -> tuple[int, int]:
    """gate, up, dy -> dgate, dup. An element: sigmoid (3), silu, dup = dy silu, dgate = dy up s (1 + gate (1 - s))
    (6).
    """
    return 5 * size_bytes(arguments["gate"]), 11 * arguments["gate"].numel()


def exact(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


OP = Op(
    reference.swiglu,
    exact,
    differentiable=("gate", "up"),
    examples={
        "odd": example(15, 77),
        "edge": example(8, 128),
        "edge_above": example(1, 4097),
        "crystalcoder_7b": example(2048, 10922),
        "amber_7b": example(2048, 11008),
        "crystalcoder_7b_16k": example(16384, 10922),
        "amber_7b_16k": example(16384, 11008),
    },
    bytes_moved=read_all_write_like("gate"),
    flops=elements("gate", 5),
    backward_cost=backward_cost,
    attributes={"intermediate_size": 11008},
    attributes_of=lambda arguments: {"intermediate_size": arguments["gate"].shape[-1]},
    wrong={
        "up too short": replaced("up", shorter),
        "up of another dtype": replaced("up", other_dtype),
        "gate of integers": replaced("gate", torch.Tensor.int),
        "up on another device": replaced("up", on_meta),
    },
    edges={
        "no rows": no_rows("gate", "up"),
        "one element": lambda a: {name: a[name][:1, :1] for name in ("gate", "up")},
        "rank 1": lambda a: {name: a[name][0] for name in ("gate", "up")},
        "rank 4": lambda a: {name: a[name][None, :, None] for name in ("gate", "up")},
    },
    sizes={
        "rows": Size(lambda n: example(n, 9), (8_000,)),
        "intermediate_size": Size(lambda n: example(3, n), (25_000,), (1_000_001,)),
    },
    ranges={"gates of 200": moved("gate", times=60.0), "values of 100": moved("gate", "up", times=30.0)},
    cost=Cost(
        example(256, 2048),
        kept_bytes=lambda arguments: 3 * size_bytes(arguments["gate"]) // 2,
        peak_bytes=lambda arguments: 5 * in_float32(arguments, "gate"),
    ),
)
