"""Model FLOPs utilisation (MFU) of a run: one peak, recorded with its origin, and lines that can be computed again from
the file.

Lines of metrics.jsonl of the kinds `start` and `peak` hold flops_per_token, peak_flops, peak_origin and peak_machine. A
step line's model_flops_utilization is its tokens_per_second x flops_per_token / peak_flops, both of the newest such
line before it. The peak is measured at the first start on a machine and kept for later starts there. A busy machine
makes it too low; so where a step achieves more than the peak, the peak is measured again and recorded before the step's
line, and no line says more than 100 %.
"""

from __future__ import annotations

import math
import platform
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weftrain.core.formats.canonical import parse_json, sha256_json
from weftrain.core.run.metrics_lines import check_record
from weftrain.core.run.step_lines import lines_from_the_end

if TYPE_CHECKING:
    from weftrain.core.backend import Fingerprint

UNKNOWN = "unknown"
EVENTS = ("start", "peak", "end")  # `end` had a second measurement in earlier versions


@dataclass(frozen=True)
class Peak:
    """FLOP/s (None: unknown) and where the figure comes from. machine: names all it depends on; empty: not recorded."""

    flops: float | None
    origin: str
    machine: str = ""

    def __str__(self) -> str:
        return "unknown" if self.flops is None else f"{self.flops / 1e9:,.0f} GFLOP/s ({self.origin})"

    def of(self, devices: int) -> Peak:
        """Of so many devices like the one it was measured on."""
        return (
            self
            if self.flops is None or devices == 1
            else replace(self, flops=self.flops * devices, origin=f"{devices} x {self.origin}")
        )

    def raised(self, achieved_flops: float, measure: Callable[[], Peak] | None = None) -> Peak:
        """This peak or, if more FLOP/s were achieved, the larger of a new measurement and what was achieved."""
        if self.flops is None or not self.flops < achieved_flops < math.inf:
            return self
        again = self if measure is None else replace(measure(), machine=self.machine)
        if again.flops is not None and again.flops >= achieved_flops:
            return again
        return replace(self, flops=achieved_flops, origin=f"achieved by a step itself; {again}")


def machine_name(fingerprint: Fingerprint, compute: str) -> str:
    """A name for what a peak depends on: host, device, threads, ranks, dtype. A hash: records name no host."""
    device = [fingerprint.device_type, fingerprint.device, fingerprint.threads, fingerprint.ranks]
    return sha256_json([platform.node(), platform.processor(), *device, compute])[:16]


@dataclass(frozen=True)
class Speed:
    """Turns tokens per second into MFU, which an unknown peak makes 'unknown'. measure: takes the peak again."""

    flops_per_token: float
    peak: Peak
    measure: Callable[[], Peak] | None = None

    def allowing(self, tokens_per_second: float) -> Speed:
        """This, or the same with a higher peak where so many tokens a second are more than the peak allows."""
        peak = self.peak.raised(tokens_per_second * self.flops_per_token, self.measure)
        return self if peak is self.peak else replace(self, peak=peak)

    def utilization(self, tokens_per_second: float) -> float | str:
        """Model FLOP/s over the peak; recomputation is not counted."""
        known = self.peak.flops is not None and math.isfinite(tokens_per_second)
        return tokens_per_second * self.flops_per_token / self.peak.flops if known and self.peak.flops else UNKNOWN

    def as_record(self) -> dict[str, Any]:
        """The fields of the line that states the peak."""
        peak = {"peak_flops": self.peak.flops, "peak_origin": self.peak.origin, "peak_machine": self.peak.machine}
        return {"flops_per_token": self.flops_per_token, **peak}


def recorded_peak(metrics: Path, machine: str) -> Peak | None:
    """The newest peak that a run's metrics.jsonl states for this machine; None where it states none."""
    try:
        for line in lines_from_the_end(metrics, b'"peak_machine"'):
            try:
                record = parse_json(line)
                check_record(record)
            except ValueError:
                continue  # the readers of the measurements report a damaged line
            if (
                record["kind"] in EVENTS
                and record.get("peak_machine") == machine
                and (peak := _peak(record)) is not None
            ):
                return peak
    except FileNotFoundError:
        pass
    return None


class RunUtilization:
    """MFU of a run, from its effective records in their order: `add` each, then ask `result`.

    It is the median over the logged steps after the first tenth, as tokens per second are, of the steps on the machine
    that the run ended on alone: each against the highest peak that was recorded for that machine.
    """

    def __init__(self) -> None:
        self._per_token, self._machine = math.nan, ""
        self._best: dict[str, Peak] = {}
        self._achieved = array("d")  # FLOP/s of the steps since the run came to this machine
        self._before = self._steps = 0  # steps before those, and all

    def add(self, record: Mapping[str, Any]) -> None:
        """The next record; one that tells neither a step nor a peak changes nothing."""
        if record["kind"] == "step":
            self._steps += 1
            self._achieved.append(float(record.get("tokens_per_second", math.nan)) * self._per_token)
        elif record["kind"] in EVENTS and (peak := _peak(record)) is not None:
            if peak.machine != self._machine:
                self._achieved, self._before, self._machine = array("d"), self._steps, peak.machine
            self._per_token = float(record.get("flops_per_token", math.nan))
            if (best := self._best.get(peak.machine)) is None or (peak.flops or 0.0) > (best.flops or 0.0):
                self._best[peak.machine] = peak

    def add_steps(self, tokens_per_second: np.ndarray) -> None:
        """`add` for many records of steps, float64 [n]."""
        self._achieved.frombytes((tokens_per_second * self._per_token).tobytes())
        self._steps += len(tokens_per_second)

    def result(self) -> tuple[float, Peak] | None:
        """The share, at most 1, and the peak; None: unknown."""
        achieved = np.array(self._achieved, np.float64)[max(0, self._steps // 10 - self._before) :]
        warm = achieved[np.isfinite(achieved)]
        peak = self._best.get(self._machine)
        if not len(warm) or peak is None or not peak.flops:
            return None
        share = float(np.median(warm)) / peak.flops
        return (share, peak) if share <= 1 else None  # an earlier version's peak, too low to measure anything against


def run_utilization(records: Iterable[Mapping[str, Any]]) -> tuple[float, Peak] | None:
    """The `RunUtilization` of all of them."""
    found = RunUtilization()
    for record in records:
        found.add(record)
    return found.result()


def _peak(record: Mapping[str, Any]) -> Peak | None:
    flops = record.get("peak_flops")
    if not isinstance(flops, (int, float)) or not 0 < flops < math.inf:
        return None
    return Peak(float(flops), str(record.get("peak_origin", "measured")), str(record.get("peak_machine", "")))
