"""A run's measurements: metrics.jsonl is the truth, TensorBoard the view.

One JSON object a line, with `kind` (step, evaluation, or an event's name), `step` (completed steps) and `time` (seconds since 1970).
Lines are only ever appended; a resume from step k appends {"kind": "resume", "step": k}, and `read_metrics` then leaves out what came
before it and lies beyond k. What a reader would get wrong: JSON has no NaN, so non-finite numbers are the strings "nan", "inf" and
"-inf" in the file; `read_metrics` makes them floats again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weftrain.core import fsops
from weftrain.core.canonical import canonical_json, parse_json
from weftrain.core.errors import RunFolderError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"
TORN = "metrics.torn"
TENSORBOARD = "tensorboard"
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsWriter:
    """Appends to `folder`/metrics.jsonl and, where asked, mirrors numbers into `folder`/tensorboard.

    resume_step: the completed steps of the checkpoint that this start continues from; None for a fresh run, which is taken as 0 where
    the file already has lines (a run killed before its first checkpoint). Lines that a crash left torn are moved to metrics.torn.
    Raises RunFolderError where the files cannot be written.
    """

    def __init__(self, folder: Path, tensorboard: bool, resume_step: int | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._path = Path(folder) / METRICS
        self._clock = clock
        self._board: SummaryWriter | None = None
        with self._blamed():
            torn = _repair(self._path)
            if resume_step is None and self._path.exists() and self._path.stat().st_size:
                resume_step = 0
            if tensorboard:
                self._board = _open_board(self._path.parent / TENSORBOARD, resume_step)
        if resume_step is not None:
            self.event("resume", step=resume_step, **({"torn_lines": torn} if torn else {}))

    def step(self, record: Mapping[str, Any]) -> None:
        """One log line of training; `record` has `step`. Numbers go to TensorBoard as train/<name>, groups as train/<name>/<group>."""
        self._append("step", record)
        self._mirror("train", record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """One held-out measurement; `record` has `step` and `set`. Numbers go to TensorBoard as heldout/<set>/<name>."""
        self._append("evaluation", record)
        self._mirror(f"heldout/{record['set']}", record)

    def event(self, kind: str, **fields: Any) -> None:
        """Something that happened (`step` among its fields): a checkpoint, a resume, a skipped step. All lines so far become durable."""
        self._append(kind, fields)
        self.flush()

    def flush(self) -> None:
        """Make every line durable and TensorBoard's view complete: to be called before a checkpoint, which resume trusts."""
        with self._blamed():
            if self._path.exists():
                fsops.sync_file(self._path)
            if self._board is not None:
                self._board.flush()

    def close(self) -> None:
        self.flush()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, kind: str, fields: Mapping[str, Any]) -> None:
        self._time = self._clock()
        line = json.dumps({"kind": kind, "time": self._time, **_finite(fields)}, allow_nan=False, ensure_ascii=False)
        with self._blamed():
            fsops.append_line(self._path, line)

    def _mirror(self, tag: str, record: Mapping[str, Any]) -> None:
        if self._board is None:
            return
        with self._blamed():
            for name, value in _scalars(tag, record):
                self._board.add_scalar(name, value, record["step"], walltime=self._time)

    @contextlib.contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = error.filename or self._path
            raise RunFolderError(f"{where}: cannot be written: {error.strerror or error}: make room or check it, then resume") from error


_MEASURED = {
    "step": ("step", "loss", "grad_norm", "learning_rate", "tokens", "skipped"),
    "evaluation": ("step", "set", "loss", "tokens"),
}


class Digest:
    """SHA-256 of what step and evaluation records measured, a canonical JSON line each: equal for equal training, whatever its speed was.

    Clock, throughput and memory are left out, and so is a record of any other kind. The order of the records counts.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, record: Mapping[str, Any]) -> None:
        """`record` has `kind`, as a line of metrics.jsonl does."""
        if keys := _MEASURED.get(record["kind"]):
            self._hash.update(canonical_json(_finite([record["kind"], {key: record.get(key) for key in keys}])) + b"\n")

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def digest(records: Iterable[Mapping[str, Any]]) -> str:
    """The `Digest` of all of them, in hexadecimal."""
    found = Digest()
    for record in records:
        found.add(record)
    return found.hexdigest()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The effective records of a run, in the order they were made: what an uninterrupted run would have left, and the events.

    Of step and evaluation records with the same step (and set) the last counts, and none counts that lies beyond the step of a later
    resume. A torn last line is left out. An empty list where there are no metrics. Raises RunFolderError for a damaged line elsewhere.
    """
    path = Path(folder) / METRICS
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read: {error.strerror}: check the file and its permissions") from error
    records: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line break is torn, or nothing
        record = _record(line)
        if record is None:
            raise RunFolderError(f"{path}:{number}: not a metrics line: resume the run, which moves it to {TORN}, or remove it")
        if record["kind"] == "resume":
            records = {key: kept for key, kept in records.items() if key[0] == "event" or kept["step"] <= record["step"]}
        key = (record["kind"], record["step"], record.get("set")) if record["kind"] in ("step", "evaluation") else ("event", number)
        records.pop(key, None)  # so that one made again takes its new place
        records[key] = _restored(record)
    return list(records.values())


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("kind"), str)
    measured = whole and record["kind"] in ("step", "evaluation", "resume")
    if whole and record["kind"] == "evaluation" and not isinstance(record.get("set"), str):
        return None
    return record if whole and (not measured or type(record.get("step")) is int) else None


def _repair(path: Path) -> int:
    """Move torn and damaged lines to metrics.torn, so that every line left is whole. How many were moved."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    *lines, tail = data.split(b"\n")
    good = [line for line in lines if _record(line) is not None]
    torn = [line for line in lines if _record(line) is None] + ([tail] if tail else [])
    if torn:
        beside = path.with_name(TORN)
        kept = beside.read_bytes() if beside.exists() else b""
        fsops.write_bytes(beside, kept + b"\n".join(torn) + b"\n")  # first: a crash in between keeps a line twice, never not at all
        fsops.write_bytes(path, b"".join(line + b"\n" for line in good))
    return len(torn)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: item if key in ("kind", "set") else _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _scalars(tag: str, record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(f"{tag}/{name}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            yield f"{tag}/{name}", value


def _open_board(folder: Path, resume_step: int | None) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and wanted only here

    fsops.make_dirs(folder)
    return SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)  # type: ignore[no-untyped-call]
