"""Tier `direct`: direct I/O past the page cache. Two threads read ahead, one writes behind, and buffers are reused.

Writes are done in the order in which they were requested, and none is done after one that failed: the order of tiles,
gradients and commits on the disk is what makes a step a transaction (base.py).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weftrain.backends.streaming.store.arena import aligned
from weftrain.backends.streaming.store.base import UpdateRange, copy_gradients
from weftrain.backends.streaming.store.checksums import checksum
from weftrain.backends.streaming.store.file import FileStore, as_bytes, state_sums
from weftrain.backends.streaming.store.layout import Layout, Record, Tile
from weftrain.backends.streaming.store.planes import DTYPES, Planes, planes_apart, planes_in
from weftrain.core.errors import BackendError

STALL_WARNING_S = 15.0


def _view(memory: Tensor) -> memoryview:
    return memory.view(torch.uint8).numpy().data


class _Pool:
    """Aligned, reused buffers with a limit on the bytes in use. A request is always met if no buffer is in use.

    A free buffer serves requests down to half its size: tiles of similar sizes share, and no step maps new pages.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._used_bytes = limit_bytes, 0
        self._free: list[Tensor] = []
        self._in_use: dict[int, Tensor] = {}  # address -> the whole buffer
        self._changed = threading.Condition()
        self._failed: BaseException | None = None
        self._tickets, self._served = itertools.count(), 0

    def ticket(self) -> int:
        """A place in the queue. Buffers are handed out in the order of their requests: a later one that took the last
        buffer would keep it from the earlier one that the run waits for.
        """
        return next(self._tickets)

    def acquire(self, size_bytes: int, ticket: int | None = None) -> Tensor:
        with self._changed:
            ticket = self.ticket() if ticket is None else ticket
            self._changed.wait_for(
                lambda: (
                    self._failed
                    or (
                        self._served == ticket
                        and (self._used_bytes == 0 or self._used_bytes + size_bytes <= self._limit)
                    )
                )
            )
            if self._failed is not None:
                raise self._failed
            self._served += 1
            self._changed.notify_all()
            self._used_bytes += size_bytes
            self._free.sort(key=Tensor.numel)
            fitting = (n for n, buffer in enumerate(self._free) if size_bytes <= buffer.numel() <= 2 * size_bytes)
            number = next(fitting, None)
            if number is None:
                held = sum(buffer.numel() for buffer in (*self._free, *self._in_use.values()))
                while self._free and held + size_bytes > 2 * self._limit:  # free buffers of other sizes
                    held -= self._free.pop().numel()
                found = aligned(size_bytes)
            else:
                found = self._free.pop(number)
            self._in_use[found.data_ptr()] = found
            return found[:size_bytes]

    def release(self, buffer: Tensor) -> None:
        with self._changed:
            self._used_bytes -= buffer.numel()
            self._free.append(self._in_use.pop(buffer.data_ptr()))
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """No buffer will be released any more: raise `error` in every `acquire` that waits, or will."""
        with self._changed:
            self._failed = error
            self._changed.notify_all()


