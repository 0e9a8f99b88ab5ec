"""The store: weights, optimizer state and spooled gradients off the device, and the promise that a step is a transaction.

    ram      tensors of this process; updated in place; nothing survives the process
    mapped   a file mapped into memory: weights are used where they lie, in the page cache
    direct   a file read and written past the page cache, into buffers that are used again: no more memory than the schedule asks for

What a reader would get wrong: nothing undoes and nothing logs. An update writes a tile beside its old version (layout.py), a gradient lies
in a place of its own until every tile was updated with it, and `commit` says how many steps are complete and how many tiles have had
the last update. A process killed at any instant leaves old or new tiles, and the commit that says which.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import mmap
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weftrain.backends.streaming.layout import PAGE_BYTES, Layout, Record, Tile, ahead_tiles
from weftrain.core import fsops
from weftrain.core.canonical import canonical_json, parse_json
from weftrain.core.errors import BackendError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int16": torch.int16, "int8": torch.int8, "uint8": torch.uint8}
STALL_WARNING_S = 15.0
_CHUNK_ELEMENTS = 1 << 19  # of a mapped tile: copied beside and updated while it is in the last cache
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Planes = dict[str, Tensor]
# One part of a tile to update: first and last element (of the owned ones), planes to change in place, and the gradient of those elements.
Part = tuple[int, int, Planes, Tensor]


@dataclass(frozen=True)
class Pending:
    """The update that follows from the last step, decided and not yet made everywhere."""

    gradient_scale: float
    learning_rates: dict[str, float]
    update_index: int


@dataclass(frozen=True)
class Commit:
    """Where the store stands. `cursor` tiles have had the pending update; `rotation` counts those that all tiles have had."""

    step: int
    optimizer_updates: int
    rotation: int
    cursor: int
    pending: Pending | None
    dataset_id: str | None = None
    sequence: int = 0
    boot_id: str = ""
    closed: bool = False


def no_trace(track: str, name: str, start_s: float, end_s: float) -> None:
    """Nobody wants a timeline."""


class Store:
    """What the three tiers share. Names in gradients and states are canonical parameter names; all memory is the host's."""

    tier = ""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.commit: Commit | None = None  # None: holds no state yet
        self.bytes_read = self.bytes_written = 0  # asked for, in all
        self.stall_s = self.io_s = 0.0  # waited for by the engine; spent by the disk (reads and writes, each by itself)
        self.trace: Callable[[str, str, float, float], None] = no_trace  # track, name, start and end in seconds

    # -- what differs from tier to tier

    def prefetch(self, record: Record, slot: Tensor | None, with_state: bool) -> None:
        """Begin to bring a record: its weights, and where with_state all that an update needs."""

    ahead = False  # whether what the first record's next update needs, beyond weights and gradient, is here or on its way

    def read_ahead(self, record: Record) -> None:
        """Begin to bring the first record's state for the step after this one, while this one still computes."""

    def drop_ahead(self) -> None:
        """No update comes: what was read ahead is not needed."""

    def compute_planes(self, record: Record) -> list[Tensor]:
        """Of each tile of a fetched record, the owned elements of the weights in the compute dtype, flat."""
        raise NotImplementedError

    def updating(self, tile: Tile) -> Iterator[Part]:
        """The parts of a tile, to be updated in place one by one; the tile counts as updated when the iterator is exhausted."""
        raise NotImplementedError

    def spool(self, tile: Tile, gradient: Callable[[Tensor], None]) -> None:
        """Keep a tile's gradient: `gradient` fills a flat tensor of the owned elements."""
        raise NotImplementedError

    def read_state(self, tile: Tile) -> Planes:
        """Every plane of a tile as it is now (no update may be pending)."""
        raise NotImplementedError

    def write_state(self, tile: Tile, planes: Planes) -> None:
        """Set a tile as it is before any update (rotation 0). Between `begin_filling` and `end_filling`."""
        raise NotImplementedError

    def drain(self) -> None:
        """Wait until all that was written is in the system's hands. Raises BackendError for what failed."""

    def close(self) -> None:
        """Let go of files and memory; the store can be opened again."""

    # -- the transaction

    def begin_filling(self) -> None:
        """The store is about to be overwritten: until `end_filling` it holds no state."""
        self.drain()
        self._record(None)

    def end_filling(self, step: int, optimizer_updates: int) -> None:
        self._record(Commit(step, optimizer_updates, 0, 0, None))
        self.drain()

    def complete_step(self, step: int, optimizer_updates: int, pending: Pending | None, dataset_id: str | None) -> None:
        """`step` steps are complete, the gradients of the last one are spooled; all earlier updates have been made."""
        self._record(replace(self.standing(), step=step, optimizer_updates=optimizer_updates, pending=pending, dataset_id=dataset_id))

    def needs_update(self, tile: Tile) -> bool:
        return self.commit is not None and self.commit.pending is not None and tile.index >= self.commit.cursor

    def rotation(self, tile: Tile) -> int:
        """How many updates a tile has had since the store was filled."""
        commit = self.standing()
        return commit.rotation + (tile.index < commit.cursor)

    def _updated(self, tile: Tile) -> None:
        """One more tile has had the pending update; after the last one nothing is pending."""
        commit = self.standing()
        if tile.index != commit.cursor:  # the whole promise hangs on this order
            raise BackendError(f"tile {tile.index} was updated when tile {commit.cursor} was due: a defect of the schedule")
        last = tile.index + 1 == len(self.layout.tiles)
        done = replace(commit, rotation=commit.rotation + 1, cursor=0, pending=None) if last else replace(commit, cursor=tile.index + 1)
        self._record(done)

    def standing(self) -> Commit:
        if self.commit is None:
            raise BackendError("the store holds no state: it was never filled, or filling it was interrupted; import a checkpoint")
        return self.commit

    def _record(self, commit: Commit | None) -> None:
        """The new standing, for this process at once; for a restart when all that was written before it has arrived."""
        self.commit = commit


