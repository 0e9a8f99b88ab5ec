"""The recipe: every key a typed, checked, frozen field. A recipe describes; code builds.

Nothing is coerced: `3` is not accepted where a string is meant nor `"3"` where a number is, an unknown key is an error,
and a missing key is an error unless the field shows a default. Files are read by core/recipe_file.py, which knows
lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from weftrain.core.alert_rules import AlertRules, check_rules
from weftrain.core.changes import MAX_CHANGES, Change, changed
from weftrain.core.evaluations_section import EvaluationConfig, check_evaluations
from weftrain.core.formats.safe_names import PlainName
from weftrain.core.formats.strict_model import (
    MAX_COUNT,
    Count,
    NonNegative,
    Positive,
    PositiveInt,
    Scalar,
    Seed,
    StrictModel,
    first_problem,
)
from weftrain.core.model_config import ChangeableKey, ModelConfig
from weftrain.core.muon import MuonConfig, with_muon
from weftrain.core.objectives_section import NextTokenObjective, ObjectiveConfig, check_objective
from weftrain.core.order.data_section import DataConfig
from weftrain.core.order.timeline import Timeline, timeline
from weftrain.core.parameters import ParameterSpec
from weftrain.core.precision_section import PrecisionConfig, check_parts
from weftrain.core.tuning import TuningConfig, rule_of_each, tuned_specs
from weftrain.core.unlearning_section import check_unlearning, freeze_beyond

RunName = Annotated[PlainName, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # names a folder
MAX_THREADS = 1024  # of a process: torch makes them all at once
Threads = Annotated[int, Field(ge=0, le=MAX_THREADS)]
TimeoutS = Annotated[int, Field(gt=0, le=30 * 86_400)]  # at most a month: torch.distributed takes no more
Prompt = Annotated[str, Field(min_length=1, max_length=10_000)]


class CompileOption(StrictModel):
    compile: bool = False  # compile the blocks with torch.compile; they share one graph


class RecomputeOption(StrictModel):
    # what backward computes again. selective: all but matrix products and attention; full: each block from its input
    activation_checkpointing: Literal["none", "selective", "full"] = "none"


# Options that mean the same in every backend that derives its options from them: choosing another backend keeps them.
SHARED_OPTIONS: tuple[type[StrictModel], ...] = (CompileOption, RecomputeOption)


class OptimizerConfig(StrictModel):
    """AdamW, or Muon for some matrices (core/muon.py) and AdamW for the rest, which the other keys are of.
    `eps_placement`: `after_bias_correction` is torch's, `before_bias_correction` is Cerebras's.
    """

    name: Literal["adamw", "muon"]
    muon: MuonConfig | None = None
    beta1: Annotated[float, Field(ge=0, lt=1)]
    beta2: Annotated[float, Field(ge=0, lt=1)]
    eps: Positive
    eps_placement: Literal["after_bias_correction", "before_bias_correction"]
    weight_decay: NonNegative
    decay: Literal["all", "matrices_and_embeddings"]  # the second skips biases and norms
    clip_norm: Positive | None  # global gradient norm; null: no clipping
    non_finite: Literal["halt", "skip"] = "halt"  # if loss or gradient norm is not finite: stop, or leave the step out
    # `skip` stops the run when more steps in a row, or a larger share of the last 100, were left out
    max_consecutive_skips: PositiveInt = 10
    max_skip_share: Annotated[float, Field(gt=0, le=1)] = 0.1

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the later key where it is null: a recipe that does not use it has the hash it had before."""
        return {key: value for key, value in handler(self).items() if key != "muon" or value is not None}

    @model_validator(mode="after")
    def _check_muon(self) -> OptimizerConfig:
        if self.name == "muon" and self.muon is None:
            raise ValueError("name is muon and 'muon' is missing: give its keys, or muon: {} for the usual ones")
        if self.name != "muon" and self.muon is not None:
            raise ValueError(f"name is {self.name} and 'muon' is given: set name: muon, or leave it out")
        return self


class Segment(StrictModel):
    """One part of the learning-rate schedule, from `start` at its first step to `end`, one step after its last."""

    # one_minus_sqrt falls quickly first, sqrt last; inverse_sqrt is in proportion to 1 / sqrt(step): core/optim.py
    shape: Literal["linear", "cosine", "constant", "one_minus_sqrt", "sqrt", "inverse_sqrt"]
    steps: PositiveInt
    start: NonNegative
    end: NonNegative | None = None  # left out for `constant`

    @model_validator(mode="after")
    def _check(self) -> Segment:
        if (self.shape == "constant") != (self.end is None):
            raise ValueError("'end' is needed for linear and cosine and the decays, and has no meaning for constant")
        if self.shape == "inverse_sqrt" and not (self.start and self.end):
            raise ValueError("'start' and 'end' of inverse_sqrt are above 0: it never reaches 0")
        return self


