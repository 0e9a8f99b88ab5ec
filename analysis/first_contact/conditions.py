"""Where a check runs, and the small training runs that several checks compare."""

from __future__ import annotations

import hashlib
import math
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weftrain.analysis.bench.train import bench_source
from weftrain.core.backend import Backend, Job, Plan, Run
from weftrain.core.config import Recipe
from weftrain.core.model_config import ModelConfig
from weftrain.core.parameters import Role, parameter_specs
from weftrain.core.recipe_file import load_recipe

SCRATCH = "scratch"
TINY = (  # what a dry run makes of any demo or 7B model: width 48, seconds on one core
    "model.num_layers=2",
    "model.hidden_size=48",
    "model.num_heads=3",
    "model.intermediate_size=70",
    "model.vocab_size=512",
    "model.max_position_embeddings=64",
    "data.sequence_length=32",
    "kernels.preferences=[reference]",
)
_ROTARY = {
    "crystal_demo": ("model.rotary_dim=4", "model.mup.base_hidden_size=16"),
    "amber_demo": ("model.rotary_dim=16",),
}
NO_DATA = ("data.sources=[]", "data.chunks=null", "log.evaluate_every_steps=0", "checkpoint.every_steps=0")


@dataclass(frozen=True)
class Conditions:
    """backend: gives a backend by name, or raises BackendError. dry: on the CPU, at sizes that take seconds, to try the
    program itself.
    """

    folder: Path
    backend: Callable[[str], Backend]
    dry: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def scratch(self) -> Path:
        """A new folder, removed with the others when all checks are done."""
        (self.folder / SCRATCH).mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=self.folder / SCRATCH))

    def order(self, first: str) -> tuple[str, ...]:
        """kernels.preferences that begin with a source; dry, the one that compiles nothing."""
        return ("reference",) if self.dry else tuple(dict.fromkeys((first, "triton", "torch", "reference")))


def small_recipe(conditions: Conditions, name: str = "amber_demo", *overrides: str) -> Recipe:
    """A demo of 7 million parameters or less on random rows, eight of them a step in two micro-batches."""
    tiny = (*TINY, *_ROTARY[name]) if conditions.dry else ()
    size = ("data.synthetic_rows=32", "schedule.steps=1000", "batch.global_batch_size=8", "batch.micro_batch_size=4")
    return load_recipe(name, (*NO_DATA, *size, *tiny, *overrides)).recipe


def with_order(recipe: Recipe, order: Sequence[str]) -> Recipe:
    """The recipe with other kernels.preferences and no pins."""
    kernels = recipe.kernels.model_copy(update={"preferences": tuple(order), "pins": {}})
    return recipe.model_copy(update={"kernels": kernels})


def start(
    conditions: Conditions,
    backend: str,
    recipe: Recipe,
    last_step: int,
    first_step: int = 0,
    weights: Mapping[str, torch.Tensor] | None = None,
    **options: Any,
) -> Run:
    """A run of a backend on the device of the conditions, or on that of the options."""
    found = conditions.backend(backend)
    threads = {"threads": 1} if conditions.dry else {}  # two that wait for each other take longer on busy cores
    wanted = found.options.model_validate({"device": conditions.device, **threads, **options})
    job = Job(recipe, Plan(first_step, last_step), wanted, weights, folder=conditions.scratch())
    return found.prepare(job)


def losses(conditions: Conditions, backend: str, recipe: Recipe, steps: int, **options: Any) -> list[float]:
    """The loss of each of `steps` steps from the recipe's own first weights, on fixed random rows."""
    run = start(conditions, backend, recipe, steps, **options)
    try:
        return [float(result.loss) for result in run.train(bench_source(recipe))]
    finally:
        run.close()


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """Of every bit of a state."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode())
        found.update(state[name].contiguous().view(-1).numpy().tobytes())
    return found.hexdigest()[:16]


def apart(found: Sequence[float], wanted: Sequence[float]) -> float:
    """The largest relative difference of two lists of losses; infinite where one is not finite."""
    pairs = zip(found, wanted, strict=True)
    return max(abs(one - other) / abs(other) if math.isfinite(one) else math.inf for one, other in pairs)


class DrawnOnTheDevice(Mapping[str, torch.Tensor]):
    """First weights for timing: normal numbers drawn on the device, a tensor at a time. The recipe's own draw takes
    minutes of one core for 7 billion parameters.
    """

    def __init__(self, config: ModelConfig, device: str) -> None:
        self._specs = {spec.name: spec for spec in parameter_specs(config)}
        self._device = device

    def __getitem__(self, name: str) -> torch.Tensor:
        spec = self._specs[name]
        if spec.role is Role.NORM_WEIGHT:
            return torch.ones(spec.shape, device=self._device)
        if spec.role in (Role.NORM_BIAS, Role.BIAS):
            return torch.zeros(spec.shape, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return torch.randn(spec.shape, generator=generator, device=self._device) * 0.02

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)
