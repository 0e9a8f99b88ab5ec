"""Stores in a folder: `lock`, `layout.json` (what the store was made for, written last), `commit`, `state`, and
`checksums`: an entry for each place of a tile, then one for each spooled gradient.

`commit` has two pages, written alternately. Each carries its own hash, so a torn page is noticed and the other one
counts. A checksum is written after the data it covers and before the commit that counts that data. It has a place of
its own for each version of a tile, so a crash can tear it only where it can tear the tile.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weftrain.backends.streaming.store.base import Commit, Store
from weftrain.backends.streaming.store.checksums import MAX_PLANES, checksum
from weftrain.backends.streaming.store.layout import PAGE_BYTES, Layout, Tile
from weftrain.backends.streaming.store.planes import Planes
from weftrain.core.errors import BackendError, file_problem
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json
from weftrain.core.formats.plain_file import read_plain

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_FILES = {"lock", "state", "commit", "checksums"}
_DAMAGED = "the store was damaged from outside: remove its folder, and the run continues from its newest checkpoint"


class FileStore(Store):
    """What the tiers `mapped` and `direct` have in common: folder, lock, commits and checksums."""

    def __init__(self, layout: Layout, folder: Path, *, direct: bool) -> None:
        super().__init__(layout)
        self.folder, self._direct = folder, direct
        self._open()

    def _open(self) -> None:
        self._sequence = 0  # of the last commit
        self._on_disk: Commit | None = None  # what a restart finds
        self._stack = contextlib.ExitStack()
        try:
            with self._reported("opened"):
                self._take_lock()
                new = holds_no_store(self.layout, self.folder)
                self._state = self._file("state", direct=self._direct)
                self._commits, self._checksums = self._file("commit"), self._file("checksums")
                self._sums = np.zeros((self.layout.num_places, MAX_PLANES), np.dtype("<u8"))
                self._gradient_sums = np.zeros(len(self.layout.tiles), self._sums.dtype)
                self._create() if new else self._read_checksums()
                found = None if new else read_commit(self.folder)
                if found is not None:
                    self._sequence = found.sequence
                    self._write_commit(found)  # now marked as open
        except BaseException:
            self._stack.close()
            raise

    def _take_lock(self) -> None:
        fsops.make_dirs(self.folder)
        path, holder = self.folder / "lock", canonical_json({"process": os.getpid()}) + b"\n"
        try:
            self._stack.enter_context(fsops.held_lock(path, holder))
        except BlockingIOError:
            said = read_plain(path, "record")[:200].decode(errors="replace").strip()
            remedy = "wait for that process, or give another backend.options.store"
            raise BackendError(f"{self.folder}: the store is in use ({said}): {remedy}") from None

    def _file(self, name: str, *, direct: bool = False) -> fsops.PositionedFile:
        file = fsops.PositionedFile(self.folder / name, direct=direct)
        self._stack.callback(file.close)
        return file

    def _create(self) -> None:
        needed, free = self.layout.file_bytes, fsops.free_bytes(self.folder)
        have = (self.folder / "state").stat().st_blocks * 512  # reserved by a creation that was interrupted
        if needed > free + have:
            raise BackendError(
                f"{self.folder}: the store needs {needed:,} bytes on disk ({self.layout.format.name}: "
                f"{self.layout.state_bytes:,} of state and {self.layout.gradient_bytes:,} of gradients), "
                f"{free + have:,} are free: make room{_superseded_stores(self.folder)}, put backend.options.store on "
                "another disk, or take a smaller backend.options.state_format"
            )
        self._state.allocate(needed)
        self._commits.allocate(2 * PAGE_BYTES)
        self._checksums.allocate(self._sums.nbytes + self._gradient_sums.nbytes)
        self._write_commit(None)
        fsops.write_bytes(self.folder / "layout.json", canonical_json(self.layout.identity) + b"\n")

    # -- checksums

    def _read_checksums(self) -> None:
        """`_sums` [place, plane] and `_gradient_sums` [tile]."""
        wanted = {"state": self.layout.file_bytes, "checksums": self._sums.nbytes + self._gradient_sums.nbytes}
        for name, size in wanted.items():
            if (found := (self.folder / name).stat().st_size) != size:
                raise BackendError(f"{self.folder / name}: holds {found:,} bytes, the layout says {size:,}: {_DAMAGED}")
        values = np.fromfile(self.folder / "checksums", self._sums.dtype)
        self._sums[:] = values[: self._sums.size].reshape(self._sums.shape)
        self._gradient_sums[:] = values[self._sums.size :]

    def _note_state(self, tile: Tile, rotation: int, sums: Sequence[int]) -> None:
        """Record the checksums of `tile.planes`, in their order, after the state was written."""
        entry = self._sums[(place := self.layout.place(tile, rotation)), : len(sums)]
        entry[:] = sums
        self._checksums.write_at(place * self._sums[0].nbytes, memoryview(entry.tobytes()))

    def _note_gradient(self, tile: Tile, value: int) -> None:
        """The same for the checksum of a tile's gradient."""
        self._gradient_sums[tile.index] = value
        self._checksums.write_at(self._sums.nbytes + tile.index * 8, memoryview(value.to_bytes(8, "little")))

    def _check_planes(self, tile: Tile, rotation: int, planes: Planes) -> None:
        """Raises BackendError if planes that were read are not those that were written."""
        for number, plane in enumerate(tile.planes):
            if plane.name in planes:
                found = checksum(as_bytes(planes[plane.name]), tile.index, number, rotation)
                self._check(tile, rotation, number, found)

    def _check(self, tile: Tile, rotation: int, number: int, found: int) -> None:
        if found != self._sums[self.layout.place(tile, rotation)][number]:
            raise self._damaged(tile, tile.planes[number].name)

    def _check_gradient(self, tile: Tile, step: int, found: int) -> None:
        if found != self._gradient_sums[tile.index]:
            raise self._damaged(tile, f"the gradient of step {step - 1}")

    def _damaged(self, tile: Tile, what: str) -> BackendError:
        step = "" if self.commit is None else f" as of {self.commit.step} completed steps"
        more = f" and {len(tile.fragments) - 3} more" if len(tile.fragments) > 3 else ""
        names = ", ".join(fragment.name for fragment in tile.fragments[:3]) + more
        return BackendError(
            f"{self.folder}/state: {what} of {names} (tile {tile.index}){step} is not what was written: {_DAMAGED}"
        )

    # -- commits, and the end

    def _write_commit(self, commit: Commit | None) -> None:
        if commit is None:
            self.commit, pages = None, [(page, bytes(PAGE_BYTES)) for page in (0, 1)]
        else:
            self._sequence += 1
            self.commit = replace(commit, sequence=self._sequence, boot_id=boot_id(), closed=False)
            pages = [(self._sequence % 2, _page(self.commit))]
        written = self.commit

        def write() -> None:
            for page, contents in pages:
                self._commits.write_at(page * PAGE_BYTES, memoryview(contents))
            self._on_disk = written

        self._in_order(write)

    def _in_order(self, write: Callable[[], None]) -> None:
        """Write after every earlier write."""
        with self._reported("written"):
            write()

    def set_aside(self) -> None:
        """Rename the folder, whole, to the first free `<name>.superseded-N` beside it, and begin with a new one."""
        names = (f"{self.folder.name}.superseded-{number}" for number in itertools.count(1))
        free = next(path for name in names if not (path := self.folder.with_name(name)).exists())
        with self._reported("set aside"):
            self._mark_closed()
            fsops.rename(self.folder, free)  # while the lock is held
        self._stack.close()
        self.commit = None
        self._open()

    def close(self) -> None:
        """Make everything durable and mark the store closed: only a closed store survives a stop of the machine."""
        try:
            with contextlib.suppress(BackendError):  # was reported when it happened
                self.drain()
                with self._reported("closed"):
                    self._mark_closed()
        finally:
            self._stack.close()

    def _mark_closed(self) -> None:
        self._state.sync()
        self._checksums.sync()
        if self._on_disk is not None:
            page = _page(replace(self._on_disk, sequence=self._sequence + 1, closed=True))
            self._commits.write_at((self._sequence + 1) % 2 * PAGE_BYTES, memoryview(page))
        self._commits.sync()

    @contextlib.contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        """Turns an OSError into a BackendError: which file cannot be `what`, where a restart goes on, the remedy."""
        try:
            yield
        except OSError as error:
            done = "" if self._on_disk is None else f"; the store stands at {self._on_disk.step} completed steps"
            remedy = "check the disk, then resume"
            if what == "set aside":
                remedy = "move its files away by hand, or choose another backend.options.store"
            if self._direct and what == "opened" and error.errno == errno.EINVAL:
                other = "backend.options.tier=mapped, or another backend.options.store"
                remedy = f"this file system has no direct I/O: take {other}"
            where = error.filename or self.folder
            raise BackendError(f"{where}: cannot be {what}: {file_problem(error)}{done}: {remedy}") from error


