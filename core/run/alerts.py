"""Which lines of metrics.jsonl are alerts, by the rules of a recipe (core/alert_rules.py): a pure state machine.

    alerts = Alerts(recipe.alerts)
    for record in effective_records(folder): alerts.add(record)      # after a resume: what the run has recorded so far
    for alert in alerts.add(line): ...                               # a new line

It sees the lines in their order and nothing else, no clock and no file, so after a resume it stands where it stood.
What follows from an alert: core/run/alert_actions.py.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weftrain.core.alert_rules import (
    AlertRule,
    Disk,
    HeldoutRise,
    Memory,
    MetricLimit,
    MovingRule,
    SkippedSteps,
    Throughput,
)
from weftrain.core.formats.units import gb, gib

Record = Mapping[str, Any]
DISK_KEY = "disk_free_bytes"  # in the lines of a run that has the rule `disk`
DEVICE_KEYS = ("device_peak_memory_max_bytes", "device_peak_memory_bytes")  # of all ranks, of rank 0
HOST_KEYS = ("memory_max_bytes", "memory_bytes")
_KINDS = ("step", "evaluation", "score")  # of the lines that rules see
_LEAST, _MOST_LOG = 1e-300, 690.0  # what a float holds of a logarithm
_TO_STANDARD_DEVIATION = 1.4826  # of a normal distribution, from its median absolute deviation


@dataclass(frozen=True)
class Reading:
    """What one line says to one rule. words: the value beside its limit, for people."""

    bad: bool
    metric: str
    value: float
    limit: float
    words: str


@dataclass(frozen=True)
class Alert:
    """A rule's alert. step: completed steps of the line that made it; since: of the first bad line before it."""

    rule: AlertRule
    step: int
    since: int
    reading: Reading

    @property
    def words(self) -> str:
        return self.reading.words


class Alerts:
    """The rules with all that they remember. A rule alerts once, and again only after `calm_lines` good lines."""

    def __init__(self, rules: Sequence[AlertRule]) -> None:
        self._watches = [_Watch(rule, _reader(rule)) for rule in rules]

    def add(self, record: Record) -> tuple[Alert, ...]:
        """Count a line of metrics.jsonl. The alerts that begin with it; other kinds of lines make none."""
        if record["kind"] not in _KINDS:
            return ()
        return tuple(alert for watch in self._watches if (alert := watch.add(record)) is not None)

    def unread(self) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
        """Of each rule whose metric none of the lines had: its name, the key, and the keys that they had."""
        return tuple(
            (watch.rule.label, watch.read.wanted, tuple(sorted(watch.read.others)))
            for watch in self._watches
            if isinstance(watch.read, _Limit | _Most) and not watch.read.seen and watch.read.others
        )


@dataclass
class _Stretch:
    """A stretch of bad lines of one series. calm: good lines in a row."""

    bad: int = 0
    since: int = 0
    alerted: bool = False
    calm: int = 0


@dataclass
class _Watch:
    rule: AlertRule
    read: Callable[[Record], Reading | None]
    stretches: dict[str, _Stretch] = field(default_factory=dict)  # by set; "" for steps

    def add(self, record: Record) -> Alert | None:
        reading = self.read(record)
        if reading is None:
            return None
        series = "" if record["kind"] == "step" else f"{record['kind']} {record['set']} {record.get('metric', '')}"
        stretch = self.stretches.setdefault(series, _Stretch())
        if not reading.bad:
            stretch.bad, stretch.calm = 0, stretch.calm + 1
            stretch.alerted = stretch.alerted and stretch.calm < self.rule.calm_lines
            return None
        stretch.since = stretch.since if stretch.bad else record["step"]
        stretch.bad, stretch.calm = stretch.bad + 1, 0
        if stretch.alerted or stretch.bad < self.rule.for_lines:
            return None
        stretch.alerted = True
        return Alert(self.rule, record["step"], stretch.since, reading)


