"""What backends on torch devices have in common: rows to a device, the global norm, the clip coefficient, who they are,
and what they say.

What a reader would get wrong: this is no backend. A function stands here because two backends must give the same bits,
or the same words.
"""

from __future__ import annotations

import math
import platform
import time
import warnings
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from weftrain.core.backend import Batch, BatchSource, Fingerprint, Job, StoredState
from weftrain.core.config import MAX_THREADS, OptimizerConfig, Recipe
from weftrain.core.errors import BackendError, CheckpointError
from weftrain.core.formats.strict_model import StrictModel
from weftrain.core.model import Decoder, rotary_tables
from weftrain.core.optim import ParameterGroup
from weftrain.core.parameters import Role, parameter_specs
from weftrain.core.prediction import Prediction, Speeds
from weftrain.kernels.host_memory import use_huge_pages

FP32_ROLES = (Role.NORM_WEIGHT, Role.NORM_BIAS)  # never copied to bf16: norms compute in fp32
HEAD_USE = "embedding.weight as the head"  # a tied weight's second use; no parameter has such a name
_NAMES_IN_MESSAGE = 16


def torch_device(wanted: str) -> torch.device:
    """'auto', 'cpu' or 'cuda' -> a device. Raises BackendError for cuda where there is none."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            "backend.options.device is cuda and torch sees no CUDA device: install a CUDA build of torch, or set "
            "device=cpu"
        )
    return torch.device(wanted)


def ask_for_huge_pages() -> None:
    """kernels/host_memory.py, and a warning where the system refuses."""
    if reason := use_huge_pages():
        warnings.warn(
            f"no huge pages, so steps are slower: {reason}; backend.options.huge_pages=false asks for none",
            stacklevel=3,
        )


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """ids and labels int64 [B, T] (labels -100 where masked), document_start int32 [B, T] or None."""
    ids = torch.from_numpy(batch.ids).to(device)
    labels = ids[:, 1:].contiguous()
    if batch.loss_mask is not None:
        labels = labels.masked_fill(~torch.from_numpy(batch.loss_mask).to(device), -100)
    document_start = None if batch.document_start is None else torch.from_numpy(batch.document_start).to(device)
    return ids[:, :-1].contiguous(), labels, document_start


_Loss = TypeVar("_Loss", torch.Tensor, float)


@dataclass(frozen=True)
class LossScale:
    """By what the sum of a global batch's token losses is divided. Both numbers are the whole batch's, on every rank,
    before any backward.

    So micro-batches and replicas with different numbers of bearing tokens add up to the large batch's gradient.
    """

    divisor: int  # for the gradient: objective.normalizer
    bearing_tokens: int

    @classmethod
    def of(cls, recipe: Recipe, bearing_tokens: int) -> LossScale:
        return cls(
            bearing_tokens if recipe.objective.normalizer == "bearing_tokens" else recipe.tokens_per_step,
            bearing_tokens,
        )

    def mean(self, loss: _Loss) -> _Loss:
        """The sum of token losses over `divisor` -> over bearing tokens. NaN where there is none: such a step never
        counts as made.
        """
        if self.divisor == self.bearing_tokens:
            return loss  # without a bearing token 0 / 0 made it NaN already
        return loss * (self.divisor / self.bearing_tokens if self.bearing_tokens else math.nan)


def slice_rows(batch: Batch, first: int, count: int) -> Batch:
    """Rows first..first+count-1 of a batch, as views."""
    rows = slice(first, first + count)
    mask, start = batch.loss_mask, batch.document_start
    return Batch(batch.ids[rows], None if mask is None else mask[rows], None if start is None else start[rows])


def present(found: Mapping[str, torch.Tensor | None], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """name -> gradient, in the order of `names`. Raises BackendError for a parameter that the loss did not reach."""
    gradients = {name: found.get(name) for name in names}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    if missing:
        raise BackendError(f"no gradient reached {missing[0]} (of {len(missing)}): a kernel or the model dropped it")
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def global_norm(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of the parameters' gradient norms (0-dim fp32 each), in parameter order: 0-dim fp32.

    As torch.nn.utils.clip_grad_norm_ has it. So a backend that sees one layer at a time computes the bits of one that
    sees all.
    """
    return torch.linalg.vector_norm(torch.stack(list(norms)))


