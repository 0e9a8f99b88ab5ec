"""A run's measurements as curves, in one pass over metrics.jsonl: the effective line, and what a rollback abandoned.

Only numbers are kept, sixteen bytes a point, so a run of millions of logged steps takes some hundred megabytes.
`counted_columns` says which records count; the others are drawn faintly, with the ledger's reason.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weftrain.analysis.report.samples import Samples
from weftrain.core.run.metrics import METRICS, heldout_label
from weftrain.core.run.metrics_lines import (
    MAX_STEP,
    MEASURED,
    MetricsRecord,
    StepColumns,
    checked_line,
    counted_columns,
)
from weftrain.core.run.scores import SCORE
from weftrain.core.run.speed import RunUtilization

Entry = Mapping[str, Any]
_RATE = "learning_rate/"
_LARGEST = 1e300  # JSON may hold integers that no float does
MAX_ALERTS = 10_000
_PENDING = 1 << 62  # the "line" of a resume that did not come yet: behind all others


@dataclass(frozen=True)
class MetricChart:
    """One chart of the report page: the figure that step records hold under `key`, drawn as a line called `name`."""

    key: str
    title: str
    unit: str
    name: str
    rate: bool = False  # the axis begins at zero, and the run's median is drawn
    scale: float = 1.0  # what a logged figure is divided by


# A figure that the trainer logs gets a chart by an entry here and nothing else: docs/add-a-metric.md.
METRIC_CHARTS = (
    MetricChart("grad_norm", "Gradient norm", "before clipping", "gradient norm"),
    MetricChart("reward_margin", "Reward margin", "chosen minus rejected", "reward margin"),
    MetricChart("reward_accuracy", "Pairs in order", "share, chosen above rejected", "reward accuracy"),
    MetricChart("tokens_per_second", "Throughput", "tokens/s", "tokens/s", rate=True),
    MetricChart("step_ms", "Time of a step", "ms", "step", rate=True),
    MetricChart("data_wait_ms", "Waiting for data", "ms a step", "data wait"),
    MetricChart("checkpoint_stall_ms", "Waiting for a checkpoint", "ms, of the last save", "checkpoint stall"),
    MetricChart("memory_bytes", "Resident memory", "GiB", "resident memory", scale=2**30),
    MetricChart("device_peak_memory_bytes", "Peak device memory", "GiB", "device memory", scale=2**30),
)


class Points:
    """(completed steps, value) in the file's order, stored as columns. A value may be nan or infinite."""

    def __init__(self, points: Iterable[tuple[int, float]] = (), scale: float = 1.0) -> None:
        self._steps, self._values, self._scale = array("q"), array("d"), scale  # of the newest points
        self._before: list[tuple[np.ndarray, np.ndarray]] = []
        for step, value in points:
            self.add(step, value)

    def add(self, step: int, value: float) -> None:
        self._steps.append(step)
        self._values.append(value)

    def extend(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Add many points, int64 and float64 [n], which stay as they are."""
        self._settle()
        self._before.append((steps, values))

    def _settle(self) -> None:
        """Put the points that were added one by one behind those that came as columns."""
        if self._steps:
            self._before.append((np.array(self._steps, np.int64), np.array(self._values, np.float64)))
            self._steps, self._values = array("q"), array("d")

    def _joined(self) -> tuple[np.ndarray, np.ndarray]:
        self._settle()
        if len(self._before) != 1:
            steps, values = zip(*self._before, strict=True) if self._before else ((), ())
            self._before = [
                (np.concatenate((*steps, np.empty(0, np.int64))), np.concatenate((*values, np.empty(0, np.float64))))
            ]
        return self._before[0]

    @property
    def steps(self) -> np.ndarray:
        """int64 [n]"""
        return self._joined()[0]

    @property
    def values(self) -> np.ndarray:
        """float64 [n], divided by `scale`"""
        return self._joined()[1] / self._scale

    def __len__(self) -> int:
        return len(self._steps) + sum(len(steps) for steps, _ in self._before)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return zip(self.steps.tolist(), self.values.tolist(), strict=True)


@dataclass(frozen=True)
class LoggedCurve:
    """One line of a chart. abandoned: why it does not count (a branch); None for the effective line."""

    name: str
    points: Points
    abandoned: str | None = None


@dataclass
class _Measurements:
    """The measurements of the effective line, or of one abandoned segment."""

    training: dict[str, Points] = field(default_factory=lambda: {key: Points(scale=scale) for key, scale in _keys()})
    rates: dict[str, Points] = field(default_factory=dict)
    heldout: dict[str, Points] = field(default_factory=dict)
    scores: dict[tuple[str, str], Points] = field(default_factory=dict)  # by metric and set
    last_time: float = -math.inf
    evaluation_s: float = 0.0
    unsettled: list[StepColumns] = field(default_factory=list)

    def add(self, record: MetricsRecord) -> None:
        step = record["step"]
        self.last_time = record.get("time", self.last_time)
        if math.isfinite(took_s := record.get("evaluation_s", 0.0)):
            self.evaluation_s += took_s
        if record["kind"] == "evaluation":
            self.heldout.setdefault(heldout_label(record), Points()).add(step, record["loss"])
            return
        if record["kind"] == SCORE:
            self.scores.setdefault((record["metric"], record["set"]), Points()).add(step, record["value"])
            return
        self.settle()
        for key, points in self.training.items():
            value = record.get(key)
            # a key that no reader checks may hold anything
            if isinstance(value, float) or (type(value) is int and abs(value) < _LARGEST):
                points.add(step, value)
        for name, rate in record.get("learning_rate", {}).items():
            if name not in self.rates:
                self.rates[name] = Points()
            self.rates[name].add(step, rate)

    def add_columns(self, columns: StepColumns) -> None:
        if "time" in columns.figures:
            self.last_time = float(columns.figures["time"][-1])
        self.unsettled.append(columns)

    def settle(self) -> None:
        """Join the columns since the last call, which are many and short."""
        every, self.unsettled = self.unsettled, []
        all_steps = _joined(one.steps for one in every)
        for name in dict.fromkeys(name for columns in every for name in columns.figures):
            if name in self.training:
                points = self.training[name]
            elif name.startswith(_RATE):
                points = self.rates.setdefault(name.removeprefix(_RATE), Points())
            else:
                continue
            having = [columns for columns in every if name in columns.figures]
            steps = all_steps if len(having) == len(every) else _joined(one.steps for one in having)
            points.extend(steps, _joined(one.figures[name] for one in having))


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    found = list(parts)
    return np.concatenate(found) if found else np.empty(0)


def _is_read(name: str) -> bool:
    """Whether this figure of a step line is read here."""
    return name in ("time", "skipped") or name.startswith(_RATE) or name in dict(_keys())


def _keys() -> Iterator[tuple[str, float]]:
    yield "loss", 1.0
    yield from ((chart.key, chart.scale) for chart in METRIC_CHARTS)


@dataclass
class Curves:
    """Contents of the file. starts: for each start asked about, the last completed step before the next; -1: none."""

    lines: int = 0
    own: _Measurements = field(default_factory=_Measurements)
    abandoned: list[tuple[str, _Measurements]] = field(default_factory=list)  # why, oldest first
    last_step: MetricsRecord | None = None
    restarts: list[int] = field(default_factory=list)
    skips: list[int] = field(default_factory=list)
    utilization: RunUtilization = field(default_factory=RunUtilization)
    samples: Samples = field(default_factory=Samples)  # of the effective line
    alerts: list[tuple[int, str]] = field(default_factory=list)  # step and words, of every line; the first MAX_ALERTS
    reached: int = 0
    starts: list[int] = field(default_factory=list)

    def logged(self, key: str, name: str) -> tuple[LoggedCurve, ...]:
        """The effective line first, if it has a point, then the abandoned ones."""
        found = [
            LoggedCurve(name, self.own.training[key]),
            *(LoggedCurve(name, part.training[key], why) for why, part in self.abandoned),
        ]
        return tuple(curve for curve in found if len(curve.points))

    def heldout(self) -> tuple[LoggedCurve, ...]:
        parts: list[tuple[str | None, _Measurements]] = [(None, self.own), *self.abandoned]
        return tuple(
            LoggedCurve(f"held-out {name}", points, why)
            for why, part in parts
            for name, points in sorted(part.heldout.items())
        )

    def scores(self) -> tuple[tuple[str, tuple[LoggedCurve, ...]], ...]:
        """The curves of each metric, a curve for each set; those of a score that could not be made have no metric."""
        parts: list[tuple[str | None, _Measurements]] = [(None, self.own), *self.abandoned]
        metrics = sorted({metric for _, part in parts for metric, _ in part.scores if metric})
        return tuple(
            (
                metric,
                tuple(
                    LoggedCurve(name, points, why)
                    for why, part in parts
                    for (other, name), points in sorted(part.scores.items())
                    if other == metric
                ),
            )
            for metric in metrics
        )

    def learning_rates(self) -> tuple[LoggedCurve, ...]:
        """A curve for each parameter group; groups with identical rates are one."""
        alike: dict[tuple[bytes, bytes], list[str]] = {}
        for name, points in self.own.rates.items():
            alike.setdefault((points.steps.tobytes(), points.values.tobytes()), []).append(name)
        return tuple(LoggedCurve(", ".join(names), self.own.rates[names[0]]) for names in alike.values())

    def median(self, key: str) -> float | None:
        """Median over the logged steps after the first tenth, as analysis/report/summary.py defines tokens/s."""
        speeds = self.own.training[key].values
        warm = speeds[len(speeds) // 10 :]
        warm = warm[np.isfinite(warm)]
        return float(np.median(warm)) if len(warm) else None


def read_curves(folder: Path, entries: Sequence[Entry], started: Sequence[float] = ()) -> Curves:
    """Read the metrics of the run in `folder`. started: times of its starts, seconds since 1970; see Curves.starts.

    entries: the ledger's, which distinguish rollbacks from crashes and include rollbacks not yet followed by a resume.
    Raises RunFolderError for a damaged line.
    """
    found = Curves(starts=[-1] * len(started))
    begins = np.array(list(itertools.accumulate(started, max)), np.float64)
    pending = _pending(entries)
    rollbacks = [entry for entry in entries if entry["kind"] == "rollback"]
    parts: dict[int, _Measurements] = {}
    words: dict[int, str] = {}
    newest = b""  # the last step line that counts, where it came among columns
    columns: list[StepColumns] = []
    for line in counted_columns(folder / METRICS, _is_read, MAX_STEP if pending is None else pending[0]):
        if isinstance(line, StepColumns):
            columns.append(line)
            found.lines = line.number
            if line.left_by:
                parts.setdefault(line.left_by, _Measurements()).add_columns(line)
            else:
                _add_columns(found, line)
                newest = line.last
            continue
        number, record, left_by = line
        kind = record["kind"]
        found.lines = number
        if kind == "step":
            _note_start(found, begins, record)
        if kind == "sample":
            if left_by == 0 and (pending is None or record["step"] <= pending[0]):
                found.samples.add(record)
        elif kind not in MEASURED:
            _event(found, record)
            if kind == "resume" and number in parts:
                words[number] = _why(rollbacks, record, parts[number].last_time)
        elif left_by > 0:
            parts.setdefault(left_by, _Measurements()).add(record)
        elif left_by == 0 and pending is not None and record["step"] > pending[0]:
            parts.setdefault(_PENDING, _Measurements()).add(record)
            words[_PENDING] = pending[1]
        elif left_by == 0:
            found.own.add(record)
            found.utilization.add(record)
            if kind == "step":
                found.last_step, newest = record, b""
                if record.get("skipped"):
                    found.skips.append(record["step"])
    if newest:
        found.last_step = checked_line(newest)
    _note_starts(found, begins, columns)
    for part in (found.own, *parts.values()):
        part.settle()
    found.abandoned = [(words[line], parts[line]) for line in sorted(parts)]
    return found


def _add_columns(found: Curves, columns: StepColumns) -> None:
    """Count columns of the effective line in."""
    found.own.add_columns(columns)
    found.utilization.add_steps(columns.column("tokens_per_second"))
    if "skipped" in columns.figures:
        found.skips += columns.steps[columns.figures["skipped"]].tolist()


def _note_starts(found: Curves, begins: np.ndarray, columns: Sequence[StepColumns]) -> None:
    """`_note_start` for all records that came as columns."""
    found.reached = max(found.reached, int(_joined(one.steps for one in columns).max(initial=0)))
    timed = [one for one in columns if "time" in one.figures]
    if timed and len(begins):
        steps, times = _joined(one.steps for one in timed), _joined(one.figures["time"] for one in timed)
        places = np.searchsorted(begins, times, side="right") - 1
        starts = np.array(found.starts, np.int64)
        np.maximum.at(starts, places[places >= 0], steps[places >= 0])
        found.starts = starts.tolist()


def _note_start(found: Curves, begins: np.ndarray, record: MetricsRecord) -> None:
    """Note how far the start before this record got. A clock that was set back is treated as having stopped."""
    found.reached = max(found.reached, record["step"])
    place = int(np.searchsorted(begins, record.get("time", -math.inf), side="right")) - 1
    if place >= 0 and found.starts[place] < record["step"]:
        found.starts[place] = record["step"]


def _event(found: Curves, record: MetricsRecord) -> None:
    if record["kind"] == "resume":
        found.restarts.append(record["step"])
    if record["kind"] == "alert" and len(found.alerts) < MAX_ALERTS:
        found.alerts.append((record["step"], record["words"]))
    found.utilization.add(record)


def _pending(entries: Sequence[Entry]) -> tuple[int, str] | None:
    """Step and words of the rollbacks since the last start, for which metrics.jsonl has no resume yet."""
    found = None
    for entry in entries:
        if entry["kind"] in ("start", "resume"):
            found = None
        elif entry["kind"] == "rollback" and (found is None or entry["step"] < found[0]):
            found = (
                entry["step"],
                f"branch {entry['branch']}, abandoned by the rollback to step {entry['step']:,}: {entry['reason']}",
            )
    return found


def _why(rollbacks: Sequence[Entry], resume: MetricsRecord, last: float) -> str:
    for entry in rollbacks:
        if entry["step"] == resume["step"] and last <= entry["time"] <= resume.get("time", math.inf):
            return f"branch {entry['branch']}, abandoned by the rollback to step {entry['step']:,}: {entry['reason']}"
    return f"made again after the restart at step {resume['step']:,}"
