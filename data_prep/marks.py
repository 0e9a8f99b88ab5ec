"""What is known of each token of a fixed row besides its id, as one byte per token.

A row that arrives packed may hold several documents and padding. Its marks pass through all stages; when rows are laid
out, `spans` separates the documents, and a shard keeps their ends in `doc_end`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

LOSS = 1  # the token, as a label, bears loss
BEGINS = 2  # a document begins here; a row's first token begins one without it
PADDING = 4  # the token is no text


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
