"""Stores that are files: a folder with its lock, what it was made for, where it stands, and the state; and the tier
that maps it.

What a reader would get wrong: `commit` has two pages, written in turn. Each carries its own hash, so a torn one is seen
and the other counts.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weftrain.backends.streaming.state import result_from_json
from weftrain.backends.streaming.store.base import DTYPES, Commit, Part, Pending, Planes, Store, typed
from weftrain.backends.streaming.store.checksums import ENTRY_BYTES, MAX_PLANES, Running, Sums, checksum, packed
from weftrain.backends.streaming.store.layout import PAGE_BYTES, Layout, Record, Tile
from weftrain.core.backend import StoredState
from weftrain.core.errors import BackendError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json
from weftrain.core.formats.plain_file import read_plain

_CHUNK_ELEMENTS = 1 << 19  # of a mapped tile: copied beside and updated while it is in the last cache
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class FileStore(Store):
    """A folder: `lock`, `layout.json` (what it was made for, written last), `commit` (two pages, the newer whole one
    counts), `state`, and `checksums` of it: an entry for each place of a tile, then one for each spooled gradient.

    A checksum is written after what it is of and before the commit that counts it, so it is torn where and only where
    that is; and it lies apart from those of the version before, as the tile itself does.
    """

    def __init__(self, layout: Layout, folder: Path, *, direct: bool) -> None:
        super().__init__(layout)
        self.folder, self._direct = folder, direct
        self._open()

    def _open(self) -> None:
        layout, folder = self.layout, self.folder
        self._sequence = 0  # of the last commit
        self._kept: Commit | None = None  # what a restart would find
        self._stack = contextlib.ExitStack()
        with self._blamed("opened"):
            fsops.make_dirs(folder)
            holder = canonical_json({"process": os.getpid()}) + b"\n"
            try:
                self._stack.enter_context(fsops.held_lock(folder / "lock", holder))
            except BlockingIOError:
                said = read_plain(folder / "lock", "record")[:200].decode(errors="replace").strip()
                raise BackendError(
                    f"{folder}: the store is in use ({said}): wait for that process, or give another "
                    "backend.options.store"
                ) from None
        try:
            with self._blamed("opened"):
                new = check_identity(layout, folder)
                self._state = fsops.PositionedFile(folder / "state", direct=self._direct)
                self._stack.callback(self._state.close)
                self._commits = fsops.PositionedFile(folder / "commit")
                self._stack.callback(self._commits.close)
                self._checksums = fsops.PositionedFile(folder / "checksums")
                self._stack.callback(self._checksums.close)
                if new:
                    self._create()
                elif (size := (folder / "state").stat().st_size) != layout.file_bytes:
                    raise BackendError(
                        f"{folder}/state: holds {size:,} bytes, the layout says {layout.file_bytes:,}: {_DAMAGED}"
                    )
                self._sums, self._gradient_sums = self._read_checksums(new)
                found = None if new else read_commit(folder)
                self._sequence = 0 if found is None else found.sequence
                if found is not None:
                    self._record(found)  # opened, and not closed
        except BaseException:
            self._stack.close()
            raise

    def _read_checksums(self, new: bool) -> tuple[list[list[int]], list[int]]:
        """For each place the checksums of a tile's planes; for each tile that of its gradient."""
        places, tiles = self.layout.num_places, len(self.layout.tiles)
        size = places * ENTRY_BYTES + tiles * 8
        if new:
            return [[0] * MAX_PLANES for _ in range(places)], [0] * tiles
        path = self.folder / "checksums"
        if (found := path.stat().st_size) != size:
            raise BackendError(f"{path}: holds {found:,} bytes, the layout says {size:,}: {_DAMAGED}")
        values = struct.unpack(f"<{size // 8}Q", path.read_bytes())
        entries = [list(values[start : start + MAX_PLANES]) for start in range(0, places * MAX_PLANES, MAX_PLANES)]
        return entries, list(values[places * MAX_PLANES :])

    def _note_state(self, tile: Tile, rotation: int, sums: Sums) -> None:
        """Keep the checksums of a tile's planes, in the order of `tile.planes`: after the state was written, in the
        order of writes.
        """
        place = self.layout.place(tile, rotation)
        self._sums[place][: len(sums)] = sums
        self._checksums.write_at(place * ENTRY_BYTES, memoryview(packed(sums)))

    def _note_gradient(self, tile: Tile, step: int, gradient: Tensor) -> None:
        """The same for the gradient of a tile that makes `step` steps complete."""
        value = self._gradient_sums[tile.index] = checksum(_bytes(gradient), tile.index, -1, step)
        self._checksums.write_at(self.layout.num_places * ENTRY_BYTES + tile.index * 8, memoryview(packed([value])))

    def _check_planes(self, tile: Tile, rotation: int, planes: Planes) -> None:
        """Raises BackendError where planes that were read are not those that were written."""
        for number, plane in enumerate(tile.planes):
            if plane.name in planes:
                self._check(tile, rotation, number, checksum(_bytes(planes[plane.name]), tile.index, number, rotation))

    def _check(self, tile: Tile, rotation: int, number: int, found: int) -> None:
        if found != self._sums[self.layout.place(tile, rotation)][number]:
            raise self._damaged(tile, tile.planes[number].name)

    def _check_gradient(self, tile: Tile, step: int, found: int) -> None:
        if found != self._gradient_sums[tile.index]:
            raise self._damaged(tile, f"the gradient of step {step - 1}")

    def _damaged(self, tile: Tile, what: str) -> BackendError:
        step = "" if self.commit is None else f" as of {self.commit.step} completed steps"
        names = ", ".join(piece.name for piece in tile.pieces[:3]) + (
            f" and {len(tile.pieces) - 3} more" if len(tile.pieces) > 3 else ""
        )
        return BackendError(
            f"{self.folder}/state: {what} of {names} (tile {tile.index}){step} is not what was written: {_DAMAGED}"
        )

    def set_aside(self) -> None:
        """Rename the folder, whole, to the first free `<name>.superseded-N` beside it, and begin with a new one."""
        with self._blamed("set aside"):
            self._mark_closed()
            fsops.rename(self.folder, _superseded(self.folder))  # the lock is held until it has its new name
        self._stack.close()
        self.commit = None
        self._open()

    def _create(self) -> None:
        needed, free = self.layout.file_bytes, fsops.free_bytes(self.folder)
        have = (self.folder / "state").stat().st_blocks * 512  # what an interrupted creation has reserved
        if needed > free + have:
            raise BackendError(
                f"{self.folder}: the store needs {needed:,} bytes on disk ({self.layout.format.name}: "
                f"{self.layout.state_bytes:,} of state "
                f"and {self.layout.gradient_bytes:,} of gradients), {free + have:,} are free: make "
                f"room{_beside(self.folder)}, "
                "put backend.options.store on another disk, or take a smaller backend.options.state_format"
            )
        self._state.allocate(needed)
        self._commits.allocate(2 * PAGE_BYTES)
        self._checksums.allocate(self.layout.num_places * ENTRY_BYTES + len(self.layout.tiles) * 8)
        self._record(None)
        fsops.write_bytes(self.folder / "layout.json", canonical_json(self.layout.identity) + b"\n")

    def _record(self, commit: Commit | None) -> None:
        if commit is None:
            self.commit, pages = None, [(page, bytes(PAGE_BYTES)) for page in (0, 1)]
        else:
            self._sequence += 1
            self.commit = replace(commit, sequence=self._sequence, boot_id=_boot_id(), closed=False)
            pages = [(self._sequence % 2, _page(self.commit))]
        standing = self.commit

        def write() -> None:
            for page, contents in pages:
                self._commits.write_at(page * PAGE_BYTES, memoryview(contents))
            self._kept = standing

        self._in_order(write)

    def _in_order(self, job: Callable[[], None]) -> None:
        """Run a job behind every write so far."""
        with self._blamed("written"):
            job()

    def _part(self, memory: Tensor) -> memoryview:
        return memory.view(torch.uint8).numpy().data

    def close(self) -> None:
        """Make all durable and mark the store closed: only then does it survive a stop of the machine."""
        try:
            with contextlib.suppress(BackendError):  # what failed was reported when it failed
                self.drain()
                with self._blamed("closed"):
                    self._mark_closed()
        finally:
            self._stack.close()

    def _mark_closed(self) -> None:
        self._state.sync()
        self._checksums.sync()
        if self._kept is not None:
            page = _page(replace(self._kept, sequence=self._sequence + 1, closed=True))
            self._commits.write_at((self._sequence + 1) % 2 * PAGE_BYTES, memoryview(page))
        self._commits.sync()

    @contextlib.contextmanager
    def _blamed(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            done = "" if self._kept is None else f"; the store stands at {self._kept.step} completed steps"
            where = error.filename or self.folder
            remedy = "check the disk, then resume"
            if what == "set aside":
                remedy = "move its files away by hand, or choose another backend.options.store"
            if self.tier == "direct" and what == "opened" and error.errno == errno.EINVAL:
                remedy = (
                    "this file system has no direct I/O: take backend.options.tier=mapped, or another "
                    "backend.options.store"
                )
            raise BackendError(f"{where}: cannot be {what}: {error.strerror or error}{done}: {remedy}") from error


def _superseded(folder: Path) -> Path:
    return next(
        path
        for number in itertools.count(1)
        if not (path := folder.with_name(f"{folder.name}.superseded-{number}")).exists()
    )


def _beside(folder: Path) -> str:
    """Words about stores that were set aside, where there are any."""
    found = sorted(path.name for path in folder.parent.glob(f"{folder.name}.superseded-*"))
    return f" (nothing reads {', '.join(found)} in {folder.parent} any more)" if found else ""


_DAMAGED = "the store was damaged from outside: remove its folder, and the run continues from its newest checkpoint"


def check_identity(layout: Layout, folder: Path) -> bool:
    """True where the folder holds no whole store yet. Raises BackendError where it holds one of another recipe or
    format.
    """
    try:
        found = parse_json(read_plain(folder / "layout.json", "record"))
    except FileNotFoundError:
        strange = (
            sorted({entry.name for entry in folder.iterdir()} - {"lock", "state", "commit", "checksums"})
            if folder.is_dir()
            else []
        )
        if strange and not all(name.startswith(fsops.TEMPORARY_PREFIX) for name in strange):
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
    version = found.get("version") if isinstance(found, dict) else None
    if type(version) is int and version != wanted["version"]:
        raise BackendError(
            f"{folder}: the store is of format {version}, and this version of weftrain reads {wanted['version']}: "
            "finish the "
            "run with the version that made it, or rename the folder: the run then continues from its newest checkpoint"
        )
    changed = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
    if changed[:1] == ["model"] and isinstance(found["model"], dict):
        changed = [
            f"model.{key}" for key in wanted["model"] if found["model"].get(key) != wanted["model"][key]
        ] or changed
    raise BackendError(
        f"{folder}: the store was made for another recipe or format ({', '.join(changed) or 'it has keys of its own'} "
        "differ): "
        "give backend.options.store another folder, or remove this one"
    )


def read_commit(folder: Path) -> Commit | None:
    """Where a store stands; None where it was not filled. Raises BackendError for one that a crash of the machine or a
    hand has torn.
    """
    pages = read_plain(folder / "commit", "record") if (folder / "commit").exists() else b""
    if len(pages) != 2 * PAGE_BYTES:
        raise BackendError(f"{folder}/commit: is missing or cut: {_DAMAGED}")
    found: list[Commit] = []
    for start in range(0, len(pages), PAGE_BYTES):
        page = pages[start : start + PAGE_BYTES]
        text = page[64:].rstrip(b" ")
        if hashlib.sha256(text).hexdigest().encode() == page[:64]:
            try:
                values = json.loads(text)
                values["pending"] = None if values["pending"] is None else Pending(**values["pending"])
                found.append(Commit(**values))
            except (ValueError, TypeError, KeyError) as error:
                raise BackendError(
                    f"{folder}/commit: is of another version ({error}), or no store's: {_DAMAGED}"
                ) from error
    if not found:
        if any(pages):
            raise BackendError(f"{folder}/commit: neither page is whole: {_DAMAGED}")
        return None
    newest = max(found, key=lambda commit: commit.sequence)
    if not newest.closed and newest.boot_id != _boot_id():
        raise BackendError(
            f"{folder}: the machine stopped while the store was open, so its last writes may be lost: remove the "
            "folder, and the run "
            "continues from its newest checkpoint"
        )
    return newest


def _page(commit: Commit) -> bytes:
    text = canonical_json(asdict(commit))
    if len(text) > PAGE_BYTES - 64:
        raise BackendError("the store's commit does not fit its page: fewer parameter groups are needed")
    return (hashlib.sha256(text).hexdigest().encode() + text).ljust(PAGE_BYTES)


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def state_sums(tile: Tile, planes: Planes, rotation: int) -> list[int]:
    """Checksums of a tile's planes in their order."""
    return [
        checksum(_bytes(planes[plane.name]), tile.index, number, rotation) for number, plane in enumerate(tile.planes)
    ]


def _bytes(plane: Tensor) -> np.ndarray:
    return plane.view(torch.uint8).numpy()


class MappedStore(FileStore):
    """Weights are views of the map. Nothing here asks for a page that is not there: all blocks were reserved when the
    file was made.
    """

    tier = "mapped"

    def __init__(self, layout: Layout, folder: Path) -> None:
        super().__init__(layout, folder, direct=False)

    def _open(self) -> None:
        super()._open()
        self._map = mmap.mmap(self._state.descriptor, self.layout.file_bytes, mmap.MAP_SHARED)
        self._memory = torch.frombuffer(self._map, dtype=torch.uint8)
        # tile -> the version of it that this process wrote, or checked: its compute plane, and all of it.
        self._known: dict[int, int] = {}
        self._read: dict[int, int] = {}

    def _planes(self, tile: Tile, rotation: int) -> Planes:
        offset = self.layout.offset(tile, rotation)
        return typed(self._memory[offset : offset + tile.bytes], tile)

    def _gradient(self, tile: Tile) -> Tensor:
        offset = self.layout.gradient_offset(tile)
        return self._memory[offset : offset + tile.gradient_bytes].view(DTYPES[tile.gradient_dtype])

    def compute_planes(self, record: Record) -> list[Tensor]:
        found = []
        for tile in record.tiles:
            rotation, name = self.rotation(tile), tile.planes[0].name
            found.append(self._planes(tile, rotation)[name])
            if self._known.get(tile.index) != rotation:
                self._check_planes(tile, rotation, {name: found[-1]})
                self._known[tile.index] = rotation
        return found

    def updating(self, tile: Tile) -> Iterator[Part]:
        before, step = self.rotation(tile), self.standing().step
        old, new = (self._planes(tile, before + further) for further in (0, 1))
        sums = [
            [Running(tile.index, number, before + further) for number in range(len(tile.planes))] for further in (0, 1)
        ]
        gradient_sum = Running(tile.index, -1, step)
        gradient = self._gradient(tile)
        for start in range(0, len(tile.owned), _CHUNK_ELEMENTS):
            stop = min(start + _CHUNK_ELEMENTS, len(tile.owned))
            parts = [slice(start // plane.elements_per_item, stop // plane.elements_per_item) for plane in tile.planes]
            for plane, part, running in zip(tile.planes, parts, sums[0], strict=True):
                running.add(_bytes(old[plane.name][part]))
                if plane.name != "copy":
                    new[plane.name][part].copy_(old[plane.name][part])
            gradient_sum.add(_bytes(gradient[start:stop]))
            yield start, stop, new, gradient[start:stop]
            for plane, part, running in zip(tile.planes, parts, sums[1], strict=True):
                running.add(_bytes(new[plane.name][part]))
        for number, running in enumerate(sums[0]):
            self._check(tile, before, number, running.value)
        self._check_gradient(tile, step, gradient_sum.value)
        with self._blamed("written"):
            self._note_state(tile, before + 1, [running.value for running in sums[1]])
        self._known[tile.index] = before + 1
        self.bytes_read += tile.bytes + tile.gradient_bytes
        self.bytes_written += tile.bytes
        self._updated(tile)

    def spool(self, tile: Tile, gradient: Callable[[Tensor], None]) -> None:
        gradient(self._gradient(tile))
        with self._blamed("written"):
            self._note_gradient(tile, self.standing().step + 1, self._gradient(tile))
        self.bytes_written += tile.gradient_bytes

    def read_state(self, tile: Tile) -> Planes:
        rotation = self.rotation(tile)
        planes = self._planes(tile, rotation)
        if self._read.get(tile.index) != rotation:  # an export asks for each parameter by itself
            self._check_planes(tile, rotation, planes)
            self._read[tile.index] = rotation
        return planes

    def write_state(self, tile: Tile, planes: Planes) -> None:
        target = self._planes(tile, 0)
        for name, plane in target.items():
            plane.copy_(planes[name])
        with self._blamed("written"):
            self._note_state(tile, 0, state_sums(tile, target, 0))
        self._known[tile.index] = 0

    def close(self) -> None:
        with contextlib.suppress(ValueError):  # closed before
            self._map.flush()
        self._memory = torch.empty(0, dtype=torch.uint8)
        super().close()


def kept_in(layout: Layout, folder: Path) -> StoredState | None:
    """The state of the store in `folder`; None where there is none, an unfinished one, or one that was filled and not
    trained.

    Raises BackendError as opening it would.
    """
    commit = None if check_identity(layout, folder) else read_commit(folder)
    if commit is None or commit.step == commit.filled_step:
        return None
    return StoredState(commit.step, commit.stretch, folder, commit.dataset_id, result_from_json(commit.result))
