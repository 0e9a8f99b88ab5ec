"""The Cerebras backend: the recipe's whole step for the vendor's compiler, in the vendor's own environment.

It has three levels. *Lower* runs the compiler's front end without a cluster (`weftrain lower`, lowered/lowering.py),
here and in CI. *Compile* and *train* on a system are written to the vendor's API and were run only as far as is
possible without a cluster. `target: cpu` runs the same training script on the vendor's CPU backend in fp32: it shows
that the script trains, and nothing about speed.

Weights and optimizer state live in another process, and on a system on other machines. State can be read only at the
steps that the plan names before the first step.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator

from weftrain.backends.cerebras import environment
from weftrain.backends.cerebras.job import WorkerJob, save_state
from weftrain.backends.cerebras.process import ROOT, WorkerProcess
from weftrain.backends.cerebras.program import check_mask
from weftrain.backends.common.base import PlainBackend, options_of
from weftrain.backends.common.state_snapshot import check_state
from weftrain.backends.common.step import LossScale
from weftrain.core import checkpoint as checkpoints  # this package has a module of that name
from weftrain.core.backend import EvalResult, Fingerprint, Job, Plan, State, StepResult
from weftrain.core.config import Recipe
from weftrain.core.data import training_source
from weftrain.core.errors import BackendError, NonFiniteError
from weftrain.core.formats import fsops
from weftrain.core.formats.plain_file import real_path
from weftrain.core.formats.strict_model import PositiveInt, StrictModel
from weftrain.core.model import kernel_specs
from weftrain.core.optim import group_learning_rates, parameter_groups
from weftrain.core.order.batch import Batch, BatchSource, EvaluationSource
from weftrain.core.parameters import parameter_specs
from weftrain.core.prediction import Prediction, Speeds
from weftrain.core.run.prepare import refuse_unsupported
from weftrain.kernels import select

NOT_RUN = "written to the vendor's API and never run on a system"


class CerebrasOptions(StrictModel):
    """backend.options of `cerebras`."""

    target: Literal["csx", "cpu"] = "csx"  # cpu: the vendor's CPU backend, fp32, a test of the training script
    execution_strategy: Literal["weight_streaming"] = "weight_streaming"  # the only one that release 2.10 has
    micro_batch: Literal["recipe", "auto"] = "recipe"  # auto: the cluster's compiler chooses
    precision_level: Annotated[int, Field(ge=0, le=2)] = 1  # the vendor's precision_opt_level
    silence_s: PositiveInt = 600  # seconds without a message after which the worker is ended
    management_address: str | None = None  # of the cluster; null: from the vendor's configuration file
    management_namespace: str | None = None  # of the cluster; null: from the vendor's configuration file
    credentials_path: str | None = (
        None  # file with the cluster's TLS certificate; null: from the vendor's configuration
    )
    activation_checkpointing: str = "none"  # only none: the compiler decides what is recomputed

    @field_validator("activation_checkpointing")
    @classmethod
    def _none(cls, value: str) -> str:
        if value != "none":
            raise ValueError(
                "torch.utils.checkpoint cannot be traced, and the compiler decides what is recomputed: leave it out"
            )
        return value


def check_expressible(recipe: Recipe, options: CerebrasOptions) -> None:
    """Raises BackendError, naming the key and the remedy, for a recipe that the vendor's package cannot run."""
    for key, source in recipe.kernels.pins.items():
        if source != "reference":
            raise BackendError(
                f"kernels.pins '{key}' = '{source}': the compiler traces the reference ops, and no other source exists "
                "on a system: remove the pin"
            )
    refuse_unsupported(BACKEND.name, BACKEND.unsupported, recipe)
    if "reference" not in recipe.kernels.preferences:
        raise BackendError(
            "kernels.preferences: the compiler traces the reference ops, which are not among them: add 'reference'"
        )
    if recipe.data.document_attention:
        raise BackendError(
            "data.document_attention: the training script passes ids and labels, and no document boundaries: set it to "
            "false"
        )
    if recipe.optimizer.non_finite == "skip":
        raise BackendError(
            "optimizer.non_finite: a traced step cannot be skipped because of its own result: set it to halt"
        )
    vendors = ("linear", "cosine", "constant")
    if other := next((one.shape for one in recipe.schedule.learning_rate if one.shape not in vendors), None):
        raise BackendError(
            f"schedule.learning_rate: the vendor's package has no schedule of shape {other}: use {', '.join(vendors)}"
        )
    if options.target == "cpu":
        if recipe.precision.compute != "float32":
            raise BackendError(
                "the vendor's CPU backend casts nothing: set precision.compute=float32 with backend.options.target=cpu"
            )
        if recipe.batch.replicas != 1:
            raise BackendError(
                f"batch.replicas is {recipe.batch.replicas} and the vendor's CPU backend is one process: set "
                "batch.replicas=1"
            )


