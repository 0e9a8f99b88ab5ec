"""The tensors of a revision by the headers of its safetensors files: a few kilobytes of each file, and no weights."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from weftrain.core.formats.tensor_file import MAX_FOREIGN_HEADER_BYTES, TensorLayout, parse_header
from weftrain.exchange.audit.series import Revision, Series

T = TypeVar("T")
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor -> dtype, shape
_FIRST_BYTES = 64 << 10  # a 7B's header takes 30 kB
_LARGE_BYTES = 1 << 20  # one header beyond it is parsed at a time: parsed, it takes many times its bytes
_SHARD = re.compile(r"(.*)-(\d{1,6})-of-(\d{1,6})(\.\w+)")
_parsing = threading.Lock()


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a revision's weights lie: tensor -> (file, its place there)."""

    places: Mapping[str, tuple[str, TensorLayout]]

    @property
    def shapes(self) -> Shapes:
        return {name: (place.dtype, place.shape) for name, (_, place) in self.places.items()}

    @property
    def digest(self) -> str:
        """Equal for equal names, dtypes and shapes."""
        return hashlib.sha256(json.dumps(sorted(self.shapes.items())).encode()).hexdigest()


class Kept(Generic[T]):
    """Values by their digest, from any thread. Only the newest are kept, so that memory is bounded. sized: how much of
    `limit` one takes.
    """

    def __init__(self, limit: int, sized: Callable[[T], int]) -> None:
        self._kept: OrderedDict[str, T] = OrderedDict()
        self._limit, self._sized, self._size = limit, sized, 0
        self._lock = threading.Lock()

    def keep(self, digest: str, value: T) -> None:
        with self._lock:
            self._size += 0 if digest in self._kept else self._sized(value)
            self._kept[digest] = value
            self._kept.move_to_end(digest)
            while self._size > self._limit and len(self._kept) > 1:
                self._size -= self._sized(self._kept.popitem(last=False)[1])

    def get(self, digest: str) -> T | None:
        with self._lock:
            return self._kept.get(digest)


def read_layout(series: Series, revision: Revision) -> Layout | None:
    """A revision's layout; None where it has no safetensors files here. Raises ValueError for a header that is wrong,
    and what reading raises.
    """
    if revision.pickled or not revision.weights or not revision.here:
        return None
    places: dict[str, tuple[str, TensorLayout]] = {}
    for file in revision.weights:
        try:
            found = _read_one(series, revision, file.path, file.size)
        except ValueError as error:
            raise ValueError(f"{file.path}: {error}") from None
        for name, place in found.items():
            if not name.startswith(series.prefix):
                continue
            if name in places:
                raise ValueError(f"tensor '{name[:80]}' is in {places[name][0]} and in {file.path}")
            places[name] = (file.path, place)
    return Layout(places)


def _read_one(series: Series, revision: Revision, path: str, size: int) -> dict[str, TensorLayout]:
    begin = series.read(revision, path, 0, min(size, _FIRST_BYTES))
    if len(begin) < 8:
        raise ValueError(f"holds {len(begin)} bytes, which is no safetensors file")
    length = int.from_bytes(begin[:8], "little")
    if length > min(MAX_FOREIGN_HEADER_BYTES, size - 8):
        raise ValueError(f"claims a header of {length} bytes in a file of {size}")
    if len(begin) < 8 + length:
        begin += series.read(revision, path, len(begin), 8 + length)
    if len(begin) < 8 + length:
        raise ValueError(f"ends {8 + length - len(begin)} bytes too early")
    header = begin[8 : 8 + length]
    if length < _LARGE_BYTES:
        return parse_header(header, size, foreign=True)
    with _parsing:
        return parse_header(header, size, foreign=True)


def missing_files(revision: Revision) -> list[str]:
    """The files of weights that a name such as `model-00001-of-00003` promises and the list lacks."""
    there = {file.path for file in revision.weights}
    missing = []
    for stem, total, suffix in {
        (match[1], match[3], match[4]) for path in there if (match := _SHARD.fullmatch(path)) is not None
    }:
        first = 0 if f"{stem}-{'0' * len(total)}-of-{total}{suffix}" in there else 1
        for number in range(first, first + min(int(total), 10_000)):
            name = f"{stem}-{number:0{len(total)}}-of-{total}{suffix}"
            if name not in there:
                missing.append(name)
    return sorted(missing)
