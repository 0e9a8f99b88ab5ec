"""What an experiment tracker is to this program: `Tracker`, the run it shows and the records that it is sent.

A tracker is given a run's records in the order they were made. Where it stands is kept for it in the run's folder
(analysis/tracking/follower.py), so that it can be stopped, killed or without a network at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from weftrain.core.errors import WeftrainError, printable
from weftrain.core.formats.canonical import canonical_json
from weftrain.core.formats.plain_file import real_path
from weftrain.core.run.run_folder import shown

# finished: the run reached its end. interrupted: it may go on. abandoned: it went back, and goes on as another one.
Ending = Literal["finished", "interrupted", "abandoned"]


class TrackerError(WeftrainError):
    """A tracker cannot take a run's records now. The run goes on, and it is tried again."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker shows. hyperparameters: the recipe's values by dotted key, lists as JSON.

    continues: names the tracked run that this one takes the place of, since the run went back behind what that one has.
    number: counts them, from 1.
    """

    folder: Path
    hyperparameters: Mapping[str, str | int | float]
    number: int = 1
    continues: str = ""

    @property
    def name(self) -> str:
        name = real_path(self.folder).name
        return name if self.number == 1 else f"{name} ({self.number})"


@dataclass(frozen=True)
class Record:
    """A line of metrics.jsonl or of the ledger, in the form that trackers take.

    step: completed steps. time: seconds since 1970. numbers: such as train/loss, heldout/words/loss or
    score/SUITE/TASK/value. texts: such as samples/1. event: a line about what happened, such as "ended after step 40";
    "" for a measurement.
    """

    kind: str
    step: int
    time: float
    numbers: Mapping[str, float]
    texts: Mapping[str, str]
    event: str = ""


class Tracker(Protocol):
    """One tracked run. Every method but `problem` may take its time and may raise: it is called again later, with the
    same records.

    Credentials come from the environment of the tracker's own library, and go nowhere else.
    """

    def problem(self) -> str:
        """What is missing for it to work here, such as a package or credentials, and what to do; "" for nothing.

        Asked before the first step: without a network, and without importing what takes seconds.
        """

    def open(self, run: TrackedRun, known: str | None, after: int) -> str:
        """Begin a tracked run, or go on with the one that `known` names. Returns what names it, for the next time.

        after: the step after which the records will be that are sent now; 0 for a new run.
        """

    def send(self, records: Sequence[Record]) -> None:
        """Take the records, which are durable or in safe hands when it returns."""

    def rewind(self, step: int) -> bool:
        """Forget what lies beyond `step`, since the run went back to it. False where the tracker cannot: then what it
        has stays, and records of steps that it has are not sent again.
        """

    def close(self, ending: Ending) -> None:
        """Finish. Nothing is sent after it, except through another `open`."""


def hyperparameters(recipe: Mapping[str, Any]) -> dict[str, str | int | float]:
    """A resolved recipe by dotted keys; a list is one value, as JSON, and so is null."""
    return dict(_leaves("", recipe))


def _leaves(key: str, value: Any) -> Iterator[tuple[str, str | int | float]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}" if key else name, item)
    else:
        yield key, value if isinstance(value, str | int | float) else canonical_json(value).decode()


_NUMBERS = {"step": "train", "evaluation": "heldout", "score": "score"}  # kind of a line -> how its numbers are named


def record(line: Mapping[str, Any], number: int) -> Record | None:
    """What a checked line of metrics.jsonl says; None for one that no tracker has a place for.

    number: which of the run's prompts a sample continues, from 1.
    """
    kind, step, time = line["kind"], line.get("step", 0), line.get("time", 0.0)
    if kind == "sample":
        text = printable(line.get("problem") or line["prompt"] + line["text"], keep="\n\t")
        return Record(kind, step, time, {}, {f"samples/{number}": text})
    if kind in _NUMBERS:
        tag = _NUMBERS[kind] if kind == "step" else f"{_NUMBERS[kind]}/{line['set']}"
        return Record(kind, step, time, dict(_scalars(tag, line)), {})
    words = {
        "start": f"training begins after step {step}",
        "resume": f"goes on from step {step}",
        "checkpoint": f"checkpoint of step {step}, root {str(line.get('root', ''))[:12]}",
        "end": f"ended after step {step}",
        "alert": one_line(f"alert at step {step}: {line.get('words') or line.get('rule', '')}"),
    }.get(kind)
    return None if words is None else Record(kind, step, time, {}, {}, words)


def ledger_record(entry: Mapping[str, Any]) -> Record | None:
    """What an entry of the ledger says that metrics.jsonl does not; None for the others."""
    step, reason = entry.get("step", 0), str(entry.get("reason", ""))
    words = {
        "rollback": lambda: f"rolled back to step {step}: {reason}",
        "defer": lambda: f"chunk {entry['chunk']}: {entry['action']}: {reason}",
        "skip": lambda: f"step {step} was skipped",
        "recipe": lambda: (
            "recipe changed: "
            + "; ".join(f"{key}: {shown(old)} -> {shown(new)}" for key, old, new in entry["changes"][:8])
        ),
        "remove": lambda: f"old checkpoints removed at step {step}",
    }.get(entry["kind"])
    return None if words is None else Record(entry["kind"], step, entry.get("time", 0.0), {}, {}, one_line(words()))


def one_line(text: str) -> str:
    """At most 300 characters of a text, without line breaks and what controls a terminal."""
    return printable(" ".join(text.split()))[:300]


def _scalars(tag: str, line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _scalars(f"{tag}/{name}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and name not in ("step", "time"):
            yield f"{tag}/{name}", value