def worker_job(
    recipe: Recipe, options: CerebrasOptions, mode: Literal["validate", "compile", "train"]
) -> Callable[[Path], WorkerJob]:
    """Makes the worker's job from the folder it is to work in. Raises BackendError for a recipe that cannot run."""
    check_expressible(recipe, options)
    root = str(real_path(recipe.data.root))  # the worker is started elsewhere
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": root})})

    def in_folder(folder: Path) -> WorkerJob:
        return WorkerJob(
            mode=mode,
            target=options.target,
            recipe=recipe,
            artifacts=str(real_path(folder)),
            vendor_version=environment.pinned("cerebras-pytorch"),
            micro_batch=options.micro_batch,
            precision_level=options.precision_level,
            management_address=options.management_address,
            management_namespace=options.management_namespace,
            credentials_path=options.credentials_path,
            python_paths=(str(ROOT.parent),),
        )

    return in_folder


class CerebrasRun:
    """A run whose state lives in the worker process. See Run in core/backend.py."""

    def __init__(self, job: Job, options: CerebrasOptions) -> None:
        self._recipe, self._plan, self._options = job.recipe, job.plan, options
        self._groups = parameter_groups(job.recipe.model, job.recipe.optimizer, job.recipe.tuning)
        self._shapes = {
            f"{plane}/{spec.name}": spec.shape
            for spec in parameter_specs(job.recipe.model)
            for plane in ("weights", "exp_avg", "exp_avg_sq")
        }
        specs = kernel_specs(job.recipe.model, "csx", torch.float32)
        self._kernels = select(specs, ["reference"]).manifest
        self._scratch = tempfile.TemporaryDirectory(prefix="weftrain-cerebras-")
        # the worker is started in it
        folder = Path(self._scratch.name) if job.folder is None else real_path(job.folder) / "cerebras"
        if folder.exists():
            fsops.remove_tree(folder)  # of an earlier process: its executors' artifacts; state is in checkpoints
        self._folder, self._step, self._busy = folder, job.plan.start_step, False
        job.progress("starting the worker", 0.0)
        self._worker = WorkerProcess(worker_job(job.recipe, options, "train")(folder), options.silence_s)
        ready = [event for event in self._worker.events() if event["event"] == "ready"][-1]
        self._versions = {"vendor": ready["vendor"], "torch": ready["torch"]}
        if job.weights is not None:
            zeros = {name: torch.zeros(shape) for name, shape in self._shapes.items()}
            weights = {f"weights/{name}": tensor for name, tensor in job.weights.items()}
            self.import_state(State(job.plan.start_step, 0, {**zeros, **weights}))

    def train(self, source: BatchSource) -> Iterator[StepResult]:
        """See Run.train. On a system there are results only for the steps that the plan logs, each with the tokens
        since the one before.

        The worker, or on a system the cluster's input workers, read the rows from the recipe's own data. Raises
        BackendError for a source that is not the recipe's.
        """
        recipe, plan = self._recipe, self._plan
        wanted = training_source(recipe).dataset_id
        if source.dataset_id != wanted:
            raise BackendError(
                f"the worker reads the recipe's data ({wanted[:16]}), but the source is other data "
                f"({source.dataset_id[:16]})"
            )
        if self._step < plan.last_step:  # later rows are checked where they are read
            rows = source.rows(self._step, 0, recipe.batch.global_batch_size)
            check_mask(rows, self._step, recipe.objective.divides_by_positions)
        every = 1 if self._options.target == "cpu" else plan.log_every_steps
        while self._step < plan.last_step:
            first, seen = self._step, self._step
            count = 1 if self._options.target == "cpu" else _next_look(plan, first) - first
            self._busy = True
            for event in self._worker_events(
                "train", source, first, count=count, every=min(every, count), dataset_id=wanted
            ):
                if event["event"] != "step":
                    break
                completed = event["step"] + 1
                rates = group_learning_rates(self._groups, recipe.schedule, event["step"])
                read = source.rows(event["step"], 0, recipe.batch.global_batch_size)
                loss, bearing = LossScale.of(recipe, read.bearing_tokens).mean(event["loss"]), read.bearing_tokens
                if not np.isfinite([loss, event["grad_norm"]]).all():
                    why = "" if bearing else " (no token of the global batch bears a loss)"
                    raise NonFiniteError(
                        f"step {event['step']}: loss {loss}{why}, gradient norm {event['grad_norm']}: a system makes "
                        "the update before the loss can be checked: go back to the newest checkpoint"
                    )
                self._step = completed
                self._busy = completed < first + count
                tokens = (completed - seen) * recipe.tokens_per_step
                seen = completed
                if not self._busy:
                    self._finish()
                yield StepResult(event["step"], loss, event["grad_norm"], rates, tokens, bearing, event["step_ms"], 0.0)
                if not self._busy:
                    break

    def _worker_events(self, command: str, source: BatchSource, step: int, **fields: Any) -> Iterator[dict[str, Any]]:
        try:
            yield from self._worker.ask(command, **fields)
        except NonFiniteError as error:
            names = source.sample_names(step, 0, self._recipe.batch.global_batch_size)
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise NonFiniteError(f"step {step}: {error}; the step did not happen; its samples: {shown}") from None

    def _finish(self) -> None:
        """Read the event that ends a command whose last step has been yielded."""
        for _ in self._worker.events():
            pass

    def gradients(self, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
        raise BackendError(
            "a system gives no gradients: use another backend for them (--backend local), or read them from the "
            "first moments of a checkpoint after one step: exp_avg is (1 - beta1) times the clipped gradient"
        )

    def evaluate(self, source: EvaluationSource) -> EvalResult:
        self._check_idle("evaluate")
        batch = source.rows(0, source.num_rows)
        mask = (
            np.ones((source.num_rows, source.sequence_length), dtype=np.bool_)
            if batch.loss_mask is None
            else batch.loss_mask
        )
        folder = self._folder / "rows"
        tensors = {"ids": torch.from_numpy(batch.ids), "mask": torch.from_numpy(mask)}
        event = self._worker.one("evaluate", path=str(save_state(folder, State(0, 0, tensors))))
        fsops.remove_tree(folder)
        return EvalResult(event["loss"], event["tokens"])

    def export_state(self) -> State:
        """See Run.export_state. Tensors are read lazily from the worker's files, which exist until the next export."""
        self._check_idle("export state")
        folder = self._folder / "state"
        fsops.remove_tree(folder)
        state, _ = checkpoints.load(Path(self._worker.one("export", path=str(folder))["path"]))
        return state

    def import_state(self, state: State) -> None:
        check_state(state.tensors, self._shapes)
        self._check_idle("import state")
        folder = self._folder / "import"
        self._worker.one("import", path=str(save_state(folder, state)))
        fsops.remove_tree(folder)
        self._step = state.step

    def fingerprint(self) -> Fingerprint:
        more = {
            "target": self._options.target,
            **self._versions,
            "compute": self._recipe.precision.compute,
            "precision_level": self._options.precision_level,
            "replicas": self._recipe.batch.replicas,
        }
        if self._options.target == "cpu":  # in the worker's process, whose threads are not ours to set
            return Fingerprint("cerebras", "cpu", platform.machine(), kernels=self._kernels, more=more)
        return Fingerprint("cerebras", "csx", "Cerebras system", kernels=self._kernels, more=more)

    def stats(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._worker.close()
        self._scratch.cleanup()

    def _check_idle(self, what: str) -> None:
        if self._busy:
            raise BackendError(
                f"step {self._step}: a system can {what} only at the planned steps (checkpoint.every_steps, "
                "log.evaluate_every_steps, the last): do it there"
            )


def _next_look(plan: Plan, step: int) -> int:
    """The next number of completed steps at which state or an evaluation is wanted."""
    for done in range(step + 1, plan.last_step + 1):
        if plan.wants_state(done) or plan.wants_evaluation(done) or plan.wants_scores(done):
            return done
    return plan.last_step


class CerebrasBackend(PlainBackend):
    name = "cerebras"
    summary = "the vendor's compiler and systems, in an environment of their own; `weftrain lower` needs no cluster"
    options = CerebrasOptions
    portable_options = frozenset(
        {"target", "execution_strategy", "micro_batch", "precision_level", "activation_checkpointing"}
    )
    returns_gradients = False  # a system exports state, and at planned steps only
    unsupported = frozenset(
        {
            "dropout",
            "experts",
            "replayable",
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
        }
    )

    def unavailable(self) -> str | None:
        return environment.missing()

    def prepare(self, job: Job) -> CerebrasRun:
        """Raises BackendError for a recipe that cannot run there, or if no cluster is reached."""
        options = options_of(job, CerebrasOptions)
        check_expressible(job.recipe, options)
        if options.target == "csx" and (job.plan.evaluate_every_steps or job.plan.evaluate_at_start):
            raise BackendError(
                "log.evaluate_every_steps: evaluation on a system needs a separate trace, which is not implemented: "
                "set it to 0 and run `weftrain eval RUN --backend local` on the checkpoints"
            )
        return CerebrasRun(job, options)

    def outline(self, recipe: Recipe, options: StrictModel) -> list[str]:
        return [
            f"cerebras     `weftrain lower {recipe.name}` lowers this step with the vendor's compiler and reports the "
            "result"
        ]

    def predict(self, recipe: Recipe, options: StrictModel, speeds: Speeds) -> Prediction:
        raise BackendError("the cerebras backend predicts nothing: run `weftrain lower` to learn more")


BACKEND = CerebrasBackend()