class ScheduleConfig(StrictModel):
    """Length and base learning rate of each step. The segments may be longer than `steps`, not shorter."""

    steps: PositiveInt
    learning_rate: Annotated[tuple[Segment, ...], Field(min_length=1, strict=False)]

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        covered = sum(segment.steps for segment in self.learning_rate)
        if covered < self.steps:
            last, rest = self.learning_rate[-1], self.steps - covered
            rate = last.start if last.end is None else last.end
            raise ValueError(
                f"learning_rate covers {covered} steps of {self.steps}: add a segment, e.g. with "
                f"'schedule.learning_rate.{len(self.learning_rate)}={{shape: constant, steps: {rest}, start: "
                f"{rate!r}}}'"
            )
        return self


class BatchConfig(StrictModel):
    """global_batch_size = micro_batch_size x replicas x accumulation steps, in sequences."""

    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt
    replicas: PositiveInt = 1

    @property
    def accumulation_steps(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.replicas)

    @model_validator(mode="after")
    def _check(self) -> BatchConfig:
        if self.global_batch_size % (self.micro_batch_size * self.replicas):
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size x replicas = "
                f"{self.micro_batch_size} x {self.replicas} = {self.micro_batch_size * self.replicas}"
            )
        return self


DEFAULT_PREFERENCES = ("flash_attn", "cpp", "torch", "triton", "reference")


class KernelsConfig(StrictModel):
    """Which implementations of the ops are selected. A preference may fall through to the next; a pin (`op`,
    `op@module-glob`) never does. The default list stands for the device's own order: on a GPU, Triton's fused kernels
    come before torch's compositions that no compiler fuses (kernels/registry.py).
    """

    preferences: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = DEFAULT_PREFERENCES
    pins: dict[str, str] = Field(default_factory=dict)


class BackendConfig(StrictModel):
    """Which backend, and its own options, whose schema stands in the backend's file."""

    name: Annotated[str, Field(min_length=1)]
    options: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict)


class KeepConfig(StrictModel):
    """Which checkpoints of a run are kept; after each save the others are removed (core/run/retention.py)."""

    last: PositiveInt = 2  # the newest ones
    every_steps: PositiveInt | None = None  # those whose step is a multiple, for ever
    chunk_ends: bool = True  # those at the ends of chunks, of a run that has data.chunks
    best: Count = 0  # those with the lowest held-out loss, the mean over the sets
    archive: Literal["none", "weights"] = "none"  # weights: those of a removed checkpoint stay, in the folder archive


class CheckpointConfig(StrictModel):
    every_steps: Count  # 0: only at the end
    at_end: bool = True  # false: none after the last step, for a backend that keeps the state itself
    every_minutes: Positive | None = None  # besides: so long after the last one began, at the end of a step
    keep: KeepConfig | None = None  # null: all

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the later keys where they are null: a recipe that does not use them has the hash it had before."""
        later = ("every_minutes", "keep")
        return {key: value for key, value in handler(self).items() if key not in later or value is not None}


class LogConfig(StrictModel):
    """When loss is read and held-out loss measured, in completed steps. 0: never."""

    every_steps: PositiveInt
    evaluate_every_steps: Count
    evaluate_at_start: bool = False  # besides: before the first step of a new run
    evaluate_rows: PositiveInt = 64  # rows of each held-out set
    tensorboard: bool = True
    # experiment trackers that are sent the run while it trains: wandb, mlflow, or what another package gives
    trackers: Annotated[tuple[PlainName, ...], Field(max_length=16, strict=False)] = ()
    # end the run, saved, after the first evaluation whose losses are all at most this
    stop_at_loss: Positive | None = None
    # texts that the model continues at each evaluation, by the most likely token; the first process does it on its CPU
    sample_prompts: Annotated[tuple[Prompt, ...], Field(max_length=16, strict=False)] = ()
    sample_tokens: Annotated[int, Field(gt=0, le=1024)] = 64  # new tokens of each sample, at most

    @model_validator(mode="after")
    def _check(self) -> LogConfig:
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError("'trackers' names one twice")
        if self.sample_prompts and not self.evaluate_every_steps:
            raise ValueError(
                "'sample_prompts' are continued at each evaluation, and there is none: set 'evaluate_every_steps'"
            )
        if self.stop_at_loss is not None and not self.evaluate_every_steps:
            raise ValueError("'stop_at_loss' is of an evaluation, and there is none: set 'evaluate_every_steps'")
        return self

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the later keys at their defaults: a recipe that does not use them has the hash it had before."""
        fields, found = type(self).model_fields, handler(self)
        later = ("trackers", "evaluate_at_start", "stop_at_loss", "sample_prompts", "sample_tokens")
        left_out = {key for key in later if getattr(self, key) == fields[key].default}
        return {key: value for key, value in found.items() if key not in left_out}


