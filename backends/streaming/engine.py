"""The engine: carries out a schedule. Weights come and go, activations stay, gradients leave, updates happen where the
state is.

What a reader would get wrong: no saved tensor is packed or rebound. A layer always comes back to the same memory, so
whatever autograd saved of its weights is true again when its backward runs; `free` says from when on it is not. The
bits are those of the local backend because every operation is: the same kernels on the same shapes, micro-batches added
in order, one norm a parameter, AdamW element by element.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn

from weftrain.backends.common.base import device_fingerprint
from weftrain.backends.common.state_snapshot import SnapshotOwner, StateSnapshot, check_state
from weftrain.backends.common.step import (
    LossScale,
    call,
    clip_coefficient,
    global_norm,
    non_finite_message,
    slice_rows,
    to_device,
)
from weftrain.backends.streaming.device import Offload, Streams
from weftrain.backends.streaming.fabric import Alone, Follower, Group
from weftrain.backends.streaming.passes import Gradients, Pass
from weftrain.backends.streaming.schedule import BRINGING, Event, Schedule, Scheduler
from weftrain.backends.streaming.state import Given, Reader, fill, initial, result_json, spooled
from weftrain.backends.streaming.store.base import DTYPES, Commit, Completed, Pending, Store, no_trace
from weftrain.backends.streaming.store.direct import aligned
from weftrain.backends.streaming.store.layout import Layout, Record, Tile
from weftrain.backends.streaming.store.planes import Work
from weftrain.backends.streaming.trace import Trace
from weftrain.core.backend import Batch, BatchSource, EvalResult, EvaluationSource, Fingerprint, Job, State, StepResult
from weftrain.core.errors import BackendError, NonFiniteError
from weftrain.core.model import Decoder, kernel_specs, rotary_tables
from weftrain.core.optim import group_learning_rates, parameter_groups
from weftrain.core.parameters import ParameterSpec, parameter_specs
from weftrain.kernels import Spec, select
from weftrain.kernels.host_memory import huge_page_bytes


class StreamingRun:
    """One training run over a store."""

    def __init__(self, job: Job, options: Any, device: torch.device, store: Store, fabric: Alone) -> None:
        recipe = job.recipe
        self._fabric = fabric
        self._recipe, self._plan, self._options, self._device, self._store = recipe, job.plan, options, device, store
        self._layout: Layout = store.layout
        self._progress = job.progress
        compute = getattr(torch, recipe.precision.compute)
        self._groups = {group.name: group for group in parameter_groups(recipe.model, recipe.optimizer)}
        uses = kernel_specs(recipe.model, device.type, compute, torch.float32, recipe.data.document_attention)
        attributes = {"eps_placement": recipe.optimizer.eps_placement}
        uses += [
            Spec("adamw", "optimizer", "cpu", compute, attributes),
            Spec("grad_norm", "optimizer", device.type, compute, attributes),
        ]
        self._selection = select(uses, recipe.kernels.preferences, recipe.kernels.pins)
        self._adamw = self._selection.function("adamw", "optimizer")
        self._grad_norm = self._selection.function("grad_norm", "optimizer")
        with torch.device("meta"):  # weights are bound when a record is there
            self._model = Decoder(recipe.model, self._selection, residual_dtype=torch.float32)
        for name, table in zip(("cos", "sin"), rotary_tables(recipe.model), strict=True):
            self._model.register_buffer(name, table.to(device), persistent=False)
        self._segments = self._model.segments()
        self._run_block = torch.compile(call, dynamic=False) if options.compile else call
        self._run_head = torch.compile(call, dynamic=False) if options.compile else call

        layers = len(self._layout.records) - 2
        # Weights that others send, or a disk, need a place; those that lie in memory are used there.
        elsewhere = store.tier == "direct" or isinstance(fabric, Group) or device.type != "cpu"
        self._layer_slots = min(options.layer_slots, layers) if elsewhere else 0
        self._scheduler = Scheduler(self._layout, store.tier, self._layer_slots, store.buffer_bytes)
        self._slots: dict[int, Tensor] = {}
        self._landings: dict[int, Tensor] = {}
        self._streams = Streams(device) if device.type == "cuda" else None
        self._leaving: list[tuple[Record, Gradients, Any]] = []  # gradients on their way from a CUDA device
        self._micro_batches = recipe.batch.global_batch_size // recipe.batch.micro_batch_size
        self._leaves: dict[int, dict[str, nn.Parameter]] = {}  # of the records that are there
        self._work = Work()
        self._snapshots = SnapshotOwner()
        self._measured: dict[str, float] = {}
        self._dataset_id: str | None = None
        self._stop = job.stop
        self._stretch, self._sets_aside = job.segment, job.stored_state == "set_aside"
        self._trace_path = None if job.folder is None or not options.trace_steps else job.folder / "trace.json"

        if fabric.rank == 0 and (
            job.stored_state != "continue"
            or not self._all_stand(store.commit)
            or self._standing().step < job.plan.start_step
        ):
            self._fill(initial(job), job.plan.start_step, 0)

    # -- the step

    def train(self, source: BatchSource) -> Iterator[StepResult]:
        """See Run.train. Raises BackendError where the store fails."""
        recipe = self._recipe
        self._dataset_id = source.dataset_id
        trace = Trace()
        traced = self._standing().step + self._options.trace_steps if self._trace_path is not None else 0
        while self._standing().step < self._plan.last_step:
            self._snapshots.detach()
            start, step = time.perf_counter(), self._standing().step
            self._measured = {}
            self._store.trace = trace if step < traced else no_trace
            self._fabric.regroup()
            self._fabric.order(do="step", step=step)
            losses, norms, loss_scale, data_wait_s = self._own_share(source, step)
            loss, bearing = loss_scale.mean(torch.stack(losses).sum()), loss_scale.bearing_tokens
            norm = global_norm([norms[spec.name] for spec in parameter_specs(recipe.model)])
            rates = group_learning_rates(tuple(self._groups.values()), recipe.schedule, step)
            finite = bool(torch.isfinite(loss + norm))
            if not finite and recipe.optimizer.non_finite == "halt":
                micro = recipe.batch.micro_batch_size
                raise NonFiniteError(non_finite_message(source, step, losses, float(norm), micro, bearing))
            updates = self._standing().optimizer_updates + finite
            scale = float(clip_coefficient(norm, recipe.optimizer.clip_norm)) if finite else 0.0
            pending = Pending(scale, dict(rates), updates) if finite else None
            waited_ms, until_now_ms = data_wait_s * 1e3, (time.perf_counter() - start) * 1e3
            tokens = recipe.tokens_per_step
            result = StepResult(step, loss, norm, rates, tokens, bearing, until_now_ms, waited_ms, skipped=not finite)
            self._complete(Completed(step + 1, updates, pending, self._dataset_id, self._stretch, result_json(result)))
            if step + 1 == self._plan.last_step:
                self._flush()  # nothing comes that would bring the records
            if self._trace_path is not None and step + 1 == min(traced, self._plan.last_step):
                trace.save(self._trace_path)
            yield replace(result, step_ms=(time.perf_counter() - start) * 1e3)

    def _own_share(self, source: BatchSource, step: int) -> tuple[list[Tensor], dict[str, Tensor], LossScale, float]:
        """This rank's micro-batches of a step: losses of all ranks' micro-batches, norms where they are known, what the
        losses were divided by, and seconds waited for rows.
        """
        micro, begin = self._recipe.batch.micro_batch_size, time.perf_counter()
        mine = self._fabric.micro_batches(self._micro_batches)
        rows = [source.rows(step, number * micro, micro) for number in mine]
        waited = time.perf_counter() - begin
        scale = LossScale.of(self._recipe, self._fabric.total(sum(batch.bearing_tokens for batch in rows)))
        work = Pass(self, [to_device(batch, self._device) for batch in rows], self._spool, self._fabric, scale.divisor)
        first, more = self._first_update(), step + 1 < self._plan.last_step
        self._carry_out(self._scheduler.step(first, read_ahead=more), work, shared=True)
        return self._fabric.losses(work.losses), work.norms, scale, waited

    def _complete(self, completed: Completed) -> None:
        if self._fabric.sharded:  # no rank may be a step behind without the gradients of that step
            self._store.drain()
            self._fabric.barrier()
        self._store.complete_step(completed)
        if self._fabric.sharded:
            self._store.drain()  # a rank may be a step behind rank 0, never ahead of it
            self._fabric.order(do="complete", completed=asdict(completed))

    # -- the other ranks

    def follow(self, source: BatchSource) -> None:
        """Take orders from rank 0 until the run ends or this rank has left. Raises BackendError where rank 0 is
        lost.
        """
        assert isinstance(self._fabric, Follower)
        self._dataset_id = source.dataset_id
        while (order := self._fabric.next_order()) is not None:
            if self._stop.requested():
                self._fabric.leave(self._stop.number)
            match order.pop("do"):
                case "step":
                    self._own_share(source, order["step"])
                    if self._fabric.sharded:
                        self._store.drain()
                        self._fabric.barrier()
                case "complete":
                    self._store.complete_step(Completed.from_json(order["completed"]))
                case "pass":
                    self._carry_out(self._schedule(order["schedule"]), None, shared=order["schedule"] != "flush")
                    self._store.drain()
                case "stand":
                    self._stand(order["commit"])
                case "fill":
                    given, aside = self._sent_by_leader(None), order["set_aside"]
                    fill(self._store, given, order["step"], order["updates"], self._progress, set_aside=aside)
                case "part":
                    Reader(self._store, self._fabric).part(order["name"])

    def _all_stand(self, commit: Commit | None) -> bool:
        """Whether all stores hold the state that rank 0's holds. Raises BackendError for one that stands elsewhere."""
        if not self._fabric.sharded or commit is None:
            return commit is not None
        self._fabric.order(do="stand", commit=asdict(commit))
        return self._stand(asdict(commit))

    def _stand(self, leading: dict[str, Any]) -> bool:
        """A rank whose store missed the last `complete` has spooled the gradients of that step: it makes up for it."""
        own = self._store.commit
        if own is not None and own.step == leading["step"] - 1 and own.pending is None and self._fabric.rank > 0:
            missed = Completed.from_json({field.name: leading[field.name] for field in fields(Completed)})
            if own.stretch in (leading["stretch"], leading["before"]) or own.step == own.filled_step:
                self._store.complete_step(missed)
            own = self._store.commit
        stands = -1.0 if own is None else float(own.step) if own.stretch == leading["stretch"] else -2.0
        steps = [float(loss) for loss in self._fabric.losses([torch.tensor(stands)])]
        wrong = [rank for rank, step in enumerate(steps) if step != leading["step"]]
        if wrong:
            where = {-1: "holds no state", -2: "is of another branch or run"}.get(
                int(steps[wrong[0]]), f"stands at {steps[wrong[0]]:.0f}"
            )
            raise BackendError(
                f"the store of rank {wrong[0]} {where}, that of rank 0 stands at step {leading['step']}: give each "
                "rank its own store of "
                "this run, or remove all of them and continue from a checkpoint"
            )
        return True

    def _fill(self, given: Given, step: int, updates: int) -> None:
        if self._fabric.sharded:
            self._fabric.order(do="fill", step=step, updates=updates, set_aside=self._sets_aside)
            given = self._sent_by_leader(given)
        fill(self._store, given, step, updates, self._progress, set_aside=self._sets_aside)

    def _sent_by_leader(self, given: Given | None) -> Given:
        def tensor(plane: str, spec: ParameterSpec) -> Tensor:
            found = None if given is None else given(plane, spec)
            whole = torch.zeros(spec.shape) if found is None else found.detach().to("cpu", torch.float32).contiguous()
            return self._fabric.broadcast(whole)

        return tensor

    def _schedule(self, name: str) -> Schedule:
        if name == "flush":
            return self._scheduler.flush(self._first_update())
        if name == "evaluation":
            return self._scheduler.evaluation(self._first_update())
        return self._scheduler.step(self._first_update(), spooling=False)

    def _lead(self, name: str, work: Pass | None) -> None:
        """A pass in which rank 0 alone computes; of a sharded store all ranks bring their parts, or flush what each has
        to.
        """
        if self._fabric.sharded:
            self._fabric.order(do="pass", schedule=name)
        self._carry_out(self._schedule(name), work, shared=self._fabric.sharded and name != "flush")

    # -- what rank 0 does alone

    def gradients(self, batch: Batch) -> tuple[float, dict[str, Tensor]]:
        """See Run.gradients."""
        found: dict[str, Tensor] = {}

        def keep(record: Record, gradients: Gradients) -> None:
            found.update({name: gradient.detach().float().cpu().clone() for name, gradient in gradients.items()})

        micro = self._recipe.batch.micro_batch_size
        rows = [slice_rows(batch, number * micro, micro) for number in range(self._micro_batches)]
        scale = LossScale.of(self._recipe, batch.bearing_tokens)
        work = Pass(self, [to_device(part, self._device) for part in rows], keep, Alone(), scale.divisor)
        self._lead("quiet step", work)
        return float(scale.mean(torch.stack(work.losses).sum())), {
            spec.name: found[spec.name] for spec in parameter_specs(self._recipe.model)
        }

    def evaluate(self, source: EvaluationSource) -> EvalResult:
        """Mean held-out loss over tokens; as many micro-batches share one pass over the weights as in training."""
        total, tokens, micro = 0.0, 0, self._recipe.batch.micro_batch_size
        span = micro * self._micro_batches
        for start in range(0, source.num_rows, span):
            end = min(start + span, source.num_rows)
            rows = [
                to_device(source.rows(first, min(micro, end - first)), self._device)
                for first in range(start, end, micro)
            ]
            evaluation = Pass(self, rows, None, Alone())
            self._lead("evaluation", evaluation)
            total = sum((float(loss) for loss in evaluation.losses), total)
            tokens += sum(int((labels >= 0).sum()) for _, labels, _ in rows)
        if tokens == 0:
            raise BackendError(f"held-out set '{source.name}' has no token that bears a loss; check its loss mask")
        return EvalResult(total / tokens, tokens)

    def _saved_where(self) -> contextlib.AbstractContextManager[Any]:
        """Where autograd keeps what it saves of a block: where it is, or with offload_activations in the host's
        memory.
        """
        if not self._options.offload_activations:
            return contextlib.nullcontext()
        return Offload({slot.untyped_storage().data_ptr() for slot in self._slots.values()})

    def _first_update(self) -> int | None:
        """The first tile of this rank's store that still needs the last step's update; None where none does."""
        commit = self._store.commit
        first = None if commit is None or commit.pending is None else commit.cursor
        if first is None:
            self._store.drop_ahead()
        self._scheduler.came_ahead = self._store.ahead
        return first

    def _standing(self) -> Commit:
        return self._store.standing()

    # -- records: coming, updated, going

    def _slot(self, record: Record) -> Tensor | None:
        """Where the record's weights are computed with, on the device: the same memory each time; None where they are
        used in place.
        """
        if self._layer_slots == 0:
            return None
        return self._memory(record, self._slots, self._device)

    def _landing(self, record: Record) -> Tensor | None:
        """Where a disk reads the record's weights to: the slot itself, or host memory on the way to another device."""
        if self._store.tier != "direct" or self._device.type == "cpu":
            return self._slot(record)
        return self._memory(record, self._landings, torch.device("cpu"))

    def _memory(self, record: Record, slots: dict[int, Tensor], device: torch.device) -> Tensor:
        number = self._scheduler.slot(record)
        if number not in slots:
            size = max(other.compute_bytes for other in self._layout.records if self._scheduler.slot(other) == number)
            slots[number] = (
                aligned(size) if device.type == "cpu" else torch.empty(size, dtype=torch.uint8, device=device)
            )
            if device.type == "cpu" and self._streams is not None:
                self._streams.pin(slots[number])
        return slots[number]

    def _carry_out(self, schedule: Schedule, work: Pass | None, shared: bool) -> None:
        """A pass; one that breaks off leaves nobody waiting for this rank."""
        try:
            self._do(schedule, work, shared)
        except BaseException:
            self._fabric.abandon()
            raise

    def _do(self, schedule: Schedule, work: Pass | None, shared: bool) -> None:
        """Do what a schedule says, in order, and hold the store to its bytes. Records are asked for as early as their
        slots are free.
        """
        store, begin = self._store, time.perf_counter()
        read, written, stalled, busy = store.bytes_read, store.bytes_written, store.stall_s, store.io_s
        coming = deque(event for event in schedule.events if event.kind in ("update", "fetch"))
        occupied: set[int] = set()
        computing, ahead = 0.0, schedule.ahead_bytes > 0
        for number, event in enumerate(schedule.events):
            self._progress(str(event), number / len(schedule.events))
            while coming and (slot := self._scheduler.slot(coming[0].record)) not in occupied:
                occupied.add(slot)
                asked = coming.popleft()
                if self._streams is not None:
                    self._streams.wait_until_copied(slot)
                store.prefetch(asked.record, self._landing(asked.record), asked.kind == "update")
            # all that comes first has been asked for, and has been updated
            if ahead and not coming and event.kind == "backward":
                ahead = False
                store.read_ahead(self._layout.records[0])
            start = time.perf_counter()
            if event.kind in BRINGING:
                self._bring(event, shared)
            elif event.kind == "free":
                occupied.discard(self._scheduler.slot(event.record))
                self._freed(event.record)
            elif work is not None:
                getattr(work, event.kind)(event.record)
            end = time.perf_counter()
            computing += end - start if event.kind in ("forward", "loss", "backward") else 0.0
            if event.kind != "free":
                store.trace(
                    "compute" if event.kind in ("forward", "loss", "backward") else "move", str(event), start, end
                )
        if work is not None:
            work.fabric.settle()
        while self._leaving:
            self._spool_oldest()
        moved = (store.bytes_read - read, store.bytes_written - written)
        if moved != (schedule.bytes_read, schedule.bytes_written):
            raise BackendError(
                f"the store moved {moved} bytes in and out, the schedule says "
                f"{schedule.bytes_read, schedule.bytes_written}"
            )
        busy, stalled = store.io_s - busy, store.stall_s - stalled
        found = {
            "store_in_bytes": float(moved[0]),
            "store_out_bytes": float(moved[1]),
            "store_io_ms": busy * 1e3,  # reads and writes, each counted by itself
            "stall_ms": stalled * 1e3,  # of those, what computation waited for
            "compute_ms": computing * 1e3,
            "pass_ms": (time.perf_counter() - begin) * 1e3,
        }
        self._measured = {name: value + self._measured.get(name, 0.0) for name, value in found.items()}

    def _freed(self, record: Record) -> None:
        """Nobody reads this slot any more. poison_freed_slots makes sure of it."""
        slot = self._slot(record)
        if self._streams is not None:
            self._streams.used(self._scheduler.slot(record))
        if self._options.poison_freed_slots and slot is not None:
            self._store.drain()  # what is still being written from the slot
            slot.fill_(0xFF)  # NaN in every float type

    def _bring(self, event: Event, shared: bool) -> None:
        """Make the record's weights current and there, on all ranks where the pass is shared."""
        record, slot = event.record, self._slot(event.record)
        if event.kind == "resident" and slot is not None:
            return
        for tile in record.tiles:
            if self._store.needs_update(tile):
                self._update(tile)
        planes = self._store.compute_planes(record)
        if slot is not self._landing(record) or self._store.tier != "direct":
            self._copy_into(record, planes, slot)
        if shared:
            self._fabric.share(record, slot)
        self._bind(record, planes)

    def _copy_into(self, record: Record, planes: list[Tensor], slot: Tensor | None) -> None:
        """Host to slot, on a CUDA device beside the computation with the record before."""
        if slot is None:
            return
        with contextlib.nullcontext() if self._streams is None else self._streams.copying(self._scheduler.slot(record)):
            for tile, plane in zip(record.tiles, planes, strict=False):  # a rank without a store has none
                first = tile.compute_offset + tile.owned.start // len(tile.owned) * tile.compute_bytes
                slot[first : first + tile.compute_bytes].copy_(plane.view(torch.uint8), non_blocking=True)

    def _bind(self, record: Record, planes: list[Tensor]) -> None:
        """Point the record's parameters at its weights: the same Parameter objects each time, at whatever memory holds
        them now.
        """
        slot, leaves = self._slot(record), self._leaves.setdefault(record.index, {})
        specs = {spec.name: spec for spec in record.specs}
        for number, tile in enumerate(record.tiles):
            plane = planes[number] if slot is None else slot[tile.compute_offset :].view(DTYPES[tile.compute])
            for piece in tile.pieces:
                if piece.start:
                    # the rest of a tensor that began in an earlier tile: they lie one after the other in the slot
                    continue
                spec = specs[piece.name]
                # .data: a version counter of its own. Autograd's says that memory was written to since a weight was
                # saved, and it was, with another layer and then with this one again; that it is this one is the
                # schedule's promise.
                weight = plane[piece.offset : piece.offset + spec.size].view(spec.shape).data
                if spec.name in leaves:
                    leaves[spec.name].data = weight
                else:
                    leaves[spec.name] = nn.Parameter(weight)
                    owner, _, attribute = spec.name.rpartition(".")
                    setattr(self._model.get_submodule(owner), attribute, leaves[spec.name])

    @torch.no_grad()
    def _update(self, tile: Tile) -> None:
        """Make the pending update of one tile: AdamW on its planes, part by part, with the gradient that was
        spooled.
        """
        config, pending = self._recipe.optimizer, self._standing().pending
        assert pending is not None
        scale = torch.tensor(pending.gradient_scale, dtype=torch.float32)
        for start, stop, planes, gradient in self._store.updating(tile):
            part = slice(start, stop)
            weights, exp_avg, exp_avg_sq = self._work.load(planes, part)
            copies = planes["copy"][part] if "copy" in planes else None
            lists: dict[str, list[list[Tensor]]] = {}
            for piece in tile.pieces:
                first = max(piece.offset - tile.owned.start, start)
                last = min(piece.offset + piece.stop - piece.start - tile.owned.start, stop)
                if first >= last:
                    continue
                own = slice(first - start, last - start)
                columns = lists.setdefault(piece.group, [[], [], [], [], []])
                for column, plane in zip(columns, (weights, gradient, exp_avg, exp_avg_sq, copies), strict=True):
                    if plane is not None:
                        column.append(plane[own])
            for name, columns in lists.items():
                self._adamw(
                    *columns[:4],
                    columns[4] or None,
                    learning_rate=pending.learning_rates[name],
                    beta1=config.beta1,
                    beta2=config.beta2,
                    eps=config.eps,
                    weight_decay=self._groups[name].weight_decay,
                    update_index=pending.update_index,
                    eps_placement=config.eps_placement,
                    gradient_scale=scale,
                )
            self._work.save(planes, part, weights, exp_avg, exp_avg_sq)

    def _spool(self, record: Record, gradients: Gradients) -> None:
        if self._streams is None:
            self._spool_now(record, gradients)
            return
        self._leaving.append((record, *self._streams.to_host(gradients)))
        while len(self._leaving) > 1:  # one record later: the copy runs beside the next one's backward
            self._spool_oldest()

    def _spool_oldest(self) -> None:
        record, gradients, arrived = self._leaving.pop(0)
        arrived.synchronize()
        self._spool_now(record, gradients)

    def _spool_now(self, record: Record, gradients: Gradients) -> None:
        for tile in record.tiles:
            self._store.spool(tile, spooled(tile, gradients))

    # -- state

    def export_state(self) -> State:
        """See Run.export_state. Each tensor is read when it is asked for, and what is still held before the run trains
        on.
        """
        self._snapshots.detach()
        self._flush()
        reader = Reader(self._store, self._fabric)
        return State(
            self._standing().step,
            self._standing().optimizer_updates,
            self._snapshots.track(StateSnapshot(reader.shapes(), reader.read)),
        )

    def _flush(self) -> None:
        """Make the pending update everywhere, and wait until all is written."""
        # after a crash the ranks may stand at different tiles
        if self._fabric.sharded or self._first_update() is not None:
            self._lead("flush", None)
        self._store.drain()

    def import_state(self, state: State) -> None:
        """See Run.import_state; tensors are read one parameter at a time, so a lazy state never is in memory as a
        whole.
        """
        check_state(state.tensors, Reader(self._store, self._fabric).shapes())
        self._snapshots.detach()
        tensors = state.tensors
        self._fill(lambda plane, spec: tensors[f"{plane}/{spec.name}"], state.step, state.optimizer_updates)

    def fingerprint(self) -> Fingerprint:
        """See Run.fingerprint."""
        more = {
            "compute": self._recipe.precision.compute,
            "compile": self._options.compile,
            "activations": self._options.activations,
            "state_format": self._layout.format.name,
            "tier": self._store.tier,
            "micro_batch_size": self._recipe.batch.micro_batch_size,
            "reduction": "micro-batches added in order, fp32",
        }
        recomputes: Literal["none", "full"] = "full" if self._options.activations == "recompute" else "none"
        return device_fingerprint("streaming", self._device, self._selection.manifest, more, recomputes=recomputes)

    def stats(self) -> dict[str, float]:
        """Resident memory; of the last step and what followed it, what the store moved and how long that was waited
        for.
        """
        io_ms = self._measured.get("store_io_ms", 0.0)  # where nothing was moved, no share of it lay under computation
        return {
            "memory_bytes": float(psutil.Process().memory_info().rss),
            "huge_page_bytes": float(huge_page_bytes()),
            **self._measured,
            **({"overlap_share": max(0.0, 1 - self._measured["stall_ms"] / io_ms)} if io_ms else {}),
        }

    def close(self) -> None:
        """Close the store: durable, and free for the next process."""
        try:
            self._snapshots.detach()
            self._fabric.close()
        finally:
            self._leaves.clear()
            self._slots.clear()
            self._store.close()
