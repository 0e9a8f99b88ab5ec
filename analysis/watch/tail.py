"""The end of a file that another process appends lines to: what is new since the last look, and the last lines of all.

The reader starts at the file's end, so a file of a million lines is watched at once.
"""

from __future__ import annotations

import os
from pathlib import Path

from weftrain.core.formats.plain_file import open_plain

MAX_BYTES = 1 << 24  # that are read at once


class LineTail:
    """Whole lines after `offset`. A file that became shorter, as torn lines were moved away, is read from its end."""

    def __init__(self, path: Path, offset: int | None = None) -> None:
        self._path = path
        self.offset = _size(path) if offset is None else offset

    def read(self) -> list[bytes]:
        """The new lines, without their line breaks: at most MAX_BYTES of them, so call it until there are none."""
        size = _size(self._path)
        if size < self.offset:
            self.offset = size
        if size == self.offset:
            return []
        with open_plain(self._path) as file:
            file.seek(self.offset)
            data = file.read(MAX_BYTES)
        whole = data.rfind(b"\n") + 1
        if not whole and len(data) == MAX_BYTES:
            whole = MAX_BYTES  # no line of ours is so long: it is passed over
        self.offset += whole
        return data[:whole].split(b"\n")[:-1]


def last_lines(path: Path, most_bytes: int) -> tuple[list[bytes], int]:
    """The whole lines in the last `most_bytes` bytes, and where they end. Nothing where there is no file."""
    size = _size(path)
    if not size:
        return [], 0
    start = max(0, size - most_bytes)
    with open_plain(path) as file:
        file.seek(start)
        data = file.read(size - start)
    first = data.find(b"\n") + 1 if start else 0
    whole = data.rfind(b"\n") + 1
    return data[first:whole].split(b"\n")[:-1] if whole > first else [], start + whole


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