class StartFrom(StrictModel):
    """What the first step starts from: another run's newest checkpoint, or the one of a step, all of its state or its
    weights alone; or the weights of a Hugging Face folder.
    """

    run: RunName | None = None  # below the folder that holds the run folders
    folder: Annotated[str, Field(min_length=1, max_length=4096)] | None = None  # path or URL of a run or a checkpoint
    step: Count | None = None  # completed steps of the checkpoint; null: the newest
    revision: RunName | None = None  # of a release in `folder`, such as ckpt_003, in place of a step
    huggingface: Annotated[str, Field(min_length=1, max_length=4096)] | None = None  # a path
    state: Literal["all", "weights"]
    data: Literal["from_start", "continue"] = "from_start"  # continue: after the rows that the other run has read
    # continue: steps are counted on from the checkpoint's, and schedule, chunks and data go on as in one run
    steps: Literal["from_start", "continue"] = "from_start"
    offset: Count = 0  # samples of this recipe's data that are passed over before the first
    # keys of the model in which this run may be larger; the rows that are added are drawn from the seed
    grow: Annotated[tuple[Literal["vocab_size"], ...], Field(strict=False)] = ()
    # keys of the model that may differ, though the same weights then compute something else
    change: Annotated[tuple[ChangeableKey, ...], Field(strict=False)] = ()

    @property
    def source(self) -> str:
        """What it names, for messages."""
        if self.run is None:
            return f"folder '{self.folder or self.huggingface}'"
        return f"run '{self.run}'"

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not given, so that records of earlier versions keep their bytes."""
        tree: dict[str, Any] = handler(self)
        left_out = (("offset", 0), ("steps", "from_start"))
        return {key: value for key, value in tree.items() if value is not None and (key, value) not in left_out}

    @model_validator(mode="after")
    def _check_source(self) -> StartFrom:
        if sum(one is not None for one in (self.run, self.folder, self.huggingface)) != 1:
            raise ValueError("give exactly one of 'run', 'folder' and 'huggingface'")
        if self.revision is not None and (self.folder is None or self.step is not None):
            raise ValueError("a revision is one of the release in 'folder': leave run and step out")
        if self.steps == "continue" and (self.state, self.data, self.huggingface) != ("all", "continue", None):
            raise ValueError("steps: continue goes on with a run's whole state: give state: all and data: continue")
        if self.huggingface is not None and (self.state == "all" or self.data == "continue" or self.step is not None):
            raise ValueError(
                "a Hugging Face folder holds weights alone: give state: weights, and leave data and step out"
            )
        if self.offset and self.data == "continue":
            raise ValueError("data: continue goes on after what the other run has read: leave offset out")
        return self

    @model_validator(mode="after")
    def _check_grow(self) -> StartFrom:
        if self.grow and self.state == "all":
            raise ValueError("grow needs state: weights: rows that are drawn have no optimizer state")
        return self


class Recipe(StrictModel):
    """A whole training run, resolved: every default filled in."""

    name: RunName
    description: str
    seed: Seed
    start_from: StartFrom | None = None
    model: ModelConfig
    tuning: TuningConfig = Field(default_factory=TuningConfig)  # what of the model is trained
    objective: ObjectiveConfig = Field(default_factory=NextTokenObjective)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    precision: PrecisionConfig
    data: DataConfig
    batch: BatchConfig
    kernels: KernelsConfig = Field(default_factory=KernelsConfig)
    backend: BackendConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    evaluations: Annotated[tuple[EvaluationConfig, ...], Field(max_length=100, strict=False)] = ()
    # what changes at which step; a start drops those that it has made
    changes: Annotated[tuple[Change, ...], Field(max_length=MAX_CHANGES, strict=False)] = ()
    alerts: AlertRules = ()  # what in the run's lines of metrics is an alert, and what is done then

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the later sections where they are empty: such a recipe has the hash it had before."""
        later = ("tuning", "evaluations", "changes", "alerts")
        return {key: value for key, value in handler(self).items() if key not in later or value}

    @classmethod
    def from_record(cls, tree: Any) -> Recipe:
        """As a run or checkpoint recorded it. Raises pydantic's ValidationError."""
        return cls.model_validate(with_earlier_keys(tree) if isinstance(tree, Mapping) else tree)

    def at(self, step: int) -> Recipe:
        """The recipe after `step` completed steps: with the changes due by then, and the later ones still planned.

        Where one is due, `data.continues` is left out: how the data goes on is found when the change is made.
        """
        due = [change for change in self.changes if change.step <= step]
        if not due:
            return self
        tree = changed(self.model_dump(mode="json"), due)
        later = [change.model_dump(mode="json") for change in self.changes[len(due) :]]
        return Recipe.model_validate(tree | {"changes": later, "data": tree["data"] | {"continues": None}})

    def stages(self) -> Iterator[tuple[int, int, Recipe]]:
        """The parts of the run between its changes: the first step, the step after the last one, and the recipe."""
        edges = [0, *(change.step for change in self.changes)]
        for number, first in enumerate(edges):
            stage = self.at(first) if number else self
            yield first, edges[number + 1] if number + 1 < len(edges) else stage.schedule.steps, stage

    @property
    def total_tokens(self) -> int:
        """Positions read by the whole run, with its changes."""
        return sum((stop - first) * stage.tokens_per_step for first, stop, stage in self.stages())

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        """Every parameter of the run's state, in execution order, with what `tuning` and `optimizer` make of it."""
        return with_muon(tuned_specs(self.model, self.tuning), self.optimizer.muon)

    @property
    def drops(self) -> bool:
        """Whether training uses dropout, in the model or in adapters."""
        return self.model.dropout > 0 or (self.tuning.lora is not None and self.tuning.lora.dropout > 0)

    @property
    def timeline(self) -> Timeline:
        """Which samples each step reads."""
        return timeline(self.data, self.schedule.steps, self.batch.global_batch_size)

    @property
    def tokens_per_step(self) -> int:
        return self.batch.global_batch_size * self.data.sequence_length

    @model_validator(mode="before")
    @classmethod
    def _freeze_beyond(cls, tree: Any) -> Any:
        return freeze_beyond(tree) if isinstance(tree, Mapping) else tree

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} exceeds "
                f"model.max_position_embeddings {self.model.max_position_embeddings}"
            )
        if self.batch.global_batch_size % self.data.pieces:
            raise ValueError(
                f"batch.global_batch_size {self.batch.global_batch_size} is not a multiple of data.row_length / "
                f"data.sequence_length = {self.data.pieces}: a batch reads whole rows"
            )
        if (tokens := self.schedule.steps * self.tokens_per_step) > MAX_COUNT:
            raise ValueError(
                f"schedule.steps, batch.global_batch_size and data.sequence_length make {tokens:,} tokens: set one "
                "lower"
            )
        if self.data.chunks is not None and self.schedule.steps % self.data.chunks:
            raise ValueError(
                f"schedule.steps {self.schedule.steps} is not a multiple of data.chunks {self.data.chunks}"
            )
        check_objective(
            self.objective,
            global_batch=self.batch.global_batch_size,
            micro_batch=self.batch.micro_batch_size,
            pieces=None if self.data.synthetic_rows is not None else self.data.pieces,
            document_attention=self.data.document_attention,
        )
        rule_of_each(self.parameters, self.tuning.learning_rates)
        if self.model.mup is not None and self.optimizer.muon is not None and self.optimizer.muon.scale != "spectral":
            raise ValueError(
                f"optimizer.muon.scale is {self.optimizer.muon.scale} and model.mup carries rates over to other "
                "widths, which only the scale spectral does: set optimizer.muon.scale=spectral"
            )
        compiled = self.backend.options.get("compile") is True
        check_parts(self.model, self.precision.tensor_parts, self.tuning.lora is not None, compiled)
        sources = None if self.data.synthetic_rows is not None else [source.name for source in self.data.sources]
        check_unlearning(self.objective, sources, self.model.num_layers, self.parameters)
        check_evaluations(self.evaluations, self.checkpoint.every_steps)
        self._check_changes()
        check_rules(self.alerts)
        return self

    def _check_changes(self) -> None:
        """Every recipe that the changes make must hold as one that is written out."""
        tree, before, steps = self.model_dump(mode="json"), 0, self.schedule.steps
        for number, change in enumerate(self.changes):
            where = f"changes.{number}"
            if not before < change.step < steps:
                limits = f"{before + 1}..{steps - 1}"
                raise ValueError(f"{where}: step {change.step} is not in {limits}: give changes in order, one a step")
            try:
                tree = changed(tree, [change]) | {"changes": []}
                stage = Recipe.model_validate(tree)
                steps = stage.schedule.steps
                if stage.tuning != self.tuning:
                    raise ValueError("set: objective rmu freezes what lies behind its layer: begin another run with it")
            except ValidationError as error:
                raise ValueError(f"{where} (step {change.step}): {first_problem(error)}") from None
            except ValueError as error:
                raise ValueError(f"{where} (step {change.step}): {error}") from None
            before = change.step


def with_earlier_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded recipe with the keys that it is older than, where the default of today is not what it did."""
    return {"objective": {"normalizer": "all_positions"}} | dict(tree)
