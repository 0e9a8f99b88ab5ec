"""How fast a folder's disk reads and writes past the page cache, which weight streaming depends on.

Streaming reads and writes at once, and a disk that does both is neither as fast as the sum nor as slow as one of the
two; so that is measured too, and is the figure that a prediction uses.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from weftrain.core.errors import WeftrainError
from weftrain.core.formats import fsops
from weftrain.core.formats.units import gb

_BLOCK_BYTES = 32 << 20


class DiskError(WeftrainError):
    """A folder whose disk cannot be measured."""


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes per second with direct I/O in 32 MiB blocks: each direction alone, and the sum of both at once."""

    read: float
    write: float
    mixed: float

    def __str__(self) -> str:
        return f"read {gb(self.read)}/s, write {gb(self.write)}/s, both at once {gb(self.mixed)}/s"


def measured_disk(folder: Path, size_bytes: int = 1 << 30) -> DiskSpeed:
    """Read, write and do both in a temporary file of `size_bytes` in `folder`. About 2 s on a fast disk.

    Raises DiskError where there is no room or no direct I/O.
    """
    blocks = max(4, size_bytes // _BLOCK_BYTES)
    where = folder
    while not where.exists():
        where = where.parent
    path = fsops.temporary_beside(where / "disk-speed")
    try:
        file = fsops.PositionedFile(path, direct=True)
    except OSError as error:
        raise DiskError(f"{where}: no direct I/O there ({error.strerror}): measure another folder") from error
    try:
        file.allocate(blocks * _BLOCK_BYTES)
        first, second = (memoryview(mmap.mmap(-1, _BLOCK_BYTES)) for _ in range(2))
        first[:] = os.urandom(1 << 20) * (_BLOCK_BYTES >> 20)
        # the first write of a block is slower on some file systems, and happens once in a store's life
        for index in range(blocks):
            file.write_at(index * _BLOCK_BYTES, first)

        def seconds(write: range, read: range) -> float:
            def reading() -> None:
                for index in read:
                    file.read_at(index * _BLOCK_BYTES, second)

            thread = threading.Thread(target=reading)
            start = time.perf_counter()
            thread.start()
            for index in write:
                file.write_at(index * _BLOCK_BYTES, first)
            thread.join()
            return time.perf_counter() - start

        everything, nothing, half = range(blocks), range(0), blocks // 2
        total = blocks * _BLOCK_BYTES
        write_s, read_s, both_s = (
            seconds(everything, nothing),
            seconds(nothing, everything),
            seconds(range(half), range(half, blocks)),
        )
        return DiskSpeed(total / read_s, total / write_s, total / both_s)
    except OSError as error:
        raise DiskError(
            f"{where}: {error.strerror}: free {blocks * _BLOCK_BYTES:,} bytes, or measure another folder"
        ) from error
    finally:
        file.close()
        with contextlib.suppress(OSError):
            fsops.remove_file(path)
