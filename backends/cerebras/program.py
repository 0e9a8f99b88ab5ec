"""The training script for the vendor's package. It runs in that package's environment only; the same script serves its
CPU backend, its compiler and its systems.

What a reader would get wrong: on a system `step` is traced once and never runs in Python. So it has no condition on a
value, its loss is the global batch's, which is traced at the global batch size however many systems share it, and what
is to be seen comes out of a closure.
"""

from __future__ import annotations

import itertools
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weftrain.backends.cerebras.job import WorkerJob, save_state
from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.config import Recipe, Segment
from weftrain.core.data import training_source
from weftrain.core.errors import BackendError, DataError, NonFiniteError
from weftrain.core.initialization import draw
from weftrain.core.model import Decoder, kernel_specs
from weftrain.core.model_config import ModelConfig
from weftrain.core.optim import beta_power, parameter_groups
from weftrain.core.order.batch import Batch, BatchSource
from weftrain.core.parameters import parameter_specs
from weftrain.kernels import Selection, reference
from weftrain.kernels.host_memory import peak_resident_bytes

Send = Callable[..., None]
IGNORED_LABEL = -100


def run(job_line: str, commands: Iterator[Mapping[str, Any]], send: Send) -> None:
    """Run one job: build the program, then answer commands until standard input ends."""
    job = WorkerJob.model_validate_json(job_line)
    send("phase", name="loading the vendor's package")
    try:
        import cerebras.pytorch as cstorch
    except ImportError as error:
        raise BackendError(
            f"{sys.executable}: cerebras-pytorch cannot be imported ({error}): run `weftrain backends setup cerebras`, "
            "or correct WEFTRAIN_CEREBRAS_PYTHON"
        ) from error

    if cstorch.__version__ != job.vendor_version:
        raise BackendError(
            f"this environment has cerebras-pytorch {cstorch.__version__}, but {job.vendor_version} is required: "
            "set it up again"
        )
    program = Program(job, cstorch, send)
    send("ready", vendor=cstorch.__version__, torch=torch.__version__, parameters=program.parameter_names)
    if job.mode != "train":
        program.lower()
        return
    for command in commands:
        name = command["command"]
        if name == "train":
            program.train(command)
        elif name == "evaluate":
            program.evaluate(command)
        elif name == "export":
            program.export(Path(command["path"]))
        elif name == "import":
            program.restore(Path(command["path"]))
        else:
            raise BackendError(f"unknown command '{name}'")


def traced_model(recipe: Recipe) -> ModelConfig:
    """The recipe's model with rotary tables that end at the first power of two which holds a sequence.

    The tables are state of the step and go to the system with it: those of 131,072 positions have 34 MB each.
    """
    needed = 1 << (recipe.data.sequence_length - 1).bit_length()
    positions = min(recipe.model.max_position_embeddings, needed)
    return recipe.model.model_copy(update={"max_position_embeddings": positions})


