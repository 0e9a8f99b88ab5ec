"""Ranks above 0 carry out rank 0's commands, each of which names its run, until rank 0 ends.

A worker decides nothing and prints nothing. If it fails on its own it writes the reason to the store, and the other
ranks report that reason when their next collective fails.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from weftrain.backends.cuda.copied_state import Claims
from weftrain.backends.cuda.engine import CudaRun
from weftrain.backends.cuda.memory_copies import find
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.rendezvous import leave
from weftrain.backends.cuda.world import World
from weftrain.core.backend import Job, Plan
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError, NonFiniteError, WeftrainError
from weftrain.core.order.batch import BatchSource


class RankWorker:
    """A rank above 0. open_source: how it opens the rows of a run's recipe on its machine."""

    def __init__(self, world: World, own: Job, open_source: Callable[[Job], BatchSource]) -> None:
        self._world, self._own, self._open_source = world, own, open_source
        self._runs: dict[int, CudaRun] = {}
        self._sources: dict[int, BatchSource] = {}

    def run(self) -> None:
        """Until rank 0 ends the world. Raises BackendError, also where this rank fails: the others learn why."""
        while (command := self._world.next_command())["do"] != "end":
            try:
                self._carry_out(command)
            except NonFiniteError:
                continue  # rank 0 raised the same, and decides what becomes of the run
            except (WeftrainError, OSError) as error:
                if command["do"] == "prepare" and isinstance(error, BackendError):
                    continue  # every rank was told; rank 0 decides
                self._world.report_failure(str(error))
                raise
        self._world.stop.ask(command.get("signal", 0))  # so that every rank ends with the same exit code
        leave()

    def _carry_out(self, command: dict[str, Any]) -> None:
        if command["do"] == "find":
            self._world.copies, _ = find(self._world, Path(command["folder"]), command["layout"])
            return
        if command["do"] == "prepare":
            recipe = Recipe.model_validate(command["recipe"])
            options = CudaOptions.model_validate(recipe.backend.options)
            times = {"time_phases": command["time_phases"], "folder": self._own.folder}
            job = Job(recipe, Plan(**command["plan"]), options, **times)
            given = command["weights"], command["recalled"], command["first_weights"]
            run = CudaRun(job, options, self._world, *given)
            self._runs[run.number] = run
            return
        run = self._runs[command["run"]]
        with run.naming_memory(f"'{command['do']}'"):
            self._of_run(run, command)

    def _of_run(self, run: CudaRun, command: dict[str, Any]) -> None:
        number = run.number
        match command["do"]:
            case "train":
                source = self._sources[number] = self._open_source(run.job)
                if source.dataset_id != command["dataset_id"]:
                    mine, other = source.dataset_id[:12], command["dataset_id"][:12]
                    raise BackendError(f"reads dataset {mine}, rank 0 reads {other}: give all nodes the same data")
            case "step":
                run.step_number = command["step"]
                run.step(self._sources[number])
            case "gradients":
                run.gradients_of(None)
            case "evaluate":
                run.evaluate_rounds(command["rounds"], lambda round_number: None)
            case "memory":
                run.over_ranks()
            case "wait":  # rank 0 is at work on something that takes long
                pass
            case "whole":
                run.whole(command["name"], keep=False)
            case "save":
                files = {
                    name: {key: (dtype, tuple(shape)) for key, (dtype, shape) in part.items()}
                    for name, part in command["files"].items()
                }
                run.writer.begin(Path(command["folder"]), files, run.whole)
            case "place":
                run.place(command["plane"], command["name"], tuple(command["shape"]), None, 0)
            case "stand":
                run.stand(command["step"], command["optimizer_updates"])
            case "copy":
                run.copies.copy(Claims(**command["claims"]))
            case "close":
                self._runs.pop(number).release()
                self._sources.pop(number, None)
            case other:
                raise BackendError(
                    f"rank 0 asked for '{other}', which this version does not know: install the same everywhere"
                )
