"""What a run is doing, kept up to date from the ends of its files: `RunView`.

    view = RunView(folder)
    view.update()            # again and again: only what is new is read

Nothing is written and nothing verified. Numbers that count no more, after a resume or rollback, are dropped.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from weftrain.analysis.report.run_list import held_locks, lock_identity
from weftrain.analysis.watch.tail import LineTail, last_lines
from weftrain.core.errors import RunFolderError, file_problem
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.checkpoint_manifest import STEP_FOLDER
from weftrain.core.formats.plain_file import real_path
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.metrics import METRICS
from weftrain.core.run.metrics_lines import checked_line
from weftrain.core.run.run_folder import LOCK, stored_recipe

# running: a process of this machine holds the run's lock. writing: none does, and lines come all the same, so it runs
# on another machine. stalled: one of the two, without a new line for too long. stopped: the same command resumes it.
State = Literal["running", "writing", "stalled", "stopped", "complete", "started", "unreadable"]
_FIRST_BYTES = 32 << 20  # of metrics.jsonl that are looked at first
_FIRST_LINES = 2_000  # the last ones, which are read whole; of those before them only what is rare
_RARE = (b'"evaluation"', b'"score"', b'"alert"', b'"resume"')
_KEPT = 512  # lines for the curves
_RECENT = 32  # lines for speed and time
_ALERTS = 5
STALL_S = 60.0  # at least so long without a line is a stall
_STALL_GAPS = 10.0  # and so many times the usual time between two lines


@dataclass(frozen=True)
class RunState:
    """What a run is doing at one moment. Times are in seconds since 1970. age_s: of the newest line."""

    name: str
    state: State
    step: int = 0
    steps: int | None = None  # that the recipe trains
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_s: float | None = None
    checkpoint_step: int | None = None
    checkpoint_time: float | None = None
    evaluations: Mapping[str, tuple[int, float]] = field(default_factory=dict)  # set -> step, loss
    scores: Mapping[str, tuple[int, float]] = field(default_factory=dict)  # task and metric -> step, value
    alerts: tuple[tuple[int, str], ...] = ()  # step, words; the newest last
    age_s: float | None = None
    problem: str | None = None
    losses: tuple[float, ...] = ()
    speeds: tuple[float, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Without the curves."""
        found = {key: value for key, value in vars(self).items() if key not in ("losses", "speeds")}
        found["evaluations"] = {name: {"step": step, "loss": loss} for name, (step, loss) in self.evaluations.items()}
        found["scores"] = {name: {"step": step, "value": value} for name, (step, value) in self.scores.items()}
        found["alerts"] = [{"step": step, "words": words} for step, words in self.alerts]
        return {key: _json(value) for key, value in found.items()}


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunView:
    """The run in `folder`. stall_s: without a line for so long it is stalled; None: ten times its usual time between
    two lines, and a minute at least.
    """

    def __init__(self, folder: Path, stall_s: float | None = None, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._stall_s, self._clock = folder, stall_s, clock
        self._steps = deque[dict[str, Any]](maxlen=_KEPT)
        self._evaluations: dict[str, tuple[int, float]] = {}
        self._scores: dict[str, tuple[int, float]] = {}
        self._alerts = deque[tuple[int, str]](maxlen=_ALERTS)
        self._ended_at: int | None = None  # the step of the line that ends the file
        self._last_time: float | None = None
        self._tail: LineTail | None = None

    def update(self) -> RunState:
        """Read what is new."""
        try:
            recipe = stored_recipe(self._folder, missing_ok=True)
            if recipe is None and not (self._folder / LOCK).exists() and not (self._folder / METRICS).exists():
                raise RunFolderError(f"{self._folder}: is no run's folder")
            steps = _count(recipe)
            for line in self._new_lines():
                self._add(line)
            return self._state(steps)
        except (RunFolderError, OSError) as error:
            problem = str(error) if isinstance(error, RunFolderError) else f"{self._folder}: {file_problem(error)}"
            return RunState(self._folder.name, "unreadable", problem=problem)

    def _new_lines(self) -> list[bytes]:
        path = self._folder / METRICS
        if self._tail is None:
            lines, end = last_lines(path, _FIRST_BYTES)
            self._tail = LineTail(path, end)
            before, whole = lines[:-_FIRST_LINES], lines[-_FIRST_LINES:]
            return [line for line in before if any(word in line[:40] for word in _RARE)] + whole
        found = list[bytes]()
        while lines := self._tail.read():
            found += lines
        return found

    def _add(self, data: bytes) -> None:
        try:
            line = checked_line(data)
        except ValueError:
            return
        kind, step = line["kind"], line.get("step", 0)
        self._last_time = line.get("time", self._last_time)
        self._ended_at = step if kind == "end" else None
        if kind == "step":
            self._steps.append(line)
        elif kind == "evaluation":
            self._evaluations[str(line["set"])] = step, float(line["loss"])
        elif kind == "score":
            self._scores[f"{line['set']} {line['metric']}"] = step, float(line["value"])
        elif kind == "alert":
            self._alerts.append((step, line["words"]))
        elif kind == "resume":
            while self._steps and self._steps[-1]["step"] > step:
                self._steps.pop()
            self._evaluations = {name: one for name, one in self._evaluations.items() if one[0] <= step}
            self._scores = {name: one for name, one in self._scores.items() if one[0] <= step}

    def _state(self, steps: int | None) -> RunState:
        last = self._steps[-1] if self._steps else None
        step = max([0 if last is None else int(last["step"]), self._ended_at or 0])
        recent = list(self._steps)[-_RECENT:]
        speeds = [one for line in self._steps if (one := _speed(line)) is not None]
        saved_step, saved_at = _newest_checkpoint(self._folder / "checkpoints")
        age = None if self._last_time is None else max(0.0, self._clock() - self._last_time)
        return RunState(
            name=real_path(self._folder).name,
            state=self._word(step, steps, age, recent),
            step=step,
            steps=steps,
            loss=None if last is None else float(last["loss"]),
            tokens_per_second=statistics.median(speeds[-_RECENT:]) if speeds else None,
            eta_s=None if steps is None else _eta_s(recent, step, steps),
            checkpoint_step=saved_step,
            checkpoint_time=saved_at,
            evaluations=dict(self._evaluations),
            scores=dict(self._scores),
            alerts=tuple(self._alerts),
            age_s=age,
            losses=tuple(float(line["loss"]) for line in self._steps),
            speeds=tuple(speeds),
        )

    def _word(self, step: int, steps: int | None, age: float | None, recent: list[dict[str, Any]]) -> State:
        held = lock_identity(self._folder / LOCK) in held_locks()
        late = age is not None and age > (_stall_s(recent) if self._stall_s is None else self._stall_s)
        if held:
            return "stalled" if late else "running"
        if self._ended_at is not None or (steps is not None and step >= steps):
            return "complete"
        if not recent:
            return "started"
        return "stopped" if late or _ended_or_here(self._folder) else "writing"


def _ended_or_here(folder: Path) -> bool:
    """Whether the newest start was on this machine, where no lock means no process."""
    import socket

    lines, _ = last_lines(folder / LOCK, 1 << 20)
    try:
        return bool(parse_json(lines[-1])["host"] == socket.gethostname())
    except (ValueError, KeyError, TypeError, IndexError):
        return True


def _stall_s(recent: list[dict[str, Any]]) -> float:
    times = [line["time"] for line in recent if "time" in line]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    return max(STALL_S, _STALL_GAPS * statistics.median(gaps)) if gaps else math.inf


def _eta_s(recent: list[dict[str, Any]], step: int, steps: int) -> float | None:
    """From the time that the recent steps took, with their evaluations and checkpoints."""
    if step >= steps:
        return 0.0
    if len(recent) < 2 or "time" not in recent[0] or "time" not in recent[-1]:
        return None
    done, took = recent[-1]["step"] - recent[0]["step"], recent[-1]["time"] - recent[0]["time"]
    return (steps - step) * took / done if done > 0 and took > 0 else None


def _speed(line: Mapping[str, Any]) -> float | None:
    value = line.get("tokens_per_second")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _count(recipe: Mapping[str, Any] | None) -> int | None:
    try:
        steps = (recipe or {})["schedule"]["steps"]
    except (KeyError, TypeError):
        return None
    return steps if type(steps) is int else None


def _newest_checkpoint(folder: Path) -> tuple[int | None, float | None]:
    try:
        found = {int(match[1]): path for path in folder.iterdir() if (match := STEP_FOLDER.fullmatch(path.name))}
        step = max(found)
        return step, found[step].stat().st_mtime
    except (OSError, ValueError):
        return None, None


def runs_in(folder: Path) -> list[Path]:
    """The folder itself if it is a run's, else the runs in it, by name."""
    if any((folder / name).exists() for name in (METRICS, LEDGER, LOCK)):
        return [folder]
    return sorted(path for path in folder.iterdir() if path.is_dir() and (path / LOCK).exists())
