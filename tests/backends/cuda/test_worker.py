"""A rank above 0 ends when rank 0 does, goes on after errors that every rank was told, and reports its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from weftrain.backends.cuda import worker
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.worker import RankWorker
from weftrain.backends.cuda.world import World
from weftrain.core.backend import Job, Plan
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError, NonFiniteError
from weftrain.core.stop import StopRequest


class Scripted(World):
    """Receives these commands from nobody."""

    def __init__(self, *commands: dict[str, Any]) -> None:
        super().__init__(torch.device("cpu"), dist.HashStore(), 1, 2, 1.0, StopRequest())
        self.commands = iter(commands)

    def next_command(self) -> dict[str, Any]:
        return next(self.commands)


class Steps:
    """A run whose steps raise this."""

    step_number, number = 0, 1

    def __init__(self, error: Exception) -> None:
        self.error = error

    def naming_memory(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def step(self, source: object) -> None:
        raise self.error


def ready(world: World, recipe: Recipe, error: Exception) -> RankWorker:
    found = RankWorker(world, Job(recipe, Plan(0, 1), CudaOptions()), lambda job: None)  # type: ignore[arg-type, return-value]
    found._runs[1], found._sources[1] = Steps(error), None  # type: ignore[assignment]
    return found


@pytest.fixture(autouse=True)
def _no_world_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "leave", lambda: None)


def test_an_error_that_rank_0_raised_too_does_not_end_it(tiny_recipe: Callable[..., Recipe]) -> None:
    world = Scripted({"do": "step", "run": 1, "step": 3}, {"do": "end", "signal": 15})
    ready(world, tiny_recipe(), NonFiniteError("nan")).run()
    assert world.stop.number == 15
    assert not world.store.check(["failure"])


def test_an_error_of_its_own_is_left_for_the_others(tiny_recipe: Callable[..., Recipe]) -> None:
    world = Scripted({"do": "step", "run": 1, "step": 3})
    with pytest.raises(OSError, match="disk"):
        ready(world, tiny_recipe(), OSError("disk gone")).run()
    assert world.store.get("failure").endswith(b": disk gone")


def test_a_command_of_another_version_is_refused(tiny_recipe: Callable[..., Recipe]) -> None:
    world = Scripted({"do": "dance", "run": 1})
    with pytest.raises(BackendError, match="rank 0 asked for 'dance'"):
        ready(world, tiny_recipe(), OSError()).run()


def test_a_word_of_rank_0_that_is_at_work_asks_for_nothing(tiny_recipe: Callable[..., Recipe]) -> None:
    world = Scripted({"do": "wait", "run": 1}, {"do": "end"})
    ready(world, tiny_recipe(), ValueError("no step is asked for")).run()
    assert not world.store.check(["failure"])
