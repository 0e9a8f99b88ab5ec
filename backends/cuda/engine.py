"""One training run over many ranks: the step, and what rank 0 asks of the others.

The core calls the public methods of a run on rank 0. Each sends a command, and then all ranks do the same: `step`,
`gradients_of`, `evaluate_rounds`, `whole`, `place`. Loss and gradient norm are summed over all ranks before they are
tested, so every rank decides alike whether a step happens.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from weftrain.backends.common.copies import HostCopy, RowsAhead
from weftrain.backends.common.decoder import (
    PLANES,
    first_weight,
    initial_weight,
    select_kernels,
)
from weftrain.backends.common.device import device_fingerprint, memory_stats
from weftrain.backends.common.frozen_layers import keeps_frozen_layers
from weftrain.backends.common.muon import MuonUpdate
from weftrain.backends.common.out_of_memory import naming_memory
from weftrain.backends.common.phase_clock import PhaseClock, StepClock
from weftrain.backends.common.state_snapshot import check_state
from weftrain.backends.common.step import (
    HeldOutTotal,
    LossScale,
    Rows,
    clip_coefficient,
    held_by_device,
    padded_rows,
    step_happens,
    to_device,
    update,
    update_sets,
)
from weftrain.backends.common.step_result import result_json
from weftrain.backends.common.tree_norms import row_widths
from weftrain.backends.cuda.degrees import degrees, numerics, ranks_per_node, shared_heads
from weftrain.backends.cuda.experts import total_tallies
from weftrain.backends.cuda.frozen import FrozenAcrossRanks
from weftrain.backends.cuda.memory_copies import MemoryCopies
from weftrain.backends.cuda.models import build
from weftrain.backends.cuda.muon import over_ranks
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.overlap import check_async_tensor_parallel
from weftrain.backends.cuda.parallel import Meshes
from weftrain.backends.cuda.pipeline_layout import parameters_of_stage, rank_of_stage, stage_count
from weftrain.backends.cuda.planner import check_memory, outlook
from weftrain.backends.cuda.save import Parts, RankedTensors, RankWriter
from weftrain.backends.cuda.stage import MicroBatch, RankTokens
from weftrain.backends.cuda.tied_embedding import TIED, TiedEmbedding
from weftrain.backends.cuda.totals import StageRanks, Totals
from weftrain.backends.cuda.world import BETWEEN_STEPS, IDLE, World
from weftrain.core.backend import EvalResult, Fingerprint, Job, State, StepResult
from weftrain.core.config import Recipe
from weftrain.core.dropout import row_keys
from weftrain.core.errors import BackendError, NonFiniteError, WeftrainError
from weftrain.core.experts import balance_biases, measures_of, take_tallies
from weftrain.core.formats.canonical import sha256_json
from weftrain.core.formats.checkpoint_files import Written
from weftrain.core.objectives import loss_of
from weftrain.core.optim import group_learning_rates, parameter_groups
from weftrain.core.order.batch import Batch, BatchSource, EvaluationSource
from weftrain.core.parameters import ParameterSpec

if TYPE_CHECKING:
    from weftrain.backends.cuda.pipeline import Pipeline


class CudaRun:
    """This rank's part of a run. given: rank 0 has initial weights (job.weights); else they are drawn. recalled: the
    state is that of world.copies, in the nodes' memory. given_first: rank 0 has the weights of the model that the run
    began with, for an objective that keeps it; else they are drawn.
    """

    def __init__(
        self,
        job: Job,
        options: CudaOptions,
        world: World,
        given: bool,
        recalled: bool = False,
        given_first: bool = False,
    ) -> None:
        self._world, self._options, self._recipe, self._plan = world, options, job.recipe, job.plan
        self.job = job
        self.number = world.next_run()
        self.step_number, self._optimizer_updates = job.plan.start_step, 0
        error = None
        try:
            self._choose(job.recipe, options)
        except (WeftrainError, ValueError) as problem:  # a kernel's refusal is a ValueError
            error = str(problem)
        world.agree(error)  # before the first collective of the set-up: a rank that failed would not come to it
        chosen = {
            "recipe": sha256_json(job.recipe.model_dump(mode="json")),
            "kernels": sha256_json(self._kernels.manifest),
        }
        if options.memory_copies_every_steps:
            chosen["ranks of a node"] = str(ranks_per_node(world.size))
        world.same_everywhere(chosen)
        if world.leads and (told := shared_heads(job.recipe.model, self._degrees)):
            sys.stderr.write(f"weftrain: {told}\n")
        with self.naming_memory("the preparation of the run"):
            with world.together("shard the model across ranks"):
                self._build(job.recipe, options)
            held = [tensor for plane in PLANES for tensor in self._planes[plane].values()]
            self.copies = MemoryCopies(world, self._degrees, options, job, held)
            if recalled:
                self.stand(*self.copies.restore())
            else:
                self._fill(given)
            self._fill_frozen(given_first)
        self.writer = RankWriter(world, self.number)
        self._closed = False
        self._rows_ahead, self._host_copy = RowsAhead(world.device), HostCopy(world.device)
        self._clock, self._step_clock = PhaseClock(world.device, job.time_phases), StepClock(world.device)
        chosen_for = world, self._clock, self._kernels, self._model, self._held, self._degrees
        self._totals = Totals(*chosen_for, row_widths(job.recipe), self._stage_ranks())
        self._pipeline = self._open_pipeline()
        world.stall_s, world.replace_stalled = options.stall_s, options.stalled == "replace"
        world.folder = job.folder or Path()

    def _choose(self, recipe: Recipe, options: CudaOptions) -> None:
        """Everything that one rank can find wrong by itself."""
        world, device = self._world, self._world.device
        self._degrees = degrees(options, recipe, world.size, ranks_per_node(world.size))
        if options.memory_copies_every_steps and not all(spec.trained for spec in recipe.parameters):
            raise BackendError(
                "backend.options.memory_copies_every_steps copies what the optimizer moves, and the recipe has other "
                "parameters (tuning, or model.experts.bias_update): set it to 0"
            )
        # With offloading the optimizer runs on the host, but for the norms, which FSDP leaves on the device.
        where = "cpu" if options.cpu_offload else device.type
        self._kernels = select_kernels(recipe, device.type, where, where, also_on={device.type})
        check_async_tensor_parallel(options, device)
        check_memory(recipe, options, self._degrees, device)

    def _build(self, recipe: Recipe, options: CudaOptions) -> None:
        device = self._world.device
        meshes = Meshes.of(self._degrees, recipe.model.num_kv_heads, device.type, self._world.timeout_s)
        asked = recipe, options, self._kernels, self._degrees, meshes, device
        self._meshes, self._built = meshes, build(*asked)
        self._decoder, self._model = self._built.decoder, self._built.model
        trained = {spec.name for spec in recipe.parameters if spec.trained}
        ties = recipe.model.tie_embeddings and meshes.pipeline is not None and TIED in trained
        self._tied = TiedEmbedding(self._degrees, self._world.timeout_s) if ties else None
        self._frozen = FrozenAcrossRanks(*asked) if keeps_frozen_layers(self.job) else None
        weights = self._model.weights
        owned = {spec.name: weights[spec.name] for spec in self._built.specs if spec.trained}
        self._planes: dict[str, dict[str, Tensor]] = {"weights": weights, **{plane: {} for plane in PLANES[1:]}}
        for spec in self._built.specs:
            for plane in spec.planes[1:]:
                self._planes[plane][spec.name] = torch.zeros_like(weights[spec.name])
        self._specs = {spec.name: spec for spec in recipe.parameters}
        self._owner_of = {
            name: rank_of_stage(stage, options)  # of a pipeline
            for stage in reversed(range(stage_count(options)))  # of a weight that two stages have, the first one's
            for name in parameters_of_stage(stage, recipe, options)
        }
        self._groups = parameter_groups(recipe.model, recipe.optimizer, recipe.tuning)
        self._held = held_by_device(owned)
        self._sets = {where: update_sets(self._groups, self._model.copies, held) for where, held in self._held.items()}
        shapes = {spec.name: spec.shape for spec in self._built.specs}
        spread = over_ranks(self._world, self._model, shapes, meshes.stage)
        newton_schulz = self._kernels.newton_schulz
        self._muon = MuonUpdate(recipe, self._groups, self._model.copies, newton_schulz, spread)

    def _stage_ranks(self) -> StageRanks | None:
        """What the totals must know of a pipeline."""
        if (group := self._meshes.pipeline) is None:
            return None
        inner, last = self._degrees.stage_ranks, stage_count(self._options) - 1
        head = rank_of_stage(last, self._options) * inner
        names = [spec.name for spec in self._recipe.parameters if spec.trained]
        twice = frozenset() if self._tied is None else frozenset([TIED])
        return StageRanks(range(head, head + inner), group, names, twice)

    def _open_pipeline(self) -> Pipeline | None:
        if self._meshes.pipeline is None:
            return None
        from weftrain.backends.cuda.pipeline import Pipeline  # imports torch's compiler, which takes most of a second

        tokens = self._recipe.data.sequence_length // self._degrees.sequence
        asked = self._built.stages, self._model, self._recipe, self._options, self._meshes.pipeline
        return Pipeline(*asked, tokens, self._world.device, self._clock)

    def _fill(self, given: bool) -> None:
        """Initial weights, one at a time: rank 0's if given, else each tensor is drawn by one of the ranks."""
        for index, spec in enumerate(self._recipe.parameters):
            source = 0 if given else index % self._world.size
            whole = initial_weight(self.job, spec) if self._world.rank == source else None
            self.place("weights", spec.name, spec.shape, whole, source)
        self._model.refresh()

    def _fill_frozen(self, given: bool) -> None:
        """The same for the frozen layers."""
        for index, spec in enumerate(() if self._frozen is None else self._frozen.specs):
            source = 0 if given else index % self._world.size
            whole = first_weight(self.job, spec) if self._world.rank == source else None
            assert self._frozen is not None
            self._frozen.place(spec.name, self._shared(f"frozen {spec.name}", spec.shape, whole, source))

    def _shared(self, what: str, shape: tuple[int, ...], whole: Tensor | None, source: int) -> Tensor:
        """fp32: the tensor that rank `source` has, on every rank."""
        tensor = torch.empty(shape) if whole is None else whole.detach().to(torch.float32).contiguous()
        if self._world.size > 1:
            with self._world.together(f"share {what}"):
                dist.broadcast(tensor, source)
        return tensor

    def place(self, plane: str, name: str, shape: tuple[int, ...], whole: Tensor | None, source: int) -> None:
        """Give every rank its part of a whole tensor that rank `source` has."""
        tensor = self._shared(f"{plane}/{name}", shape, whole, source)
        if name not in self._planes["weights"]:
            return  # another stage's
        if plane == "weights":
            self._model.place_weight(name, tensor)
        else:
            self._planes[plane][name].copy_(self._model.part(name, tensor))

    # -- the step

    def train(self, source: BatchSource) -> Iterator[StepResult]:
        """See Run.train. One host synchronisation a step: the check that loss and norm are finite."""
        with self._together(do="train", dataset_id=source.dataset_id):
            pass
        try:
            while self.step_number < self._plan.last_step:
                self.writer.detach()
                with self._together(do="step", step=self.step_number):
                    result = self.step(source)
                self._world.doing = BETWEEN_STEPS
                yield result
                if self.copies.due(self.step_number, self._plan.last_step):
                    self._copy(source, result)
        finally:
            self._world.doing = IDLE

    def _copy(self, source: BatchSource, result: StepResult) -> None:
        """Copy the state into the nodes' memory, now that all that the plan wants of the step is recorded."""
        claims = self.copies.claims(self.step_number, self._optimizer_updates, source.dataset_id, result_json(result))
        with self._together(do="copy", claims=vars(claims)):
            self.copies.copy(claims)

    def step(self, source: BatchSource) -> StepResult:
        self._step_clock.begin()
        recipe, step = self._recipe, self.step_number
        self._world.step = step
        losses, loss_scale, data_wait_s = self._forward_backward(partial(source.rows, step))
        with self._world.together(f"add the gradients of step {step}"):
            self._clock.to("communication")
            gradients = self._take_gradients()
            loss, norm, measures = self._totals.loss_and_norm(losses, loss_scale, gradients)
            rates, bearing = group_learning_rates(self._groups, recipe.schedule, step), loss_scale.bearing_tokens
            everywhere = partial(self._totals.losses, losses)
            self._step_clock.result()
            finite = step_happens(recipe, source, step, loss, norm, bearing, everywhere)
            if (experts := recipe.model.experts) is not None:
                tallies = total_tallies(self._decoder, self._world.device, self._pipeline is not None)
                measures |= measures_of(experts, tallies)
        self._clock.to("update")
        if finite:
            self._update(gradients, norm, rates)
            if experts is not None:
                weights = self._planes["weights"]
                own = {name: table for name, table in tallies.items() if f"{name}.weight" in weights}
                balance_biases(experts, own, weights)
        del gradients
        self.step_number += 1
        if (phases := self._clock.stop()) is not None and self._pipeline is not None:
            self._pipeline.timed(phases)
        step_ms = self._step_clock.end()
        tokens, times = recipe.tokens_per_step, (step_ms, data_wait_s * 1e3)
        return StepResult(step, loss, norm, rates, tokens, bearing, *times, not finite, phases, measures)

    def _update(self, gradients: Mapping[str, Tensor], norm: Tensor, rates: Mapping[str, float]) -> None:
        """Clip and update. norm: of the global batch's gradients, 0-dim."""
        scale = clip_coefficient(norm, self._recipe.optimizer.clip_norm)
        self._optimizer_updates += 1
        for where, sets in self._sets.items():
            adamw, count = self._kernels.on[where.type].adamw, self._optimizer_updates
            update(adamw, sets, self._planes, gradients, self._recipe.optimizer, rates, count, scale.to(where))
        self._muon.update(self._planes, gradients, rates, scale)
        self._model.updated()

    def _take_gradients(self) -> dict[str, Tensor]:
        """This rank's parts of the global batch's gradients. A collective."""
        gradients = self._model.take_gradients()
        if self._tied is not None:
            self._tied.add(gradients)
        return gradients

    def _forward_backward(self, rows: Callable[[int, int], Batch]) -> tuple[list[Tensor], LossScale, float]:
        """Leaves the gradients in place. Returns what the head returned for each of this rank's micro-batches, over the
        scale's divisor, the scale, and seconds waited for rows.
        """
        batch, start = self._recipe.batch, time.perf_counter()
        group, count = self._replica, batch.accumulation_steps
        firsts = range(
            group * count * batch.micro_batch_size, (group + 1) * count * batch.micro_batch_size, batch.micro_batch_size
        )
        self._world.doing = f"read rows {firsts[0]}.. of step {self.step_number}"
        self._clock.to("data wait")
        # all of them first: the divisor is the whole batch's
        read = [rows(first, batch.micro_batch_size) for first in firsts]
        data_wait_s = time.perf_counter() - start
        self._clock.to("communication")
        # The ranks of a row, and of one pipeline, read the same rows, and each counted them.
        everywhere = self._world.total(sum(data.bearing_tokens for data in read))
        scale = LossScale.of(self._recipe, everywhere // (self._degrees.row_ranks * self._degrees.pipeline))
        micro_batches = self._micro_batches(read, firsts, scale)
        if self._pipeline is None:
            return self._one_after_another(micro_batches), scale, data_wait_s
        self._clock.to("copy")
        all_of_them = list(micro_batches)
        with self._world.together(f"compute step {self.step_number}"):
            return self._pipeline.step(all_of_them), scale, data_wait_s

    @property
    def _replica(self) -> int:
        """Which of the data-parallel groups of ranks, that have rows of their own, this rank is in."""
        return self._world.rank % self._degrees.stage_ranks // self._degrees.row_ranks

    def _micro_batches(self, read: list[Batch], firsts: range, scale: LossScale) -> Iterator[MicroBatch]:
        """On the device, each copied while the one before is computed."""
        on_device = self._rows_ahead(read)
        for first in firsts:
            self._clock.to("copy")
            self._world.doing = f"compute step {self.step_number}"
            tokens, keys = self._tokens(next(on_device)), None
            if self._recipe.drops:
                of_rows = self._recipe.seed, self.step_number, first, len(tokens.ids)
                keys = row_keys(*of_rows, self._recipe.batch.global_batch_size, self._world.device)
            yield MicroBatch(tokens, keys, scale.divisor)

    def _one_after_another(self, micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
        """Forward and backward of the whole model; what the head returned for each, over the divisor."""
        losses: list[Tensor] = []
        count = self._recipe.batch.accumulation_steps
        for tokens, keys, divisor in micro_batches:
            self._clock.to("forward")
            with (
                self._world.together(f"compute step {self.step_number}"),
                self._model.micro_batch(last=len(losses) == count - 1),
            ):
                if self._frozen is not None:
                    tokens = self._frozen.with_state(tokens)
                # The sum over tokens divided by the global batch's number: many ranks equal one large batch.
                sums = self._model.loss(tokens, keys) / divisor
                self._clock.to("backward")
                loss_of(sums).backward()
            losses.append(sums.detach())
        return losses

    def _tokens(self, rows_on_device: Rows) -> RankTokens:
        """This rank's tokens of some rows. The rotary tables are those of all tokens of its tensor group."""
        ids, labels, document_start, extras = rows_on_device
        rotary = self._decoder.rotary(ids.shape[1])
        within = self._world.rank % self._degrees.row_ranks // self._degrees.copies
        if self._degrees.sequence > 1:

            def own(whole: Tensor) -> Tensor:
                return whole.tensor_split(self._degrees.sequence, 1)[within].contiguous()

            ids, labels = own(ids), own(labels)
            if extras is not None and extras.token_weights is not None:
                extras = extras._replace(token_weights=own(extras.token_weights))
            context = within // self._degrees.tensor  # tensor ranks rotate q and k of all their context's tokens
            tokens = ids.shape[1] * self._degrees.tensor
            rows = slice(context * tokens, (context + 1) * tokens)
            rotary = [None if tables is None else (tables[0][rows], tables[1][rows]) for tables in rotary]
        return RankTokens(ids, labels, document_start, extras, rotary)

    # -- what the core asks for

    def gradients(self, batch: Batch) -> tuple[float, dict[str, Tensor]]:
        """See Run.gradients."""
        with self._together(do="gradients"):
            return self.gradients_of(batch)

    def gradients_of(self, batch: Batch | None) -> tuple[float, dict[str, Tensor]]:
        whole = self._share_rows(batch)
        losses, scale, _ = self._forward_backward(lambda first, count: whole.take(slice(first, first + count)))
        self._clock.stop()
        self._world.doing = IDLE
        with self._world.together("add gradients"):
            gradients = self._take_gradients()
            loss, _, _ = self._totals.loss_and_norm(losses, scale, gradients)
            found = {
                spec.name: self._assembled(spec, gradients.get(spec.name)).detach().cpu().clone()
                for spec in self._recipe.parameters
                if spec.trained
            }
        take_tallies(self._decoder)  # of no step
        return float(loss), found

    def _share_rows(self, batch: Batch | None) -> Batch:
        """Rank 0's rows, on every rank."""
        names = [field.name for field in fields(Batch)]
        found = {name: self._world.broadcast_array(getattr(batch, name, None)) for name in names}
        assert found["ids"] is not None
        return Batch(**found)  # type: ignore[arg-type]

    def evaluate(self, source: EvaluationSource) -> EvalResult:
        """Held-out loss. Rank 0 reads the rows and pads the last round."""
        rows = self._degrees.data * self._recipe.batch.micro_batch_size
        rounds = -(-source.num_rows // rows)
        with self._together(do="evaluate", rounds=rounds):
            total = self.evaluate_rounds(rounds, lambda number: padded_rows(source, number * rows, rows))
        return total.result(source)

    def evaluate_rounds(self, rounds: int, read: Callable[[int], Batch | None]) -> HeldOutTotal:
        total = HeldOutTotal(self._recipe.objective, self._world.device)
        micro = self._recipe.batch.micro_batch_size
        group = self._replica
        for number in range(rounds):
            batch = self._share_rows(read(number)).take(slice(group * micro, (group + 1) * micro))
            tokens = self._tokens(to_device(batch, self._world.device))
            with torch.no_grad(), self._world.together("evaluate"):
                if self._pipeline is None:
                    total.add(self._model.loss(tokens, None), tokens.labels)
                elif (found := self._pipeline.evaluate(MicroBatch(tokens, None))) is not None:
                    total.add(found, tokens.labels)
        if self._world.rank % self._degrees.copies:
            total.sums.zero_()  # another rank has the same
        if self._world.size > 1:
            with self._world.together("add the held-out losses"):
                dist.all_reduce(total.sums)
        self._model.refresh()
        return total

    def keep_waiting(self, what: str) -> None:
        """See WaitedFor: one small broadcast, so that no rank waits longer than its timeout."""
        self._world.doing = f"{BETWEEN_STEPS}: {what}"  # for the hang detector: something moves
        with self._together(do="wait"):
            pass

    def export_state(self) -> State:
        """See Run.export_state. A tensor is assembled on access; in a save every rank writes its share."""
        tensors = RankedTensors(self._shapes(), self._ask_for, self._begin_save, self._world.size)
        return State(self.step_number, self._optimizer_updates, self.writer.track(tensors))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        specs = self._recipe.parameters
        return {f"{plane}/{spec.name}": spec.shape for plane in PLANES for spec in specs if plane in spec.planes}

    def _ask_for(self, name: str) -> Tensor:
        with self._together(do="whole", name=name):
            found = self.whole(name, keep=True)
        assert found is not None
        return found

    def whole(self, name: str, keep: bool) -> Tensor | None:
        """The whole of a tensor, in host memory on a rank that keeps it. A collective."""
        plane, _, parameter = name.partition("/")
        spec = self._specs[parameter]
        with self._world.together(f"assemble {name}"):
            owned = self._planes[plane].get(parameter)
            whole = self._assembled(spec, owned).detach()
            return self._host_copy(whole) if keep else None

    def _assembled(self, spec: ParameterSpec, owned: Tensor | None) -> Tensor:
        """A parameter, or a tensor of its shape, in fp32, from what all ranks own. owned: None where another stage has
        it. A collective.
        """
        whole = None if owned is None else self._model.whole(spec.name, owned.float()).to(self._world.device)
        if self._meshes.pipeline is None:
            assert whole is not None
            return whole
        # every rank takes part, and one that keeps nothing drops it: a save then needs no second order of its tensors
        sent = torch.empty(spec.shape, device=self._world.device) if whole is None else whole.contiguous()
        dist.broadcast(sent, self._owner_of[spec.name] * self._degrees.stage_ranks)
        return sent

    def _begin_save(self, folder: Path, files: Parts) -> Callable[[], Written]:
        with self._together(do="save", folder=str(folder), files=files):
            return self.writer.begin(folder, files, self.whole)

    def import_state(self, state: State) -> None:
        """See Run.import_state. Rank 0 reads tensor by tensor and every rank keeps its part."""
        check_state(state.tensors, self._shapes())
        self.writer.detach()
        for plane in PLANES:
            for spec in (one for one in self._recipe.parameters if plane in one.planes):
                whole = state.tensors[f"{plane}/{spec.name}"]  # first: reading it may send commands
                with self._together(do="place", plane=plane, name=spec.name, shape=spec.shape):
                    self.place(plane, spec.name, spec.shape, whole, 0)
        with self._together(do="stand", step=state.step, optimizer_updates=state.optimizer_updates):
            self.stand(state.step, state.optimizer_updates)

    def stand(self, step: int, optimizer_updates: int) -> None:
        self.step_number, self._optimizer_updates = step, optimizer_updates
        self._model.refresh()

    def fingerprint(self) -> Fingerprint:
        """See Run.fingerprint."""
        more = numerics(self._options, self._recipe, self._degrees, self._world.device)
        recomputes, kernels = self._options.activation_checkpointing, self._kernels.manifest
        return device_fingerprint(
            "cuda", self._world.device, kernels, more, ranks=self._world.size, recomputes=recomputes
        )

    def stats(self) -> dict[str, float]:
        """Rank 0's memory, the largest of any rank, and how long the last save interrupted training."""
        stats = memory_stats(self._world.device)
        if self._world.size > 1 and not self._closed:
            with self._together(do="memory"):
                stats |= self.over_ranks()
        if self.writer.stall_ms is not None:
            stats["checkpoint_stall_ms"] = self.writer.stall_ms
        if self.copies.stall_ms is not None:
            stats["memory_copy_stall_ms"] = self.copies.stall_ms
        return stats

    def over_ranks(self) -> dict[str, float]:
        """Of each figure of this rank's memory the largest of any rank, as NAME_max_bytes; and a pipeline's bubble. A
        collective.
        """
        own = memory_stats(self._world.device)
        largest = torch.tensor(list(own.values()), dtype=torch.float64)
        with self._world.together("compare the ranks' memory"):
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        found = {
            f"{name.removesuffix('_bytes')}_max_bytes": value for name, value in zip(own, largest.tolist(), strict=True)
        }
        return found | ({} if self._pipeline is None else self._pipeline.bubble(self._world))

    def close(self) -> None:
        """End the run on every rank."""
        if self._closed:
            return
        with contextlib.suppress(BackendError):  # the error that ends the run is being raised already
            self._world.command(do="close", run=self.number)
        self.release()

    def naming_memory(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """Around what this rank allocates."""
        asked = self._recipe, self._options, self._degrees, self._world.device.type
        where = f"{doing} of rank {self._world.rank}" if self._world.size > 1 else doing
        return naming_memory(where, self._world.device, lambda: outlook(*asked))

    @contextlib.contextmanager
    def _together(self, **what: Any) -> Iterator[None]:
        """Rank 0: send a command, and carry it out too. If that fails, the other ranks wait in a collective that no
        command reaches, so the world is aborted.
        """
        self._world.command(run=self.number, **what)
        try:
            with self.naming_memory(f"step {self.step_number}" if what["do"] == "step" else f"'{what['do']}'"):
                yield
        except NonFiniteError:
            raise  # on every rank
        except BaseException as error:
            self._world.abort(str(error) or type(error).__name__)
            raise

    def release(self) -> None:
        self._closed = True
        self.writer.close()
        self.copies.close(complete=self.step_number == self._plan.last_step)
        for plane in self._planes.values():
            plane.clear()