def _typed(memory: Tensor, tile: Tile) -> Planes:
    """Planes as views of a tile's bytes."""
    found = {}
    for name, (offset, plane) in tile.plane_offsets().items():
        found[name] = memory[offset : offset + plane.bytes(len(tile.owned))].view(DTYPES[plane.dtype])
    return found


class RamStore(Store):
    tier = "ram"

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self._planes: dict[int, Planes] = {}
        self._gradients: dict[int, Tensor] = {}

    def compute_planes(self, record: Record) -> list[Tensor]:
        return [self._planes[tile.index][tile.planes[0].name] for tile in record.tiles]

    def updating(self, tile: Tile) -> Iterator[Part]:
        yield 0, len(tile.owned), self._planes[tile.index], self._gradients[tile.index]
        self._updated(tile)

    def spool(self, tile: Tile, gradient: Callable[[Tensor], None]) -> None:
        if tile.index not in self._gradients:
            self._gradients[tile.index] = torch.zeros(len(tile.owned), dtype=DTYPES[tile.gradient_dtype])
        gradient(self._gradients[tile.index])

    def read_state(self, tile: Tile) -> Planes:
        return self._planes[tile.index]

    def write_state(self, tile: Tile, planes: Planes) -> None:
        if tile.index not in self._planes:
            pinned = torch.cuda.is_available()  # copies to a device then run beside its computation
            self._planes[tile.index] = {name: torch.empty(p.shape, dtype=p.dtype, pin_memory=pinned) for name, p in planes.items()}
        for name, plane in planes.items():
            self._planes[tile.index][name].copy_(plane)

    def close(self) -> None:
        self._planes, self._gradients = {}, {}


class EmptyStore(RamStore):
    """Of a rank that holds no state: others send it what it needs."""

    def compute_planes(self, record: Record) -> list[Tensor]:
        return []


