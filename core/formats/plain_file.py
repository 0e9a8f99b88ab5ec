"""Reading files that may come from anyone: opened without blocking, only if regular, and read up to a limit.

Opening a FIFO blocks until a writer comes, a device has no end, and a sparse file can claim terabytes. So every such
file is opened here. LIMIT_BYTES is the one table of how large each kind may be.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, cast

from weftrain.core.formats import distant_files

Kind = Literal[
    "recipe",
    "record",
    "ledger",
    "metrics",
    "manifest",
    "dataset manifest",
    "line table",
    "tokenizer",
    "chat template",
    "reference",
    "release",
    "key",
    "trace",
    "card",
    "evaluation set",
]

# Bytes: each at least ten times what the largest known run or model needs, and small enough to parse in memory.
LIMIT_BYTES: dict[Kind, int] = {
    "recipe": 256 << 10,  # YAML, which PyYAML parses at some hundred kilobytes a second
    "record": 16 << 20,  # a recipe, environment or evaluation as it was recorded: canonical JSON
    "ledger": 512 << 20,  # a million lines, each of them kept in memory
    "metrics": 16 << 30,  # read line by line
    "manifest": 64 << 20,  # of a checkpoint: an entry a tensor
    "dataset manifest": 256 << 20,  # an entry a shard
    "line table": 64 << 30,  # a dataset's inputs.jsonl and sources.jsonl: hashed in blocks, read line by line
    "tokenizer": 256 << 20,  # the largest vocabularies published take 35 MB
    "chat template": 1 << 20,  # the longest that are published have some ten kilobytes
    "reference": 4 << 30,  # 16 bytes a preference pair
    "release": 256 << 20,  # an entry a file
    "key": 1 << 16,  # keys and signatures
    "card": 1 << 20,  # README.md
    "trace": 1 << 30,  # a streamed run's first steps
    "evaluation set": 1 << 30,  # of the safety analyses: the largest published has some hundred megabytes
}
MAX_LINE_BYTES = 4 << 20  # of the ledger, whose lines hold recipes and environments, and of the metrics
_BLOCK_BYTES = 1 << 20


class UnreadableFileError(io.UnsupportedOperation):
    """Not a plain file, or larger than its kind may be. Both an OSError and a ValueError: caught wherever either is."""

    def __init__(self, reason: str, path: Path) -> None:
        super().__init__(errno.EINVAL, reason, str(path))

    def __str__(self) -> str:
        return str(self.strerror)


def real_path(path: str | os.PathLike[str]) -> Path:
    """The path with its symbolic links resolved. A link to itself stays, and opening it raises OSError; Path.resolve
    would raise RuntimeError.
    """
    return Path(os.path.realpath(path))


def open_plain(path: Path, *, follow: bool = True, buffering: int = -1) -> BinaryIO:
    """Open a plain file for reading. follow: whether the path may be a symbolic link to one.

    Raises UnreadableFileError, at once, for a FIFO, device, socket or folder; other OSErrors as `open` does.
    """
    # Without O_NONBLOCK, opening a FIFO waits for its writer. The check is of the open file, whatever the name becomes.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    problem = "is not a regular file" if follow else "is a symbolic link or not a regular file"
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        sockets = (errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP)  # and devices without a driver
        if error.errno in sockets or (error.errno == errno.ELOOP and not follow):
            raise UnreadableFileError(problem, path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableFileError(problem, path)
    if (token := distant_files.token_at(descriptor)) is not None:
        return _open_distant(path, descriptor, token, buffering)
    return cast(BinaryIO, os.fdopen(descriptor, "rb", buffering=buffering))


def _open_distant(path: Path, descriptor: int, token: bytes, buffering: int) -> BinaryIO:
    if (read := distant_files.bytes_of(token)) is None:
        os.close(descriptor)
        raise UnreadableFileError("stands for a file in an object store: open the run by its address there", path)
    raw = distant_files.DistantFile(descriptor, read)
    return cast(BinaryIO, raw if buffering == 0 else io.BufferedReader(raw, _BLOCK_BYTES))


def read_plain(path: Path, kind: Kind, *, follow: bool = True) -> bytes:
    """All bytes of a plain file, at most LIMIT_BYTES[kind]. Raises UnreadableFileError, OSError."""
    with open_plain(path, follow=follow, buffering=0) as file:
        limit = LIMIT_BYTES[kind]
        check_size(path, kind, os.fstat(file.fileno()).st_size)
        data = bytearray()
        while block := file.read(min(_BLOCK_BYTES, limit + 1 - len(data))):
            data += block
        check_size(path, kind, len(data))  # it may have grown meanwhile
        return bytes(data)


def plain_lines(path: Path, kind: Kind) -> Iterator[bytes]:
    """The lines of a plain file without their line breaks, read lazily; an unfinished last line is left out.

    Raises UnreadableFileError for a file beyond LIMIT_BYTES[kind] or a line beyond MAX_LINE_BYTES, OSError.
    """
    with open_plain(path) as file:
        check_size(path, kind, os.fstat(file.fileno()).st_size)
        while line := file.readline(MAX_LINE_BYTES + 1):
            if line[-1] == 10:  # \n
                yield line[:-1]
            elif len(line) > MAX_LINE_BYTES:
                raise UnreadableFileError(f"has a line of more than {MAX_LINE_BYTES:,} bytes", path)


def torn_size(path: Path, kind: Kind) -> int:
    """How many bytes of a plain file follow its last line break. Raises UnreadableFileError, OSError."""
    with open_plain(path) as file:
        at = size = file.seek(0, os.SEEK_END)
        check_size(path, kind, size)
        while at:
            length = min(_BLOCK_BYTES, at)
            at = file.seek(at - length)
            if (found := file.read(length).rfind(b"\n")) >= 0:
                return size - at - found - 1
        return size


def check_size(path: Path, kind: Kind, size_bytes: int) -> None:
    """Raises UnreadableFileError if a file of this kind may not be so large."""
    if size_bytes > LIMIT_BYTES[kind]:
        raise UnreadableFileError(f"holds more than the {LIMIT_BYTES[kind]:,} bytes that a {kind} file may", path)
