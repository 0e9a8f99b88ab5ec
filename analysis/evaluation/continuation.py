"""Continue text until a stop word, from a model that knows only tokens.

A row is continued piece by piece, each twice as long as the last, and its text is checked in between, so a row costs at
most twice the tokens it needed. Finished rows drop out of the batch, and a sampled row depends on its number among the
prompts: samples of one prompt may be drawn in pieces, but not rows of different prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

FIRST_PIECE = 32  # tokens


class TokenModel(Protocol):
    """What is needed of a model: weftrain.analysis.evaluation.generation.Generator, or a test's own."""

    def log_likelihoods(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 16
    ) -> list[tuple[float, bool]]:
        """(context, continuation) -> sum of ln p over the continuation, and whether greedy decoding gives it."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop_ids: Collection[int] = (),
        batch_size: int = 64,
    ) -> list[list[int]]:
        """The new tokens of each prompt, without the stop id that ended it."""
        ...


def continue_in_pieces(
    model: TokenModel,
    prompts: Sequence[Sequence[int]],
    count: int,
    has_ended: Callable[[int, Sequence[int]], bool],
    *,
    stop_ids: Collection[int],
    batch_size: int,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """At most `count` new tokens of each prompt, until has_ended(its number, its new tokens) or one of stop_ids.

    The last piece of a row may run past its end. Raises what the model raises.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    going, piece, made = list(range(len(prompts))), FIRST_PIECE, 0
    while going and made < count:
        piece = min(piece, count - made)
        more = model.generate(
            [[*prompts[index], *rows[index]] for index in going],
            piece,
            temperature=temperature,
            top_p=top_p,
            seed=derived_seed(seed, made),  # or each piece would draw the same numbers again
            stop_ids=stop_ids,
            batch_size=batch_size,
        )
        for index, new in zip(going, more, strict=True):
            rows[index] += new
        going = [
            index
            for index, new in zip(going, more, strict=True)
            if len(new) == piece and not has_ended(index, rows[index])
        ]
        made, piece = made + piece, piece * 2
    return rows


def derived_seed(seed: int, *of: object) -> int:
    """A seed in 0..2^63-1 derived from another and from its purpose."""
    digest = hashlib.sha256(repr((seed, *of)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
