"""What is known of each token besides its id: planes, each an array beside the ids; and what the bits of marks mean.

A document of which nothing is known has no plane; beside another that has one, its tokens have the plane's plain value.
Weights say by what a token's loss is multiplied; 0 makes it bear none (stages/write.py). Marks are one byte per token:
a row that arrives packed may hold several documents and padding. When rows are laid out, `spans` separates the
documents, and a shard keeps their ends in `doc_end`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

LOSS = 1  # the token, as a label, bears loss
BEGINS = 2  # a document begins here; a row's first token begins one without it
PADDING = 4  # the token is no text

MARKS, WEIGHTS = "marks", "weights"
PLANES: dict[str, tuple[np.dtype[Any], int]] = {  # name -> (type, plain value)
    MARKS: (np.dtype(np.uint8), LOSS),
    WEIGHTS: (np.dtype(np.float32), 1),
}


def plain(name: str, length: int) -> np.ndarray:
    """A plane of so many tokens of which nothing is known."""
    dtype, value = PLANES[name]
    return np.full(length, value, dtype)


def add_plane(
    planes: dict[str, list[np.ndarray]], name: str, plane: np.ndarray | None, tokens: Sequence[np.ndarray]
) -> None:
    """Add a document's plane, or None, to those of the documents before it. tokens: of all of them, its own last."""
    if name not in planes:
        if plane is None:
            return
        planes[name] = [plain(name, len(ids)) for ids in tokens[:-1]]
    planes[name].append(plain(name, len(tokens[-1])) if plane is None else plane.astype(PLANES[name][0]))


class Span(NamedTuple):
    """Tokens start..stop-1 of a row: one document, or the padding."""

    start: int
    stop: int
    padding: bool


def spans(marks: np.ndarray) -> Iterator[Span]:
    """uint8 [n] marks of a row -> its documents and its padding, in order."""
    is_padding = (marks & PADDING) != 0
    begins = ((marks & BEGINS) != 0) & ~is_padding
    begins[1:] |= is_padding[1:] != is_padding[:-1]
    begins[:1] = True
    starts = np.flatnonzero(begins).tolist()
    for start, stop in zip(starts, [*starts[1:], len(marks)], strict=True):
        yield Span(start, stop, bool(is_padding[start]))
