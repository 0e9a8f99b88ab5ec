"""Reads a file once and hashes it as a whole and in parts, in bounded memory.

scanned = scan(path, [ByteRange("header", 0, 96), ByteRange("weights/norm.weight", 96, 1120)], pool)

`pool` does the hashing, which releases the interpreter's lock: the file and its parts are hashed at the same time,
while the next block is read. So one large file keeps two cores busy, and several files keep all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from weftrain.core.formats.plain_file import open_plain

BLOCK_BYTES = 4 << 20  # two of them are in memory for each file that is being read
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class ByteRange:
    """The bytes [begin, end) of a file. rounded: they are fp32 values, and these in bfloat16 are hashed as well."""

    name: str
    begin: int
    end: int
    rounded: bool = False


@dataclass(frozen=True)
class Scanned:
    """A file that was read: its bytes, its SHA-256, those of its parts, and those of the parts in bfloat16."""

    size: int
    sha256: str
    parts: Mapping[str, str] = field(default_factory=dict)
    rounded: Mapping[str, str] = field(default_factory=dict)


def scan(
    path: Path,
    parts: Sequence[ByteRange],
    pool: Executor,
    progress: Callable[[int], None] = lambda num_bytes: None,
    limit_bytes: int | None = None,
) -> Scanned:
    """Read a plain file from its beginning to its end, or to the first block beyond `limit_bytes`.

    parts: in the order of their bytes, without overlap; what lies beyond the end of the file has the hash of what is
    there. progress: called with the bytes of each block. Raises OSError, ValueError for parts out of order.
    """
    whole, split = hashlib.sha256(), _PartHashes(parts)
    blocks, at, under_way = (bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)), 0, list[Future[None]]()
    try:
        with open_plain(path, follow=False, buffering=0) as file:
            while limit_bytes is None or at <= limit_bytes:
                block = memoryview(blocks[at // BLOCK_BYTES % 2])
                count = _fill(file, block)
                for job in under_way:
                    job.result()
                under_way = []
                if not count:
                    break
                under_way = [pool.submit(whole.update, block[:count])]
                if parts:
                    under_way.append(pool.submit(split.update, at, block[:count]))
                at += count
                progress(count)
                if count < BLOCK_BYTES:
                    break
    finally:
        for job in under_way:
            job.result()
    return Scanned(at, whole.hexdigest(), *split.results())


def _fill(file: Any, block: memoryview) -> int:
    """Read until the block is full or the file ends; the bytes read."""
    done = 0
    while done < len(block) and (count := cast(int, file.readinto(block[done:]))):
        done += count
    return done


class _PartHashes:
    """Hashes the parts of a file as its blocks come, in their order."""

    def __init__(self, parts: Sequence[ByteRange]) -> None:
        if any(after.begin < before.end for before, after in pairwise(parts)):
            raise ValueError("parts of a file overlap or are out of order")
        self._parts, self._next = parts, 0
        self._digest, self._rounded, self._rest = hashlib.sha256(), hashlib.sha256(), b""
        self._found: dict[str, str] = {}
        self._found_rounded: dict[str, str] = {}

    def update(self, at: int, block: memoryview) -> None:
        """The bytes from `at` on."""
        stop = at + len(block)
        while self._next < len(self._parts) and (part := self._parts[self._next]).begin < stop:
            inside = block[max(0, part.begin - at) : part.end - at]
            self._digest.update(inside)
            if part.rounded:
                self._round(inside)
            if part.end > stop:
                return
            self._end_part()

    def results(self) -> tuple[dict[str, str], dict[str, str]]:
        while self._next < len(self._parts):
            self._end_part()
        return self._found, self._found_rounded

    def _end_part(self) -> None:
        part = self._parts[self._next]
        self._found[part.name] = self._digest.hexdigest()
        if part.rounded:
            self._found_rounded[part.name] = self._rounded.hexdigest()
        self._digest, self._rounded, self._rest = hashlib.sha256(), hashlib.sha256(), b""
        self._next += 1

    def _round(self, data: memoryview) -> None:
        """Hash fp32 values in bfloat16. A value may begin in one block and end in the next."""
        if self._rest:
            lacking = _FLOAT_BYTES - len(self._rest)
            first, data = self._rest + bytes(data[:lacking]), data[lacking:]
            if len(first) < _FLOAT_BYTES:
                self._rest = first
                return
            self._rounded.update(_in_bfloat16(first))
        whole = len(data) // _FLOAT_BYTES * _FLOAT_BYTES
        if whole:
            self._rounded.update(_in_bfloat16(data[:whole]))
        self._rest = bytes(data[whole:])


def _in_bfloat16(data: bytes | memoryview) -> memoryview:
    values = torch.from_numpy(np.frombuffer(data, dtype="<f4").copy())
    return values.to(torch.bfloat16).view(torch.uint8).numpy().data
