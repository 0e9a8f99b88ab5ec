"""What an interrupted reading of a release has found already, so that the next one goes on from there.

The note is a file in the user's cache folder, one line a file of the release. A line is used only while the file has
the same device, inode, size, and times of change (mtime and ctime, in nanoseconds), and while blocks of it at places
that were drawn at random hash to the same; its SHA-256 is then compared with release.json as if it had just been read.
So a note never says that a file is as it should be, only what was in it. It trusts whoever may write to the user's own
cache folder, and that a file's ctime changes with its bytes, as local file systems see to. A reading that ends, with
whatever result, removes its note: the next one reads every byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from weftrain.core.errors import WeftrainError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json, sha256_json
from weftrain.core.formats.one_pass import ByteRange, Scanned
from weftrain.core.formats.plain_file import open_plain, plain_lines

_LEAST_BYTES = 16 << 20  # a smaller file is read again
_PROBES, _PROBE_BYTES = 8, 64 << 10
_KEYS = {"name", "state", "sha256", "parts", "rounded", "ranges", "probes"}
_SETTLED_NS = 2_000_000_000  # a file that changed so shortly ago may change again without another time of change


class Notes:
    """The note of one release in one place. taken: the number of files that were not read again."""

    def __init__(self, path: Path, known: Mapping[str, Mapping[str, Any]]) -> None:
        self._path, self._known, self._lock = path, known, threading.Lock()
        self.taken = 0

    def look(self, path: Path) -> list[int] | None:
        """What identifies a file's present state, before it is read; None for one that is not noted."""
        status = os.stat(path, follow_symlinks=False)
        newest = max(status.st_mtime_ns, status.st_ctime_ns)
        if status.st_size < _LEAST_BYTES or time.time_ns() - newest < _SETTLED_NS:
            return None
        return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]

    def found(self, name: str, path: Path, parts: Sequence[ByteRange]) -> Scanned | None:
        """What was read of this file, if it is still the same. Raises OSError."""
        line = self._known.get(name)
        if line is None or line["state"] != self.look(path) or line["ranges"] != _hash_of(parts):
            return None
        if _probe(path, [place for place, _ in line["probes"]]) != line["probes"]:
            return None
        self.taken += 1
        size, sha256 = line["state"][2], line["sha256"]
        return Scanned(size, sha256, line["parts"], line["rounded"])

    def add(self, name: str, path: Path, before: list[int], found: Scanned, parts: Sequence[ByteRange]) -> None:
        """Note a file that was read and has not changed since `before`. What cannot be written is not noted."""
        if self.look(path) != before or found.size != before[2]:
            return
        places = [secrets.randbelow(max(1, found.size - _PROBE_BYTES)) for _ in range(_PROBES)]
        line = {
            "name": name,
            "state": before,
            "sha256": found.sha256,
            "parts": dict(found.parts),
            "rounded": dict(found.rounded),
            "ranges": _hash_of(parts),
            "probes": _probe(path, places),
        }
        with self._lock, contextlib.suppress(OSError), self._path.open("ab") as file:
            file.write(canonical_json(line) + b"\n")


@contextlib.contextmanager
def noted(folder: Path, root: str, *, from_start: bool = False) -> Iterator[Notes | None]:
    """The note of a release with this root in this place; removed at the end unless the reading is interrupted.

    from_start: what was noted is not used. None where the cache folder is another user's or cannot be written.
    """
    place = cache_folder() / "weftrain" / "verify"
    path = place / f"{sha256_json([os.path.realpath(folder), root])}.jsonl"
    try:
        fsops.make_dirs(place)
        if not _is_own(place):
            yield None
            return
        if from_start:
            path.unlink(missing_ok=True)
        notes = Notes(path, _read(path))
        os.close(fsops.open_own(path, os.O_WRONLY | os.O_CREAT))
        path.chmod(0o600)
    except OSError:
        yield None
        return
    try:
        yield notes  # after an interrupt or a kill the note stays
    except WeftrainError:
        path.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _is_own(place: Path) -> bool:
    """Whether a folder is this user's, and no other may write to it."""
    status = os.stat(place, follow_symlinks=False)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a note by the file that they are of; a line that is damaged ends it."""
    found: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        for text in plain_lines(path, "release"):
            line = parse_json(text)
            if not isinstance(line, dict) or set(line) != _KEYS:  # of another version, or torn
                break
            found[str(line["name"])] = line
    return found


def _hash_of(parts: Sequence[ByteRange]) -> str:
    return sha256_json([[part.name, part.begin, part.end, part.rounded] for part in parts])


def _probe(path: Path, places: Sequence[int]) -> list[list[Any]]:
    """Place and SHA-256 of a block of the file from each of these places on."""
    found: list[list[Any]] = []
    with open_plain(path, follow=False, buffering=0) as file:
        for place in places:
            file.seek(place)
            found.append([place, hashlib.sha256(file.read(_PROBE_BYTES)).hexdigest()])
    return found