def _reader(rule: AlertRule) -> Callable[[Record], Reading | None]:
    """What reads a line for `rule`: None where the line does not concern it."""
    match rule:
        case MovingRule():
            return _Moving(rule)
        case SkippedSteps():
            return _Skipped(rule)
        case Throughput():
            return _Slow(rule)
        case Disk():
            return _least(DISK_KEY, rule.below_gb * 1e9)
        case Memory():
            return _Most(DEVICE_KEYS if rule.of == "device" else HOST_KEYS, rule.above_gib * 2**30)
        case HeldoutRise():
            return _Rise(rule)
        case MetricLimit():
            return _Limit(rule)
        case _:
            raise TypeError(f"no rule: {rule!r}")


def _number(record: Record, key: str) -> float | None:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return None if math.isnan(value) else float(value)


class _Window:
    """The last `size` values, with their median at once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values = deque[float]()
        self._sorted: list[float] = []

    def add(self, value: float) -> None:
        self._values.append(value)
        insort(self._sorted, value)
        if len(self._values) > self._size:
            del self._sorted[bisect_left(self._sorted, self._values.popleft())]

    @property
    def is_full(self) -> bool:
        return len(self._values) == self._size

    @property
    def is_warm(self) -> bool:
        return 2 * len(self._values) >= self._size

    def median(self) -> float:
        return _median(self._sorted)

    def deviation(self) -> float:
        """The standard deviation, estimated from the median absolute deviation."""
        median = self.median()
        return _TO_STANDARD_DEVIATION * _median(sorted(abs(value - median) for value in self._sorted))


def _median(ascending: Sequence[float]) -> float:
    middle = len(ascending) // 2
    if len(ascending) % 2:
        return ascending[middle]
    return (ascending[middle - 1] + ascending[middle]) / 2


class _Moving:
    """A value beside the level of the lines before it, and the robust deviation of values from their levels. A skipped
    step is not counted.
    """

    def __init__(self, rule: MovingRule) -> None:
        self._rule, self._level, self._residuals = rule, _Window(rule.level_lines), _Window(rule.window)

    def __call__(self, record: Record) -> Reading | None:
        key = self._rule.metric
        value = _number(record, key) if record["kind"] == "step" and not record.get("skipped") else None
        if value is None:
            return None
        reading = self._reading(value) if self._residuals.is_warm else None
        if math.isfinite(value):
            scaled = self._scaled(value)
            if self._level.is_full:
                self._residuals.add(scaled - self._level.median())
            self._level.add(scaled)
        return reading

    def _scaled(self, value: float) -> float:
        return math.log(max(value, _LEAST)) if self._rule.logarithmic else value

    def _unscaled(self, value: float) -> float:
        return math.exp(min(value, _MOST_LOG)) if self._rule.logarithmic else value

    def _reading(self, value: float) -> Reading:
        rule, median = self._rule, self._level.median()
        level = self._unscaled(median)
        limit = level * rule.ratio
        if value > limit:  # the deviation takes longer, and few lines get here
            usual, deviation = median + self._residuals.median(), self._residuals.deviation()
            limit = max(limit, self._unscaled(usual + rule.deviations * deviation))
            if value > limit:
                far = f"{(self._scaled(value) - usual) / deviation:.1f}" if deviation else "infinitely many"
                words = (
                    f"{rule.metric} {value:.6g} is {far} robust standard deviations above {level:.6g}, the median of "
                    f"the last {rule.level_lines} lines"
                )
                return Reading(True, rule.metric, value, limit, words)
        return Reading(False, rule.metric, value, limit, "")


class _Slow:
    def __init__(self, rule: Throughput) -> None:
        self._rule, self._window = rule, _Window(rule.window)

    def __call__(self, record: Record) -> Reading | None:
        value = _number(record, "tokens_per_second") if record["kind"] == "step" else None
        if value is None or not math.isfinite(value):
            return None
        reading = None
        if self._window.is_warm:
            median = self._window.median()
            words = (
                f"{value:,.0f} tokens/s are {value / median:.0%} of the median of the last {self._rule.window} lines"
            )
            bad = value < (limit := median * self._rule.share)
            reading = Reading(bad, "tokens_per_second", value, limit, words if bad else "")
        self._window.add(value)
        return reading


class _Skipped:
    def __init__(self, rule: SkippedSteps) -> None:
        self._rule, self._steps = rule, deque[int]()

    def __call__(self, record: Record) -> Reading | None:
        if record["kind"] != "step":
            return None
        if record.get("skipped"):
            self._steps.append(record["step"])
        while self._steps and self._steps[0] <= record["step"] - self._rule.window:
            self._steps.popleft()
        count = len(self._steps)
        words = f"{count} of the last {self._rule.window} steps were skipped"
        return Reading(count >= self._rule.steps, "skipped", count, self._rule.steps, words)


def _least(key: str, limit: float) -> Callable[[Record], Reading | None]:
    def read(record: Record) -> Reading | None:
        value = _number(record, key) if record["kind"] == "step" else None
        if value is None:
            return None
        return Reading(value < limit, key, value, limit, f"{gb(value)} of disk are free, less than {gb(limit)}")

    return read


class _Most:
    """The first of `keys` that a line has."""

    def __init__(self, keys: Sequence[str], limit: float) -> None:
        self._keys, self._limit, self.seen, self.others = keys, limit, False, set[str]()

    @property
    def wanted(self) -> str:
        return self._keys[-1]

    def __call__(self, record: Record) -> Reading | None:
        if record["kind"] != "step":
            return None
        for key in self._keys:
            if (value := _number(record, key)) is not None:
                self.seen = True
                words = f"{key} is {gib(value)}, more than {gib(self._limit)}"
                return Reading(value > self._limit, key, value, self._limit, words)
        self.others.update(numeric_keys(record))
        return None


class _Rise:
    def __init__(self, rule: HeldoutRise) -> None:
        self._rule, self._lowest = rule, dict[str, float]()

    def __call__(self, record: Record) -> Reading | None:
        if record["kind"] != "evaluation" or self._rule.set not in (None, record["set"]):
            return None
        name, loss = record["set"], _number(record, "loss")
        if loss is None:
            return None
        lowest = self._lowest.get(name, math.inf)
        self._lowest[name] = min(lowest, loss)
        words = f"held-out loss of {name} is {loss:.4f}, {loss - lowest:.4f} above the run's lowest, {lowest:.4f}"
        bad = loss > (limit := lowest + self._rule.by)
        return Reading(bad, "loss", loss, limit, words if bad else "")


class _Limit:
    """A rule over any key. others: the keys that lines had while none had this one."""

    def __init__(self, rule: MetricLimit) -> None:
        self._rule, self.seen, self.others = rule, False, set[str]()

    @property
    def wanted(self) -> str:
        return self._rule.metric

    def __call__(self, record: Record) -> Reading | None:
        rule = self._rule
        if record["kind"] != rule.lines or rule.set not in (None, record.get("set")):
            return None
        *outer, key = rule.metric.split(".")
        inner: Any = record
        for part in outer:
            inner = inner.get(part) if isinstance(inner, Mapping) else None
        value = _number(inner, key) if isinstance(inner, Mapping) else None
        if value is None:
            if not self.seen:
                self.others.update(numeric_keys(record))
            return None
        self.seen = True
        if rule.above is not None:
            limit, bad, words = rule.above, value > rule.above, "above"
        else:
            assert rule.below is not None
            limit, bad, words = rule.below, value < rule.below, "below"
        return Reading(bad, rule.metric, value, limit, f"{rule.metric} {value:.6g} is {words} {limit:.6g}")


def numeric_keys(record: Record) -> Iterable[str]:
    """The keys of a line whose values are numbers; within another one, as 'learning_rate.matrices'."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from (f"{key}.{inner}" for inner in numeric_keys(value))
        elif _number(record, key) is not None and key != "time":
            yield key
