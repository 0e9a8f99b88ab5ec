"""Carries out a schedule: loads each record's weights, makes its pending update, has the pass compute with it, spools
its gradients and frees its slot.

A layer's weights always return to the same memory, so views of them that autograd saved are valid again when the
layer's backward runs. Between `free` and the next load they are not.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weftrain.backends.common.decoder import PLANES
from weftrain.backends.common.step import update
from weftrain.backends.streaming.communicator import Communicator, Gradients
from weftrain.backends.streaming.device import Copies, CudaCopies, DeviceMemory
from weftrain.backends.streaming.device_state import DeviceState
from weftrain.backends.streaming.experts import ReachedExperts
from weftrain.backends.streaming.offload import Offload
from weftrain.backends.streaming.options import StreamingOptions
from weftrain.backends.streaming.passes import Pass
from weftrain.backends.streaming.placement import Placement, gradient_bytes
from weftrain.backends.streaming.schedule import COMPUTING, LOADING, Event, PassSchedule, PassScheduler
from weftrain.backends.streaming.state import Progress
from weftrain.backends.streaming.store.arena import aligned
from weftrain.backends.streaming.store.base import Store, UpdateRange
from weftrain.backends.streaming.store.layout import ROUTER_BIASES, Record, Tile
from weftrain.backends.streaming.store.planes import DTYPES, UpdateBuffers
from weftrain.backends.streaming.updates import Updates
from weftrain.core.config import OptimizerConfig, Recipe
from weftrain.core.errors import BackendError
from weftrain.core.model import Decoder
from weftrain.core.optim import ParameterGroup, parameter_groups

# keys of recipe.optimizer that an update reads, and the key of model.experts for the biases of routers
_OF_UPDATES = ("beta1", "beta2", "eps", "eps_placement", "weight_decay", "decay")
_BIAS_UPDATE = "bias_update"
_RANGE_ELEMENTS = 1 << 23  # of a tile on the device, updated at once: formats that are not fp32 need buffers for them


class _Optimizer(NamedTuple):
    """keys: of a recipe, by which the rest was made. groups: by name."""

    keys: dict[str, Any]
    config: OptimizerConfig
    groups: Mapping[str, ParameterGroup]
    bias_update: float


class PassExecutor:
    """For one store and one model. adamw: for the host's memory, and for the device's. device_limit_bytes: see
    DeviceMemory. parameters: by name, those that have been loaded once. measured: bytes and times, summed over the
    passes since it was last cleared.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: StreamingOptions,
        device: torch.device,
        store: Store,
        communicator: Communicator,
        model: Decoder,
        adamw: tuple[Callable[..., Any], Callable[..., Any]],
        progress: Progress,
        placement: Placement,
        device_limit_bytes: int | None = None,
    ) -> None:
        self.store, self.measured = store, dict[str, float]()
        self.parameters: dict[str, nn.Parameter] = {}
        self._options, self._device, self._communicator = options, device, communicator
        self._model, self._adamw, self._recipe, self._progress = model, adamw, recipe, progress
        bias_update = 0.0 if recipe.model.experts is None else recipe.model.experts.bias_update
        told = recipe.optimizer.model_dump(mode="json", include=set(_OF_UPDATES))
        self.optimizer_keys: dict[str, Any] = told | {_BIAS_UPDATE: bias_update}  # for Pending
        self._updating_by = self._optimizer_of(self.optimizer_keys)
        self.placement = placement
        self._scheduler = PassScheduler(store.layout, store.tier, placement, store.buffer_bytes)
        self._slots: dict[int, Tensor] = {}
        self._host_slots: dict[int, Tensor] = {}
        self._copies = CudaCopies(device) if device.type == "cuda" else Copies()
        self._experts = ReachedExperts(model.segments() if placement.apart else (), self._copies)
        self.memory = DeviceMemory(device, device_limit_bytes)
        self._kept: DeviceState | None = None
        if placement.states or placement.gradients:
            self._kept = store.device_state = DeviceState(store.layout, placement, self.memory, self._copies)
        self._offload = Offload(self._copies, self._weight_addresses) if options.offload_activations else None
        self._buffers = UpdateBuffers()
        # What lies in memory can be updated beside the computation; what comes from the disk is when it has come.
        self._updates = Updates(self._update_record, beside=placement.apart and store.tier != "direct")
        self._came: set[int] = set()  # records whose copy into their slot has been requested in this pass

    def _optimizer_of(self, keys: Mapping[str, Any]) -> _Optimizer:
        """What updates by these keys, and by the rest of the job's recipe."""
        recipe = self._recipe
        config = recipe.optimizer.model_copy(update={key: keys[key] for key in _OF_UPDATES})
        groups = {group.name: group for group in parameter_groups(recipe.model, config, recipe.tuning)}
        return _Optimizer(dict(keys), config, groups, keys[_BIAS_UPDATE])

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
        self._experts.begin()
        try:
            computing_s = self._do(schedule, model_pass, shared)
        except BaseException:
            self._communicator.abort()  # no rank may wait for this one
            raise
        found = [now - then for now, then in zip(self._counters(), before, strict=True)]
        (read, written, to_device, to_host), (io_s, stall_s) = found[:4], found[4:]
        wanted = [schedule.bytes_read, schedule.bytes_written]
        if [read, written] != wanted:
            raise BackendError(f"the store moved {read, written} bytes in and out, the schedule says {tuple(wanted)}")
        wanted = [schedule.to_device_bytes - self._experts.left_out_bytes, schedule.to_host_bytes]
        if [to_device, to_host] != wanted and not self._communicator.several:
            copied = f"{to_device, to_host} bytes were copied to the device and back"
            raise BackendError(f"{copied}, the schedule says {tuple(wanted)}")
        numbers = {
            "store_in_bytes": float(read),
            "store_out_bytes": float(written),
            "store_io_ms": io_s * 1e3,  # summed over reads and writes
            "stall_ms": stall_s * 1e3,  # the part of it for which computation waited
            "compute_ms": computing_s * 1e3,
            "pass_ms": (time.perf_counter() - begin) * 1e3,
        }
        if self.placement.apart:
            numbers |= {"to_device_bytes": float(to_device), "to_host_bytes": float(to_host)}
        self.measured = {name: value + self.measured.get(name, 0.0) for name, value in numbers.items()}

    def _counters(self) -> tuple[float, ...]:
        store, copies = self.store, self._copies
        moved = store.bytes_read, store.bytes_written, copies.to_device_bytes, copies.to_host_bytes
        return *moved, store.io_s, store.stall_s

    def _do(self, schedule: PassSchedule, model_pass: Pass | None, shared: bool) -> float:
        """Returns the seconds of computation. A record is requested as soon as its slot is free."""
        streamed = [event for event in schedule.events if event.kind in ("update", "fetch")]
        to_request = deque(event for event in streamed if event.record.index not in self.placement.states)
        to_copy: deque[Event] = deque()  # requested, and not yet copied to the device
        occupied: set[int] = set()
        computing_s, ahead = 0.0, schedule.ahead_bytes > 0
        self._load_kept()
        self._came.clear()
        self._updates.begin([event.record for event in streamed if event.kind == "update"])
        for number, event in enumerate(schedule.events):
            self._progress(str(event), number / len(schedule.events))
            while to_request and (slot := self._scheduler.slots.number(to_request[0].record)) not in occupied:
                occupied.add(slot)
                self._request(to_request[0], slot)
                to_copy.append(to_request.popleft())
            self._copy_ahead(to_copy, event)
            if ahead and not to_request and event.kind == "backward":  # all of this pass has been requested
                ahead = False
                self.store.read_ahead(self._scheduler.ahead)
            start = time.perf_counter()
            if event.kind in LOADING:
                self._load(event, shared)
            elif event.kind == "free":
                occupied.discard(self._scheduler.slots.number(event.record))
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
        if self._offload is not None:
            self._offload.end()
        return computing_s

    # -- where weights are

    def _slot(self, record: Record) -> Tensor | None:
        """The device memory for a record's weights, always the same; None: they are used in the store's memory."""
        if self._kept is not None and record.index in self.placement.states:
            return self._kept.weights(record)
        return None if self.placement.layer_slots == 0 else self._memory(record, self._slots, on_host=False)

    def _target(self, record: Record) -> Tensor | None:
        """The host memory into which the store reads a record's weights: its slot, or a buffer for the copy to it."""
        if self.store.tier != "direct" or not self.placement.apart:
            return self._slot(record)
        return self._memory(record, self._host_slots, on_host=True)

    def _memory(self, record: Record, slots: dict[int, Tensor], on_host: bool) -> Tensor:
        number = self._scheduler.slots.number(record)
        if number not in slots:
            sharing = [other for other in self.store.layout.records if self._scheduler.slots.number(other) == number]
            size = max(other.compute_bytes for other in sharing)
            if on_host:
                slots[number] = self._copies.pinned(aligned(size))
            elif self.placement.apart:
                slots[number] = self.memory.allocate(size, f"a slot for the weights of {record.name}")
            else:
                slots[number] = aligned(size)
        return slots[number]

    def saved_tensors(self, record: Record) -> contextlib.AbstractContextManager[Any]:
        """Where autograd keeps what it saves of a block: on the device, or with offload_activations in host memory."""
        return contextlib.nullcontext() if self._offload is None else self._offload.block(record.index)

    def _weight_addresses(self) -> set[int]:
        kept = [] if self._kept is None else self._kept.all_weights()
        return {slot.untyped_storage().data_ptr() for slot in (*self._slots.values(), *kept)}

    def _load_kept(self) -> None:
        """Once: a state that lies in a file is read into device memory, with the gradient of a pending update."""
        for tile in self.store.layout.tiles if self._kept is not None else ():
            if self._kept is not None and self._kept.keeps(tile) and not self._kept.holds(tile):
                self._kept.put(tile, self.store.read_state(tile))
                if self.store.needs_update(tile):
                    self._kept.gradient(tile).copy_(self.store.read_gradient(tile))

    # -- a record's visit

    def _request(self, event: Event, slot: int) -> None:
        self._copies.wait_until_copied(slot)
        self.store.prefetch(event.record, self._target(event.record), event.kind == "update")

    def _copy_ahead(self, requested: deque[Event], now: Event) -> None:
        """Copy records whose slots are free to the device while the record before them computes, if they lie in memory
        and have been updated.
        """
        if now.kind in LOADING and requested and requested[0] is now:
            requested.popleft()
        if not self.placement.apart or self.store.tier == "direct" or now.kind not in COMPUTING:
            return
        while requested and self._updates.made(requested[0].record) and requested[0].to_device_bytes:
            event = requested.popleft()
            slot = self._slot(event.record)
            assert slot is not None
            self._copy(event, self.store.compute_planes(event.record), slot)
            self._came.add(event.record.index)

    def _load(self, event: Event, shared: bool) -> None:
        """Update a record and bind its weights to the model; on all ranks if the pass is shared."""
        record, slot = event.record, self._slot(event.record)
        kept = record.index in self.placement.states
        if event.kind == "resident" and slot is not None and not kept:
            return
        self._updates.wait_for(record)
        if kept:
            self._bind(record, [], slot)
            return
        planes = self.store.compute_planes(record)
        if self.placement.apart and slot is not None:
            if record.index not in self._came and event.to_device_bytes:
                self._copy(event, planes, slot)
            self._came.discard(record.index)
            self._copies.wait_for_copy(self._scheduler.slots.number(record))
        elif slot is not None and self.store.tier != "direct":
            self._copy(event, planes, slot)
        if shared:
            self._communicator.broadcast_weights(record, slot)
        self._bind(record, planes, slot)

    def _copy(self, event: Event, planes: list[Tensor], slot: Tensor) -> None:
        """Host to slot; on a CUDA device beside the computation of the record before."""
        record = event.record
        with self._copies.copying(self._scheduler.slots.number(record)):
            for tile, plane in zip(record.tiles, planes, strict=False):  # a rank without a store has none
                place = slot[tile.slot_offset : tile.slot_offset + tile.compute_bytes]
                source = plane.view(torch.uint8)
                for part in self._experts.parts(event, tile):
                    place[part].copy_(source[part], non_blocking=True)
                    self._copies.to_device_bytes += part.stop - part.start if self.placement.apart else 0

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
                    parameter = self.parameters[spec.name] = nn.Parameter(weight, requires_grad=spec.trained)
                    setattr(self._model.get_submodule(owner), attribute, parameter)

    def _update_record(self, record: Record) -> None:
        for tile in record.tiles:
            if self.store.needs_update(tile):
                self._update(tile)

    def _updating(self, tile: Tile) -> Iterable[UpdateRange]:
        return self.store.updating(tile) if self._kept is None or not self._kept.keeps(tile) else self._in_place(tile)

    def _in_place(self, tile: Tile) -> Iterator[UpdateRange]:
        """The same as `Store.updating`, for a tile whose state stays on the device."""
        assert self._kept is not None
        planes, gradient, count = self._kept.planes(tile), self._kept.gradient(tile), len(tile.owned)
        for start in range(0, count, _RANGE_ELEMENTS):
            stop = min(start + _RANGE_ELEMENTS, count)
            yield UpdateRange(start, stop, planes, gradient[start:stop])
        if self.store.tier != "ram":
            self._copies.to_host_bytes += sum(plane.nbytes for plane in planes.values())
        self.store.write_updated(tile, planes)

    @torch.no_grad()
    def _update(self, tile: Tile) -> None:
        """Make a tile's pending update with the gradient that was spooled, part by part: AdamW on its planes, and the
        biases of routers as `balance_biases` moves them.
        """
        pending = self.store.committed.pending
        assert pending is not None
        by = self._updating_by
        if (keys := pending.optimizer or self.optimizer_keys) != by.keys:  # of the process before, by another recipe
            by = self._updating_by = self._optimizer_of(keys)
        adamw = self._adamw[self._kept is not None and self._kept.keeps(tile)]
        for start, stop, stored, gradient in self._updating(tile):
            # torch.tensor would wait for all that the device has been given
            scale = torch.full((), pending.gradient_scale, dtype=torch.float32, device=gradient.device)
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
            for name in groups.pop(ROUTER_BIASES, ()):
                views["weights"][name].add_(views["gradient"][name], alpha=by.bias_update)
            copies = views.get("copy")
            sets = [
                (by.groups[group], names, None if copies is None else [copies[name] for name in names])
                for group, names in groups.items()
            ]
            rates, index = pending.learning_rates, pending.update_index
            update(adamw, sets, views, views["gradient"], by.config, rates, index, scale)
            self._buffers.save(stored, part, *fp32)

    def spool(self, record: Record, gradients: Gradients) -> None:
        """Send a record's gradients to the store, or keep them on the device."""
        trained = [tile for tile in record.tiles if tile.trained]

        def write(gradients: Gradients) -> None:
            for tile in trained:
                self.store.spool(tile, gradients)

        if self._kept is not None and self.placement.keeps_gradient(record):
            for tile in trained:
                self._kept.keep_gradient(tile, gradients)
            if self.store.tier == "ram":
                return
        self._copies.to_host_bytes += gradient_bytes(record) if self.placement.apart else 0
        if self.store.tier == "ram":  # straight to where they are kept
            with self._copies.leaving(gradients):
                write(gradients)
        else:
            self._copies.to_host(gradients, write)

    def _free(self, record: Record) -> None:
        """The slot may be reused; poison_freed_slots shows if anything still reads it."""
        slot = self._slot(record)
        self._copies.used(self._scheduler.slots.number(record))
        if self._options.poison_freed_slots and slot is not None:
            self.store.drain()  # writes out of the slot
            slot.fill_(0xFF)  # NaN in every float type

    def close(self) -> None:
        self._updates.close()
        self._copies.close()
        self._slots.clear()
        self._host_slots.clear()
        self.store.close()