def clip_coefficient(norm: torch.Tensor, clip_norm: float | None) -> torch.Tensor:
    """What each gradient is multiplied by, 0-dim fp32: torch.nn.utils.clip_grad_norm_'s formula, or 1 without
    clipping.
    """
    return torch.ones_like(norm) if clip_norm is None else (clip_norm / (norm + 1e-6)).clamp(max=1.0)


def non_finite_message(
    source: BatchSource,
    step: int,
    losses: Sequence[torch.Tensor],
    norm: float,
    micro_batch_size: int,
    bearing_tokens: int,
) -> str:
    """Why the step did not happen, and which samples were in it. losses: of each micro-batch of the global batch, in
    order.
    """
    happened = f"the step did not happen, weights and optimizer are as after step {step - 1}"
    if not bearing_tokens:
        names = source.sample_names(step, 0, source.global_batch_size)
        return (
            f"step {step}: no token of the global batch bears a loss, so it has neither a loss nor a gradient: "
            f"{happened}; samples: "
            f"{_some(names)}; correct their loss mask, leave them out with data.skip, or set optimizer.non_finite=skip"
        )
    bad = [index for index, loss in enumerate(losses) if not torch.isfinite(loss)] or range(len(losses))
    names = [name for index in bad for name in source.sample_names(step, index * micro_batch_size, micro_batch_size)]
    loss = (
        math.fsum(float(value) for value in losses) if all(torch.isfinite(value) for value in losses) else "not finite"
    )
    return (
        f"step {step}: loss {loss}, gradient norm {norm}: {happened}; samples: {_some(names)}; look at them, lower the "
        "learning rate, "
        "or set optimizer.non_finite=skip"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_IN_MESSAGE} more" if len(names) > _NAMES_IN_MESSAGE else ""
    return ", ".join(names[:_NAMES_IN_MESSAGE]) + more


class TreeSum:
    """The sum of `count` contributions a name, added in a tree that depends on `count` alone: fp32, in the order they
    come.

    count = m 2^k with m odd: runs of m are added one after another, and these sums in a balanced binary tree. So the
    sum in one process is that of 2, 4, .. processes that each have an equal run of contributions and then add in pairs.
    It keeps at most k + 1 partial sums.
    """

    def __init__(self, count: int) -> None:
        self._run = count // (count & -count)
        self._sums: dict[str, list[tuple[int, torch.Tensor]]] = {}  # name -> (contributions, their sum), large to small

    def add(self, name: str, part: torch.Tensor) -> None:
        """The next contribution of `name`; it is kept, and must not be changed."""
        stack = self._sums.setdefault(name, [])
        if stack and stack[-1][0] < self._run:
            count, partial = stack.pop()
            stack.append((count + 1, partial + part))
        else:
            stack.append((1, part.float()))
        while len(stack) > 1 and stack[-1][0] == stack[-2][0] >= self._run:
            (count, right), (_, left) = stack.pop(), stack.pop()
            stack.append((2 * count, left + right))

    def totals(self) -> dict[str, torch.Tensor]:
        """Name -> sum, after the last contribution. Empty where none came."""
        assert all(len(stack) == 1 for stack in self._sums.values())
        return {name: stack[0][1] for name, stack in self._sums.items()}

    def clear(self) -> None:
        self._sums = {}


