"""Token losses of logits. The formula is `kernels/reference.py:cross_entropy`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weftrain.kernels import reference
from weftrain.kernels.contract import Arguments, Op
from weftrain.kernels.ops._changes import LOSS_EDGES, WRONG_LABEL_VALUES, WRONG_LABELS, WRONG_SOFTCAP, no_rows, replaced
from weftrain.kernels.ops._parts import LOSS_DEFAULTS, Draw, elements, loss_attributes, read_all, size_bytes


def example(rows: int, vocab: int, *, std: float = 3.0, **statics: float) -> Callable[[str, torch.dtype], Arguments]:
    def build(device: str, dtype: torch.dtype) -> Arguments:
        draw = Draw(device, dtype)
        return {"logits": draw.normal(rows, vocab, std=std), "labels": draw.labels(rows, vocab), **statics}

    return build


def backward_cost(arguments: Arguments) -> tuple[int, int]:
    """logits, labels, dloss fp32 -> dlogits. A logit: scale, minus logsumexp, exp, times dloss scale."""
    logits, labels = arguments["logits"], arguments["labels"]
    return 2 * size_bytes(logits) + size_bytes(labels) + 4 * labels.numel(), 4 * logits.numel()


def exact(
    logits: Tensor,
    labels: Tensor,
    logits_scale: float = 1.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    logits_softcap: float | None = None,
) -> Tensor:
    losses = []
    for row, label in zip(logits * logits_scale, labels.tolist(), strict=True):
        if label == ignore_index:
            losses.append(row.new_zeros(()))
            continue
        if logits_softcap is not None:
            positive, negative = (row / logits_softcap).exp(), (-row / logits_softcap).exp()
            row = logits_softcap * (positive - negative) / (positive + negative)
        log_sum = row.exp().sum().log()
        losses.append(log_sum - row[label] + (z_loss * log_sum**2 if z_loss else 0))
    return torch.stack(losses)


OP = Op(
    reference.cross_entropy,
    exact,
    differentiable=("logits",),
    examples={
        "odd": example(29, 101),
        "odd_scaled": example(29, 101, logits_scale=0.13875, z_loss=1e-2),
        "odd_capped": example(29, 101, logits_scale=0.7, z_loss=1e-2, logits_softcap=2.5),
        "edge": example(9, 1024, std=1.0),
        "edge_above": example(16, 8193, std=1.0, logits_scale=0.7, z_loss=1e-3),
        "edge_capped": example(9, 1025, logits_softcap=30.0),
        "amber_7b": example(2048, 32000),
        "amber_7b_16k": example(16384, 32000),
    },
    bytes_moved=lambda arguments: read_all(arguments) + 4 * arguments["labels"].numel(),
    flops=elements("logits", 4),
    backward_cost=backward_cost,
    attributes={"vocab_size": 32000, **LOSS_DEFAULTS},
    attributes_of=lambda arguments: {"vocab_size": arguments["logits"].shape[1], **loss_attributes(arguments)},
    wrong={
        "logits of rank 3": replaced("logits", lambda logits: logits[None]),
        "logits of integers": replaced("logits", torch.Tensor.int),
        "an empty vocabulary": replaced("logits", lambda logits: logits[:, :0]),
        **WRONG_LABELS,
        **WRONG_SOFTCAP,
    },
    wrong_values=WRONG_LABEL_VALUES,
    edges={
        "no rows": no_rows("logits", "labels"),
        "one row": lambda a: {**a, "logits": a["logits"][1:2], "labels": a["labels"][1:2]},
        "a vocabulary of one": lambda a: {**a, "logits": a["logits"][:, :1], "labels": a["labels"].clamp(max=0)},
        **LOSS_EDGES,
    },
)
