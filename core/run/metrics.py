"""A run's measurements: metrics.jsonl is the truth, and trackers (analysis/tracking) are its views.

One JSON object a line, with `kind` (step, evaluation, sample, or an event's name), `step` (completed steps) and `time`
(seconds since 1970). Lines are only ever appended; a resume from step k appends {"kind": "resume", "step": k}, and
`read_metrics` then leaves out what came before it and lies beyond k. JSON has no NaN, so non-finite numbers are the
strings "nan", "inf" and "-inf" in the file; `read_metrics` makes them floats again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from weftrain.core.errors import RunFolderError, os_errors_as
from weftrain.core.experts_section import ROUTER_MEASURES
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json
from weftrain.core.formats.plain_file import open_plain, read_plain
from weftrain.core.objectives_section import MEASURES
from weftrain.core.run.checked_metrics import remember_growth
from weftrain.core.run.metrics_lines import counted_lines, damaged_numbers

METRICS = "metrics.jsonl"
TORN = "metrics.torn"


class MetricsWriter:
    """Appends to `folder`/metrics.jsonl.

    resume_step: the completed steps of the checkpoint that this start continues from; None for a fresh run, which is
    taken as 0 where the file already has lines (a run killed before its first checkpoint). The file is repaired first
    (see `repair`), unless it was just now. begins: False for lines that are added to those of a run that has ended,
    whose lock is held. Raises RunFolderError where the file cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        resume_step: int | None = None,
        *,
        repaired: bool = False,
        begins: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = Path(folder) / METRICS
        self._clock = clock
        with self._writing():
            if not repaired:
                repair(self._path.parent, clock=clock)
            if resume_step is None and self._path.exists() and self._path.stat().st_size:
                resume_step = 0
        if resume_step is not None and begins:
            self.event("resume", step=resume_step)

    def step(self, record: Mapping[str, Any]) -> None:
        """A log line of training."""
        self._append("step", record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """A held-out measurement; `record` has `step` and `set`."""
        self._append("evaluation", record)

    def measured(self, record: Mapping[str, Any]) -> None:
        """A line of an evaluator (core/evaluators.py), which has its `kind`."""
        self._append(record["kind"], {key: value for key, value in record.items() if key != "kind"})

    def samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Texts that the model wrote; each of `records` has `step`, `prompt`, `text` (what follows the prompt) and,
        where there is none, `problem`.
        """
        for record in records:
            self._append("sample", record)

    def event(self, kind: str, **fields: Any) -> None:
        """Something that happened, such as a checkpoint or a resume. All lines so far become durable."""
        self._append(kind, fields)
        self.flush()

    def flush(self) -> None:
        """Make every line durable: before a checkpoint, which a resume trusts."""
        with self._writing():
            if self._path.exists():
                fsops.sync_file(self._path)

    def note_checked(self) -> None:
        """Spare the next start to read what was written so far (core/run/checked_metrics.py)."""
        with self._writing():
            if self._path.exists():
                remember_growth(self._path)

    def close(self) -> None:
        self.flush()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, kind: str, fields: Mapping[str, Any]) -> None:
        line = json.dumps({"kind": kind, "time": self._clock(), **finite(fields)}, allow_nan=False, ensure_ascii=False)
        with self._writing():
            fsops.append_line(self._path, line)

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return os_errors_as(RunFolderError, f"{self._path}: cannot be written", "make room or check it, then resume")


_MEASURED = {
    "step": ("step", "loss", "grad_norm", "learning_rate", "tokens", "skipped"),
    "evaluation": ("step", "set", "loss", "tokens"),
}
# keys that records of earlier versions lack, whose digests must stay what they were
LATER = ("bearing_tokens", *MEASURES, *ROUTER_MEASURES)


def rows_label(rows: object, available: object) -> str:
    """'64 of 1,024 rows', 'all 1,024 rows', '64 rows' where the total is not recorded, or 'rows not recorded'."""
    if not isinstance(rows, int):
        return "rows not recorded"
    if not isinstance(available, int):
        return f"{rows:,} rows"
    return f"all {rows:,} rows" if rows == available else f"{rows:,} of {available:,} rows"


def heldout_label(record: Mapping[str, Any]) -> str:
    """'words (64 of 1,024 rows)': the set, and how much of it was read, since losses over other rows differ."""
    return f"{record['set']} ({rows_label(record.get('rows'), record.get('rows_available'))})"


class Digest:
    """SHA-256 of what step and evaluation records measured, a canonical JSON line each: equal for equal training,
    whatever its speed was.

    Clock, throughput and memory are left out, and so is a record of any other kind. The order of the records counts.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, record: Mapping[str, Any]) -> None:
        """`record` has `kind`, as a line of metrics.jsonl does."""
        if keys := _MEASURED.get(record["kind"]):
            measured = {key: record.get(key) for key in keys} | {key: record[key] for key in LATER if key in record}
            self._hash.update(canonical_json(finite([record["kind"], measured])) + b"\n")

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def digest(records: Iterable[Mapping[str, Any]]) -> str:
    """The `Digest` of all of them, in hexadecimal."""
    found = Digest()
    for record in records:
        found.add(record)
    return found.hexdigest()