class DirectStore(FileStore):
    """buffer_bytes: for state being read or written, and as much again for gradients.

    Two threads read, so that the disk works while what came is checked, and one writes, in order. A write of updated
    state waits while something is being read: the computation waits for reads alone, until buffers are short.
    """

    tier = "direct"
    _writer: ThreadPoolExecutor | None = None  # None while the store is being opened: writes are then done at once

    def __init__(self, layout: Layout, folder: Path, buffer_bytes: int) -> None:
        super().__init__(layout, folder, direct=True)
        self.buffer_bytes = buffer_bytes
        self._reader, self._writer = ThreadPoolExecutor(2, "store-reader"), ThreadPoolExecutor(1, "store-writer")
        self._buffers, self._gradient_buffers = _Pool(buffer_bytes), _Pool(buffer_bytes)
        # tile -> its compute plane, and the rest of it with the gradient
        self._reads: dict[int, Future[tuple[Tensor, Tensor | None]]] = {}
        self._writes: dict[int, Future[None]] = {}  # tile -> the last write of its state
        self._spools: dict[int, Future[None]] = {}  # tile -> the last write of its gradient
        self._fetched: dict[int, Tensor] = {}
        self._ahead: dict[int, Future[Tensor]] = {}  # tile -> the rest of its state
        self._lock = threading.Lock()
        self._quiet, self._num_reading = threading.Condition(), 0  # reads that the disk works on
        self._queued: list[Future[None]] = []  # writes
        self._failed: BaseException | None = None

    def prefetch(self, record: Record, slot: Tensor | None, with_state: bool) -> None:
        assert slot is not None
        for tile in record.tiles:
            plane = slot[tile.slot_offset : tile.slot_offset + tile.compute_bytes]
            update = with_state and self.needs_update(tile)
            ahead = self._ahead.pop(tile.index, None) if update else None
            # what is to be read must have been written
            earlier = [self._writes.get(tile.index), self._spools.get(tile.index) if update else None]
            rotation, step = self.rotation(tile), self.committed.step
            ticket = self._buffers.ticket() if update and ahead is None else None
            self._reads[tile.index] = self._reader.submit(
                self._read_tile, tile, plane, rotation, step, earlier, ticket, ahead
            )
            self.bytes_read += tile.compute_bytes if ahead is not None or not update else tile.bytes
            self.bytes_read += tile.gradient_bytes if update else 0

    def _read_tile(
        self,
        tile: Tile,
        plane: Tensor,
        rotation: int,
        step: int,
        earlier: list[Future[None] | None],
        ticket: int | None,
        ahead: Future[Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """ticket: for a buffer; None: the tile's state has come ahead, or is not asked for."""
        for write in earlier:
            if write is not None:
                write.result()
        offset, state_bytes, rest = self.layout.offset(tile, rotation), tile.bytes - tile.compute_bytes, None
        if ticket is not None:
            rest = self._buffers.acquire(state_bytes + tile.gradient_bytes, ticket)
        elif ahead is not None:
            rest = ahead.result()
        with self._reading(tile):
            state = [] if rest is None or ahead is not None else [rest[:state_bytes]]
            self._state.read_at(offset, *map(_view, (plane, *state)))
            if rest is not None:
                self._state.read_at(self.layout.gradient_offset(tile), _view(rest[state_bytes:]))
        self._check_planes(tile, rotation, planes_apart(tile, plane, rest if ahead is None else None))
        if rest is not None:
            self._check_gradient(tile, step, checksum(as_bytes(rest[state_bytes:]), tile.index, -1, step))
        return plane, rest

    def read_ahead(self, tiles: Iterable[Tile]) -> None:
        def read(tile: Tile, offset: int, rotation: int, earlier: Future[None] | None, ticket: int) -> Tensor:
            if earlier is not None:
                earlier.result()
            state_bytes = tile.bytes - tile.compute_bytes
            rest = self._buffers.acquire(state_bytes + tile.gradient_bytes, ticket)
            with self._reading(tile):
                self._state.read_at(offset, _view(rest[:state_bytes]))
            self._check_planes(tile, rotation, planes_apart(tile, None, rest))
            return rest

        for tile in tiles:
            offset = self.layout.offset(tile, self.rotation(tile)) + tile.compute_bytes
            earlier, ticket = self._writes.get(tile.index), self._buffers.ticket()
            self._ahead[tile.index] = self._reader.submit(read, tile, offset, self.rotation(tile), earlier, ticket)
            self.bytes_read += tile.bytes - tile.compute_bytes

    @property
    def has_read_ahead(self) -> bool:  # type: ignore[override]
        return bool(self._ahead)

    def drop_ahead(self) -> None:
        while self._ahead:
            self._buffers.release(self._wait(self._ahead.popitem()[1], None, "read"))

    @contextlib.contextmanager
    def _reading(self, tile: Tile) -> Iterator[None]:
        """Around the read itself: writes of state wait for its end."""
        start = time.perf_counter()
        with self._quiet:
            self._num_reading += 1
        try:
            yield
        finally:
            with self._quiet:
                self._num_reading -= 1
                self._quiet.notify_all()
        self._record_io("read", tile, start)

    def _record_io(self, what: str, tile: Tile, start: float) -> None:
        end = time.perf_counter()
        with self._lock:  # both threads add to io_s
            self.io_s += end - start
        self.trace(what, self.layout.records[tile.record].name, start, end)

    def compute_planes(self, record: Record) -> list[Tensor]:
        for tile in record.tiles:
            if tile.index in self._reads:
                self._fetched[tile.index] = self._wait(self._reads.pop(tile.index), record, "read")[0]
        return [self._fetched[tile.index].view(DTYPES[tile.planes[0].dtype]) for tile in record.tiles]

    def updating(self, tile: Tile) -> Iterator[UpdateRange]:
        plane, rest = self._wait(self._reads.pop(tile.index), self.layout.records[tile.record], "read")
        assert rest is not None
        self._fetched[tile.index] = plane
        state_bytes = tile.bytes - tile.compute_bytes
        planes, rotation = planes_apart(tile, plane, rest), self.rotation(tile) + 1
        yield UpdateRange(0, len(tile.owned), planes, rest[state_bytes:].view(DTYPES[tile.gradient_dtype]))

        # The gradient's part of the buffer is free now. From there the weights are written, so that the slot is, too.
        weights = rest[state_bytes : state_bytes + tile.compute_bytes].copy_(plane)

        def write() -> None:
            with self._quiet:
                self._quiet.wait_for(lambda: self._num_reading == 0)
            start = time.perf_counter()
            self._state.write_at(self.layout.offset(tile, rotation), _view(weights), _view(rest[:state_bytes]))
            self._record_io("write", tile, start)
            self._note_state(tile, rotation, state_sums(tile, planes_apart(tile, weights, rest), rotation))
            self._buffers.release(rest)

        self.bytes_written += tile.bytes
        self._writes[tile.index] = self._submit(write)
        self._updated(tile)

    def write_updated(self, tile: Tile, planes: Planes) -> None:
        rotation = self.rotation(tile) + 1
        self._write_beside(tile, planes, rotation)
        self.bytes_written += tile.bytes
        self._updated(tile)

    def spool(self, tile: Tile, gradients: Mapping[str, Tensor]) -> None:
        with self._reported("written"):
            buffer = self._gradient_buffers.acquire(tile.gradient_bytes)
        copy_gradients(tile, gradients, buffer.view(DTYPES[tile.gradient_dtype]))
        step = self.committed.step + 1

        def write() -> None:
            start = time.perf_counter()
            self._state.write_at(self.layout.gradient_offset(tile), _view(buffer))
            self._record_io("spool", tile, start)
            self._note_gradient(tile, checksum(as_bytes(buffer), tile.index, -1, step))
            self._gradient_buffers.release(buffer)

        self.bytes_written += tile.gradient_bytes
        self._spools[tile.index] = self._submit(write)

    def read_state(self, tile: Tile) -> Planes:
        self.drain()
        memory = aligned(tile.bytes)
        rotation = self.rotation(tile)
        with self._reported("read"):
            self._state.read_at(self.layout.offset(tile, rotation), _view(memory))
        planes = planes_in(memory, tile)
        self._check_planes(tile, rotation, planes)
        return planes

    def read_gradient(self, tile: Tile) -> Tensor:
        self.drain()
        memory, step = aligned(tile.gradient_bytes), self.committed.step
        with self._reported("read"):
            self._state.read_at(self.layout.gradient_offset(tile), _view(memory))
        self._check_gradient(tile, step, checksum(as_bytes(memory), tile.index, -1, step))
        return memory.view(DTYPES[tile.gradient_dtype])

    def write_state(self, tile: Tile, planes: Planes) -> None:
        self._write_beside(tile, planes, 0)

    def _write_beside(self, tile: Tile, planes: Planes, rotation: int) -> None:
        """Write planes through a buffer, behind all earlier writes. The buffer is not one of those that reads wait for:
        what was read ahead keeps them until this call returns.
        """
        with self._reported("written"):
            buffer = self._gradient_buffers.acquire(tile.bytes)
        target = planes_in(buffer, tile)
        ends = 0
        for name, plane in target.items():
            plane.copy_(planes[name])
            ends = plane.data_ptr() + plane.nbytes - buffer.data_ptr()
        buffer[ends:].zero_()

        def write() -> None:
            start = time.perf_counter()
            self._state.write_at(self.layout.offset(tile, rotation), _view(buffer))
            self._record_io("write", tile, start)
            self._note_state(tile, rotation, state_sums(tile, target, rotation))
            self._gradient_buffers.release(buffer)

        self._writes[tile.index] = self._submit(write)

    def _submit(self, write: Callable[[], None]) -> Future[None]:
        """Write after all earlier writes. None is done after one that failed: it could overwrite a good tile."""

        def run() -> None:
            if self._failed is not None:
                raise self._failed
            try:
                write()
            except BaseException as error:
                self._fail(error)
                raise

        assert self._writer is not None
        future = self._writer.submit(run)
        self._queued = [item for item in self._queued if not item.done() or item.exception() is not None] + [future]
        return future

    def _fail(self, error: BaseException) -> None:
        self._failed = self._failed or error
        for pool in (self._buffers, self._gradient_buffers):
            pool.fail(error)

    def _in_order(self, write: Callable[[], None]) -> None:
        if self._writer is None:
            super()._in_order(write)
        else:
            self._submit(write)

    def drain(self) -> None:
        for future in self._queued:
            self._wait(future, None, "written")
        self._queued = []

    def _wait(self, future: Future[Any], record: Record | None, what: str) -> Any:
        """A result. The wait counts as a stall; a long one is reported while it lasts."""
        start, name = time.perf_counter(), "the end of the step" if record is None else record.name
        while not concurrent.futures.wait((future,), STALL_WARNING_S).done:
            waited = time.perf_counter() - start
            warnings.warn(
                f"{self.folder}: {waited:.0f} s waited for {name} to be {what}: the disk is slow or hangs", stacklevel=2
            )
        with self._reported(what):
            result = future.result()
        end = time.perf_counter()
        self.stall_s += end - start
        if end - start > 1e-4:
            self.trace("stall", name, start, end)
        return result

    def close(self) -> None:
        # otherwise a read that waits for a buffer would never end
        self._buffers.fail(BackendError(f"{self.folder}: the store was closed"))
        self._reader.shutdown(cancel_futures=True)
        try:
            super().close()
        finally:
            assert self._writer is not None
            self._writer.shutdown(cancel_futures=True)