def _superseded_stores(folder: Path) -> str:
    """For a message: the stores that were set aside; empty if there are none."""
    found = sorted(path.name for path in folder.parent.glob(f"{folder.name}.superseded-*"))
    return f" (nothing reads {', '.join(found)} in {folder.parent} any more)" if found else ""


def holds_no_store(layout: Layout, folder: Path) -> bool:
    """Whether no store was completely made in the folder. Raises BackendError for a store of another recipe or format,
    and if there are other files.
    """
    try:
        found = parse_json(read_plain(folder / "layout.json", "record"))
    except FileNotFoundError:
        strange = sorted({entry.name for entry in folder.iterdir()} - _FILES) if folder.is_dir() else []
        if not all(name.startswith(fsops.TEMPORARY_PREFIX) for name in strange):
            raise BackendError(
                f"{folder}: holds '{strange[0]}', so it is no store: give an empty or new folder as "
                "backend.options.store"
            ) from None
        return True
    except ValueError as error:
        raise BackendError(f"{folder}/layout.json: {error}: {_DAMAGED}") from None
    wanted = parse_json(canonical_json(layout.identity))
    if found == wanted:
        return False
    found = found if isinstance(found, dict) else {}
    version = found.get("version")
    if type(version) is int and version != wanted["version"]:
        raise BackendError(
            f"{folder}: the store is of format {version}, and this version of weftrain reads {wanted['version']}: "
            "finish the run with the version that made it, or rename the folder: the run then continues from its "
            "newest checkpoint"
        )
    changed = [key for key in wanted if found.get(key) != wanted[key]]
    if changed[:1] == ["model"] and isinstance(model := found.get("model"), dict):
        changed = [f"model.{key}" for key in wanted["model"] if model.get(key) != wanted["model"][key]] or changed
    raise BackendError(
        f"{folder}: the store was made for another recipe or format ({', '.join(changed) or 'it has keys of its own'} "
        "differ): give backend.options.store another folder, or remove this one"
    )


