"""Measures what fill-in-the-middle does to a text, with the released scripts' method and the exact one.

The exact method is measured too: each document is transformed, packed, found in the stream, restored and compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weftrain.core.errors import DataError
from weftrain.data_prep.fim import exact as fim
from weftrain.data_prep.fim.released import released_row
from weftrain.data_prep.tokens.tokenization import TextEncoder

# Of CrystalCoder's released scripts on its own data: segments encoded otherwise, rows that overflow, segments without
# their fim_middle.
RELEASED_SHARES = (0.39, 0.96, 0.02)


@dataclass(frozen=True)
class FimDamage:
    """segments: transformed documents or pieces; changed: those whose own tokens cannot be restored. rows, overflowed:
    packed rows, and those that were cut. lost_middle: segments whose fim_middle was cut off.
    """

    mode: str
    segments: int
    changed: int
    rows: int
    overflowed: int
    lost_middle: int

    @property
    def shares(self) -> tuple[float, float, float]:
        """changed, overflowed and lost_middle as shares."""
        segments = max(1, self.segments)
        return self.changed / segments, self.overflowed / max(1, self.rows), self.lost_middle / segments


def fim_damage(
    documents: Sequence[np.ndarray],
    encoder: TextEncoder,
    sequence_length: int,
    rate: float,
    spm_share: float,
    seed: int = 0,
) -> tuple[FimDamage, FimDamage]:
    """(released, exact) over documents without start and end tokens. Raises DataError for less than one row."""
    bos, eos = encoder.around()
    stream = np.concatenate([part for tokens in documents for part in (bos, tokens.astype(encoder.dtype), eos)])
    rows = (len(stream) - 1) // sequence_length
    if rows < 1:
        raise DataError(f"{len(stream)} tokens do not fill one row of {sequence_length} + 1; give more text")
    return _released(stream, rows, encoder, sequence_length, rate, spm_share, seed), _exact(
        documents, encoder, sequence_length, rate, spm_share, seed
    )


def _released(
    stream: np.ndarray, rows: int, encoder: TextEncoder, sequence_length: int, rate: float, spm_share: float, seed: int
) -> FimDamage:
    ids = fim.fim_ids(encoder)
    if ids.pad is None:  # what fills a row that became shorter counts for nothing
        ids = ids._replace(pad=encoder.markers.separator)
    made = [
        released_row(
            stream[row * sequence_length : (row + 1) * sequence_length + 1],
            encoder,
            ids,
            rate,
            spm_share,
            np.random.default_rng([seed, row]),
        )
        for row in range(rows)
    ]
    return FimDamage(
        "released",
        sum(row.segments for row in made),
        sum(row.segments_encoded_anew for row in made),
        rows,
        sum(row.overflowed for row in made),
        sum(row.lost_middle for row in made),
    )


def _exact(
    documents: Sequence[np.ndarray],
    encoder: TextEncoder,
    sequence_length: int,
    rate: float,
    spm_share: float,
    seed: int,
) -> FimDamage:
    """Transform, join, cut into rows, join again, and restore every document."""
    ids, (bos, eos) = fim.fim_ids(encoder), encoder.around()
    draws, pieces = [], []
    for tokens in documents:
        content = hashlib.sha256(tokens.astype("<i4").tobytes()).digest()
        draws.append(fim.draw(seed, content, 0, rate, spm_share, len(tokens)))
        pieces += [bos, fim.transform(tokens.astype(encoder.dtype), *draws[-1], ids), eos]
    stream = np.concatenate(pieces)
    rows = -(-(len(stream) - 1) // sequence_length)  # the last one short: nothing of the measured documents is left out
    packed = [stream[row * sequence_length : (row + 1) * sequence_length + 1] for row in range(rows)]
    again = np.concatenate([packed[0], *(row[1:] for row in packed[1:])])
    changed = lost = start = 0
    for tokens, drawn in zip(documents, draws, strict=True):
        length = len(tokens) + (fim.NUM_SENTINELS if drawn[0] != fim.PLAIN else 0)
        start += len(bos)
        found = again[start : start + length]
        if drawn[0] != fim.PLAIN:
            changed += not np.array_equal(fim.restore(found, *drawn, ids), tokens)
            lost += int((found == ids.middle).sum()) != 1
        start += length + len(eos)
    transformed = sum(drawn[0] != fim.PLAIN for drawn in draws)
    return FimDamage("exact", transformed, changed, rows, int(len(again) < len(stream)), lost)


def damage_lines(released: FimDamage, exact: FimDamage) -> list[str]:
    """A table with the released scripts' own figures beside ours."""
    names = ("segments encoded otherwise", "rows that are cut", "segments without their fim_middle")
    lines = [f"{'':<34}{'released, theirs':>18}{'released, here':>16}{'exact':>8}"]
    for name, theirs, ours, none in zip(names, RELEASED_SHARES, released.shares, exact.shares, strict=True):
        lines.append(f"{name:<34}{theirs:>18.0%}{ours:>16.1%}{none:>8.1%}")
    lines.append(
        f"here: {released.segments:,} segments in {released.rows:,} rows released, {exact.segments:,} in "
        f"{exact.rows:,} exact"
    )
    return lines