def effective_records(
    folder: Path, without: Collection[int] = (), kinds: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The effective records of a run, in the order they were made: what an uninterrupted run would have left, and the
    events.

    Of step, evaluation and sample records with the same step (and set, or prompt) the last counts, and none counts
    that lies beyond the step of a later resume. A torn last line is left out. Nothing where there are no metrics. The
    file is read as the records are asked for, and none is kept. without: numbers of damaged lines that are passed over
    (`damaged_lines`). kinds: of the records wanted; of a million lines two seconds are spared where `step` is not among
    them. Raises RunFolderError for any other damaged line.
    """
    return (record for _, record, left_by in counted_lines(Path(folder) / METRICS, without, kinds) if not left_by)


def run_has_ended(folder: Path) -> bool:
    """Whether the last start, resume or end in a run's metrics is an end. Raises RunFolderError for a damaged line."""
    last = None
    for record in effective_records(folder):
        if record["kind"] in ("start", "resume", "end"):
            last = record["kind"]
    return last == "end"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All `effective_records` at once, for a run that is known to be small."""
    return list(effective_records(folder))


def damaged_lines(folder: Path) -> list[int]:
    """Numbers, from 1, of the damaged lines. What follows the last line break is not counted."""
    path = folder / METRICS
    return damaged_numbers(path) if path.exists() else []


def repair(folder: Path, damaged: Sequence[int] | None = None, *, clock: Callable[[], float] = time.time) -> None:
    """Move torn and damaged lines to metrics.torn, so that every line left is whole; the event `repair` names them by
    number.

    damaged: what `damaged_lines` gave, if it was asked already. The run's lock must be held. Raises OSError.
    """
    path = folder / METRICS
    if not path.exists():
        return
    bad = set(damaged_lines(folder) if damaged is None else damaged)
    if not bad and _ends_whole(path):
        return
    *lines, tail = read_plain(path, "metrics").split(b"\n")
    torn = [line for number, line in enumerate(lines, 1) if number in bad] + ([tail] if tail else [])
    whole = [line for number, line in enumerate(lines, 1) if number not in bad]
    step = next((found["step"] for line in reversed(whole) if "step" in (found := json.loads(line))), 0)
    event = {"kind": "repair", "time": clock(), "step": step, "lines": sorted(bad), "torn_bytes": len(tail)}
    beside = path.with_name(TORN)
    kept = read_plain(beside, "metrics") if beside.exists() else b""
    # first: a crash in between leaves a line in both files, never in neither
    fsops.write_bytes(beside, kept + b"\n".join(torn) + b"\n")
    fsops.write_bytes(path, b"".join(line + b"\n" for line in (*whole, json.dumps(event).encode())))


def _ends_whole(path: Path) -> bool:
    with open_plain(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return size == 0 or file.read(1) == b"\n"


def finite(value: Any) -> Any:
    """A value for JSON, which has no such numbers: "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
