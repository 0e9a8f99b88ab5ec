"""One process, one device (cpu or cuda): the plainest correct backend, the specification of all others.

The fp32 master weights and AdamW's moments live in canonical-name dictionaries. In bf16 the model runs on bf16 copies
of the matrices, refreshed in the optimizer's own pass once a step; norms stay fp32 and are shared. So the model's
parameters are not always the weights: `export_state` gives the masters.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from weftrain.backends.common.alone import outline_alone, predict_alone
from weftrain.backends.common.base import PlainBackend
from weftrain.backends.common.continuing import prepared_alike
from weftrain.backends.common.copies import RowsAhead
from weftrain.backends.common.decoder import HEAD_USE, call
from weftrain.backends.common.device import DeviceOptions, device_fingerprint, prepare_process
from weftrain.backends.common.device_memory import alone_needs, alternatives, check_memory
from weftrain.backends.common.frozen_layers import frozen_layers
from weftrain.backends.common.in_memory import InMemoryRun
from weftrain.backends.common.out_of_memory import naming_memory
from weftrain.backends.common.phase_clock import PhaseClock, StepClock
from weftrain.backends.common.recompute import block_runner
from weftrain.backends.common.step import LossScale, Rows, global_norm, present, step_happens
from weftrain.backends.common.sums import gradient_sum, reduction_words, take_at_once, tree_sum
from weftrain.backends.common.tree_norms import tree_global_norm, tree_norms
from weftrain.core.backend import Fingerprint, Job, StepResult
from weftrain.core.config import CompileOption, Recipe, RecomputeOption
from weftrain.core.dropout import EMBEDDING_PLACE, at_place, block_place, row_keys
from weftrain.core.errors import BackendError
from weftrain.core.experts import balance_biases, measures_of, take_tallies
from weftrain.core.formats.strict_model import StrictModel
from weftrain.core.objectives import loss_of
from weftrain.core.optim import group_learning_rates
from weftrain.core.order.batch import Batch, BatchSource
from weftrain.core.prediction import Prediction, Speeds
from weftrain.core.state_losses import StateLosses


class LocalOptions(DeviceOptions, CompileOption, RecomputeOption):
    """backend.options of the local backend."""


class LocalRun(InMemoryRun):
    """One training run in this process."""

    def __init__(self, job: Job, options: LocalOptions, device: torch.device) -> None:
        self._replayable = job.recipe.precision.numerics == "replayable"
        # padded products have other bits than those of a layout that does not pad
        super().__init__(job, device, pads=not self._replayable)
        self._options = options
        # A tied weight has two uses, and each has a gradient of its own until the end of the step: a backend that meets
        # head and embedding at different times, or on different machines, can then add in the same order. In the tree
        # they are added for each micro-batch, as autograd does where it has both.
        self._leaves = dict(self.parameters)  # what is trained
        at_head = job.recipe.objective.ends_at is None  # else training does not come to the head
        apart = at_head and not self._replayable
        if apart and (tied := self.model.tied_weight()) is not None and "embedding.weight" in self._leaves:
            self._leaves[HEAD_USE] = torch.nn.Parameter(tied.detach())
        self._run_block = block_runner(call, options.activation_checkpointing, options.compile)
        self._run_head = torch.compile(call, dynamic=False) if options.compile else call
        self._sums = gradient_sum(job.recipe)  # of the micro-batches, if there are several
        self._cut: dict[str, torch.Tensor] = {}  # without accumulation: gradients of padded copies
        bound, sums, cut = self.bound, self._sums, self._cut
        if job.recipe.batch.accumulation_steps > 1:
            take_at_once(self._leaves, lambda name, gradient: sums.add(name, bound.own(name, gradient)))
        else:
            take_at_once(
                bound.padded, lambda name, gradient: cut.update({name: bound.own(name, gradient).contiguous()})
            )
        self._frozen = frozen_layers(job, self.kernels, device, pads=not self._replayable)
        self._rows_ahead = RowsAhead(device)
        self._clock, self._step_clock = PhaseClock(device, job.time_phases), StepClock(device)

    def go_on(self, job: Job) -> bool:
        """See Continues.go_on: where rows, schedule and record change, and gradients are added as before."""
        before, after = self.recipe.batch, job.recipe.batch
        counts = before.accumulation_steps, after.accumulation_steps
        alike = min(counts) > 1 and not self._replayable  # its tree is that of its number of micro-batches
        shapes = [(recipe.batch.micro_batch_size, recipe.data.sequence_length) for recipe in (self.recipe, job.recipe)]
        if not (
            self.step_number == job.plan.start_step
            and prepared_alike(self.recipe, job.recipe)
            and (counts[0] == counts[1] or alike)
            and (shapes[0] == shapes[1] or not self._options.compile)  # each shape is compiled for itself
            # the losses of routers are divided by it
            and (job.recipe.model.experts is None or job.recipe.tokens_per_step == self.recipe.tokens_per_step)
        ):
            return False
        self.recipe, self.plan = job.recipe, job.plan
        return True

    # -- the step

    def train(self, source: BatchSource) -> Iterator[StepResult]:
        """See Run.train. One host synchronisation a step: the check that loss and norm are finite."""
        while self.step_number < self.plan.last_step:
            self.snapshots.detach()
            with naming_memory(
                f"step {self.step_number}", self.device, partial(outlook, self.recipe, self._options, self.device)
            ):
                result = self._step(source)
            yield result

    def _step(self, source: BatchSource) -> StepResult:
        recipe, step = self.recipe, self.step_number
        self._step_clock.begin()
        losses, loss_scale, data_wait_s = self._forward_backward(partial(source.rows, step))
        gradients = self._take_gradients()
        self._clock.to("clip")
        loss, measures = loss_scale.reported(tree_sum(losses) if self._replayable else torch.stack(losses).sum(0))
        found = list(gradients.values())
        if self._replayable:
            norm = tree_global_norm(tree_norms(found, recipe.precision.tensor_parts))
        else:
            norm = global_norm(self.kernels.norms(found))
        rates = group_learning_rates(self.groups, recipe.schedule, step)
        tokens, bearing = recipe.tokens_per_step, loss_scale.bearing_tokens
        self._step_clock.result()
        finite = step_happens(recipe, source, step, loss, norm, bearing, partial(list, losses))
        self._clock.to("update")
        tallies = take_tallies(self.model)
        if (experts := recipe.model.experts) is not None:
            measures |= measures_of(experts, tallies)
        if finite:
            self.update(gradients, norm, rates)
            if experts is not None:
                balance_biases(experts, tallies, self.planes["weights"])
        self.step_number += 1
        phases = self._clock.stop()
        step_ms = self._step_clock.end()
        times = step_ms, data_wait_s * 1e3
        return StepResult(step, loss, norm, rates, tokens, bearing, *times, not finite, phases, measures)

    def gradients(self, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
        """See Run.gradients."""
        losses, scale, _ = self._forward_backward(lambda first, count: batch.take(slice(first, first + count)))
        self._clock.stop()
        found = self._take_gradients()
        take_tallies(self.model)  # of no step
        gradients = {name: gradient.detach().float().cpu().clone() for name, gradient in found.items()}
        return float(scale.reported(torch.stack(losses).sum(0))[0]), gradients

    def _forward_backward(self, rows: Callable[[int, int], Batch]) -> tuple[list[torch.Tensor], LossScale, float]:
        """Leaves the gradients in place. Returns what the head returned for each micro-batch, over the scale's divisor,
        the scale, and seconds waited for rows.
        """
        batch, losses, start = self.recipe.batch, [], time.perf_counter()
        self._clock.to("data wait")
        firsts = range(0, batch.global_batch_size, batch.micro_batch_size)
        # all of them first: the divisor is the whole batch's
        read = [rows(first, batch.micro_batch_size) for first in firsts]
        scale = LossScale.of(self.recipe, sum(found.bearing_tokens for found in read))
        data_wait_s = time.perf_counter() - start
        on_device = self._rows_ahead(read)
        for first in firsts:
            self._clock.to("copy")
            rows_here = next(on_device)
            self._clock.to("forward")
            keys = None
            if self.recipe.drops:
                count = len(rows_here.ids)
                keys = row_keys(self.recipe.seed, self.step_number, first, count, batch.global_batch_size, self.device)
            # The sum over tokens divided by the global batch's number: accumulation equals one large batch.
            sums = self._forward(rows_here, keys) / scale.divisor
            self._clock.to("backward")
            loss_of(sums).backward()
            losses.append(sums.detach())
        return losses, scale, data_wait_s

    def _forward(self, rows: Rows, dropout_keys: torch.Tensor | None) -> torch.Tensor:
        """What Decoder.forward computes, segment by segment: each block is compiled or recomputed by itself, and the
        head gets the leaf of its own that a tied weight has.
        """
        embedding, *blocks, head = self.model.segments()
        rotary, extras = self.model.rotary(rows.ids.shape[1]), rows.extras
        if self._frozen is not None and extras is not None:
            extras = extras._replace(frozen=self._frozen(rows.ids, rows.document_start, rotary))
        states = StateLosses(self.model.state_loss, rows.ids, rows.labels, extras)
        x = states.of(0, embedding(rows.ids, at_place(dropout_keys, EMBEDDING_PLACE)))
        for layer, block in enumerate(blocks[: states.last]):
            keys = at_place(dropout_keys, block_place(layer))
            x = self._run_block(block, x, rotary[layer], rows.document_start, keys)
            x = states.of(layer + 1, x)
        if states.last is not None:
            return states.alone()
        tied = self._leaves.get(HEAD_USE, self.model.tied_weight())
        return states.with_head(self._run_head(head, x, rows.labels, tied, states.extras))

    # -- parameters, copies and gradients

    def _take_gradients(self) -> dict[str, torch.Tensor]:
        """Parameter -> gradient of the step, in execution order; the run itself keeps none."""
        found: Mapping[str, torch.Tensor | None] = self._sums.totals() or {
            name: self._cut.get(name, leaf.grad) for name, leaf in self._leaves.items()
        }
        gradients = present(found, self._leaves)
        self._clear_gradients()
        if HEAD_USE in gradients:
            gradients["embedding.weight"] += gradients.pop(HEAD_USE)
        return gradients

    def _clear_gradients(self) -> None:
        self._sums.clear()
        self._cut.clear()
        for leaf in self._leaves.values():
            leaf.grad = None

    def fingerprint(self) -> Fingerprint:
        """See Run.fingerprint."""
        more = {
            "compute": self.recipe.precision.compute,
            "compile": self._options.compile,
            "activation_checkpointing": self._options.activation_checkpointing,
            "micro_batch_size": self.recipe.batch.micro_batch_size,
            "reduction": reduction_words(self.recipe),
        }
        recomputes = self._options.activation_checkpointing
        return device_fingerprint("local", self.device, self.kernels.manifest, more, recomputes=recomputes)

    def close(self) -> None:
        """Release every tensor."""
        super().close()
        self._frozen = None
        self._clear_gradients()
        self._leaves.clear()


def outlook(recipe: Recipe, options: LocalOptions, device: torch.device) -> tuple[dict[str, int], list[str]]:
    """What the run was computed to need, and settings that need less."""
    asked = recipe, options.activation_checkpointing, options.compile, device.type
    parts = alone_needs(*asked)
    least = sum(parts.values()) - 0.03 * (sum(parts.values()) - parts["program"])
    less = [words for words, total in alternatives(*asked) if total < least]
    return parts, [*less[:3], "the streaming backend"]


def _on_one_gpu(recomputes: str, compiled: bool, recipe: Recipe, speeds: Speeds) -> Prediction:
    """The step as the cuda backend predicts it."""
    from weftrain.backends.cuda.degrees import Degrees
    from weftrain.backends.cuda.options import CudaOptions
    from weftrain.backends.cuda.planner import predict

    alike = {"activation_checkpointing": recomputes, "compile": compiled}
    return predict(recipe, CudaOptions.model_validate(alike), Degrees(1, 1, 1, 1), speeds)


class LocalBackend(PlainBackend):
    name = "local"
    summary = "one process, one device (cpu or cuda), fp32 or bf16 with fp32 weights"
    options = LocalOptions
    returns_gradients = True
    portable_options = frozenset({"compile", "activation_checkpointing"})
    unsupported = frozenset({"replicas"})

    def outline(self, recipe: Recipe, options: StrictModel) -> list[str]:
        """See Predictor.outline."""
        assert isinstance(options, LocalOptions)
        return outline_alone(recipe, options, options.compile, options.device)

    def predict(self, recipe: Recipe, options: StrictModel, speeds: Speeds) -> Prediction:
        """See Predictor.predict. Raises BackendError for several devices."""
        assert isinstance(options, LocalOptions)
        on_gpu = partial(_on_one_gpu, options.activation_checkpointing, options.compile)
        return predict_alone(recipe, options, options.compile, options.device, speeds, on_gpu)

    def prepare(self, job: Job) -> LocalRun:
        """Raises BackendError for a device that is not there, or compile without a compiler."""
        options, device = prepare_process(job, LocalOptions)
        if options.compile and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
            raise BackendError(
                "backend.options.compile needs a C++ compiler (g++ or clang++) on PATH: install one or set "
                "compile=false"
            )
        if options.compile and options.activation_checkpointing == "selective" and job.recipe.model.experts is not None:
            raise BackendError(
                "backend.options.compile is true, activation_checkpointing selective and model.experts given: experts "
                "are not compiled, and a block that is recomputed in parts must be as a whole: set "
                "activation_checkpointing=full or none"
            )
        if device.type == "cuda":
            check_memory(job.recipe, options.activation_checkpointing, options.compile, device)
        with naming_memory("the preparation of the run", device, partial(outlook, job.recipe, options, device)):
            return LocalRun(job, options, device)


BACKEND = LocalBackend()
