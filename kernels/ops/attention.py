"""Causal self-attention: fewer key heads, a window and documents at choice. `kernels/reference.py:attention`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weftrain.kernels import reference
from weftrain.kernels.contract import Arguments, Attribute, Cost, Op, Size
from weftrain.kernels.ops._changes import element_set, no_rows, on_meta, other_dtype, replaced, shorter, so_many_tokens
from weftrain.kernels.ops._parts import Draw, in_float32, moved, read_all_write_like, size_bytes


def example(
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    *,
    kv_heads: int | None = None,
    window: int | None = None,
    documents: bool = False,
    long_document: bool = False,
) -> Callable[[str, torch.dtype], Arguments]:
    def build(device: str, dtype: torch.dtype) -> Arguments:
        draw = Draw(device, dtype)
        q, k, v = (draw.normal(batch, tokens, count, head_dim) for count in (heads, *(kv_heads or heads,) * 2))
        start = None
        if documents:  # a new document at about one token in nine
            begins = torch.rand(batch, tokens, generator=draw.generator) < 1 / 9
            start = torch.where(begins, torch.arange(tokens), 0).cummax(1).values.to(device, torch.int32)
        if long_document:  # the first row; in the others all but the first five and the last nine tokens
            position = torch.arange(tokens, dtype=torch.int32)
            start = torch.where(position < 5, 0, torch.where(position < tokens - 9, 5, tokens - 9))
            start = torch.minimum(start, position).expand(batch, tokens).clone()
            start[0] = 0
            start = start.to(device, torch.int32)
        return {"q": q, "k": k, "v": v, "scale": head_dim**-0.5, "document_start": start, "window": window}

    return build


def _score_products(arguments: Arguments) -> int:
    """Multiply-adds of one product of every query with the keys that it sees; documents would only lower it."""
    batch, tokens, heads, head_dim = arguments["q"].shape
    window = min(tokens, arguments["window"] or tokens)
    visible_pairs = window * (window + 1) // 2 + (tokens - window) * window
    return int(batch * heads * visible_pairs * head_dim)


def forward_flops(arguments: Arguments) -> int:
    return 4 * _score_products(arguments)  # q k^T and p v


def backward_cost(arguments: Arguments) -> tuple[int, int]:
    """q, k, v, out, dout -> dq, dk, dv: five products, the forward has two (Dao, arXiv 2307.08691, 3.1)."""
    moved = 4 * size_bytes(arguments["q"]) + 4 * size_bytes(arguments["k"])
    return moved, 10 * _score_products(arguments)


def _attention_of_finite(q: Tensor, k: Tensor, v: Tensor, scale: float, first: Tensor) -> Tensor:
    """All queries at once: of finite numbers, a weight of 0 is the same as not to appear. q [B, T, H_kv, G, D]."""
    position = torch.arange(q.shape[1])
    visible = (position <= position[:, None]) & (position >= first[:, :, None])  # [B, query, key]
    scores = torch.einsum("btngd,bsnd->bngts", q, k) * scale
    highest = scores.detach().masked_fill(~visible[:, None, None], float("-inf")).amax(-1, keepdim=True)
    weights = (scores - highest).clamp(max=0).exp() * visible[:, None, None]
    return torch.einsum("bngts,bsnd->btngd", weights / weights.sum(-1, keepdim=True), v)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, document_start: Tensor | None, window: int | None) -> Tensor:
    B, T, kv_heads, _ = k.shape
    first = torch.zeros(B, T, dtype=torch.int64) if document_start is None else document_start.long()
    if window is not None:
        first = torch.maximum(first, torch.arange(T) + 1 - window)
    grouped = q.unflatten(2, (kv_heads, -1))  # consecutive query heads share a key head

    def one(b: int, t: int) -> Tensor:
        seen = slice(int(first[b, t]), t + 1)
        weights = (torch.einsum("ngd,snd->sng", grouped[b, t], k[b, seen]) * scale).exp()
        return torch.einsum("sng,snd->ngd", weights / weights.sum(0), v[b, seen])

    if bool(torch.stack([tensor.isfinite().all() for tensor in (q, k, v)]).all()):
        return _attention_of_finite(grouped, k, v, scale, first).flatten(2, 3)
    return torch.stack([torch.stack([one(b, t) for t in range(T)]) for b in range(B)]).flatten(2, 3)


def _attributes(arguments: Arguments) -> dict[str, Attribute]:
    return {
        "head_dim": arguments["q"].shape[-1],
        "scale": arguments["scale"],
        "document_start": arguments["document_start"] is not None,
        "window": arguments["window"],
        "heads_per_key": arguments["q"].shape[2] // max(arguments["k"].shape[2], 1),
    }


OP = Op(
    reference.attention,
    exact,
    differentiable=("q", "k", "v"),
    examples={
        "odd": example(2, 63, 3, 20),
        "odd_blocks": example(1, 269, 1, 24),
        "odd_documents": example(2, 63, 3, 20, documents=True),
        "odd_one_token": example(2, 1, 2, 8),
        "odd_small": example(1, 19, 4, 8, kv_heads=2, window=11, documents=True),
        "odd_grouped": example(2, 37, 3, 20, kv_heads=1),
        "odd_window": example(1, 141, 2, 20, window=33),
        "odd_grouped_window": example(2, 45, 6, 20, kv_heads=2, window=7, documents=True),
        "edge_documents": example(1, 33, 4, 32, kv_heads=2, window=20, documents=True),
        "edge_window": example(1, 65, 2, 32, window=32),
        "edge_grouped_window": example(1, 129, 6, 32, kv_heads=3, window=64, documents=True),
        "edge": example(1, 64, 1, 64),
        "edge_above": example(1, 129, 1, 32, documents=True),
        "bench_70m": example(2, 512, 8, 64),
        "amber_7b": example(1, 2048, 32, 128),
        "amber_7b_16k": example(8, 2048, 32, 128),
    },
    bytes_moved=read_all_write_like("q"),
    flops=forward_flops,
    backward_cost=backward_cost,
    attributes={"head_dim": 128, "scale": 128**-0.5, "document_start": False, "window": None, "heads_per_key": 1},
    attributes_of=_attributes,
    wrong={
        "q of rank 3": replaced("q", lambda q: q[0]),
        "k of fewer tokens": replaced("k", lambda k: k[:, :-1]),
        "k of another head_dim": replaced("k", shorter),
        "k and v of a head too many": lambda arguments: {
            **arguments,
            **{name: torch.cat((arguments[name], arguments[name][:, :, :1]), 2) for name in ("k", "v")},
        },
        "k and v without heads": lambda arguments: {
            **arguments,
            **{name: arguments[name][:, :, :0] for name in ("k", "v")},
        },
        "a window of no key": replaced("window", lambda _: 0),
        "a negative window": replaced("window", lambda _: -1),
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
        "a window of one key": replaced("window", lambda _: 1),
        "a window longer than the row": replaced("window", lambda _: 10**6),
        "one key head": lambda arguments: {
            **arguments,
            **{name: arguments[name][:, :, :1] for name in ("k", "v")},
        },
        "every token a document": replaced(
            "document_start", lambda start: torch.arange(start.shape[1], device=start.device).int().expand(start.shape)
        ),
    },
    sizes={
        "tokens": Size(
            lambda n: example(2, n, 2, 16, kv_heads=1, long_document=True), (1_100,), (2_200,), accumulates=True
        ),
        "heads": Size(lambda n: example(1, 9, n, 16, kv_heads=1), (67,)),
        "head_dim": Size(lambda n: example(1, 17, 1, n), (272,)),
        "window": Size(lambda n: example(1, n + 70, 1, 16, window=n), (), (1_040,)),
    },
    ranges={"scores of 200": moved("q", times=60.0), "values of 10000": moved("v", times=1e4)},
    cost=Cost(
        example(1, 1536, 1, 16),
        # q, k, v and the output in fp32, and a statistic a query: nothing that grows with the square of the tokens
        kept_bytes=lambda arguments: 6 * in_float32(arguments, "q"),
        peak_bytes=lambda arguments: 4 * arguments["q"].shape[2] * arguments["q"].shape[1] ** 2,
    ),
)
