"""Benchmark reports beside each other, of one machine or of several: speeds with intervals, ratios to the first.

A side is one configuration on one machine: a report, or the reports of several interleaved rounds. A ratio is of the
time a token takes, in wall-clock time and, on the same machine, in units of a matrix product timed beside each step.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weftrain.analysis.bench.report import UNKNOWN, BenchReport, ReportError, configuration_differences
from weftrain.analysis.bench.timings import Difference, difference, median_interval
from weftrain.analysis.figure import new_figure, picture
from weftrain.core.formats.units import gib

_MACHINE = ("device", "cpu", "cpu_count", "memory_bytes")  # of `environment`: reports equal in these are of one machine


@dataclass(frozen=True)
class Side:
    """One configuration on one machine. to_first, in_probes: time a token relative to the first side's, in wall-clock
    time and in units of the probe; None for the first side, and in_probes for another machine or without probes.
    """

    label: str
    reports: tuple[BenchReport, ...]
    tokens_per_second: float
    low: float  # 95 % interval of tokens_per_second
    high: float
    to_first: Difference | None
    in_probes: Difference | None
    differences: tuple[str, ...]

    @property
    def judged(self) -> Difference | None:
        """What the verdict is of."""
        return self.in_probes or self.to_first

    @property
    def mfu(self) -> float | str:
        """Median share of the measured peak, or 'unknown'."""
        shares = [report.efficiency.mfu_measured for report in self.reports]
        known = [share for share in shares if not isinstance(share, str)]
        return statistics.median(known) if len(known) == len(shares) else UNKNOWN

    @property
    def speed_ratio(self) -> tuple[float, float, float] | None:
        """tokens/s over the first side's, with its 95 % interval."""
        found = self.to_first
        return None if found is None else (1 / found.ratio, 1 / found.high, 1 / found.low)


def machine_of(report: BenchReport) -> str:
    """The machine in words: the CPU, its cores and memory."""
    about = report.environment
    return f"{about['cpu']}, {about['cpu_count']} cores, {gib(about['memory_bytes'])}"


def device_of(report: BenchReport) -> str:
    """The devices that trained: '8 x NVIDIA A100-SXM4-80GB', '2 processes on the CPU'."""
    count, device = report.shape["devices"], report.environment["device"]
    if device == report.environment["cpu"]:
        return "CPU" if count == 1 else f"{count} processes on the CPU"
    return f"{count} x {device}" if count > 1 else str(device)


def same_machine(a: BenchReport, b: BenchReport) -> bool:
    """Whether two reports tell of the same kind of machine. Its name is in no report."""
    return all(a.environment.get(key) == b.environment.get(key) for key in _MACHINE)


def sides_of(reports: Sequence[BenchReport], rounds: int = 1) -> list[Side]:
    """Sides A, B, ... of reports in the order A1 B1 .. A2 B2 ... Raises ReportError if they do not come out even."""
    if len(reports) % rounds or len(reports) < 2 * rounds:
        raise ReportError(f"{len(reports)} reports are not {rounds} rounds of two or more sides: A1 B1 A2 B2 ...")
    count = len(reports) // rounds
    groups = [tuple(reports[number::count]) for number in range(count)]
    return [_side(_label(number), group, groups[0] if number else None) for number, group in enumerate(groups)]


def _label(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"R{number + 1}"


def _side(label: str, reports: tuple[BenchReport, ...], first: tuple[BenchReport, ...] | None) -> Side:
    interval = median_interval(_ms_per_token(reports))
    speed = statistics.median(report.speed.tokens_per_second for report in reports)
    to_first = in_probes = None
    apart: tuple[str, ...] = ()
    if first is not None:
        names = ("A", label)
        to_first = difference(_ms_per_token(first), _ms_per_token(reports), names=names)
        ours, theirs = _probes_per_token(first), _probes_per_token(reports)
        if ours and theirs and all(same_machine(first[0], report) for report in (*first, *reports)):
            in_probes = difference(ours, theirs, names=names)
        apart = tuple(configuration_differences(first[0], reports[0]))
    return Side(label, reports, speed, 1e3 / interval.high, 1e3 / interval.low, to_first, in_probes, apart)


def _ms_per_token(reports: Sequence[BenchReport]) -> list[list[float]]:
    """Of each counted step, a list a round."""
    return [[ms / one.shape["tokens_per_step"] for ms in values] for one in reports for values in one.counted]


def _probes_per_token(reports: Sequence[BenchReport]) -> list[list[float]]:
    """The same in units of the probe; [] unless every report has probes."""
    found = [(one.shape["tokens_per_step"], one.in_probes) for one in reports]
    if any(rounds is None for _, rounds in found):
        return []
    return [[value / tokens for value in values] for tokens, rounds in found for values in rounds or []]


def as_json(sides: Sequence[Side]) -> dict[str, Any]:
    """What `bench compare --json` prints; docs/json-output.md names the fields."""
    return {"schema_version": 1, "sides": [_side_json(side) for side in sides]}


def _side_json(side: Side) -> dict[str, Any]:
    report, judged, ratio = side.reports[0], side.judged, side.speed_ratio or (None, None, None)
    times = (None, None, None) if judged is None else (judged.ratio, judged.low, judged.high)
    return {
        "label": side.label,
        "name": report.name,
        "machine": machine_of(report),
        "device": report.environment["device"],
        "devices": report.shape["devices"],
        "recipe": report.identity["recipe"]["name"],
        "recipe_sha256": report.identity["recipe_sha256"],
        "reports": len(side.reports),
        "tokens_per_second": side.tokens_per_second,
        "tokens_per_second_low": side.low,
        "tokens_per_second_high": side.high,
        "mfu_measured": side.mfu,
        **dict(zip(("ratio", "ratio_low", "ratio_high"), ratio, strict=True)),
        **dict(zip(("time_ratio", "time_ratio_low", "time_ratio_high"), times, strict=True)),
        "time_ratio_unit": None if judged is None else "probe" if side.in_probes else "wall clock",
        "verdict": None if judged is None else judged.verdict,
        "correct": report.correctness.passed,
        "differences": list(side.differences),
    }


def plot(sides: Sequence[Side], suffix: str = ".png") -> bytes:
    """tokens/s of every side with its interval, as a picture. Raises DataError without matplotlib."""
    figure = new_figure(9, 1.2 + 0.55 * len(sides))
    axes = figure.subplots()
    places = range(len(sides))
    speeds = [side.tokens_per_second for side in sides]
    reach = [
        [max(0.0, side.tokens_per_second - side.low) for side in sides],
        [max(0.0, side.high - side.tokens_per_second) for side in sides],
    ]
    axes.barh(places, speeds, xerr=reach, color="#4269d0", ecolor="#ff725c", capsize=4)
    axes.set_yticks(places, [f"{one.label}: {one.reports[0].name}\n{device_of(one.reports[0])}" for one in sides])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens/s, with the 95 % interval of the median")
    return picture(figure, suffix)