def read_commit(folder: Path) -> Commit | None:
    """The last commit of a store; None if it was not filled. Raises BackendError if the store is damaged, or was open
    when the machine stopped.
    """
    pages = read_plain(folder / "commit", "record") if (folder / "commit").exists() else b""
    if len(pages) != 2 * PAGE_BYTES:
        raise BackendError(f"{folder}/commit: is missing or cut: {_DAMAGED}")
    found: list[Commit] = []
    for page in (pages[:PAGE_BYTES], pages[PAGE_BYTES:]):
        text = page[64:].rstrip(b" ")
        if hashlib.sha256(text).hexdigest().encode() == page[:64]:
            try:
                found.append(Commit.from_json(json.loads(text)))
            except (ValueError, TypeError, KeyError) as error:
                raise BackendError(
                    f"{folder}/commit: is of another version ({error}), or no store's: {_DAMAGED}"
                ) from error
    if not found:
        if any(pages):
            raise BackendError(f"{folder}/commit: neither page is whole: {_DAMAGED}")
        return None
    newest = max(found, key=lambda commit: commit.sequence)
    if not newest.closed and newest.boot_id != boot_id():
        raise BackendError(
            f"{folder}: the machine stopped while the store was open, so its last writes may be lost: remove the "
            "folder, and the run continues from its newest checkpoint"
        )
    return newest


def _page(commit: Commit) -> bytes:
    text = canonical_json(asdict(commit))
    if len(text) > PAGE_BYTES - 64:
        raise BackendError("the store's commit does not fit its page: fewer parameter groups are needed")
    return (hashlib.sha256(text).hexdigest().encode() + text).ljust(PAGE_BYTES)


def boot_id() -> str:
    """An identifier that changes when the machine starts; empty if the system has none."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def state_sums(tile: Tile, planes: Planes, rotation: int) -> list[int]:
    """Checksums of `tile.planes`, in their order."""
    names = [plane.name for plane in tile.planes]
    return [checksum(as_bytes(planes[name]), tile.index, number, rotation) for number, name in enumerate(names)]


def as_bytes(memory: Tensor) -> np.ndarray:
    """A tensor's memory as uint8 [n]."""
    return memory.view(torch.uint8).numpy()