class FileStore(Store):
    """A folder: `lock`, `layout.json` (what it was made for, written last), `commit` (two pages, the newer whole one counts), `state`."""

    def __init__(self, layout: Layout, folder: Path, *, direct: bool) -> None:
        super().__init__(layout)
        self.folder = folder
        self._sequence = 0  # of the last commit
        self._kept: Commit | None = None  # what a restart would find
        self._stack = contextlib.ExitStack()
        with self._blamed("opened"):
            fsops.make_dirs(folder)
            holder = canonical_json({"process": os.getpid()}) + b"\n"
            try:
                self._stack.enter_context(fsops.held_lock(folder / "lock", holder))
            except BlockingIOError:
                said = (folder / "lock").read_bytes()[:200].decode(errors="replace").strip()
                raise BackendError(
                    f"{folder}: the store is in use ({said}): wait for that process, or give another backend.options.store"
                ) from None
        try:
            with self._blamed("opened"):
                new = check_identity(layout, folder)
                self._state = fsops.PositionedFile(folder / "state", direct=direct)
                self._stack.callback(self._state.close)
                self._commits = fsops.PositionedFile(folder / "commit")
                self._stack.callback(self._commits.close)
                if new:
                    self._create()
                elif (size := (folder / "state").stat().st_size) != layout.file_bytes:
                    raise BackendError(f"{folder}/state: holds {size:,} bytes, the layout says {layout.file_bytes:,}: {_DAMAGED}")
                found = None if new else read_commit(folder)
                self._sequence = 0 if found is None else found.sequence
                if found is not None:
                    self._record(found)  # opened, and not closed
        except BaseException:
            self._stack.close()
            raise

    def _create(self) -> None:
        needed, free = self.layout.file_bytes, fsops.free_bytes(self.folder)
        have = (self.folder / "state").stat().st_blocks * 512  # what an interrupted creation has reserved
        if needed > free + have:
            raise BackendError(
                f"{self.folder}: the store needs {needed:,} bytes on disk ({self.layout.format.name}: {self.layout.state_bytes:,} of state "
                f"and {self.layout.gradient_bytes:,} of gradients), {free + have:,} are free: make room, put backend.options.store on "
                "another disk, or take a smaller backend.options.state_format"
            )
        self._state.allocate(needed)
        self._commits.allocate(2 * PAGE_BYTES)
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
                    self._state.sync()
                    if self.commit is not None:
                        page = _page(replace(self.commit, sequence=self._sequence + 1, closed=True))
                        self._commits.write_at((self._sequence + 1) % 2 * PAGE_BYTES, memoryview(page))
                    self._commits.sync()
        finally:
            self._stack.close()

    @contextlib.contextmanager
    def _blamed(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            done = "" if self._kept is None else f"; the store stands at {self._kept.step} completed steps"
            where = error.filename or self.folder
            raise BackendError(f"{where}: cannot be {what}: {error.strerror or error}{done}: check the disk, then resume") from error


_DAMAGED = "the store was damaged from outside: remove its folder, and the run continues from its newest checkpoint"


def check_identity(layout: Layout, folder: Path) -> bool:
    """True where the folder holds no whole store yet. Raises BackendError where it holds one of another recipe or format."""
    try:
        found = parse_json((folder / "layout.json").read_bytes())
    except FileNotFoundError:
        strange = sorted({entry.name for entry in folder.iterdir()} - {"lock", "state", "commit"}) if folder.is_dir() else []
        if strange and not all(name.startswith(fsops.TEMPORARY_PREFIX) for name in strange):
            raise BackendError(
                f"{folder}: holds '{strange[0]}', so it is no store: give an empty or new folder as backend.options.store"
            ) from None
        return True
    except ValueError as error:
        raise BackendError(f"{folder}/layout.json: {error}: {_DAMAGED}") from None
    wanted = parse_json(canonical_json(layout.identity))
    if found == wanted:
        return False
    changed = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
    if changed[:1] == ["model"] and isinstance(found["model"], dict):
        changed = [f"model.{key}" for key in wanted["model"] if found["model"].get(key) != wanted["model"][key]] or changed
    raise BackendError(
        f"{folder}: the store was made for another recipe or format ({', '.join(changed) or 'it has keys of its own'} differ): "
        "give backend.options.store another folder, or remove this one"
    )


def read_commit(folder: Path) -> Commit | None:
    """Where a store stands; None where it was not filled. Raises BackendError for one that a crash of the machine or a hand has torn."""
    pages = (folder / "commit").read_bytes()
    found: list[Commit] = []
    for start in range(0, len(pages), PAGE_BYTES):
        page = pages[start : start + PAGE_BYTES]
        text = page[64:].rstrip(b" ")
        if hashlib.sha256(text).hexdigest().encode() == page[:64]:
            values = json.loads(text)
            values["pending"] = None if values["pending"] is None else Pending(**values["pending"])
            found.append(Commit(**values))
    if not found:
        if any(pages):
            raise BackendError(f"{folder}/commit: neither page is whole: {_DAMAGED}")
        return None
    newest = max(found, key=lambda commit: commit.sequence)
    if not newest.closed and newest.boot_id != _boot_id():
        raise BackendError(
            f"{folder}: the machine stopped while the store was open, so its last writes may be lost: remove the folder, and the run "
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


class MappedStore(FileStore):
    """Weights are views of the map. Nothing here asks for a page that is not there: all blocks were reserved when the file was made."""

    tier = "mapped"

    def __init__(self, layout: Layout, folder: Path) -> None:
        super().__init__(layout, folder, direct=False)
        self._map = mmap.mmap(self._state.descriptor, layout.file_bytes, mmap.MAP_SHARED)
        self._memory = torch.frombuffer(self._map, dtype=torch.uint8)

    def _planes(self, tile: Tile, rotation: int) -> Planes:
        offset = self.layout.offset(tile, rotation)
        return _typed(self._memory[offset : offset + tile.bytes], tile)

    def _gradient(self, tile: Tile) -> Tensor:
        offset = self.layout.gradient_offset(tile)
        return self._memory[offset : offset + tile.gradient_bytes].view(DTYPES[tile.gradient_dtype])

    def compute_planes(self, record: Record) -> list[Tensor]:
        return [self._planes(tile, self.rotation(tile))[tile.planes[0].name] for tile in record.tiles]

    def updating(self, tile: Tile) -> Iterator[Part]:
        old, new = (self._planes(tile, self.rotation(tile) + further) for further in (0, 1))
        copied = [plane for plane in tile.planes if plane.name != "copy"]
        gradient = self._gradient(tile)
        for start in range(0, len(tile.owned), _CHUNK_ELEMENTS):
            stop = min(start + _CHUNK_ELEMENTS, len(tile.owned))
            for plane in copied:
                part = slice(start // plane.elements_per_item, stop // plane.elements_per_item)
                new[plane.name][part].copy_(old[plane.name][part])
            yield start, stop, new, gradient[start:stop]
        self.bytes_read += tile.bytes + tile.gradient_bytes
        self.bytes_written += tile.bytes
        self._updated(tile)

    def spool(self, tile: Tile, gradient: Callable[[Tensor], None]) -> None:
        gradient(self._gradient(tile))
        self.bytes_written += tile.gradient_bytes

    def read_state(self, tile: Tile) -> Planes:
        return self._planes(tile, self.rotation(tile))

    def write_state(self, tile: Tile, planes: Planes) -> None:
        for name, plane in self._planes(tile, 0).items():
            plane.copy_(planes[name])

    def close(self) -> None:
        with contextlib.suppress(ValueError):  # closed before
            self._map.flush()
        self._memory = torch.empty(0, dtype=torch.uint8)
        super().close()


def aligned(size_bytes: int) -> Tensor:
    """uint8 [size], on page boundaries, of anonymous memory that huge pages may back; returned to the system with the tensor."""
    memory = mmap.mmap(-1, max(size_bytes, PAGE_BYTES))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the system never gives huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size_bytes]


class _Pool:
    """Aligned buffers that are used again, up to a number of bytes in use at once. A first buffer is always given, whatever its size.

    A free buffer serves every smaller request: tiles of like sizes share, and no page is mapped anew from step to step.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._used = limit_bytes, 0
        self._free: list[Tensor] = []
        self._lent: dict[int, Tensor] = {}  # address -> the whole buffer
        self._changed = threading.Condition()
        self._failed: BaseException | None = None

    def take(self, size_bytes: int) -> Tensor:
        with self._changed:
            self._changed.wait_for(lambda: self._failed is not None or self._used == 0 or self._used + size_bytes <= self._limit)
            if self._failed is not None:
                raise self._failed
            self._used += size_bytes
            fitting = [buffer for buffer in self._free if buffer.numel() >= size_bytes]
            found = min(fitting, key=Tensor.numel, default=None)
            if found is None:
                held = sum(buffer.numel() for buffer in (*self._free, *self._lent.values()))
                for buffer in sorted(self._free, key=Tensor.numel):  # small ones make way
                    if held + size_bytes <= self._limit:
                        break
                    self._remove(buffer)
                    held -= buffer.numel()
                found = aligned(size_bytes)
            else:
                self._remove(found)
            self._lent[found.data_ptr()] = found
            return found[:size_bytes]

    def _remove(self, buffer: Tensor) -> None:
        self._free = [other for other in self._free if other is not buffer]

    def give(self, buffer: Tensor) -> None:
        with self._changed:
            self._used -= buffer.numel()
            self._free.append(self._lent.pop(buffer.data_ptr()))
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Nothing will come back any more: raise this wherever somebody waits, or will."""
        with self._changed:
            self._failed = error
            self._changed.notify_all()


class DirectStore(FileStore):
    """One thread reads ahead and one writes behind; both wait in the kernel while the disk works, and touch no number themselves.

    buffer_bytes: of state on its way in and out, and as much again of gradients.
    """

    tier = "direct"

    def __init__(self, layout: Layout, folder: Path, buffer_bytes: int) -> None:
        super().__init__(layout, folder, direct=True)
        self.buffer_bytes = buffer_bytes
        self._reader, self._writer = ThreadPoolExecutor(1, "store-reader"), ThreadPoolExecutor(1, "store-writer")
        self._buffers, self._gradient_buffers = _Pool(buffer_bytes), _Pool(buffer_bytes)
        self._reads: dict[int, Future[tuple[Tensor, Tensor | None]]] = {}  # tile -> its compute plane, and the rest of it with the gradient
        self._writes: dict[int, Future[None]] = {}  # tile -> the last write of its state
        self._spools: dict[int, Future[None]] = {}  # tile -> the last write of its gradient
        self._fetched: dict[int, Tensor] = {}
        self._occupants: dict[int, Record] = {}  # address of a slot -> the record last asked for into it
        self._ahead: dict[int, Future[Tensor]] = {}  # tile -> the rest of its state
        self._lock = threading.Lock()
        self._jobs: list[Future[None]] = []
        self._failed: BaseException | None = None

    def prefetch(self, record: Record, slot: Tensor | None, with_state: bool) -> None:
        assert slot is not None
        for tile in record.tiles:
            first = tile.compute_offset + tile.owned.start // max(len(tile.owned), 1) * tile.compute_bytes
            plane = slot[first : first + tile.compute_bytes]
            update = with_state and self.needs_update(tile)
            ahead = self._ahead.pop(tile.index, None) if update else None
            leaving = self._leaving(slot, record)
            self._reads[tile.index] = self._reader.submit(self._read, tile, plane, self.rotation(tile), update, leaving, ahead)
            self.bytes_read += tile.compute_bytes if ahead is not None or not update else tile.bytes
            self.bytes_read += tile.gradient_bytes if update else 0
        self._occupants[slot.data_ptr()] = record

    def _leaving(self, slot: Tensor, record: Record) -> list[Future[None]]:
        """Writes out of the same memory by the record that was there before."""
        before = self._occupants.get(slot.data_ptr())
        return (
            [] if before is None or before is record else [self._writes[tile.index] for tile in before.tiles if tile.index in self._writes]
        )

    def _read(
        self,
        tile: Tile,
        plane: Tensor,
        rotation: int,
        with_state: bool,
        leaving: list[Future[None]],
        ahead: Future[Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        # First what was written before, to the same place on disk or out of the same memory.
        for earlier in (*leaving, self._writes.get(tile.index), self._spools.get(tile.index) if with_state else None):
            if earlier is not None:
                earlier.result()
        offset, state_bytes, rest = self.layout.offset(tile, rotation), tile.bytes - tile.compute_bytes, None
        if with_state:
            rest = self._buffers.take(state_bytes + tile.gradient_bytes) if ahead is None else ahead.result()
        start = time.perf_counter()
        if rest is None or ahead is not None:
            self._state.read_at(offset, self._part(plane))
        else:
            self._state.read_at(offset, self._part(plane), self._part(rest[:state_bytes]))
        if rest is not None:
            self._state.read_at(self.layout.gradient_offset(tile), self._part(rest[state_bytes:]))
        self._busy("read", tile, start)
        return plane, rest

    def read_ahead(self, record: Record) -> None:
        def read(tile: Tile, offset: int) -> Tensor:
            if tile.index in self._writes:
                self._writes[tile.index].result()
            state_bytes = tile.bytes - tile.compute_bytes
            rest = self._buffers.take(state_bytes + tile.gradient_bytes)
            start = time.perf_counter()
            self._state.read_at(offset, self._part(rest[:state_bytes]))
            self._busy("read", tile, start)
            return rest

        for tile in ahead_tiles(record, self.buffer_bytes):
            offset = self.layout.offset(tile, self.rotation(tile)) + tile.compute_bytes
            self._ahead[tile.index] = self._reader.submit(read, tile, offset)
            self.bytes_read += tile.bytes - tile.compute_bytes

    @property
    def ahead(self) -> bool:  # type: ignore[override]
        return bool(self._ahead)

    def drop_ahead(self) -> None:
        while self._ahead:
            self._buffers.give(self._wait(self._ahead.popitem()[1], None, "read"))

    def _busy(self, what: str, tile: Tile, start: float) -> None:
        end = time.perf_counter()
        with self._lock:  # the two threads add to one figure
            self.io_s += end - start
        self.trace(what, self.layout.records[tile.record].name, start, end)

    def compute_planes(self, record: Record) -> list[Tensor]:
        for tile in record.tiles:
            if tile.index in self._reads:
                self._fetched[tile.index] = self._wait(self._reads.pop(tile.index), record, "read")[0]
        return [self._fetched[tile.index].view(DTYPES[tile.planes[0].dtype]) for tile in record.tiles]

    def updating(self, tile: Tile) -> Iterator[Part]:
        plane, rest = self._wait(self._reads.pop(tile.index), self.layout.records[tile.record], "read")
        assert rest is not None
        self._fetched[tile.index] = plane
        state_bytes = tile.bytes - tile.compute_bytes
        planes = {tile.planes[0].name: plane.view(DTYPES[tile.planes[0].dtype])}
        for name, (offset, item) in list(tile.plane_offsets().items())[1:]:
            at = offset - tile.compute_bytes
            planes[name] = rest[at : at + item.bytes(len(tile.owned))].view(DTYPES[item.dtype])
        yield 0, len(tile.owned), planes, rest[state_bytes:].view(DTYPES[tile.gradient_dtype])
        offset = self.layout.offset(tile, self.rotation(tile) + 1)

        def write() -> None:
            start = time.perf_counter()
            self._state.write_at(offset, self._part(plane), self._part(rest[:state_bytes]))
            self._buffers.give(rest)
            self._busy("write", tile, start)

        self.bytes_written += tile.bytes
        self._writes[tile.index] = self._submit(write)
        self._updated(tile)

    def spool(self, tile: Tile, gradient: Callable[[Tensor], None]) -> None:
        with self._blamed("written"):
            buffer = self._gradient_buffers.take(tile.gradient_bytes)
        gradient(buffer.view(DTYPES[tile.gradient_dtype]))

        def write() -> None:
            start = time.perf_counter()
            self._state.write_at(self.layout.gradient_offset(tile), self._part(buffer))
            self._gradient_buffers.give(buffer)
            self._busy("spool", tile, start)

        self.bytes_written += tile.gradient_bytes
        self._spools[tile.index] = self._submit(write)

    def read_state(self, tile: Tile) -> Planes:
        self.drain()
        memory = aligned(tile.bytes)
        with self._blamed("read"):
            self._state.read_at(self.layout.offset(tile, self.rotation(tile)), self._part(memory))
        return _typed(memory, tile)

    def write_state(self, tile: Tile, planes: Planes) -> None:
        with self._blamed("written"):
            buffer = self._buffers.take(tile.bytes)
        buffer.zero_()
        for name, plane in _typed(buffer, tile).items():
            plane.copy_(planes[name])

        def write() -> None:
            self._state.write_at(self.layout.offset(tile, 0), self._part(buffer))
            self._buffers.give(buffer)

        self._submit(write)

    def _submit(self, job: Callable[[], None]) -> Future[None]:
        """Behind all that was submitted before. After a failure nothing more is written: the next tile would overwrite a good one."""

        def run() -> None:
            if self._failed is not None:
                raise self._failed
            try:
                job()
            except BaseException as error:
                self._fail(error)
                raise

        future = self._writer.submit(run)
        self._jobs = [job for job in self._jobs if not job.done() or job.exception() is not None] + [future]
        return future

    def _fail(self, error: BaseException) -> None:
        self._failed = self._failed or error
        for pool in (self._buffers, self._gradient_buffers):
            pool.fail(error)

    def _in_order(self, job: Callable[[], None]) -> None:
        if hasattr(self, "_writer"):
            self._submit(job)
        else:  # still being opened
            super()._in_order(job)

    def drain(self) -> None:
        for job in self._jobs:
            self._wait(job, None, "written")
        self._jobs = []

    def _wait(self, future: Future[Any], record: Record | None, what: str) -> Any:
        """A result, with the time that it was waited for. A disk that takes long is reported while it does."""
        start, name = time.perf_counter(), "the end of the step" if record is None else record.name
        while not concurrent.futures.wait((future,), STALL_WARNING_S).done:
            waited = time.perf_counter() - start
            warnings.warn(f"{self.folder}: {waited:.0f} s waited for {name} to be {what}: the disk is slow or hangs", stacklevel=2)
        with self._blamed(what):
            result = future.result()
        end = time.perf_counter()
        self.stall_s += end - start
        if end - start > 1e-4:
            self.trace("stall", name, start, end)
        return result

    def close(self) -> None:
        self._buffers.fail(BackendError(f"{self.folder}: the store was closed"))  # a read that waits for room would wait for ever
        self._reader.shutdown(cancel_futures=True)
        try:
            super().close()
        finally:
            self._writer.shutdown(cancel_futures=True)


def open_store(layout: Layout, tier: str, folder: Path | None, buffer_bytes: int) -> Store:
    """Raises BackendError: no folder for a file tier, no room, a store of something else, in use, or torn."""
    if tier == "ram":
        return RamStore(layout)
    if folder is None:
        raise BackendError(f"backend.options.tier is {tier} and there is no folder for it: give backend.options.store a path")
    return MappedStore(layout, folder) if tier == "mapped" else DirectStore(layout, folder, buffer_bytes)


def stands_at(layout: Layout, folder: Path) -> int | None:
    """Completed steps of the store in `folder`; None where there is none, or an unfinished one. Raises BackendError as opening it would."""
    return None if check_identity(layout, folder) or (commit := read_commit(folder)) is None else commit.step