class Program:
    """Model, optimizer and schedule of a recipe on one of the vendor's backends."""

    def __init__(self, job: WorkerJob, cstorch: Any, send: Send) -> None:
        self.job, self.cs, self.send = job, cstorch, send
        recipe = self.recipe = job.recipe
        if recipe.precision.compute == "bfloat16":
            cstorch.amp.set_half_dtype("bfloat16")
        else:
            # Once a process and before the backend does so, which would install the casts of a system.
            cstorch.amp._amp_state.handle = cstorch.amp.init(enabled=False)
        self.backend = self._backend()
        send("phase", name="building the model")
        specs = kernel_specs(recipe.model, "csx", torch.float32)
        selection = Selection({(spec.op, spec.module): getattr(reference, spec.op) for spec in specs}, {})
        with self.backend.device:
            self.model = Decoder(traced_model(recipe), selection, residual_dtype=torch.float32)
            if job.mode == "train":
                self._initialize()
        self.compiled = cstorch.compile(self.model, self.backend)
        self.optimizer = self._optimizer()
        self.scheduler = self._scheduler()
        self.parameter_names = [
            name for group in parameter_groups(recipe.model, recipe.optimizer) for name in group.parameters
        ]
        self.step_count = self.skipped = 0
        self._handed_out_at = 0.0
        self._executor: Any = None

    def _backend(self) -> Any:
        job, cs = self.job, self.cs
        if job.target == "cpu":
            return cs.backend("CPU", artifact_dir=job.artifacts)
        batch = self.recipe.batch
        cs.backends.csx.precision.optimization_level = job.precision_level
        cs.backends.csx.performance.micro_batch_size = batch.micro_batch_size if job.micro_batch == "recipe" else "auto"
        cluster = cs.distributed.ClusterConfig(
            num_csx=batch.replicas,
            num_workers_per_csx=1,  # so that a streamer's rank tells which rows of a batch it reads
            mgmt_address=job.management_address,
            mgmt_namespace=job.management_namespace,
            credentials_path=job.credentials_path,
            python_paths=list(job.python_paths),
        )
        stop = {"validate": {"validate_only": True}, "compile": {"compile_only": True}, "train": {}}[job.mode]
        return cs.backend("CSX", artifact_dir=job.artifacts, cluster_config=cluster, **stop)

    @torch.no_grad()
    def _initialize(self) -> None:
        named = dict(self.model.named_parameters())
        for spec in parameter_specs(self.recipe.model):
            named[spec.name].copy_(draw(spec, self.recipe.model, self.recipe.seed))

    def _optimizer(self) -> Any:
        config = self.recipe.optimizer
        named = dict(self.model.named_parameters())
        groups = [
            {
                "params": [named[name] for name in group.parameters],
                "weight_decay": group.weight_decay,
                "adjust_learning_rate": group.learning_rate_multiplier,
            }
            for group in parameter_groups(self.recipe.model, config)
        ]
        kind = (
            self.cs.optim.AdamW
            if config.eps_placement == "before_bias_correction"
            else _adamw_after_correction(self.cs)
        )
        return kind(groups, lr=1.0, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=0.0)

    def _scheduler(self) -> Any:
        lr_scheduler, optimizer = self.cs.optim.lr_scheduler, self.optimizer
        segments = self.recipe.schedule.learning_rate

        def piece(segment: Segment) -> Any:
            if segment.end is None:
                return lr_scheduler.ConstantLR(optimizer, segment.start, segment.steps)
            kind = lr_scheduler.CosineDecayLR if segment.shape == "cosine" else lr_scheduler.LinearLR
            return kind(optimizer, segment.start, segment.end, segment.steps)

        pieces = [piece(segment) for segment in segments]
        whole = pieces[0]
        if len(pieces) > 1:
            milestones = [sum(segment.steps for segment in segments[:count]) for count in range(1, len(segments))]
            whole = lr_scheduler.SequentialLR(optimizer, pieces, milestones)
        return lr_scheduler.ScalePerParamLR(optimizer, whole)

    def step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """ids, labels int32 [global batch, T] -> mean loss and gradient norm before clipping. Traced on a system."""
        ids, labels = batch
        loss = self.compiled(ids.long(), labels.long()) / self.recipe.tokens_per_step
        if self.job.target == "cpu" and not math.isfinite(loss.item()):
            raise NonFiniteError(f"the loss is {loss.item()}")
        loss.backward()
        clip = self.recipe.optimizer.clip_norm
        with self.cs.name_scope("clip"):
            norm = torch.nn.utils.clip_grad_norm_(list(self.model.parameters()), math.inf if clip is None else clip)
        with self.cs.name_scope("update"):
            self.optimizer.step()
        with self.cs.name_scope("schedule"):
            self.scheduler.step()
        self.optimizer.zero_grad()
        return loss, norm

    def lower(self) -> None:
        """Trace one step and have it lowered (`validate`), or compiled as well (`compile`)."""
        recipe = self.recipe
        shape = (recipe.batch.global_batch_size, recipe.data.sequence_length)
        loader = self.cs.utils.data.DataLoader(_zeros, shape)
        self.send("phase", name="tracing and lowering the step")
        start = time.perf_counter()
        traced = self.cs.trace(self.step)
        for batch in self.cs.utils.data.DataExecutor(loader, num_steps=1):
            self._hand_out(*traced(batch))
        self.send(
            "lowered" if self.job.mode == "validate" else "compiled",
            seconds=time.perf_counter() - start,
            peak_bytes=_peak_bytes(),
        )

    def _hand_out(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Report loss and gradient norm from the traced step, at the steps that were requested."""

        @self.cs.step_closure  # type: ignore[untyped-decorator]
        def report(loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
            if self.job.mode == "train":
                now = time.perf_counter()
                milliseconds, self._handed_out_at = (now - self._handed_out_at) * 1e3, now
                step = self.step_count + self._executor.iteration
                self.send("step", step=step, loss=float(loss), grad_norm=float(grad_norm), step_ms=milliseconds)

        report(loss, norm)

    def train(self, command: Mapping[str, Any]) -> None:
        """Train `count` steps from the current state. Loss and norm of each `every`-th step and of the last are
        events.
        """
        data = self.cs.utils.data
        loader = data.DataLoader(training_rows, self.recipe.model_dump_json(), command["dataset_id"], self.step_count)
        self._executor = data.DataExecutor(
            loader, num_steps=command["count"], activation_steps=command["every"], checkpoint_steps=0
        )
        traced = self.cs.trace(self.step)
        self._handed_out_at = time.perf_counter()
        for batch in self._executor:
            self._hand_out(*traced(batch))
        self.step_count += command["count"]
        self.send("trained")

    @torch.no_grad()
    def evaluate(self, command: Mapping[str, Any]) -> None:
        """Mean loss over the tokens of the rows in a folder: ids int64 [rows, T + 1] and mask bool [rows, T]."""
        if self.job.target != "cpu":
            raise BackendError(
                "evaluation on a system needs a separate trace, which is not implemented: run `weftrain eval RUN "
                "--backend local`"
            )
        rows, _ = checkpoint.load(Path(command["path"]))
        ids, mask = (rows.tensors[name].numpy() for name in ("ids", "mask"))
        size, total = self.recipe.batch.micro_batch_size, 0.0
        for first in range(0, len(ids), size):
            inputs, labels = to_inputs(Batch(ids[first : first + size], mask[first : first + size]))
            total += float(self.model(inputs.long(), labels.long()))
        self.send("evaluated", loss=total / int(mask.sum()), tokens=int(mask.sum()))

    def export(self, path: Path) -> None:
        """Write the state as a checkpoint folder. On a system the vendor's package fetches each tensor as it is
        read.
        """
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            tensors |= {
                f"weights/{name}": parameter,
                f"exp_avg/{name}": state["exp_avg"],
                f"exp_avg_sq/{name}": state["exp_avg_sq"],
            }
        held = {name: tensor.detach().to("cpu") for name, tensor in tensors.items()}
        saved = save_state(path, State(self.step_count, self.step_count - self.skipped, held))
        self.send("exported", path=str(saved))

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Load the state from such a folder, and set the schedule and the bias correction to its step."""
        state, _ = checkpoint.load(path)
        config = self.recipe.optimizer
        for name, parameter in self.model.named_parameters():
            held = self.optimizer.state[parameter]
            parameter.copy_(state.tensors[f"weights/{name}"])
            for plane in ("exp_avg", "exp_avg_sq"):
                held[plane].copy_(state.tensors[f"{plane}/{name}"])
            # The vendor's optimizer keeps beta^t of the next update.
            for power, beta in (("beta1_power", config.beta1), ("beta2_power", config.beta2)):
                held[power].fill_(float(beta_power(beta, state.optimizer_updates)))
        self.step_count, self.skipped = state.step, state.step - state.optimizer_updates
        self._set_schedule(state.step)
        self.send("imported")

    def _set_schedule(self, step: int) -> None:
        """Set the schedule to just before 0-based step `step`."""
        self.scheduler.last_epoch.fill_(step)
        whole = self.scheduler._scheduler_nested
        whole.last_epoch.fill_(step)
        first = 0
        for piece, segment in zip(getattr(whole, "_schedulers", ()), self.recipe.schedule.learning_rate, strict=False):
            piece.last_epoch.fill_(step if first == 0 else max(0, step - first))
            first += segment.steps
        if self.job.target == "cpu":
            self.scheduler.update_last_value()


def _peak_bytes() -> int:
    """Peak resident bytes of this process or of the compiler that it started, whichever is larger."""
    return max(peak_resident_bytes(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10)


def _zeros(shape: tuple[int, int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One batch of the right shape in the memory of one row, because tracing never reads its values."""
    return [
        (
            torch.zeros(1, shape[1], dtype=torch.int32).expand(shape),
            torch.zeros(1, shape[1], dtype=torch.int32).expand(shape),
        )
    ]


def to_inputs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 ids and labels [rows, T], as the vendor's loader takes them; a label that bears no loss is -100."""
    labels = batch.ids[:, 1:].copy()
    if batch.loss_mask is not None:
        labels[~batch.loss_mask] = IGNORED_LABEL
    return torch.from_numpy(batch.ids[:, :-1].astype(np.int32)), torch.from_numpy(labels.astype(np.int32))


def check_mask(batch: Batch, step: int, divides_by_positions: bool) -> None:
    """Raises BackendError for rows with a loss mask if the recipe divides the loss by bearing tokens."""
    if not divides_by_positions and batch.bearing_tokens != batch.ids[:, 1:].size:
        raise BackendError(
            f"step {step}: objective.normalizer is bearing_tokens, but rows of this step have a loss mask, and the "
            "traced step divides by a constant number of positions: set objective.normalizer=all_positions, or use "
            "another backend"
        )


class _TrainingRows(torch.utils.data.IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Batches from step `first` on: all rows on the user's node, and this task's share of them on an input worker.

    Raises BackendError for a loss mask that the traced step's divisor does not follow, NonFiniteError for a batch in
    which no token bears a loss.
    """

    def __init__(self, source: BatchSource, first: int, divides_by_positions: bool) -> None:
        self.source, self.first, self.divides_by_positions = source, first, divides_by_positions

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        import cerebras.pytorch as cstorch

        rows = cstorch.distributed.get_streaming_batch_size(self.source.global_batch_size)
        offset = cstorch.distributed.get_streaming_rank() * rows if cstorch.distributed.is_streamer() else 0
        for step in itertools.count(self.first):
            batch = self.source.rows(step, offset if rows < self.source.global_batch_size else 0, rows)
            check_mask(batch, step, self.divides_by_positions)
            if rows == self.source.global_batch_size and not batch.bearing_tokens:
                raise NonFiniteError("no token of the global batch bears a loss")
            yield to_inputs(batch)


def training_rows(recipe: str, dataset_id: str, first: int) -> Any:
    """The vendor's `input_fn`: a torch DataLoader over the recipe's order. Raises DataError if the data here is not the
    job's.
    """
    checked = Recipe.model_validate_json(recipe)
    source = training_source(checked)
    if source.dataset_id != dataset_id:
        raise DataError(
            f"the recipe's data here is {source.dataset_id}, the job's is {dataset_id}: point data.root at the same "
            "datasets"
        )
    rows = _TrainingRows(source, first, checked.objective.divides_by_positions)
    return torch.utils.data.DataLoader(rows, batch_size=None)


def _adamw_after_correction(cstorch: Any) -> Any:
    """The vendor's AdamW with torch's placement of epsilon, traceable. The vendor's own has only the other
    placement.
    """

    class AdamWAfterCorrection(cstorch.optim.AdamW):  # type: ignore[misc]
        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            for group in self.param_groups:
                beta1, beta2 = group["betas"]
                for parameter in group["params"]:
                    gradient, state = parameter.grad, self.state[parameter]
                    state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
                    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                    one = torch.tensor(1.0, dtype=torch.float32, device=parameter.device)
                    corrected = state["exp_avg_sq"].sqrt() / torch.sqrt(one - state["beta2_power"])
                    update = state["exp_avg"] / corrected.add_(group["eps"]) / (one - state["beta1_power"])
                    state["beta1_power"] *= beta1
                    state["beta2_power"] *= beta2
                    update.add_(parameter * group["weight_decay"])
                    update *= group["lr"]
                    parameter.sub_(update)

    return AdamWAfterCorrection
