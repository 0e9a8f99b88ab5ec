"""Token losses of logits. The formula is `kernels/reference.py:cross_entropy`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weftrain.kernels import reference
from weftrain.kernels.contract import Arguments, Cost, Op, Size
from weftrain.kernels.ops._changes import (
    LOSS_EDGES,
    WRONG_LABEL_VALUES,
    WRONG_LABELS,
    WRONG_SMOOTHING,
    WRONG_SOFTCAP,
    WRONG_TOKEN_WEIGHTS,
    no_rows,
    replaced,
)
from weftrain.kernels.ops._parts import (
    LOSS_DEFAULTS,
    Draw,
    elements,
    in_float32,
    loss_attributes,
    moved,
    read_all,
    size_bytes,
)


def example(
    rows: int, vocab: int, *, std: float = 3.0, weighted: bool = False, **statics: float
) -> Callable[[str, torch.dtype], Arguments]:
    def build(device: str, dtype: torch.dtype) -> Arguments:
        draw = Draw(device, dtype)
        arguments: Arguments = {"logits": draw.normal(rows, vocab, std=std), "labels": draw.labels(rows, vocab)}
        if weighted:
            arguments["token_weights"] = draw.token_weights(arguments["labels"])
        return {**arguments, **statics}

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
    label_smoothing: float = 0.0,
    token_weights: Tensor | None = None,
) -> Tensor:
    kept = labels != ignore_index
    rows = logits[kept] * logits_scale
    if logits_softcap is not None:
        rows = logits_softcap * (rows / logits_softcap).tanh()
    highest = rows.detach().amax(-1, keepdim=True) if len(rows) else rows.new_zeros((0, 1))
    highest = highest.masked_fill(~rows.detach().isfinite().all(-1, keepdim=True), 0)  # of an Inf nothing is taken away
    log_sum = (rows - highest).exp().sum(-1).log() + highest.squeeze(-1)
    targets = rows[torch.arange(len(rows)), labels[kept]]
    if label_smoothing:
        targets = targets * (1 - label_smoothing) + rows.sum(-1) * (label_smoothing / rows.shape[1])
    losses = log_sum - targets + (z_loss * log_sum**2 if z_loss else 0)
    if token_weights is not None:
        losses = losses * token_weights[kept]
    return logits.new_zeros(labels.shape).index_put((kept.nonzero().squeeze(-1),), losses)


OP = Op(
    reference.cross_entropy,
    exact,
    differentiable=("logits",),
    examples={
        "odd": example(29, 101),
        "odd_scaled": example(29, 101, logits_scale=0.13875, z_loss=1e-2),
        "odd_capped": example(29, 101, logits_scale=0.7, z_loss=1e-2, logits_softcap=2.5),
        "odd_smoothed": example(29, 101, logits_scale=0.7, z_loss=1e-2, label_smoothing=0.1),
        "odd_weighted": example(
            29, 101, weighted=True, logits_scale=0.7, z_loss=1e-2, logits_softcap=2.5, label_smoothing=0.3
        ),
        "edge": example(9, 1024, std=1.0),
        "edge_above": example(16, 8193, std=1.0, logits_scale=0.7, z_loss=1e-3),
        "edge_weighted": example(16, 8193, std=1.0, weighted=True, label_smoothing=0.1),
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
        **WRONG_SMOOTHING,
        **WRONG_TOKEN_WEIGHTS,
    },
    wrong_values=WRONG_LABEL_VALUES,
    edges={
        "no rows": no_rows("logits", "labels"),
        "one row": lambda a: {**a, "logits": a["logits"][1:2], "labels": a["labels"][1:2]},
        "a vocabulary of one": lambda a: {**a, "logits": a["logits"][:, :1], "labels": a["labels"].clamp(max=0)},
        **LOSS_EDGES,
    },
    sizes={
        "rows": Size(lambda n: example(n, 11), (8_000,), (70_001,)),
        "vocab_size": Size(lambda n: example(5, n), (70_001,)),
    },
    ranges={
        "logits + 30000": moved("logits", by=3e4),
        "logits x 2000": moved("logits", times=2000.0),
    },
    cost=Cost(
        example(128, 4096),
        kept_bytes=lambda arguments: 3 * in_float32(arguments, "logits"),
        peak_bytes=lambda arguments: 7 * in_float32(arguments, "logits"),
    ),
)
