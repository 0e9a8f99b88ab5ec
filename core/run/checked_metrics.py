"""How far an earlier start found metrics.jsonl whole: a start checks every line once, and of what was checked the hash.

`metrics.checked` names the first so many bytes with their SHA-256. It is believed where they hash to it; otherwise all
lines are checked again. It tells nothing of what the lines say, and readers of the measurements do not use it.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import NamedTuple

from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import parse_sealed, sealed
from weftrain.core.formats.plain_file import open_plain, read_plain
from weftrain.core.formats.strict_model import Count, Sha256, StrictModel, validated
from weftrain.core.run.metrics_lines import damaged_numbers

CHECKED = "metrics.checked"
_FORMAT, _VERSION = "weftrain-checked-metrics", 1
_WORTH_BYTES = 16 << 20  # what is smaller is checked in a tenth of a second
_BLOCK_BYTES = 1 << 20


class CheckedPart(NamedTuple):
    """The first `size` bytes of metrics.jsonl, `lines` whole lines."""

    size: int
    lines: int
    sha256: str


class _Note(StrictModel):
    format: str
    version: int
    size: Count
    lines: Count
    sha256: Sha256
    root: Sha256


def check_metrics(path: Path) -> tuple[list[int], CheckedPart]:
    """Numbers, from 1, of the damaged lines of metrics.jsonl, and what was read. Raises OSError."""
    digest = hashlib.sha256()
    known = _known(path)
    if known is not None and not _begins_with(path, known, digest):
        known, digest = None, hashlib.sha256()
    size, lines = (0, 0) if known is None else (known.size, known.lines)

    def seen(data: bytes) -> None:
        nonlocal size, lines
        digest.update(data)
        size, lines = size + len(data), lines + data.count(b"\n")

    damaged = damaged_numbers(path, size, lines + 1, seen)
    return damaged, CheckedPart(size, lines, digest.hexdigest())


def remember(path: Path, part: CheckedPart) -> None:
    """Note that this part was found whole, if that spares the next start something. The run's lock must be held.

    Raises OSError.
    """
    if part.size >= _WORTH_BYTES and part != _known(path):
        note = {"format": _FORMAT, "version": _VERSION, **part._asdict()}
        fsops.write_bytes(path.with_name(CHECKED), sealed(note))


def remember_growth(path: Path) -> None:
    """At a checkpoint of a running process: note what it has written, once that is an eighth of the file. The next
    start then has no more to read line by line. Raises OSError.
    """
    size, known = path.stat().st_size, _known(path)
    noted = 0 if known is None else known.size
    if size - noted >= max(_WORTH_BYTES, size // 8):
        damaged, part = check_metrics(path)
        if not damaged:
            remember(path, part)


def _known(path: Path) -> CheckedPart | None:
    with contextlib.suppress(OSError, ValueError):
        note = validated(_Note, parse_sealed(read_plain(path.with_name(CHECKED), "key"), _FORMAT, (_VERSION,)))
        return CheckedPart(note.size, note.lines, note.sha256)
    return None


def _begins_with(path: Path, part: CheckedPart, digest: hashlib._Hash) -> bool:
    """Whether the file begins with this part, which `digest` is given."""
    left = part.size
    with open_plain(path) as file:
        while left and (block := file.read(min(_BLOCK_BYTES, left))):
            digest.update(block)
            left -= len(block)
    return not left and digest.hexdigest() == part.sha256
