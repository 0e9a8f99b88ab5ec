"""A training run over a store: one layer's weights at a time are on the device, activations stay there, gradients go to
the store, and updates are made in the store's memory. A step is a schedule (schedule.py) that the executor carries out
(executor.py) while a pass computes (passes.py).

Results are bitwise those of the local backend because every operation is the same: the same kernels on the same shapes,
micro-batches added in order, one norm for each parameter, AdamW element by element.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from weftrain.backends.common.decoder import call, decoder_on_meta, select_kernels
from weftrain.backends.common.device import device_fingerprint, memory_stats
from weftrain.backends.common.frozen_layers import frozen_layers, streamed_states
from weftrain.backends.common.out_of_memory import naming_memory
from weftrain.backends.common.state_snapshot import SnapshotOwner, StateSnapshot, check_state
from weftrain.backends.common.step import (
    HeldOutTotal,
    LossScale,
    Rows,
    clip_coefficient,
    global_norm,
    step_happens,
    to_device,
)
from weftrain.backends.common.step_result import result_json
from weftrain.backends.common.sums import TreeSum, reduction_words, tree_sum
from weftrain.backends.common.tree_norms import tree_global_norm, tree_norms
from weftrain.backends.streaming.communicator import Communicator, Gradients
from weftrain.backends.streaming.executor import PassExecutor
from weftrain.backends.streaming.needs import needs, remedies
from weftrain.backends.streaming.options import StreamingOptions
from weftrain.backends.streaming.passes import Computation, Pass
from weftrain.backends.streaming.placement import Placement
from weftrain.backends.streaming.replicas import shards
from weftrain.backends.streaming.state import StateReader, TensorSource, initial_tensors
from weftrain.backends.streaming.store.base import Completed, Pending, Store, no_trace
from weftrain.backends.streaming.store.layout import Record
from weftrain.backends.streaming.trace import Trace
from weftrain.core.backend import EvalResult, Fingerprint, Job, State, StepResult
from weftrain.core.experts import measures_of, take_tallies
from weftrain.core.objective_parts import Extras
from weftrain.core.optim import group_learning_rates, parameter_groups
from weftrain.core.order.batch import Batch, BatchSource, EvaluationSource


class StreamingRun:
    """One training run over a store. Rank 0's; other ranks carry out its commands (replicas/worker.py)."""

    def __init__(
        self,
        job: Job,
        options: StreamingOptions,
        device: torch.device,
        store: Store,
        communicator: Communicator,
        placement: Placement,
        device_limit_bytes: int | None = None,
    ) -> None:
        recipe = job.recipe
        self.job, self.store, self.communicator = job, store, communicator
        self._recipe, self._options, self._device = recipe, options, device
        also_on = (device.type,) if placement.states and device.type != "cpu" else ()
        self._kernels = select_kernels(recipe, device.type, adamw_on="cpu", also_on=also_on)
        model = decoder_on_meta(recipe, self._kernels)  # the executor binds a record's weights when it has loaded them
        model.place_rotary_tables(device)
        adamw = self._kernels.adamw, self._kernels.on[device.type].adamw if also_on else self._kernels.adamw
        self.executor = PassExecutor(
            recipe, options, device, store, communicator, model, adamw, job.progress, placement, device_limit_bytes
        )
        self._micro_batches = recipe.batch.global_batch_size // recipe.batch.micro_batch_size
        self._replayable = recipe.precision.numerics == "replayable"
        self._computation = Computation(
            model,
            model.segments(),
            self.executor.parameters,
            torch.compile(call, dynamic=False) if options.compile else call,
            partial(tree_norms, parts=recipe.precision.tensor_parts) if self._replayable else self._kernels.norms,
            keep_activations=options.activations == "keep",
            accumulate=self._micro_batches > 1,
            saved_tensors=self.executor.saved_tensors,
            first_trained=store.layout.first_trained,
            tree=TreeSum(self._micro_batches) if self._replayable and self._micro_batches > 1 else None,
        )
        self._frozen = frozen_layers(job, self._kernels, device if not placement.apart else torch.device("cpu"))
        self._snapshots = SnapshotOwner()
        self._trace_path = None if job.folder is None or not options.trace_steps else job.folder / "trace.json"
        if communicator.rank == 0 and (
            job.stored_state != "continue"
            or not shards.hold_one_state(communicator, store)
            or store.committed.step < job.plan.start_step
        ):
            self._fill(initial_tensors(job), job.plan.start_step, 0)

    # -- the step

    def train(self, source: BatchSource) -> Iterator[StepResult]:
        """See Run.train. Raises BackendError if the store fails."""
        recipe, plan, store = self._recipe, self.job.plan, self.store
        groups = parameter_groups(recipe.model, recipe.optimizer, recipe.tuning)
        trained = [spec.name for spec in recipe.parameters if spec.trained]
        trace = Trace()
        traced = store.committed.step + self._options.trace_steps if self._trace_path is not None else 0
        while (step := store.committed.step) < plan.last_step:
            self._snapshots.detach()
            start = time.perf_counter()
            self.executor.measured = {}
            store.trace = trace if step < traced else no_trace
            self.communicator.regroup()
            self.communicator.command(do="step", step=step)
            losses, norms, loss_scale, data_wait_s = self.own_share(source, step)
            loss, measures = loss_scale.reported(tree_sum(losses) if self._replayable else torch.stack(losses).sum(0))
            if (experts := recipe.model.experts) is not None:
                measures |= measures_of(experts, take_tallies(self._computation.model))
            bearing = loss_scale.bearing_tokens
            norm = (tree_global_norm if self._replayable else global_norm)([norms[name] for name in trained])
            rates = group_learning_rates(groups, recipe.schedule, step)
            finite = step_happens(recipe, source, step, loss, norm, bearing, partial(list, losses))
            updates = store.committed.optimizer_updates + finite
            scale = float(clip_coefficient(norm, recipe.optimizer.clip_norm)) if finite else 0.0
            pending = Pending(scale, dict(rates), updates, self.executor.optimizer_keys) if finite else None
            waited_ms, until_now_ms = data_wait_s * 1e3, (time.perf_counter() - start) * 1e3
            tokens = recipe.tokens_per_step
            times = until_now_ms, waited_ms
            result = StepResult(step, loss, norm, rates, tokens, bearing, *times, not finite, measures=measures)
            completed = Completed(step + 1, updates, pending, source.dataset_id, self.job.segment, result_json(result))
            shards.complete_step(self.communicator, store, completed)
            if step + 1 == plan.last_step:
                self._flush()  # no pass follows that would load the records
            if self._trace_path is not None and step + 1 == min(traced, plan.last_step):
                trace.save(self._trace_path)
            yield replace(result, step_ms=(time.perf_counter() - start) * 1e3)

    def own_share(self, source: BatchSource, step: int) -> tuple[list[Tensor], dict[str, Tensor], LossScale, float]:
        """Compute this rank's micro-batches of a step. Returns what the head returned for all ranks'
        micro-batches, the gradients' norms if this rank stores them, the loss scale, and the seconds waited for rows.
        """
        micro, begin = self._recipe.batch.micro_batch_size, time.perf_counter()
        mine = self.communicator.micro_batches(self._micro_batches)
        batches = [source.rows(step, number * micro, micro) for number in mine]
        waited_s = time.perf_counter() - begin
        scale = LossScale.of(self._recipe, self.communicator.sum(sum(batch.bearing_tokens for batch in batches)))
        rows = self._rows(batches)
        model_pass = Pass(self._computation, rows, self.communicator, self.executor.spool, scale.divisor)
        schedule = self.executor.schedule("step", read_ahead=step + 1 < self.job.plan.last_step)
        with naming_memory("a step", self._device, self._outlook):
            self.executor.carry_out(schedule, model_pass, shared=True)
        return self.communicator.gather_losses(model_pass.losses), model_pass.norms, scale, waited_s

    def _rows(self, batches: list[Batch]) -> list[Rows]:
        """Micro-batches on the device, each with the state of the frozen layers if the objective reads it."""
        rows = [to_device(batch, self._device) for batch in batches]
        if self._frozen is None:
            return rows
        rotary = self._computation.model.rotary(rows[0].ids.shape[1])
        states = streamed_states(self._frozen, rows, rotary, self._device)
        return [
            one._replace(extras=(one.extras or Extras())._replace(frozen=state))
            for one, state in zip(rows, states, strict=True)
        ]

    # -- what rank 0 computes alone

    def _lead(self, name: str, model_pass: Pass | None) -> None:
        """A pass in which only rank 0 computes; ranks that own parts of the state provide them, or flush their own."""
        self.communicator.command_owners(do="pass", name=name)
        shared = self.communicator.sharded and name != "flush"
        with naming_memory(f"the pass '{name}'", self._device, self._outlook):
            self.executor.carry_out(self.executor.schedule(name), model_pass, shared=shared)

    def _outlook(self) -> tuple[Mapping[str, int], list[str]]:
        """For a message: what the run was computed to need, and settings that need less."""
        placement = self.executor.placement
        wanted = needs(self._recipe, self._options, self.store.layout, placement, self._device.type)
        parts = wanted.device_bytes if placement.apart else wanted.memory_bytes
        return parts, [remedies(self._recipe, self._options, on_device=placement.apart)]

    def gradients(self, batch: Batch) -> tuple[float, dict[str, Tensor]]:
        """See Run.gradients."""
        found: dict[str, Tensor] = {}

        def keep(record: Record, gradients: Gradients) -> None:
            found.update({name: gradient.detach().float().cpu().clone() for name, gradient in gradients.items()})

        micro = self._recipe.batch.micro_batch_size
        parts = [batch.take(slice(number * micro, (number + 1) * micro)) for number in range(self._micro_batches)]
        rows = self._rows(parts)
        scale = LossScale.of(self._recipe, batch.bearing_tokens)
        model_pass = Pass(self._computation, rows, Communicator(), keep, scale.divisor)
        self._lead("gradients", model_pass)
        take_tallies(self._computation.model)  # of no step
        loss, _ = scale.reported(torch.stack(model_pass.losses).sum(0))
        return float(loss), {spec.name: found[spec.name] for spec in self._recipe.parameters if spec.trained}

    def evaluate(self, source: EvaluationSource) -> EvalResult:
        """Held-out loss; as many micro-batches share one pass over the weights as in training."""
        total, micro = HeldOutTotal(self._recipe.objective, self._device), self._recipe.batch.micro_batch_size
        span = micro * self._micro_batches
        for start in range(0, source.num_rows, span):
            end = min(start + span, source.num_rows)
            batches = [source.rows(first, min(micro, end - first)) for first in range(start, end, micro)]
            rows = [to_device(batch, self._device) for batch in batches]
            model_pass = Pass(self._computation, rows, Communicator())
            self._lead("evaluation", model_pass)
            for found, of in zip(model_pass.losses, rows, strict=True):
                total.add(found, of.labels)
        return total.result(source)

    # -- state

    def export_state(self) -> State:
        """See Run.export_state. Each tensor is read on access, or before the run trains on."""
        self._snapshots.detach()
        self._flush()
        reader, commit = StateReader(self.store, self.communicator), self.store.committed
        tensors = self._snapshots.track(StateSnapshot(reader.shapes(), reader.read))
        return State(commit.step, commit.optimizer_updates, tensors)

    def _flush(self) -> None:
        """Make the pending update on every tile, and wait until it is written."""
        # after a crash the ranks may stand at different tiles
        if self.communicator.sharded or self.executor.first_update() is not None:
            self._lead("flush", None)
        self.store.drain()

    def import_state(self, state: State) -> None:
        """See Run.import_state. Parameters are read one at a time, so a lazy state is never in memory as a whole."""
        tensors = state.tensors
        check_state(tensors, StateReader(self.store, self.communicator).shapes())
        self._snapshots.detach()
        self._fill(lambda plane, spec: tensors[f"{plane}/{spec.name}"], state.step, state.optimizer_updates)

    def _fill(self, source: TensorSource, step: int, updates: int) -> None:
        aside = self.job.stored_state == "set_aside"
        shards.fill_from_rank_0(self.communicator, self.store, source, step, updates, self.job.progress, aside)

    def fingerprint(self) -> Fingerprint:
        """See Run.fingerprint."""
        more = {
            "compute": self._recipe.precision.compute,
            "compile": self._options.compile,
            "activations": self._options.activations,
            "state_format": self.store.layout.format.name,
            "tier": self.store.tier,
            "micro_batch_size": self._recipe.batch.micro_batch_size,
            "reduction": reduction_words(self._recipe),
        }
        recomputes: Literal["none", "full"] = "full" if self._options.activations == "recompute" else "none"
        return device_fingerprint("streaming", self._device, self._kernels.manifest, more, recomputes=recomputes)

    def stats(self) -> dict[str, float]:
        """Resident memory; and since the last step began, the bytes that the store moved, its time and the stalls."""
        measured = self.executor.measured
        io_ms = measured.get("store_io_ms", 0.0)  # 0: nothing was moved, so there is no overlap_share
        return {
            **memory_stats(self._device),
            **measured,
            **({"overlap_share": max(0.0, 1 - measured["stall_ms"] / io_ms)} if io_ms else {}),
        }

    def close(self) -> None:
        """Make the store durable, and release it for the next process."""
        try:
            self._snapshots.detach()
            self.communicator.close()
        finally:
            self.executor.close()
