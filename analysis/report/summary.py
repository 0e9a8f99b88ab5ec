"""A finished run in a few lines, computed from its metrics.jsonl alone: of a month of training, from the newest lines.

Tokens per second is the median over the logged steps after the first tenth: a slow start (compilation, cold caches),
evaluation and checkpoints are not in it.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftrain.core.run.metrics import METRICS, heldout_label
from weftrain.core.run.metrics_lines import StepColumns, checked_line, counted_columns
from weftrain.core.run.speed import EVENTS, RunUtilization
from weftrain.core.run.step_lines import lines_from_the_end, newest_lines

_NEWEST_BYTES = 32 << 20  # what is read of a long file, some sixty thousand steps in half a second


@dataclass(frozen=True)
class RunSummary:
    """What a run reached. Losses are means over tokens; heldout maps a set and its rows to (first, last). counted:
    logged steps that the figures are of; newest: the run has more, and these are its newest.
    """

    steps: int  # completed
    counted: int
    newest: bool
    # of the counted ones, left out because loss or gradient norm was not finite: the others are updates
    skipped: int
    tokens: int
    loss_first: float  # of steps that were not skipped; NaN where there is none
    loss_last: float
    heldout: dict[str, tuple[float, float]]
    tokens_per_second: float
    model_flops_utilization: float | None  # None: unknown
    peak_flops: float | None  # that it was measured against


def summarize(folder: Path) -> RunSummary | None:
    """The summary of the run in `folder`, or None if it logged no step (of a long one, none among its newest lines)."""
    path = folder / METRICS
    begin = newest_lines(path, _NEWEST_BYTES) if path.exists() else 0
    newest: StepColumns | dict[str, Any] | None = None  # what the last step line is in
    skipped, made = 0, list[float]()  # the losses of the first and the newest step that was not skipped
    speeds, utilization = array("d"), RunUtilization()
    heldout: dict[str, tuple[float, float]] = {}
    if begin and (told := _newest_peak(path, begin)) is not None:
        utilization.add(told)
    for line in counted_columns(path, ("loss", "skipped", "tokens_per_second").__contains__, begin=begin):
        if line.left_by:
            continue
        if isinstance(line, StepColumns):
            newest, counted = line, line.column("loss")[line.column("skipped") != 1].tolist()
            skipped += len(line.steps) - len(counted)
            made = [*made, *counted][:1] + [*made, *counted][-1:]
            column = line.column("tokens_per_second")
            speeds.frombytes(column.tobytes())
            utilization.add_steps(column)
            continue
        record = line.record
        utilization.add(record)
        if record["kind"] == "step":
            newest = record
            if record.get("skipped"):
                skipped += 1
            else:
                made = [*made[:1], float(record["loss"])]
            speeds.append(record.get("tokens_per_second", math.nan))
        elif record["kind"] == "evaluation":
            name, loss = heldout_label(record), float(record["loss"])
            heldout[name] = (heldout[name][0] if name in heldout else loss, loss)
    if newest is None:
        return None
    last = checked_line(newest.last) if isinstance(newest, StepColumns) else newest
    made = made or [math.nan]
    rates = [rate for rate in speeds[len(speeds) // 10 :] if math.isfinite(rate)]
    tokens_per_second = statistics.median(rates) if rates else math.nan
    used = utilization.result()
    return RunSummary(
        steps=last["step"],
        counted=len(speeds),
        newest=begin > 0,
        skipped=skipped,
        tokens=last.get("tokens", 0),
        loss_first=made[0],
        loss_last=made[-1],
        heldout=heldout,
        tokens_per_second=tokens_per_second,
        model_flops_utilization=used[0] if used else None,
        peak_flops=used[1].flops if used else None,
    )


def _newest_peak(path: Path, end: int) -> dict[str, Any] | None:
    """The newest event before this byte that tells a peak, for the steps that follow it."""
    for line in lines_from_the_end(path, b'"peak_flops"', end):
        with contextlib.suppress(ValueError):  # the start that follows names a damaged line
            record = checked_line(line)
            if record["kind"] in EVENTS:
                return record
    return None
