"""One process, one device (cpu or cuda): the plainest correct backend, the specification of all others.

The fp32 master weights and AdamW's moments live in canonical-name dictionaries. In bf16 the model runs on bf16 copies
of the matrices, refreshed in the optimizer's own pass once a step; norms stay fp32 and are shared. What a reader would
get wrong: the model's parameters are therefore not always the weights. `export_state` gives the master, and `_refresh`
is the one place that writes the copies from it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal

import psutil
import torch
from torch.utils.checkpoint import checkpoint

from weftrain.backends.common.base import (
    PlainBackend,
    ask_for_huge_pages,
    device_fingerprint,
    torch_device,
    use_threads,
)
from weftrain.backends.common.phase_clock import PhaseClock
from weftrain.backends.common.state_snapshot import SnapshotOwner, StateSnapshot, check_state
from weftrain.backends.common.step import (
    HEAD_USE,
    LossScale,
    bind_parameters,
    call,
    clip_coefficient,
    global_norm,
    non_finite_message,
    present,
    slice_rows,
    to_device,
    update,
    update_sets,
)
from weftrain.backends.common.tree_sum import TreeSum, tree_sum
from weftrain.core.backend import EvalResult, Fingerprint, Job, State, StepResult
from weftrain.core.config import CompileOption, RecomputeOption, Threads
from weftrain.core.dropout import EMBEDDING_PLACE, at_place, block_place, row_keys
from weftrain.core.errors import BackendError, NonFiniteError
from weftrain.core.model import Decoder, draw, kernel_specs
from weftrain.core.optim import group_learning_rates, parameter_groups
from weftrain.core.order.batch import Batch, BatchSource, EvaluationSource
from weftrain.core.parameters import parameter_specs
from weftrain.kernels import Spec, select
from weftrain.kernels.host_memory import huge_page_bytes


class LocalOptions(CompileOption, RecomputeOption):
    """backend.options of the local backend."""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one, else cpu; the choice is printed
    activation_checkpointing: Literal["none", "full"] = "none"  # `selective` is the cuda backend's
    threads: Threads = 0  # CPU threads; 0: torch's own choice
    # on a CPU: tensors in huge pages that the process keeps (kernels/host_memory.py); no bit changes
    huge_pages: bool = True


class LocalRun:
    """One training run in this process."""

    def __init__(self, job: Job, options: LocalOptions, device: torch.device) -> None:
        recipe = job.recipe
        self._recipe, self._plan, self._options, self._device = recipe, job.plan, options, device
        self._compute_dtype = getattr(torch, recipe.precision.compute)
        self._step, self._optimizer_updates = job.plan.start_step, 0
        self._specs = parameter_specs(recipe.model)
        self._groups = parameter_groups(recipe.model, recipe.optimizer)

        # The residual stream stays fp32 in bf16 compute, as it does under autocast: its sums are where bf16 loses most.
        documents = recipe.data.document_attention
        kernel_uses = kernel_specs(recipe.model, device.type, self._compute_dtype, torch.float32, documents)
        attributes = {"eps_placement": recipe.optimizer.eps_placement}
        kernel_uses += [
            Spec(op, "optimizer", device.type, self._compute_dtype, attributes) for op in ("adamw", "grad_norm")
        ]
        self._selection = select(kernel_uses, recipe.kernels.preferences, recipe.kernels.pins)
        self._adamw = self._selection.function("adamw", "optimizer")
        self._grad_norm = self._selection.function("grad_norm", "optimizer")

        self._weights: dict[str, torch.Tensor] = {}
        self._exp_avg: dict[str, torch.Tensor] = {}
        self._exp_avg_sq: dict[str, torch.Tensor] = {}
        for spec in self._specs:
            given = job.weights[spec.name] if job.weights is not None else draw(spec, recipe.model, recipe.seed)
            self._weights[spec.name] = given.detach().to(device, torch.float32, copy=True)
            self._exp_avg[spec.name] = torch.zeros_like(self._weights[spec.name])
            self._exp_avg_sq[spec.name] = torch.zeros_like(self._weights[spec.name])
        with torch.device("meta"):  # nothing is allocated: every parameter is bound to a master weight or its copy
            self._model = Decoder(recipe.model, self._selection, residual_dtype=torch.float32)
        self._planes = {"weights": self._weights, "exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq}
        self._parameters, self._copies = bind_parameters(self._model, self._weights, self._compute_dtype, device)
        self._update_sets = update_sets(self._groups, self._copies)
        # A tied weight has two uses, and each has a gradient of its own until the end of the step: a backend that meets
        # head and embedding at different times, or on different machines, can then add in the same order.
        self._leaves = dict(self._parameters)
        if (tied := self._model.tied_weight()) is not None:
            self._leaves[HEAD_USE] = torch.nn.Parameter(tied.detach())
        self._run_block = self._block_runner()
        self._run_head = torch.compile(call, dynamic=False) if options.compile else call
        self._accumulated: dict[str, torch.Tensor] = {}
        self._tree = TreeSum(recipe.batch.accumulation_steps) if recipe.precision.numerics == "replayable" else None
        self._snapshots = SnapshotOwner()
        self._clock = PhaseClock(device, job.time_phases)

    # -- the step
    # ----------------------------------------------------------------------------------------------------

    def train(self, source: BatchSource) -> Iterator[StepResult]:
        """See Run.train. One host synchronisation a step: the check that loss and norm are finite."""
        recipe = self._recipe
        while self._step < self._plan.last_step:
            self._snapshots.detach()
            start, step = time.perf_counter(), self._step
            losses, loss_scale, data_wait_s = self._forward_backward(partial(source.rows, step))
            gradients = self._gradients()
            self._clock.to("clip")
            loss = loss_scale.mean(torch.stack(losses).sum() if self._tree is None else tree_sum(losses))
            norm = global_norm([self._grad_norm([gradient]) for gradient in gradients.values()])
            rates = group_learning_rates(self._groups, recipe.schedule, step)
            finite = bool(torch.isfinite(loss + norm))
            self._clock.to("update")
            if finite:
                scale = clip_coefficient(norm, recipe.optimizer.clip_norm)
                index = self._optimizer_updates + 1
                update(self._adamw, self._update_sets, self._planes, gradients, recipe.optimizer, rates, index, scale)
                self._optimizer_updates = index
            self._clear_gradients()
            del gradients  # or the next step's would be made beside them
            if not finite and recipe.optimizer.non_finite == "halt":
                micro, bearing = recipe.batch.micro_batch_size, loss_scale.bearing_tokens
                raise NonFiniteError(non_finite_message(source, step, losses, float(norm), micro, bearing))
            self._step += 1
            phases = self._clock.stop()
            step_ms = (time.perf_counter() - start) * 1e3
            skipped = not finite
            tokens, bearing = recipe.tokens_per_step, loss_scale.bearing_tokens
            yield StepResult(step, loss, norm, rates, tokens, bearing, step_ms, data_wait_s * 1e3, skipped, phases)

    def gradients(self, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
        """See Run.gradients."""
        losses, scale, _ = self._forward_backward(lambda first, count: slice_rows(batch, first, count))
        self._clock.stop()
        gradients = {name: gradient.detach().float().cpu().clone() for name, gradient in self._gradients().items()}
        self._clear_gradients()
        return float(scale.mean(torch.stack(losses).sum())), gradients

    def evaluate(self, source: EvaluationSource) -> EvalResult:
        """Mean held-out loss over tokens, in the compute dtype; eager, so that no second graph is compiled for it."""
        total, tokens = 0.0, 0
        micro = self._recipe.batch.micro_batch_size
        with torch.no_grad():
            for first in range(0, source.num_rows, micro):
                ids, labels, document_start = to_device(
                    source.rows(first, min(micro, source.num_rows - first)), self._device
                )
                total += float(self._model(ids, labels, document_start))
                tokens += int((labels >= 0).sum())
        if tokens == 0:
            raise BackendError(f"held-out set '{source.name}' has no token that bears a loss; check its loss mask")
        return EvalResult(total / tokens, tokens)

    def _forward_backward(self, rows: Callable[[int, int], Batch]) -> tuple[list[torch.Tensor], LossScale, float]:
        """Each micro-batch's share of the loss, with the gradients left in place; its divisor; seconds spent waiting
        for rows.
        """
        batch, losses, start = self._recipe.batch, [], time.perf_counter()
        self._clock.to("data wait")
        firsts = range(0, batch.global_batch_size, batch.micro_batch_size)
        # all of them first: the divisor is the whole batch's
        read = [rows(first, batch.micro_batch_size) for first in firsts]
        scale = LossScale.of(self._recipe, sum(found.bearing_tokens for found in read))
        data_wait_s = time.perf_counter() - start
        for first, found in zip(firsts, read, strict=True):
            start = time.perf_counter()
            self._clock.to("copy")
            ids, labels, document_start = to_device(found, self._device)
            data_wait_s += time.perf_counter() - start
            self._clock.to("forward")
            keys = None
            if self._recipe.model.dropout:
                keys = row_keys(self._recipe.seed, self._step, first, len(ids), batch.global_batch_size, self._device)
            # The sum over tokens divided by the global batch's number: accumulation equals one large batch.
            loss = self._loss(ids, labels, document_start, keys) / scale.divisor
            self._clock.to("backward")
            loss.backward()
            losses.append(loss.detach())
            if batch.accumulation_steps > 1:
                self._accumulate()
        return losses, scale, data_wait_s

    def _loss(
        self,
        ids: torch.Tensor,
        labels: torch.Tensor,
        document_start: torch.Tensor | None,
        dropout_keys: torch.Tensor | None,
    ) -> torch.Tensor:
        embedding, *blocks, head = self._model.segments()
        x = embedding(ids, at_place(dropout_keys, EMBEDDING_PLACE))
        cos, sin = self._model.rotary(ids.shape[1])
        for layer, block in enumerate(blocks):
            x = self._run_block(block, x, cos, sin, document_start, at_place(dropout_keys, block_place(layer)))
        return self._run_head(head, x, labels, self._leaves.get(HEAD_USE))

    # -- parameters, copies and gradients
    # ------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Write every compute copy from its master weight."""
        for name, copy in self._copies.items():
            copy.copy_(self._weights[name])

    def _accumulate(self) -> None:
        """Add this micro-batch's gradients to the fp32 sums."""
        for name, leaf in self._leaves.items():
            if leaf.grad is None:
                continue
            if self._tree is not None:
                self._tree.add(name, leaf.grad)
            elif name in self._accumulated:
                self._accumulated[name] += leaf.grad
            else:
                self._accumulated[name] = leaf.grad.float()
            leaf.grad = None

    def _gradients(self) -> dict[str, torch.Tensor]:
        """Parameter -> gradient of the step, in execution order. A parameter that the loss did not reach is a defect,
        not a zero.
        """
        summed = self._accumulated if self._tree is None else self._tree.totals()
        found: Mapping[str, torch.Tensor | None] = summed or {name: leaf.grad for name, leaf in self._leaves.items()}
        gradients = present(found, self._leaves)
        if HEAD_USE in gradients:
            gradients["embedding.weight"] += gradients.pop(HEAD_USE)
        return gradients

    def _clear_gradients(self) -> None:
        self._accumulated = {}
        if self._tree is not None:
            self._tree.clear()
        for leaf in self._leaves.values():
            leaf.grad = None

    def _block_runner(self) -> Callable[..., torch.Tensor]:
        # dynamic=False: shapes are static. All blocks share one compiled graph, since their parameters are its inputs.
        run = torch.compile(call, dynamic=False) if self._options.compile else call
        if self._options.activation_checkpointing == "none":
            return run
        return lambda *arguments: checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)

    # -- state
    # ----------------------------------------------------------------------------------------------------

    def export_state(self) -> State:
        """See Run.export_state. Each tensor is copied when it is asked for, and what is still held before the run
        trains on.
        """
        held = {f"{plane}/{name}": tensor for plane, group in self._planes.items() for name, tensor in group.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
        tensors = self._snapshots.track(StateSnapshot(shapes, lambda name: held[name].detach().to("cpu", copy=True)))
        return State(self._step, self._optimizer_updates, tensors)

    def import_state(self, state: State) -> None:
        """See Run.import_state. Raises CheckpointError, before anything is changed, for a missing, unknown or misshapen
        tensor.
        """
        mine = {f"{plane}/{name}": tensor for plane, group in self._planes.items() for name, tensor in group.items()}
        check_state(state.tensors, {name: tuple(tensor.shape) for name, tensor in mine.items()})
        self._snapshots.detach()
        for name in mine:  # one at a time: a lazy state never is in memory as a whole
            mine[name].copy_(state.tensors[name])
        self._step, self._optimizer_updates = state.step, state.optimizer_updates
        self._refresh()

    def fingerprint(self) -> Fingerprint:
        """See Run.fingerprint."""
        more = {
            "compute": self._recipe.precision.compute,
            "compile": self._options.compile,
            "activation_checkpointing": self._options.activation_checkpointing,
            "micro_batch_size": self._recipe.batch.micro_batch_size,
            "reduction": "micro-batches added in order, fp32"
            if self._tree is None
            else "micro-batches added in a fixed tree, fp32",
        }
        recomputes = self._options.activation_checkpointing
        return device_fingerprint("local", self._device, self._selection.manifest, more, recomputes=recomputes)

    def stats(self) -> dict[str, float]:
        """Resident memory now, in huge pages too, and, on cuda, the peak that torch allocated there."""
        stats = {
            "memory_bytes": float(psutil.Process(os.getpid()).memory_info().rss),
            "huge_page_bytes": float(huge_page_bytes()),
        }
        if self._device.type == "cuda":
            stats["device_peak_memory_bytes"] = float(torch.cuda.max_memory_allocated(self._device))
        return stats

    def close(self) -> None:
        """Let go of every tensor."""
        self._snapshots.detach()
        self._clear_gradients()
        for held in (self._weights, self._exp_avg, self._exp_avg_sq, self._parameters, self._copies, self._leaves):
            held.clear()
        self._update_sets = []


class LocalBackend(PlainBackend):
    name = "local"
    summary = "one process, one device (cpu or cuda), fp32 or bf16 with fp32 weights"
    options = LocalOptions
    returns_gradients = True
    portable_options = frozenset({"compile", "activation_checkpointing"})

    def prepare(self, job: Job) -> LocalRun:
        """Raises BackendError for a device that is not there, more than one replica, or compile without a compiler."""
        options = job.options
        if not isinstance(options, LocalOptions):
            raise BackendError(f"the local backend was given {type(options).__name__}; it takes LocalOptions")
        batch = job.recipe.batch
        if batch.replicas != 1:
            accumulation = batch.global_batch_size // batch.micro_batch_size
            raise BackendError(
                f"batch.replicas is {batch.replicas} and the local backend is one process: set batch.replicas=1 "
                f"(the same batch in {accumulation} accumulation steps)"
            )
        device = torch_device(options.device)
        if (
            options.compile
            and device.type == "cpu"
            and not any(shutil.which(name) for name in ("g++", "clang++", "c++"))
        ):
            raise BackendError(
                "backend.options.compile needs a C++ compiler (g++ or clang++) on PATH: install one or set "
                "compile=false"
            )
        use_threads(job, options.threads)
        if options.huge_pages and device.type == "cpu":
            ask_for_huge_pages()
        return LocalRun(job, options, device)


BACKEND = LocalBackend()
