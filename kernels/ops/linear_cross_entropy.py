"""The sum of token losses, from hidden states and the head's weight.

The formula is `kernels/reference.py:linear_cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weftrain.kernels import reference
from weftrain.kernels.contract import Arguments, Cost, Op, Size
from weftrain.kernels.ops import cross_entropy
from weftrain.kernels.ops._changes import (
    LOSS_EDGES,
    WRONG_LABEL_VALUES,
    WRONG_LABELS,
    WRONG_SMOOTHING,
    WRONG_SOFTCAP,
    WRONG_TOKEN_WEIGHTS,
    no_rows,
    on_meta,
    one_column,
    other_dtype,
    replaced,
    shorter,
)
from weftrain.kernels.ops._parts import LOSS_DEFAULTS, Draw, in_float32, loss_attributes, moved, read_all, size_bytes


def example(
    rows: int, hidden: int, vocab: int, *, weighted: bool = False, **statics: float
) -> Callable[[str, torch.dtype], Arguments]:
    def build(device: str, dtype: torch.dtype) -> Arguments:
        draw = Draw(device, dtype)
        arguments: Arguments = {
            "hidden": draw.normal(rows, hidden),
            "weight": draw.normal(vocab, hidden, std=3 * hidden**-0.5),
            "labels": draw.labels(rows, vocab),
        }
        if weighted:
            arguments["token_weights"] = draw.token_weights(arguments["labels"])
        return {**arguments, **statics}

    return build


def backward_cost(arguments: Arguments) -> tuple[int, int]:
    """hidden, weight, labels -> dhidden, dweight: two products of the forward's size, and a logit's four; logits taken
    as kept on chip.
    """
    hidden, weight, labels = arguments["hidden"], arguments["weight"], arguments["labels"]
    pairs = hidden.shape[0] * weight.shape[0]
    return 2 * (size_bytes(hidden) + size_bytes(weight)) + size_bytes(labels), pairs * (4 * hidden.shape[1] + 4)


def exact(hidden: Tensor, weight: Tensor, labels: Tensor, **statics: Any) -> Tensor:
    return cross_entropy.exact(hidden @ weight.mT, labels, **statics).sum()


_WIDE = 2**18  # a vocabulary so wide that few rows fill a chunk

OP = Op(
    reference.linear_cross_entropy,
    exact,
    differentiable=("hidden", "weight"),
    examples={
        "odd": example(29, 24, 101),
        "odd_scaled": example(29, 24, 101, logits_scale=0.13875, z_loss=1e-2),
        "odd_capped": example(29, 24, 101, logits_scale=0.7, z_loss=1e-2, logits_softcap=2.5),
        "odd_smoothed": example(29, 24, 101, logits_scale=0.7, z_loss=1e-2, label_smoothing=0.1),
        "odd_weighted": example(
            29, 24, 101, weighted=True, logits_scale=0.7, z_loss=1e-2, logits_softcap=2.5, label_smoothing=0.3
        ),
        "odd_chunks": example(201, 24, 101),
        "edge": example(64, 32, 128, logits_scale=0.7, z_loss=1e-3),
        "bench_70m": example(1024, 512, 32000),
        "crystalcoder_7b": example(2048, 4096, 32032, logits_scale=0.13875),
        "crystalcoder_7b_16k": example(16384, 4096, 32032, logits_scale=0.13875),
    },
    bytes_moved=lambda arguments: read_all(arguments) + 4,
    flops=lambda arguments: (
        arguments["hidden"].shape[0] * arguments["weight"].shape[0] * (2 * arguments["hidden"].shape[1] + 4)
    ),
    backward_cost=backward_cost,
    attributes={"hidden_size": 4096, "vocab_size": 32000, **LOSS_DEFAULTS},
    attributes_of=lambda arguments: {
        "hidden_size": arguments["weight"].shape[1],
        "vocab_size": arguments["weight"].shape[0],
        **loss_attributes(arguments),
    },
    wrong={
        "hidden of rank 3": replaced("hidden", lambda hidden: hidden[None]),
        "weight too narrow": replaced("weight", shorter),
        "weight of another dtype": replaced("weight", other_dtype),
        "weight on another device": replaced("weight", on_meta),
        "an empty vocabulary": replaced("weight", lambda weight: weight[:0]),
        **WRONG_LABELS,
        **WRONG_SOFTCAP,
        **WRONG_SMOOTHING,
        **WRONG_TOKEN_WEIGHTS,
    },
    wrong_values=WRONG_LABEL_VALUES,
    edges={
        "no rows": no_rows("hidden", "labels"),
        "one row": lambda a: {**a, "hidden": a["hidden"][1:2], "labels": a["labels"][1:2]},
        "a vocabulary of one": lambda a: {**a, "weight": a["weight"][:1], "labels": a["labels"].clamp(max=0)},
        "one feature": one_column("hidden", "weight"),
        **LOSS_EDGES,
    },
    sizes={
        "rows": Size(lambda n: example(n, 8, 11), (5_000,), (70_001,), accumulates=True),
        "vocab_size": Size(lambda n: example(5, 8, n), (70_001,)),
        "hidden_size": Size(lambda n: example(5, n, 11), (5_000,)),
        # rows of 262,144 logits: one more than as many logits have
        "logits": Size(lambda n: example(n // _WIDE + 1, 8, _WIDE), (), (2**24, 2**25)),
    },
    ranges={"logits x 2000": moved("weight", times=2000.0)},
    cost=Cost(
        example(160, 8, _WIDE),
        kept_bytes=lambda arguments: 2 * in_float32(arguments, "hidden", "weight"),
        peak_bytes=lambda arguments: 4 * in_float32(arguments, "weight") + 20 * 2**24,
    ),
)