def tree_sum(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of values as `TreeSum` adds them."""
    tree = TreeSum(len(values))
    for value in values:
        tree.add("", value)
    return tree.totals()[""]


def refuse_numerics(recipe: Recipe, backend: str, reason: str) -> None:
    """For a backend that has no dropout and no reduction in a fixed tree. Raises BackendError for a recipe that asks
    for one.
    """
    if recipe.precision.numerics == "replayable":
        raise BackendError(
            f"precision.numerics is replayable and the {backend} backend {reason}: use the local or cuda backend, or "
            "numerics=fast"
        )
    if recipe.model.dropout:
        raise BackendError(
            f"model.dropout is {recipe.model.dropout} and the {backend} backend has no dropout: use local or cuda, or "
            "dropout=0"
        )


# a group's names, and their compute copies or None
UpdateSets = list[tuple[ParameterGroup, list[str], list[torch.Tensor] | None]]


def bind_parameters(
    model: Decoder, weights: Mapping[str, torch.Tensor], compute_dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, torch.nn.Parameter], dict[str, torch.Tensor]]:
    """Give a model built on `meta` its parameters and rotary tables: the master tensors themselves in fp32 (and for
    norms), compute copies of them otherwise. The parameters in execution order, and which of them are copies.
    """
    parameters: dict[str, torch.nn.Parameter] = {}
    copies: dict[str, torch.Tensor] = {}
    for spec in parameter_specs(model.config):
        master = weights[spec.name]
        shared = compute_dtype == torch.float32 or spec.role in FP32_ROLES
        parameter = parameters[spec.name] = torch.nn.Parameter(master if shared else master.to(compute_dtype))
        if not shared:
            copies[spec.name] = parameter.detach()
        owner, _, attribute = spec.name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, parameter)
    for name, table in zip(("cos", "sin"), rotary_tables(model.config, torch.device("cpu")), strict=True):
        model.register_buffer(name, table.to(device), persistent=False)
    return parameters, copies


def update_sets(
    groups: Sequence[ParameterGroup], copies: Mapping[str, torch.Tensor], held: Container[str] | None = None
) -> UpdateSets:
    """What each call of the op adamw updates: a group's parameters with compute copies, and those without. held: only
    these names.
    """
    sets: UpdateSets = []
    for group in groups:
        names = [name for name in group.parameters if held is None or name in held]
        with_copy = [name for name in names if name in copies]
        without = [name for name in names if name not in copies]
        if with_copy:
            sets.append((group, with_copy, [copies[name] for name in with_copy]))
        if without:
            sets.append((group, without, None))
    return sets


def update(
    adamw: Callable[..., Any],
    sets: UpdateSets,
    planes: Mapping[str, Mapping[str, torch.Tensor]],
    gradients: Mapping[str, torch.Tensor],
    config: OptimizerConfig,
    rates: Mapping[str, float],
    update_index: int,
    gradient_scale: torch.Tensor,
) -> None:
    """One AdamW update of the planes `weights`, `exp_avg` and `exp_avg_sq`, in place. update_index: AdamW's t, from
    1.
    """
    for group, names, copies in sets:
        adamw(
            [planes["weights"][name] for name in names],
            [gradients[name] for name in names],
            [planes["exp_avg"][name] for name in names],
            [planes["exp_avg_sq"][name] for name in names],
            copies,
            learning_rate=rates[group.name],
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
            weight_decay=group.weight_decay,
            update_index=update_index,
            eps_placement=config.eps_placement,
            gradient_scale=gradient_scale,
        )


class PhaseClock:
    """The parts of a step, one after another: each moment belongs to the part that was named last. Off, it does
    nothing.

    On a CUDA device parts are bounded by events in the stream, which cost the host nothing, and are read at the end of
    the step.
    """

    def __init__(self, device: torch.device, on: bool) -> None:
        self._cuda, self._on = device.type == "cuda", on
        self._marks: list[tuple[str, Any]] = []

    def to(self, part: str) -> None:
        """What follows is `part`."""
        if self._on:
            self._marks.append((part, self._mark()))

    def stop(self) -> dict[str, float] | None:
        """Part -> ms since the first mark; None where the clock is off."""
        if not self._on:
            return None
        self.to("")
        if self._cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (part, start), (_, end) in pairwise(self._marks):
            found[part] = found.get(part, 0.0) + (start.elapsed_time(end) if self._cuda else (end - start) * 1e3)
        self._marks = []
        return found

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def call(segment: torch.nn.Module, *arguments: Any) -> torch.Tensor:
    """What torch.compile is given: a module's parameters are then inputs of the graph, and all blocks share one."""
    return segment(*arguments)


def use_threads(job: Job, option: int) -> None:
    """Give torch the CPU threads that the job asks for, or else the backend's option; 0 and None leave torch's own
    choice.

    Raises BackendError for more than any machine has: a replay's come from a fingerprint, which may be a stranger's.
    """
    if threads := job.threads or option:
        if threads > MAX_THREADS:
            raise BackendError(
                f"{threads:,} CPU threads are more than the {MAX_THREADS:,} that a process may have: set "
                "backend.options.threads"
            )
        torch.set_num_threads(threads)


def device_fingerprint(
    backend: str,
    device: torch.device,
    kernels: Mapping[str, Any],
    more: Mapping[str, Any],
    *,
    ranks: int | None = None,
    recomputes: Literal["none", "selective", "full"],
) -> Fingerprint:
    """The fingerprint of a run on a torch device: what of device and libraries can change a bit, and `more` of the
    backend's own.
    """
    cuda = device.type == "cuda"
    libraries = {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
    }
    name = torch.cuda.get_device_name(device) if cuda else platform.machine()
    threads = torch.get_num_threads()
    return Fingerprint(backend, device.type, name, threads, ranks, kernels, {**libraries, **more}, recomputes)


class PlainBackend:
    """The answers of a backend that runs anywhere, keeps no state of its own on disk, and has nothing to say before it
    starts.
    """

    name: str
    portable_options: Set[str] = frozenset()

    def unavailable(self) -> str | None:
        return None

    def stored_state(self, recipe: Recipe, options: StrictModel, folder: Path) -> StoredState | None:
        return None

    def outline(self, recipe: Recipe, options: StrictModel) -> list[str]:
        return []

    def predict(self, recipe: Recipe, options: StrictModel, speeds: Speeds) -> Prediction | None:
        return None

    def largest_micro_batch(
        self, recipe: Recipe, options: StrictModel, speeds: Speeds, capacity_bytes: float
    ) -> int | None:
        return None

    def follows(self) -> bool:
        return False

    def follow(self, read: Callable[[], Job], open_source: Callable[[Job], BatchSource], wait_s: float) -> None:
        raise BackendError(f"the {self.name} backend has no replicas that join: --backend streaming does")

    def nothing_to_lead(self, job: Job) -> None:
        pass


def check_state(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError for a missing, unknown or misshapen tensor; a lazy state's `meta` is asked, and nothing is
    read.
    """
    missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or unknown:
        raise CheckpointError(
            f"state does not fit the model: missing {missing[:3]}, unknown {unknown[:3]}; is it of another recipe?"
        )
    described = getattr(tensors, "meta", tensors.__getitem__)
    for name, shape in shapes.items():
        tensor = described(name)
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            found, wanted = f"{tensor.dtype} {list(tensor.shape)}", f"torch.float32 {list(shape)}"
            raise CheckpointError(f"tensor {name} is {found}, the model's is {wanted}; is it of another recipe?")


class LentTensors(Mapping[str, torch.Tensor]):
    """A run's state, each tensor copied when it is asked for, so that saving it needs no second copy of the model.

    A run that trains on calls `let_go` first: whoever still holds the state then gets all of it as it was.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]) -> None:
        self._shapes, self._read = shapes, read
        self._copies: dict[str, torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._shapes:
            raise KeyError(name)
        return self._read(name) if self._copies is None else self._copies[name]

    def meta(self, name: str) -> torch.Tensor:
        """A tensor of the same dtype and shape without data."""
        return torch.empty(self._shapes[name], dtype=torch.float32, device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def take_copies(self) -> None:
        self._copies = {name: self._read(name) for name in self._shapes}


_Lent = TypeVar("_Lent", bound=LentTensors)


class Lender:
    """Remembers the last state that was lent, as long as somebody holds it."""

    def __init__(self) -> None:
        self._lent: Callable[[], LentTensors | None] = lambda: None

    def lend(self, tensors: _Lent) -> _Lent:
        self.let_go()
        self._lent = weakref.ref(tensors)
        return tensors

    def let_go(self) -> None:
        """The state is about to change."""
        lent = self._lent()
        if lent is not None:
            lent.take_copies()
        self._lent = lambda: None
