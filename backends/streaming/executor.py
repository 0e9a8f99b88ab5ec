"""Carries out a schedule: loads each record's weights, makes its pending update, has the pass compute with it, spools
its gradients and frees its slot.

A layer's weights always return to the same memory, so views of them that autograd saved are valid again when the
layer's backward runs. Between `free` and the next load they are not.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from weftrain.backends.common.decoder import PLANES
from weftrain.backends.common.step import update
from weftrain.backends.streaming.communicator import Communicator, Gradients
from weftrain.backends.streaming.device import Copies, CudaCopies, Offload
from weftrain.backends.streaming.options import StreamingOptions
from weftrain.backends.streaming.passes import Pass
from weftrain.backends.streaming.schedule import COMPUTING, LOADING, Event, PassSchedule, PassScheduler
from weftrain.backends.streaming.state import Progress
from weftrain.backends.streaming.store.base import Store
from weftrain.backends.streaming.store.direct import aligned
from weftrain.backends.streaming.store.layout import Record, Tile
from weftrain.backends.streaming.store.planes import DTYPES, UpdateBuffers
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.model import Decoder
from weftrain.core.optim import parameter_groups


class PassExecutor:
    """For one store and one model. parameters: by name, those that have been loaded once. measured: bytes and times,
    summed over the passes since it was last cleared.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: StreamingOptions,
        device: torch.device,
        store: Store,
        communicator: Communicator,
        model: Decoder,
        adamw: Callable[..., Any],
        progress: Progress,
    ) -> None:
        self.store, self.measured = store, dict[str, float]()
        self.parameters: dict[str, nn.Parameter] = {}
        self._options, self._device, self._communicator = options, device, communicator
        self._model, self._adamw, self._optimizer, self._progress = model, adamw, recipe.optimizer, progress
        self._groups = {group.name: group for group in parameter_groups(recipe.model, recipe.optimizer)}
        # Weights that come from a disk, another rank or another device need a slot; others are used in the store.
        copied = store.tier == "direct" or communicator.several or device.type != "cpu"
        self._layer_slots = min(options.layer_slots, len(store.layout.records) - 2) if copied else 0
        self._scheduler = PassScheduler(store.layout, store.tier, self._layer_slots, store.buffer_bytes)
        self._slots: dict[int, Tensor] = {}
        self._host_slots: dict[int, Tensor] = {}
        self._copies = CudaCopies(device) if device.type == "cuda" else Copies()
        self._buffers = UpdateBuffers()

    # -- a pass

    def first_update(self) -> int | None:
        """The first tile that still needs the last step's update; None if no tile does."""
        commit = self.store.commit
        if commit is not None and commit.pending is not None:
            return commit.cursor
        self.store.drop_ahead()
        return None

    def schedule(self, name: str, read_ahead: bool = False) -> PassSchedule:
        """Of the next pass, by name: step, gradients (of a step, not stored), evaluation, flush (pending updates)."""
        first, self._scheduler.came_ahead = self.first_update(), self.store.has_read_ahead
        if name == "evaluation":
            return self._scheduler.evaluation(first)
        if name == "flush":
            return self._scheduler.flush(first)
        return self._scheduler.step(first, spooling=name == "step", read_ahead=read_ahead)

    def carry_out(self, schedule: PassSchedule, model_pass: Pass | None, *, shared: bool) -> None:
        """Carry out the events in order, and check the bytes that the store moved. model_pass: None if nothing is
        computed on this rank. shared: every rank takes part and gets the weights.
        """
        before, begin = self._counters(), time.perf_counter()
        try:
            computing_s = self._do(schedule, model_pass, shared)
        except BaseException:
            self._communicator.abort()  # no rank may wait for this one
            raise
        read, written, io_s, stall_s = (now - then for now, then in zip(self._counters(), before, strict=True))
        wanted = (schedule.bytes_read, schedule.bytes_written)
        if (read, written) != wanted:
            raise BackendError(f"the store moved {read, written} bytes in and out, the schedule says {wanted}")
        found = {
            "store_in_bytes": float(read),
            "store_out_bytes": float(written),
            "store_io_ms": io_s * 1e3,  # summed over reads and writes
            "stall_ms": stall_s * 1e3,  # the part of it for which computation waited
            "compute_ms": computing_s * 1e3,
            "pass_ms": (time.perf_counter() - begin) * 1e3,
        }
        self.measured = {name: value + self.measured.get(name, 0.0) for name, value in found.items()}

    def _counters(self) -> tuple[float, ...]:
        return self.store.bytes_read, self.store.bytes_written, self.store.io_s, self.store.stall_s

    def _do(self, schedule: PassSchedule, model_pass: Pass | None, shared: bool) -> float:
        """Returns the seconds of computation. A record is requested as soon as its slot is free."""
        to_request = deque(event for event in schedule.events if event.kind in ("update", "fetch"))
        occupied: set[int] = set()
        computing_s, ahead = 0.0, schedule.ahead_bytes > 0
        for number, event in enumerate(schedule.events):
            self._progress(str(event), number / len(schedule.events))
            while to_request and (slot := self._scheduler.slot(to_request[0].record)) not in occupied:
                occupied.add(slot)
                self._request(to_request.popleft(), slot)
            if ahead and not to_request and event.kind == "backward":  # all of this pass has been requested
                ahead = False
                self.store.read_ahead(self.store.layout.records[0])
            start = time.perf_counter()
            if event.kind in LOADING:
                self._load(event, shared)
            elif event.kind == "free":
                occupied.discard(self._scheduler.slot(event.record))
                self._free(event.record)
            elif model_pass is not None:
                model_pass(event)
            end, computes = time.perf_counter(), event.kind in COMPUTING
            computing_s += end - start if computes else 0.0
            if event.kind != "free":
                self.store.trace("compute" if computes else "move", str(event), start, end)
        if model_pass is not None:
            model_pass.end()
        self._copies.finish()
        return computing_s

    # -- where weights are

    def _slot(self, record: Record) -> Tensor | None:
        """The device memory for a record's weights, always the same; None: they are used in the store's memory."""
        return None if self._layer_slots == 0 else self._memory(record, self._slots, self._device)

    def _target(self, record: Record) -> Tensor | None:
        """The host memory into which the store reads a record's weights: its slot, or a buffer for the copy to it."""
        if self.store.tier != "direct" or self._device.type == "cpu":
            return self._slot(record)
        return self._memory(record, self._host_slots, torch.device("cpu"))

    def _memory(self, record: Record, slots: dict[int, Tensor], device: torch.device) -> Tensor:
        number = self._scheduler.slot(record)
        if number not in slots:
            sharing = [other for other in self.store.layout.records if self._scheduler.slot(other) == number]
            size = max(other.compute_bytes for other in sharing)
            if device.type == "cpu":
                slots[number] = self._copies.pinned(aligned(size))
            else:
                slots[number] = torch.empty(size, dtype=torch.uint8, device=device)
        return slots[number]

    def saved_tensors(self) -> contextlib.AbstractContextManager[Any]:
        """Where autograd keeps what it saves of a block: on the device, or with offload_activations in host memory."""
        if not self._options.offload_activations:
            return contextlib.nullcontext()
        return Offload({slot.untyped_storage().data_ptr() for slot in self._slots.values()})

    # -- a record's visit

    def _request(self, event: Event, slot: int) -> None:
        self._copies.wait_until_copied(slot)
        self.store.prefetch(event.record, self._target(event.record), event.kind == "update")

    def _load(self, event: Event, shared: bool) -> None:
        """Update a record and bind its weights to the model; on all ranks if the pass is shared."""
        record, slot = event.record, self._slot(event.record)
        if event.kind == "resident" and slot is not None:
            return
        for tile in record.tiles:
            if self.store.needs_update(tile):
                self._update(tile)
        planes = self.store.compute_planes(record)
        if slot is not None and (self.store.tier != "direct" or slot is not self._target(record)):
            self._copy(record, planes, slot)
        if shared:
            self._communicator.broadcast_weights(record, slot)
        self._bind(record, planes, slot)

    def _copy(self, record: Record, planes: list[Tensor], slot: Tensor) -> None:
        """Host to slot; on a CUDA device beside the computation of the record before."""
        with self._copies.copying(self._scheduler.slot(record)):
            for tile, plane in zip(record.tiles, planes, strict=False):  # a rank without a store has none
                place = slot[tile.slot_offset : tile.slot_offset + tile.compute_bytes]
                place.copy_(plane.view(torch.uint8), non_blocking=True)

    def _bind(self, record: Record, planes: list[Tensor], slot: Tensor | None) -> None:
        """Point the model's parameters at a record's weights: the same Parameter objects each time."""
        specs = {spec.name: spec for spec in record.specs}
        for number, tile in enumerate(record.tiles):
            plane = planes[number] if slot is None else slot[tile.compute_offset :].view(DTYPES[tile.compute])
            for fragment in tile.fragments:
                if fragment.start:
                    continue  # the rest of a tensor that began in an earlier tile: contiguous with it in the slot
                spec = specs[fragment.name]
                # .data has a version counter of its own. Autograd's counter would report that the memory was written
                # after a weight was saved: by another layer, then by this one again. The schedule ensures that the
                # weights are the same ones.
                weight = plane[fragment.offset : fragment.offset + spec.size].view(spec.shape).data
                if spec.name in self.parameters:
                    self.parameters[spec.name].data = weight
                else:
                    owner, _, attribute = spec.name.rpartition(".")
                    parameter = self.parameters[spec.name] = nn.Parameter(weight)
                    setattr(self._model.get_submodule(owner), attribute, parameter)

    @torch.no_grad()
    def _update(self, tile: Tile) -> None:
        """Make a tile's pending update: AdamW on its planes, part by part, with the gradient that was spooled."""
        pending = self.store.committed.pending
        assert pending is not None
        scale = torch.tensor(pending.gradient_scale, dtype=torch.float32)
        for start, stop, stored, gradient in self.store.updating(tile):
            part = slice(start, stop)
            fp32 = self._buffers.load(stored, part)
            flat = {**dict(zip(PLANES, fp32, strict=True)), "gradient": gradient}
            if "copy" in stored:
                flat["copy"] = stored["copy"][part]
            views: dict[str, dict[str, Tensor]] = {name: {} for name in flat}
            groups: dict[str, list[str]] = {}
            for fragment in tile.fragments:
                here, _ = tile.owned_part(fragment)
                first, last = max(here.start, start) - start, min(here.stop, stop) - start
                if first < last:
                    groups.setdefault(fragment.group, []).append(fragment.name)
                    for name, tensor in flat.items():
                        views[name][fragment.name] = tensor[first:last]
            copies = views.get("copy")
            sets = [
                (self._groups[group], names, None if copies is None else [copies[name] for name in names])
                for group, names in groups.items()
            ]
            rates, index = pending.learning_rates, pending.update_index
            update(self._adamw, sets, views, views["gradient"], self._optimizer, rates, index, scale)
            self._buffers.save(stored, part, *fp32)

    def spool(self, record: Record, gradients: Gradients) -> None:
        """Send a record's gradients to the store."""

        def write(gradients: Gradients) -> None:
            for tile in record.tiles:
                self.store.spool(tile, gradients)

        self._copies.to_host(gradients, write)

    def _free(self, record: Record) -> None:
        """The slot may be reused; poison_freed_slots shows if anything still reads it."""
        slot = self._slot(record)
        self._copies.used(self._scheduler.slot(record))
        if self._options.poison_freed_slots and slot is not None:
            self.store.drain()  # writes out of the slot
            slot.fill_(0xFF)  # NaN in every float type

    def close(self) -> None:
        self._slots.clear()
        self._host_slots.clear()
        self.store.close()
