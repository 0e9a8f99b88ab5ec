"""Sends what is new in a run's folder to a tracker, and keeps in the folder where it stands: `Follower`.

    runs/<name>/tracking/<tracker>.json   what names the tracked run, the last lines of metrics.jsonl and ledger.jsonl
                                          that were sent, and the last step of each series
                         <tracker>.lock   held while a follower sends

The state is written after each batch that the tracker took, so a follower that was killed goes on with the next line.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from weftrain.analysis.tracking.tail import NewLines, Position, found_again, new_entries
from weftrain.analysis.tracking.tracker import (
    Ending,
    Record,
    TrackedRun,
    Tracker,
    hyperparameters,
    ledger_record,
    record,
)
from weftrain.core.errors import RunFolderError, os_errors_as
from weftrain.core.formats import fsops
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.formats.safe_names import checked_segment
from weftrain.core.formats.strict_model import Count, StrictModel, first_problem
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.metrics import METRICS
from weftrain.core.run.metrics_lines import MEASURED
from weftrain.core.run.run_folder import stored_recipe

TRACKING = "tracking"
_BATCH = 1_000  # lines that a tracker is given at once
_NO_MEASUREMENT = ("log", "checkpoint", "name", "description")  # parts of a recipe that change no measured value


class State(StrictModel):
    """Where a tracker stands. sent: series -> the last step of it that the tracked run has. earlier: tracked runs that
    hold what the run went back behind. ended: whether the run had ended by then. other_steps: whether steps that the
    tracked run has will be trained again with other values, as the ledger says.
    """

    id: str | None = None
    position: Position = Position()
    ledger: Position = Position()
    sent: dict[str, Count] = Field(default_factory=dict)
    earlier: tuple[str, ...] = Field(default=(), strict=False)
    ended: bool = False
    other_steps: bool = False

    @property
    def last_step(self) -> int:
        return max(self.sent.values(), default=0)


class Follower:
    """Sends a run's records to `tracker`, from where the one before stopped. name: the tracker's, for the state.

    records: how many it sent. damaged: how many lines it passed over. Raises RunFolderError, also where another process
    sends to the same tracker.
    """

    def __init__(self, folder: Path, name: str, tracker: Tracker) -> None:
        self._folder, self._tracker = folder, tracker
        self._path = folder / TRACKING / f"{checked_segment(name)}.json"
        self._held = contextlib.ExitStack()
        self._hold()
        self._state = read_state(self._path)
        self._recipe = stored_recipe(folder, missing_ok=True) or {}
        self._prompts: dict[str, int] = {}
        for prompt in self._recipe.get("log", {}).get("sample_prompts", ()):
            self._number(prompt)
        self._is_open = self._is_found = False
        self.records = self.damaged = 0

    @property
    def id(self) -> str | None:
        """What names the tracked run; None before it was opened for the first time."""
        return self._state.id

    def advance(self) -> None:
        """Send everything that is new. Raises what the tracker raises, and RunFolderError; then call it again later."""
        if not self._is_found:
            position = found_again(self._folder / METRICS, self._state.position)
            ledger = found_again(self._folder / LEDGER, self._state.ledger)
            self._state = self._state.model_copy(update={"position": position, "ledger": ledger})
            self._is_found = True
        entries, ledger_end = new_entries(self._folder / LEDGER, self._state.ledger)
        other = any(entry.get("step", 0) < self._state.last_step and _other_steps(entry) for entry in entries)
        other = other or self._state.other_steps
        lines = NewLines(self._folder / METRICS, self._state.position)
        went_back = lines.back_to is not None and lines.back_to < self._state.last_step
        if not self._is_open:
            self._open(lines.back_to if went_back and lines.back_to is not None else self._state.last_step)
        if went_back and lines.back_to is not None:
            if self._tracker.rewind(lines.back_to):
                # Kept only with the next position: whoever starts again before that rewinds again.
                sent = {series: min(step, lines.back_to) for series, step in self._state.sent.items()}
                self._state = self._state.model_copy(update={"sent": sent})
                other = False
            elif other:
                self._begin_another()
                return self.advance()
        self._send([found for entry in entries if (found := ledger_record(entry)) is not None])
        if entries:
            self._keep(self._state.model_copy(update={"ledger": ledger_end, "other_steps": other}))
        for batch, end in self._batches(lines):
            self._send_lines(batch, end)

    def close(self) -> None:
        """Let the tracker finish, and others send to it. Raises what it raises."""
        try:
            self._close("finished" if self._state.ended else "interrupted")
        finally:
            self._held.close()

    def _close(self, ending: Ending) -> None:
        if self._is_open:
            self._is_open = False
            self._tracker.close(ending)

    def _open(self, after: int) -> None:
        earlier = self._state.earlier
        run = TrackedRun(self._folder, hyperparameters(self._recipe), len(earlier) + 1, earlier[-1] if earlier else "")
        known = self._tracker.open(run, self._state.id, after)
        self._is_open = True
        self._keep(self._state.model_copy(update={"id": known}))

    def _begin_another(self) -> None:
        """The run went another way after a step, and the tracker cannot forget: another tracked run takes the place of
        this one, and is sent everything that counts.
        """
        self._close("abandoned")
        assert self._state.id is not None
        self._keep(State(earlier=(*self._state.earlier, self._state.id)))

    def _send_lines(self, lines: list[dict[str, Any]], end: Position) -> None:
        sent, records, ended = dict(self._state.sent), list[Record](), self._state.ended
        for line in lines:
            number = self._number(line["prompt"]) if line["kind"] == "sample" else 0
            if line["kind"] in MEASURED:
                series = _series(line, number)
                if line["step"] <= sent.get(series, -1):
                    continue
                sent[series] = line["step"]
            ended = line["kind"] == "end"
            if (found := record(line, number)) is not None:
                records.append(found)
        self._send(records)
        self._keep(self._state.model_copy(update={"position": end, "sent": sent, "ended": ended}))

    def _send(self, records: Sequence[Record]) -> None:
        if records:
            self._tracker.send(records)
            self.records += len(records)

    def _batches(self, lines: NewLines) -> Iterator[tuple[list[dict[str, Any]], Position]]:
        """The lines that count, and where each batch ends."""
        every = iter(lines)
        while together := list(islice(every, _BATCH)):
            self.damaged += sum(new.damaged for new in together)
            yield [new.line for new in together if new.line is not None], together[-1].end

    def _number(self, prompt: str) -> int:
        return self._prompts.setdefault(prompt, len(self._prompts) + 1)

    def _hold(self) -> None:
        with self._writing():
            fsops.make_dirs(self._path.parent)
            try:
                lock = fsops.held_lock(self._path.with_suffix(".lock"), f"{os.getpid()}\n".encode())
                self._held.enter_context(lock)
            except BlockingIOError as error:
                raise RunFolderError(
                    f"{self._folder}: another process is sending to {self._path.stem}: wait for it or stop it"
                ) from error

    def _keep(self, state: State) -> None:
        with self._writing():
            fsops.write_bytes(self._path, state.model_dump_json().encode() + b"\n")
        self._state = state

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return os_errors_as(RunFolderError, f"{self._path}: cannot be written", "make room or check its permissions")


def read_state(path: Path) -> State:
    """Where the tracker of this state file stands; at the beginning, where there is none. Raises RunFolderError."""
    remedy = "delete it, and the run is sent anew"
    try:
        with os_errors_as(RunFolderError, f"{path}: cannot be read", remedy):
            return State.model_validate_json(read_plain(path, "record")) if path.exists() else State()
    except ValidationError as error:
        raise RunFolderError(f"{path}: {first_problem(error)}: {remedy}") from error


def _other_steps(entry: dict[str, Any]) -> bool:
    """Whether steps that are trained again after this entry of the ledger have other values than before."""
    if entry["kind"] == "recipe":
        return any(key.split(".")[0] not in _NO_MEASUREMENT for key, _, _ in entry["changes"])
    return entry["kind"] in ("rollback", "defer") or bool(entry.get("from_scratch"))


def _series(line: dict[str, Any], number: int) -> str:
    kind: str = line["kind"]
    named = f"{kind}/{line.get('set')}"
    return {"evaluation": named, "score": named, "sample": f"{kind}/{number}"}.get(kind, kind)
