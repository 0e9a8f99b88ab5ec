"""The Backend protocol: what the core tells a backend, and what it gets back. backends/README.md has the smallest one.

The seam is the training run, not the device: a backend drives its own steps and the core consumes results. A wafer
traces the whole step once and hands values out only at steps named in advance (`Plan`); a weight-streaming engine
interleaves backward with update. What a reader would get wrong: steps are counted by what is *completed*.
`StepResult.step` is the 0-based index of the step just made, so after it `step + 1` steps are complete, and that number
is the one in `Plan`, `State.step` and checkpoint names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, SupportsFloat, runtime_checkable

import torch

from weftrain.core.config import Recipe
from weftrain.core.formats.strict_model import StrictModel
from weftrain.core.order.batch import Batch, BatchSource, EvaluationSource
from weftrain.core.stop import StopRequest


@dataclass(frozen=True)
class Plan:
    """When somebody will look, known before step one. All numbers count completed steps; an interval of 0 is never."""

    start_step: int
    last_step: int
    checkpoint_every_steps: int = 0
    evaluate_every_steps: int = 0
    log_every_steps: int = 1
    checkpoint_at_end: bool = True
    evaluate_at_start: bool = False  # at step 0, before anything is trained
    score_every_steps: tuple[int, ...] = ()  # of each of the recipe's `evaluations` on the training processes
    chunk_steps: int = 0  # of each chunk of the data: a checkpoint ties every chunk to a state; 0: there are no chunks
    change_steps: tuple[int, ...] = ()  # at which the recipe changes: the plan ends at the next one, with a checkpoint

    def __post_init__(self) -> None:
        if not 0 <= self.start_step <= self.last_step:
            raise ValueError(f"plan: start_step {self.start_step} must lie in 0..last_step ({self.last_step})")
        for name in ("checkpoint_every_steps", "evaluate_every_steps", "log_every_steps", "chunk_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"plan: {name} must not be negative")

    def wants_state(self, completed: int) -> bool:
        """Whether a checkpoint is due: at each multiple, after each chunk, at each change of the recipe and, unless
        declined, at the end.
        """
        at_end = (self.checkpoint_at_end and completed == self.last_step) or completed in self.change_steps
        return at_end or _due(completed, self.checkpoint_every_steps) or _due(completed, self.chunk_steps)

    def wants_evaluation(self, completed: int) -> bool:
        """True where held-out loss is due: at each multiple of the interval and, if there is one, at the end."""
        return self.evaluate_every_steps > 0 and self.wants_every(self.evaluate_every_steps, completed)

    def wants_every(self, steps: int, completed: int) -> bool:
        """Whether what is wanted every so many steps, and after the last one, is due."""
        return _due(completed, steps) or (completed == self.last_step and completed not in self.change_steps)

    def wants_scores(self, completed: int) -> bool:
        """Whether one of the recipe's `evaluations` is due, for which a state is exported."""
        return any(self.wants_every(steps, completed) for steps in self.score_every_steps)

    def wants_log(self, completed: int) -> bool:
        """Whether the loss is read, which synchronises an accelerator: the first step, each multiple, the end."""
        return completed in (self.start_step + 1, self.last_step) or _due(completed, self.log_every_steps)


def plan_of(recipe: Recipe, first_step: int) -> Plan:
    """The recipe's plan from `first_step` completed steps on, which may lie beyond its end, to its next change."""
    changes = tuple(change.step for change in recipe.changes)
    stop = next((step for step in changes if step > first_step), recipe.schedule.steps)
    return Plan(
        first_step,
        max(first_step, stop),
        checkpoint_every_steps=recipe.checkpoint.every_steps,
        evaluate_every_steps=recipe.log.evaluate_every_steps,
        log_every_steps=recipe.log.every_steps,
        evaluate_at_start=recipe.log.evaluate_at_start,
        score_every_steps=tuple(one.every_steps for one in recipe.evaluations if one.where == "train"),
        checkpoint_at_end=recipe.checkpoint.at_end,
        chunk_steps=0 if recipe.data.chunks is None else recipe.schedule.steps // recipe.data.chunks,
        change_steps=changes,
    )


def _due(completed: int, every: int) -> bool:
    return every > 0 and completed % every == 0


