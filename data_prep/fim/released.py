"""Fill-in-the-middle as CrystalCoder's data was made, row by row after packing: for comparison, not for new training.

Reproduces `fim_hdf5*.py` of LLM360/crystalcoder-data-prep, itself after EleutherAI/gpt-neox's branch FIM-clean. That
repository's README says token level, but its code cuts at characters; Model Zoo's own later FIM, which saves the
control tokens by cutting suffixes, was not used. As in the released code:
- A row's S *inputs* are transformed; the last label, the next row's first input, is thrown away and made anew.
- The inputs are split at eos. Each piece is transformed with probability `rate`: decoded, cut at two of its len(text) +
  1 positions, and its three parts are encoded separately. So ids differ around a cut, and where a row begins inside a
  character.
- An empty piece between two ends loses its eos too. The piece after the last eos may be transformed though it is empty.
- An eos follows the whole, and the result is cut to S inputs and labels. What is lost is the end of the row's last
  document: its middle, the part to be filled in. A shorter result is filled up with fim_pad, which bears no loss.
- So an unchanged row's last label is eos, although the text continues.

Different here:
- They seeded NumPy's global generator with seed + a process or file number, so results depended on their number. Here
  the caller gives a generator for each row; the draws have the same distribution only.
- They matched control tokens in text; here text that spells one stays text (tokens/tokenization.py).
- Where padding begins they have the label eos but the input fim_pad. A row here is one sequence, so that input is eos
  as well; no label that bears loss follows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from weftrain.data_prep.fim.exact import pad_id
from weftrain.data_prep.tokens.markers import FimIds
from weftrain.data_prep.tokens.tokenization import TextEncoder


class ReleasedRow(NamedTuple):
    """tokens [S + 1], the last `padding` of them fim_pad and without loss; and what happened to the row's documents.

    document_lengths: tokens left of each document in the row, in order; with padding they sum to S + 1. overflowed: the
    row was cut. segments: pieces that FIM was drawn for; segments_changed: those that cannot be restored from the row,
    because they were encoded differently (segments_encoded_anew) or cut; lost_middle: those whose fim_middle was cut
    off.
    """

    tokens: np.ndarray
    document_lengths: tuple[int, ...]
    overflowed: bool
    segments: int
    segments_changed: int
    lost_middle: int
    segments_encoded_anew: int
    padding: int


class _Segment(NamedTuple):
    """A piece of a row's inputs between ends. parts: prefix, middle and suffix as text, where FIM was drawn."""

    tokens: np.ndarray
    ends: bool  # with eos, which is not among the tokens
    parts: tuple[str, ...]
    spm: bool


def released_row(
    tokens: np.ndarray, encoder: TextEncoder, ids: FimIds, rate: float, spm_share: float, random: np.random.Generator
) -> ReleasedRow:
    """Transform one packed row [S + 1] as the released scripts do. random: seeded by (seed, row). Raises DataError."""
    pad = pad_id(ids)
    end = encoder.markers.separator
    segments = [_drawn(piece, ends, encoder, rate, spm_share, random) for piece, ends in _pieces(tokens[:-1], end)]
    texts = [text for segment in segments for text in segment.parts]
    encoded = iter(encoder.encode(texts, [f"part {number} of a row for released FIM" for number in range(len(texts))]))
    eos = np.array([end], tokens.dtype)
    made: list[np.ndarray] = []
    ends: list[int] = []
    drawn = changed = anew = lost = length = 0
    for segment in segments:
        result = segment.tokens
        if segment.parts:
            prefix, middle, suffix = (next(encoded) for _ in segment.parts)
            result, middle_place = _arranged(prefix, middle, suffix, segment.spm, ids)
            different = not np.array_equal(np.concatenate([prefix, middle, suffix]), segment.tokens)
            drawn += 1
            anew += different
            changed += different or length + len(result) > len(tokens)
            lost += length + middle_place >= len(tokens)
        if segment.ends and len(segment.tokens):
            result = np.concatenate([result, eos])
        made.append(result)
        length += len(result)
        ends.append(length)
    ends[-1] += 1  # the eos that follows the whole
    whole = np.concatenate([*made, eos]).astype(tokens.dtype)
    padding = max(0, len(tokens) - len(whole))
    row = np.concatenate([whole[: len(tokens)], np.full(padding, pad, tokens.dtype)])
    lengths = np.diff(np.minimum(ends, len(tokens)), prepend=0)
    return ReleasedRow(row, tuple(lengths.tolist()), len(whole) > len(tokens), drawn, changed, lost, anew, padding)


def _pieces(inputs: np.ndarray, eos_id: int) -> Iterator[tuple[np.ndarray, bool]]:
    """The pieces between the ends in inputs [S], and whether an end follows each; the last may be empty."""
    start = 0
    for end in np.flatnonzero(inputs == eos_id).tolist():
        yield inputs[start:end], True
        start = end + 1
    yield inputs[start:], False


def _drawn(
    tokens: np.ndarray, ends: bool, encoder: TextEncoder, rate: float, spm_share: float, random: np.random.Generator
) -> _Segment:
    """Draw whether, where and in which order; nothing is drawn for an empty piece that has an end."""
    if (ends and not len(tokens)) or random.random() >= rate:
        return _Segment(tokens, ends, (), False)
    text = encoder.decode(tokens)
    a, b = sorted(random.integers(0, len(text) + 1, 2).tolist())
    return _Segment(tokens, ends, (text[:a], text[a:b], text[b:]), bool(random.random() < spm_share))


def _arranged(
    prefix: np.ndarray, middle: np.ndarray, suffix: np.ndarray, spm: bool, ids: FimIds
) -> tuple[np.ndarray, int]:
    """The parts with their control tokens, and where fim_middle stands."""
    p, m, s = (np.array([token], prefix.dtype) for token in (ids.prefix, ids.middle, ids.suffix))
    if spm:
        return np.concatenate([p, s, suffix, m, prefix, middle]), len(suffix) + 2
    return np.concatenate([p, prefix, s, suffix, m, middle]), len(prefix) + len(suffix) + 2
