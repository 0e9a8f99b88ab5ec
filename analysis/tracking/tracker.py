"""What an experiment tracker is to this program: `Tracker`, the run it shows and the records that it is sent.

A tracker is given a run's records in the order they were made. Where it stands is kept for it in the run's folder
(analysis/tracking/follower.py), so that it can be stopped, killed or without a network at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from weftrain.core.errors import printable
from weftrain.core.formats.canonical import canonical_json


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker shows. hyperparameters: the recipe's values by dotted key, lists as JSON."""

    folder: Path
    hyperparameters: Mapping[str, str | int | float]

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True)
class Record:
    """What a line of metrics.jsonl says, in the form that trackers take. Most have numbers, texts or words alone.

    step: completed steps. time: seconds since 1970. numbers: such as train/loss or heldout/words/loss. texts: such as
    samples/1. event: a line about what happened, such as "checkpoint at step 40"; "" for a measurement.
    """

    kind: str
    step: int
    time: float
    numbers: Mapping[str, float]
    texts: Mapping[str, str]
    event: str = ""


class Tracker(Protocol):
    """One tracked run. Every method may take its time and may raise: it is called again later, with the same records.

    Credentials come from the tracker's own library and its environment, never from here.
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

    def close(self) -> None:
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


def record(line: Mapping[str, Any], number: int) -> Record:
    """What a checked line of metrics.jsonl says. number: which of the run's prompts a sample continues, from 1."""
    kind, step, time = line["kind"], line.get("step", 0), line.get("time", 0.0)
    if kind == "sample":
        text = printable(line.get("problem") or line["prompt"] + line["text"], keep="\n\t")
        return Record(kind, step, time, {}, {f"samples/{number}": text})
    if kind in ("step", "evaluation"):
        tag = "train" if kind == "step" else f"heldout/{line['set']}"
        return Record(kind, step, time, dict(_scalars(tag, line)), {})
    return Record(kind, step, time, {}, {}, f"{kind} at step {step}")


def _scalars(tag: str, line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _scalars(f"{tag}/{name}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and name not in ("step", "time"):
            yield f"{tag}/{name}", value