@dataclass(frozen=True)
class State:
    """The neutral training state: saved by any backend, loaded by any other.

    tensors: '<plane>/<canonical parameter name>' -> whole tensor in host memory, fp32; planes are 'weights', and of
    what AdamW trains 'exp_avg' and 'exp_avg_sq'. The mapping may be lazy (core/formats/lazy_tensors.py), as a
    checkpoint's is.
    step: completed steps. optimizer_updates: AdamW's t, which is less than step where steps were skipped.
    """

    step: int
    optimizer_updates: int
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one step was. loss and grad_norm may live on the device, and float() may synchronise: only log lines do it.

    loss: mean over the tokens of the global batch that bear a loss, before the update; NaN where none does. Of
    objective dpo, the mean over pairs. grad_norm: global norm before clipping, of the gradient as the objective divides
    it. tokens: positions read. bearing_tokens: those that bear a loss. skipped: loss or norm was not finite, and
    nothing was updated. step_ms: without what happens between two steps; where the update runs beside the host, from
    result to result, so that it is counted in the next step's. data_wait_ms: waiting for rows alone, not for their copy
    to a device. measures: what the objective measures besides (`objective.measures`), means over the global batch.
    """

    step: int
    loss: SupportsFloat
    grad_norm: SupportsFloat
    learning_rates: Mapping[str, float]  # parameter group -> learning rate
    tokens: int
    bearing_tokens: int
    step_ms: float
    data_wait_ms: float
    skipped: bool = False
    # with Job.time_phases: part of the step -> its time
    phases_ms: Mapping[str, float] | None = None
    measures: Mapping[str, SupportsFloat] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredState:
    """State that a backend keeps by itself.

    segment: Job.segment of the process that completed the last step. result: of that step, for a record that lacks it.
    volatile: a copy in memory, which is passed over where the run cannot go on from it.
    """

    step: int
    segment: str
    where: Path
    dataset_id: str | None
    result: StepResult | None
    volatile: bool = False


# What becomes of such state: the run goes on from it; it is overwritten; or it is renamed and kept.
StoredStateUse = Literal["continue", "replace", "set_aside"]


@dataclass(frozen=True)
class EvalResult:
    """Held-out loss, the mean over `tokens` (not over batches); of objective dpo over pairs, with its measures."""

    loss: float
    tokens: int
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def beside_loss(self) -> dict[str, float]:
        """What is reported beside the loss: the objective's measures, or the perplexity of a loss that is a mean over
        tokens, infinite where a float cannot hold it.
        """
        return dict(self.measures) or {"perplexity": math.exp(self.loss) if self.loss < 709 else math.inf}


@dataclass(frozen=True)
class Job:
    """All that a backend is told. `options`: the recipe's backend.options, checked by the backend's own schema."""

    recipe: Recipe
    plan: Plan
    options: StrictModel
    weights: Mapping[str, torch.Tensor] | None = None  # initial ones by canonical name; None: drawn from the seed
    # of an objective that keeps the model that the run began with, its weights; None: `weights`, or drawn from the seed
    first_weights: Mapping[str, torch.Tensor] | None = None
    progress: Callable[[str, float], None] = lambda words, share: None  # is told what is done, and its share (0..1)
    folder: Path | None = None  # the run's: a backend may keep files in a folder of its own name there
    stop: StopRequest = field(default_factory=StopRequest)  # whether this process was asked to stop
    time_phases: bool = False  # time the parts of each step: waits for an accelerator at the end of every step
    threads: int | None = None  # CPU threads of this process, instead of what the options say
    segment: str = ""  # names this start in the ledger; a backend that keeps state notes it with each completed step
    stored_state: StoredStateUse = "continue"  # of the backend's own; what is behind plan.start_step is replaced


@dataclass(frozen=True)
class Fingerprint:
    """All that can change a bit of a run's results. Named are the fields that the core and the command line read.

    more: whatever else the backend knows (versions, instruction set, its options, order of reduction), JSON values
    under other names.
    """

    backend: str
    device_type: str  # 'cpu' or 'cuda' as torch has them, or a vendor's own word
    device: str  # the device's name
    threads: int | None = None  # CPU threads of a process; None: the run does not compute with threads of this process
    ranks: int | None = None  # processes that compute side by side, each on such a device; None: this process alone
    kernels: Mapping[str, Any] = field(default_factory=dict)  # the manifest of kernels.select; empty: none was selected
    more: Mapping[str, Any] = field(default_factory=dict)
    # How much of the forward pass backward computes again, for HFU; None: not declared. Not recorded itself.
    recomputes: Literal["none", "selective", "full"] | None = None

    def __post_init__(self) -> None:
        for name in ("backend", "device_type", "device"):
            if not (isinstance(value := getattr(self, name), str) and value):
                raise ValueError(f"fingerprint: {name} is {value!r}: give a text")
        for name in ("threads", "ranks"):
            if (value := getattr(self, name)) is not None and (type(value) is not int or value < 1):
                raise ValueError(f"fingerprint: {name} is {value!r}: give a number from 1, or None")
        if twice := sorted(_NAMED & self.more.keys()):
            raise ValueError(f"fingerprint: {twice[0]} is in `more`, and is a field of its own")

    def as_json(self) -> dict[str, Any]:
        """One flat mapping, as manifests, ledger and environment.json record it. None and empty values are left out."""
        named = {name: getattr(self, name) for name in sorted(_NAMED)}
        return {**self.more, **{name: value for name, value in named.items() if value not in (None, {})}}


_NAMED = {"backend", "device_type", "device", "threads", "ranks", "kernels"}


class Run(Protocol):
    """One training run on one backend."""

    def train(self, source: BatchSource) -> Iterator[StepResult]:
        """Forward, backward, reduce, clip, update: one StepResult a step, from the state's step to plan.last_step.

        Between two results the caller may export, evaluate, or stop iterating.
        Raises NonFiniteError, with weights and optimizer untouched, under the `halt` policy.
        """
        ...

    def gradients(self, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
        """For the conformance suite: loss and unclipped fp32 gradient of every trained parameter, for a global batch.

        The loss is StepResult's; the gradient is divided as the objective says.
        """
        ...

    def evaluate(self, source: EvaluationSource) -> EvalResult: ...

    def export_state(self) -> State: ...

    def import_state(self, state: State) -> None: ...

    def fingerprint(self) -> Fingerprint: ...

    def stats(self) -> dict[str, float]:
        """Memory, bytes moved, stalls; the unit is in each name."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class WaitedFor(Protocol):
    """What a run also has if other processes wait for this one between two steps."""

    def keep_waiting(self, what: str) -> None:
        """Tell them what this process is doing, so that they know that it lives and wait on."""
        ...


