"""A sample of a revision's weights: a piece of each of a few tensors, the same pieces in every revision.

A norm of the same elements shows a jump as well as the norm of all of them, and takes a megabyte instead of gigabytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from weftrain.core.formats.tensor_file import DTYPES
from weftrain.exchange.audit.headers import Layout
from weftrain.exchange.audit.series import Revision, Series
from weftrain.exchange.layouts import is_buffer

MATRICES, VECTORS = 12, 4
PIECE_BYTES = 64 << 10
KEY_BYTES = 512  # of each of three places in a tensor
_FLOATS = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")
_NUMBER = re.compile(r"\d+")
Array = np.ndarray[tuple[int], np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Sample:
    """pieces: tensor -> its first elements, rounded to bf16 and as float32, so that copies in two dtypes are equal."""

    pieces: Mapping[str, Array]

    @property
    def not_finite(self) -> list[str]:
        return [name for name, piece in self.pieces.items() if not np.isfinite(piece).all()]

    @property
    def identity(self) -> str:
        """Equal for equal elements in every piece."""
        found = hashlib.sha256()
        for name in sorted(self.pieces):
            found.update(name.encode() + b"\0" + self.pieces[name].tobytes())
        return found.hexdigest()

    def norms(self) -> dict[str, float]:
        """Tensor -> the root mean square of its piece."""
        return {
            name: float(np.sqrt(np.mean(np.square(piece, dtype=np.float64)))) for name, piece in self.pieces.items()
        }

    def distance(self, other: Sample) -> float:
        """The norm of the difference as a share of this sample's own; NaN where nothing can be compared."""
        common = [
            name
            for name, piece in self.pieces.items()
            if name in other.pieces and other.pieces[name].size == piece.size
        ]
        apart = sum(
            float(np.sum(np.square(self.pieces[name] - other.pieces[name], dtype=np.float64))) for name in common
        )
        own = sum(float(np.sum(np.square(self.pieces[name], dtype=np.float64))) for name in common)
        return (apart / own) ** 0.5 if own > 0 else float("nan")


def chosen(layout: Layout) -> list[str]:
    """The tensors of a sample, a function of names and shapes: matrices and vectors at even distances in the model."""
    names = sorted(
        (name for name, (_, place) in layout.places.items() if place.dtype in _FLOATS and not is_buffer(name)),
        key=lambda name: _NUMBER.sub(lambda digits: digits[0].zfill(8), name),
    )
    matrices = [name for name in names if len(layout.places[name][1].shape) >= 2]
    vectors = [name for name in names if len(layout.places[name][1].shape) == 1]
    return [*_evenly(matrices, MATRICES), *_evenly(vectors, VECTORS)]


def _evenly(names: list[str], most: int) -> list[str]:
    if len(names) <= most:
        return names
    return [names[index * (len(names) - 1) // (most - 1)] for index in range(most)]


def read_sample(series: Series, revision: Revision, layout: Layout) -> Sample:
    """A revision's sample. Raises ValueError for a file that ends before its tensors do, and what reading raises."""
    wanted = []
    for name in chosen(layout):
        file, place = layout.places[name]
        size = DTYPES[place.dtype].itemsize
        if count := min(place.end - place.begin, PIECE_BYTES) // size * size:
            wanted.append((file, place.begin, place.begin + count, name))
    pieces = {}
    for file, together in _near(wanted):
        start, stop = together[0][1], max(end for _, _, end, _ in together)
        data = bytearray(series.read(revision, file, start, stop))
        if len(data) != stop - start:
            raise ValueError(f"{file}: ends within tensor '{together[-1][3][:80]}'")
        for _, begin, end, name in together:
            dtype = DTYPES[layout.places[name][1].dtype]
            values = torch.frombuffer(data, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=begin - start)
            pieces[name] = values.to(torch.bfloat16).float().numpy()
    return Sample(pieces)


def _near(wanted: list[tuple[str, int, int, str]]) -> Iterator[tuple[str, list[tuple[str, int, int, str]]]]:
    """(file, begin, end, tensor) of pieces, those together that one request may read: they are near each other."""
    together: list[tuple[str, int, int, str]] = []
    for piece in sorted(wanted):
        if together and (piece[0] != together[-1][0] or piece[1] > together[-1][2] + PIECE_BYTES):
            yield together[0][0], together
            together = []
        together.append(piece)
    if together:
        yield together[0][0], together


def tensor_keys(series: Series, revision: Revision, layout: Layout) -> dict[str, str]:
    """Tensor -> a hash of three places in it: different for different tensors of weights, with certainty enough to
    look closer.
    """
    keys = {}
    for name, (file, place) in layout.places.items():
        if is_buffer(name):
            continue
        found = hashlib.sha256(f"{place.dtype} {place.shape}".encode())
        last = max(place.begin, place.end - KEY_BYTES)
        for start in sorted({place.begin, (place.begin + last) // 2, last}):
            found.update(series.read(revision, file, start, min(place.end, start + KEY_BYTES)))
        keys[name] = found.hexdigest()
    return keys


def tensor_hash(series: Series, revision: Revision, layout: Layout, name: str) -> str:
    """SHA-256 of all bytes of one tensor, read in blocks."""
    file, place = layout.places[name]
    found = hashlib.sha256()
    for start in range(place.begin, place.end, 16 << 20):
        found.update(series.read(revision, file, start, min(place.end, start + (16 << 20))))
    return found.hexdigest()
