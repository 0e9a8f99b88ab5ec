"""Sends what is new in a run's folder to a tracker, and keeps in the folder where it stands: `Follower`.

    runs/<name>/tracking/<tracker>.json   what names the tracked run, the last line of metrics.jsonl that was sent,
                                          and the last step of each series

The state is written after each batch that the tracker took, so a follower that was killed goes on with the next line.
One follower of a tracker at a time: `weftrain train` is one while it holds the run's lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from weftrain.analysis.tracking.tail import NewLine, NewLines, Position
from weftrain.analysis.tracking.tracker import Record, TrackedRun, Tracker, hyperparameters, record
from weftrain.core.errors import RunFolderError, os_errors_as
from weftrain.core.formats import fsops
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.formats.strict_model import Count, StrictModel, first_problem
from weftrain.core.run.metrics import METRICS
from weftrain.core.run.metrics_lines import MEASURED
from weftrain.core.run.run_folder import stored_recipe

TRACKING = "tracking"
_BATCH = 1_000  # lines that a tracker is given at once


class State(StrictModel):
    """Where a tracker stands. sent: series -> the last step of it that the tracked run has."""

    id: str | None = None
    position: Position = Position()
    sent: dict[str, Count] = Field(default_factory=dict)

    @property
    def last_step(self) -> int:
        return max(self.sent.values(), default=0)


class Follower:
    """Sends a run's records to `tracker`, from where the one before stopped. name: the tracker's, for the state."""

    def __init__(self, folder: Path, name: str, tracker: Tracker) -> None:
        self._folder, self._tracker = folder, tracker
        self._path = folder / TRACKING / f"{name}.json"
        self._state = read_state(self._path)
        recipe = stored_recipe(folder, missing_ok=True) or {}
        self._run = TrackedRun(folder, hyperparameters(recipe))
        self._prompts: dict[str, int] = {}
        for prompt in recipe.get("log", {}).get("sample_prompts", ()):
            self._number(prompt)
        self._is_open = False

    def advance(self) -> None:
        """Send everything that is new. Raises what the tracker raises, and RunFolderError; then call it again later."""
        lines = NewLines(self._folder / METRICS, self._state.position)
        if not self._is_open:
            after = self._state.last_step if lines.back_to is None else min(lines.back_to, self._state.last_step)
            id_ = self._tracker.open(self._run, self._state.id, after)
            self._is_open = True
            self._keep(self._state.model_copy(update={"id": id_}))
        if lines.back_to is not None and lines.back_to < self._state.last_step and self._tracker.rewind(lines.back_to):
            # Kept only with the next position: whoever starts again before that rewinds again.
            sent = {series: min(step, lines.back_to) for series, step in self._state.sent.items()}
            self._state = self._state.model_copy(update={"sent": sent})
        for batch, end in _batches(lines):
            self._send(batch, end)

    def close(self) -> None:
        """Let the tracker finish. Raises what it raises."""
        if self._is_open:
            self._is_open = False
            self._tracker.close()

    def _send(self, lines: list[dict[str, Any]], end: Position) -> None:
        sent, records = dict(self._state.sent), list[Record]()
        for line in lines:
            number = self._number(line["prompt"]) if line["kind"] == "sample" else 0
            if line["kind"] in MEASURED:
                series = _series(line, number)
                if line["step"] <= sent.get(series, -1):
                    continue
                sent[series] = line["step"]
            records.append(record(line, number))
        if records:
            self._tracker.send(records)
        self._keep(State(id=self._state.id, position=end, sent=sent))

    def _number(self, prompt: str) -> int:
        return self._prompts.setdefault(prompt, len(self._prompts) + 1)

    def _keep(self, state: State) -> None:
        with os_errors_as(RunFolderError, f"{self._path}: cannot be written", "make room or check its permissions"):
            fsops.make_dirs(self._path.parent)
            fsops.write_bytes(self._path, state.model_dump_json().encode() + b"\n")
        self._state = state


def read_state(path: Path) -> State:
    """Where the tracker of this state file stands; at the beginning, where there is none. Raises RunFolderError."""
    remedy = "delete it, and the run is sent anew"
    with os_errors_as(RunFolderError, f"{path}: cannot be read", remedy):
        try:
            return State.model_validate_json(read_plain(path, "record"))
        except FileNotFoundError:
            return State()
        except ValidationError as error:
            raise RunFolderError(f"{path}: {first_problem(error)}: {remedy}") from error


def _series(line: dict[str, Any], number: int) -> str:
    kind: str = line["kind"]
    return {"evaluation": f"{kind}/{line.get('set')}", "sample": f"{kind}/{number}"}.get(kind, kind)


def _batches(lines: NewLines) -> Iterator[tuple[list[dict[str, Any]], Position]]:
    """The lines that count, and where each batch ends."""
    batch, new = list[dict[str, Any]](), NewLine(Position(), None)
    count = 0
    for count, new in enumerate(lines, 1):
        if new.line is not None:
            batch.append(new.line)
        if count % _BATCH == 0:
            yield batch, new.end
            batch = []
    if count % _BATCH:
        yield batch, new.end