@runtime_checkable
class Continues(Protocol):
    """What a run also has if it can go on by a changed recipe with the state that it has in memory."""

    def go_on(self, job: Job) -> bool:
        """The plan's last step is saved, and `job` is the next start of the same run. Whether this run takes it on, and
        computes from there, bit for bit, what one would that was prepared for `job` and got this state.

        False, with nothing changed, where it cannot, or stands at another step: it is closed, and another is prepared.
        """
        ...


# What a recipe may ask for that a backend need not have: dropout, sums in a fixed tree (precision.numerics:
# replayable), several processes (batch.replicas), text while it trains (log.sample_prompts), of the objective pairs of
# rows with measures (name: dpo), terms of next_token, marked rows to be forgotten with the head's logits (forget),
# losses of the hidden states between the blocks (hidden_states) and the model that the run began with beside the one
# that is trained (frozen_model), frozen parameters (tuning.freeze), matrices that Muon trains (optimizer.muon),
# adapters (tuning.lora), or a mixture of experts (model.experts).
Feature = Literal[
    "dropout",
    "replayable",
    "replicas",
    "samples",
    "dpo",
    "z_loss",
    "label_smoothing",
    "token_weights",
    "freeze",
    "muon",
    "lora",
    "forget",
    "hidden_states",
    "frozen_model",
    "experts",
]


@runtime_checkable
class Backend(Protocol):
    """A way to run training. One file or folder in backends/ defines `BACKEND`, an instance."""

    name: str
    summary: str  # one line for `weftrain backends`
    options: type[StrictModel]  # schema of the recipe's backend.options
    # False for one that hands out no gradients (null, cerebras): the conformance suite has nothing to compare
    returns_gradients: bool
    # Options that replay, eval and the like take from a recipe that may be a stranger's: those that decide numbers or
    # memory. Never a path, a device, an address or a time to wait.
    portable_options: Set[str]
    # A recipe that asks for one of these is refused before the backend sees it
    unsupported: Set[Feature]

    def unavailable(self) -> str | None:
        """None, or the reason a person can act on."""
        ...

    def prepare(self, job: Job) -> Run: ...

    def stored_state(self, recipe: Recipe, options: StrictModel, folder: Path) -> StoredState | None:
        """The trained state that the backend itself keeps for the run in `folder`, if any. Nothing is written.

        core/resume.py decides whether it belongs to the run. Raises BackendError for state that is damaged, or of
        another shape than this recipe's.
        """
        ...


@runtime_checkable
class Follower(Protocol):
    """What a backend also has if a run of it may span several processes, of which one leads and the others follow."""

    def follows(self) -> bool:
        """Whether this process was started to follow: then `run_worker` is called, and `prepare` never."""
        ...

    def run_worker(self, read: Callable[[], Job], open_source: Callable[[Job], BatchSource], wait_s: float) -> None:
        """Take part in a run that another process leads, until it ends.

        read: the job as this process knows it now; its `stop` is this process's request to leave. wait_s: how long to
        wait for a run. Raises BackendError.
        """
        ...

    def nothing_to_lead(self, job: Job) -> None:
        """This process was to lead a run that is already complete: release the processes that wait to follow it."""
        ...
