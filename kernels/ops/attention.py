"""Causal self-attention, optionally within documents. The formula is `kernels/reference.py:attention`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weftrain.kernels import reference
from weftrain.kernels.contract import Arguments, Op
from weftrain.kernels.ops._changes import element_set, no_rows, on_meta, other_dtype, replaced, shorter, so_many_tokens
from weftrain.kernels.ops._parts import Draw, read_all_write_like, size_bytes


def example(
    batch: int, tokens: int, heads: int, head_dim: int, *, documents: bool = False
) -> Callable[[str, torch.dtype], Arguments]:
    def build(device: str, dtype: torch.dtype) -> Arguments:
        draw = Draw(device, dtype)
        q, k, v = (draw.normal(batch, tokens, heads, head_dim) for _ in range(3))
        start = None
        if documents:  # a new document at about one token in nine
            begins = torch.rand(batch, tokens, generator=draw.generator) < 1 / 9
            start = torch.where(begins, torch.arange(tokens), 0).cummax(1).values.to(device, torch.int32)
        return {"q": q, "k": k, "v": v, "scale": head_dim**-0.5, "document_start": start}

    return build


def forward_flops(arguments: Arguments) -> int:
    batch, tokens, heads, head_dim = arguments["q"].shape
    visible_pairs = tokens * (tokens + 1) // 2  # documents would only lower it
    return 4 * batch * heads * visible_pairs * head_dim  # q k^T and p v


def backward_cost(arguments: Arguments) -> tuple[int, int]:
    """q, k, v, out, dout -> dq, dk, dv: five products, the forward has two (Dao, arXiv 2307.08691, 3.1)."""
    batch, tokens, heads, head_dim = arguments["q"].shape
    visible_pairs = tokens * (tokens + 1) // 2
    return 8 * size_bytes(arguments["q"]), 10 * batch * heads * visible_pairs * head_dim


def _attention_of_finite(q: Tensor, k: Tensor, v: Tensor, scale: float, document_start: Tensor | None) -> Tensor:
    """All queries at once: of finite numbers, a weight of 0 is the same as not to appear."""
    position = torch.arange(q.shape[1])
    visible = position[None, None, :] <= position[None, :, None]  # [1, query, key]
    if document_start is not None:
        visible = visible & (position[None, None, :] >= document_start[:, :, None])
    weights = torch.einsum("bthd,bshd->bhts", q, k).mul(scale).exp() * visible[:, None]
    return torch.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdim=True), v)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, document_start: Tensor | None) -> Tensor:
    def one(b: int, t: int) -> Tensor:
        seen = slice(0 if document_start is None else int(document_start[b, t]), t + 1)
        weights = (torch.einsum("hd,shd->sh", q[b, t], k[b, seen]) * scale).exp()
        return torch.einsum("sh,shd->hd", weights / weights.sum(0), v[b, seen])

    if bool(torch.stack([tensor.isfinite().all() for tensor in (q, k, v)]).all()):
        return _attention_of_finite(q, k, v, scale, document_start)
    return torch.stack([torch.stack([one(b, t) for t in range(q.shape[1])]) for b in range(q.shape[0])])


OP = Op(
    reference.attention,
    exact,
    differentiable=("q", "k", "v"),
    examples={
        "odd": example(2, 63, 3, 20),
        "odd_blocks": example(1, 269, 1, 24),
        "odd_documents": example(2, 63, 3, 20, documents=True),
        "odd_one_token": example(2, 1, 2, 8),
        "odd_small": example(1, 19, 2, 8, documents=True),
        "edge_documents": example(1, 33, 2, 32, documents=True),
        "edge": example(1, 64, 1, 64),
        "edge_above": example(1, 129, 1, 32, documents=True),
        "bench_70m": example(2, 512, 8, 64),
        "amber_7b": example(1, 2048, 32, 128),
    },
    bytes_moved=read_all_write_like("q"),
    flops=forward_flops,
    backward_cost=backward_cost,
    attributes={"head_dim": 128, "scale": 128**-0.5, "document_start": False},
    attributes_of=lambda arguments: {
        "head_dim": arguments["q"].shape[-1],
        "scale": arguments["scale"],
        "document_start": arguments["document_start"] is not None,
    },
    wrong={
        "q of rank 3": replaced("q", lambda q: q[0]),
        "k of fewer tokens": replaced("k", lambda k: k[:, :-1]),
        "v of fewer heads": replaced("v", lambda v: v[:, :, :-1]),
        "k of another dtype": replaced("k", other_dtype),
        "k on another device": replaced("k", on_meta),
        "document_start of int64": replaced("document_start", torch.Tensor.long),
        "document_start of too few tokens": replaced("document_start", shorter),
        "document_start on another device": replaced("document_start", on_meta),
    },
    wrong_values={
        "document_start in the future": replaced("document_start", element_set((0, 3), 4)),
        "document_start negative": replaced("document_start", element_set((0, 3), -1)),
    },
    edges={
        "no tokens": so_many_tokens(0),
        "one token": so_many_tokens(1),
        "two tokens": so_many_tokens(2),
        "no batch": no_rows("q", "k", "v", "document_start"),
        "no documents": replaced("document_start", lambda _: None),
        "every token a document": replaced(
            "document_start", lambda start: torch.arange(start.shape[1], device=start.device).int().expand(start.shape)
        ),
    },
)
