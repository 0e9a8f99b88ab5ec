"""The branches of a git clone, read from its objects: nothing is checked out, and no hook, filter or pager of git runs.

A file that git LFS keeps stands in the clone as a pointer with its SHA-256 and size, so the weights of all branches are
known by their hashes whether they were fetched or not. Headers are read of those that were.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from weftrain.core.errors import ReleaseError, one_line
from weftrain.core.formats.plain_file import open_plain
from weftrain.exchange.audit.names import place_of
from weftrain.exchange.audit.series import (
    ListedFile,
    Revision,
    Series,
    is_wanted,
    is_weight_file,
    revision_of,
    without_files,
)

_POINTER = re.compile(rb"version https://git-lfs[^\n]*\noid sha256:([0-9a-f]{64})\nsize (\d{1,18})\n?")
_MAX_POINTER_BYTES, _MAX_TREE_BYTES, _MAX_BLOB_BYTES = 1024, 16 << 20, 16 << 20
_TIMEOUT_S = 120
# The clone's own configuration runs nothing and fetches nothing.
_SAFE = ("core.fsmonitor=false", "core.hooksPath=/dev/null", "protocol.allow=never")
_GIT = ("git", "--no-pager", "--no-optional-locks", *(word for key in _SAFE for word in ("-c", key)))


class CloneSeries(Series):
    """Local and remote branches of a clone, and those of its tags whose names have a step."""

    kind = "git clone"

    def __init__(self, folder: Path) -> None:
        self.where, self._folder = str(folder), folder
        self._commits: dict[str, str] = {}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def refs(self) -> Sequence[str]:
        kinds = ("refs/remotes", "refs/heads", "refs/tags")
        for line in self._git("for-each-ref", "--format=%(objectname) %(refname)", *kinds).splitlines():
            commit, _, name = line.partition(" ")
            kind, name = name.split("/", 2)[1:] if name.count("/") >= 2 else ("", "")
            if kind == "remotes":
                name = name.partition("/")[2]
            if name and name != "HEAD" and (kind != "tags" or place_of(name) is not None):
                self._commits.setdefault(name[:256], commit)
        return list(self._commits)

    def revision(self, name: str) -> Revision:
        commit = self._commits[name]
        found = revision_of(name, commit, self._listed(commit))
        return found if all(self._path(file) for file in found.weights) else without_files(found)

    def mark(self, name: str) -> str:
        return self._commits[name]

    def read(self, revision: Revision, path: str, start: int, stop: int) -> bytes:
        files = [*revision.weights, *(file for file in (revision.config, revision.state) if file is not None)]
        file = next(file for file in files if file.path == path)
        if file.identity.startswith("git:"):
            return self._git_object(file.identity[4:], _MAX_BLOB_BYTES)[1][start:stop]
        if (place := self._path(file)) is None:
            raise ValueError(f"{path} was not fetched by git LFS")
        with open_plain(place, buffering=0) as stored:
            stored.seek(start)
            return stored.read(stop - start)

    def _listed(self, commit: str) -> Iterator[ListedFile]:
        """The files of a commit's top folder, of others their names alone."""
        kind, tree = self._git_object(f"{commit}^{{tree}}", _MAX_TREE_BYTES)
        if kind != "tree":
            raise ValueError(f"{commit[:12]} is no commit")
        width = len(commit) // 2  # of a binary object name: SHA-1 or SHA-256
        at = 0
        while at < len(tree):
            space, end = tree.index(b" ", at), tree.index(b"\0", at)
            mode, path = tree[at:space], tree[space + 1 : end].decode(errors="replace")
            oid, at = tree[end + 1 : end + 1 + width].hex(), end + 1 + width
            if mode.startswith(b"100") and is_wanted(path):
                yield self._file(path, oid)

    def _file(self, path: str, oid: str) -> ListedFile:
        size = self._size(oid)
        content = b""
        if is_weight_file(path) and size <= _MAX_POINTER_BYTES:
            content = self._git_object(oid, _MAX_POINTER_BYTES)[1]
        if (found := _POINTER.match(content)) is not None:
            return ListedFile(path, int(found[2]), f"sha256:{found[1].decode()}")
        return ListedFile(path, size, f"git:{oid}")

    def _path(self, file: ListedFile) -> Path | None:
        """Where the bytes of a file lie that git LFS keeps; of another, the folder of git's own objects."""
        if not file.identity.startswith("sha256:"):
            return self._folder
        sha256 = file.identity[7:]
        path = self._folder / ".git" / "lfs" / "objects" / sha256[:2] / sha256[2:4] / sha256
        return path if path.is_file() else None

    def _size(self, oid: str) -> int:
        with self._lock, self._batch() as process:
            return self._header(process, "info", oid)[1]

    def _git_object(self, name: str, limit: int) -> tuple[str, bytes]:
        """(type, content) of an object of at most `limit` bytes. Raises ValueError."""
        with self._lock, self._batch() as process:
            kind, size = self._header(process, "info", name)
            if size > limit:
                raise ValueError(f"{name[:60]} holds {size:,} bytes, more than the {limit:,} that are read of it")
            self._header(process, "contents", name)
            data = process.stdout.read(size + 1) if process.stdout is not None else b""
            return kind, data[:size]

    def _header(self, process: subprocess.Popen[bytes], command: str, name: str) -> tuple[str, int]:
        if process.stdin is None or process.stdout is None:
            raise ValueError("git has no streams")
        process.stdin.write(f"{command} {name}\n".encode())
        process.stdin.flush()
        words = process.stdout.readline(4096).decode(errors="replace").split()
        if len(words) != 3 or not words[2].isdecimal():
            raise ValueError(f"git has no object {name[:60]}: the clone is shallow, partial or damaged")
        return words[1], int(words[2])

    @contextlib.contextmanager
    def _batch(self) -> Iterator[subprocess.Popen[bytes]]:
        if self._process is None:
            self._process = subprocess.Popen(
                [*_GIT, "-C", str(self._folder), "cat-file", "--batch-command"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_environment(),
            )
        yield self._process

    def close(self) -> None:
        if self._process is not None:
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process.wait(_TIMEOUT_S)
            self._process = None

    def _git(self, *words: str) -> str:
        try:
            done = subprocess.run(
                [*_GIT, "-C", str(self._folder), *words],
                capture_output=True,
                timeout=_TIMEOUT_S,
                env=_environment(),
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ReleaseError(f"{self._folder}: git cannot be run ({one_line(error, 80)}): install it") from None
        if done.returncode:
            said = " ".join(done.stderr.decode(errors="replace").split())[:160]
            raise ReleaseError(f"{self._folder}: git cannot read this clone ({said}): clone it again")
        return done.stdout.decode(errors="replace")


def _environment() -> dict[str, str]:
    """The environment in which git reads the objects of this clone alone, and fetches none that is missing."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return {**kept, "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}


def is_clone(folder: Path) -> bool:
    """Whether a folder is the top of a git clone."""
    return (folder / ".git").is_dir()
