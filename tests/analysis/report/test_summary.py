"""What the end of a run prints, from a metrics file written by hand; and a peak that is measured, sourced or
unknown.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weftrain.analysis.report import summary
from weftrain.analysis.report.summary import summarize


def write(folder: Path, *records: dict[str, Any]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"time": 0.0, **record}) + "\n" for record in records))


def step(number: int, loss: float, speed: float) -> dict[str, Any]:
    return {"kind": "step", "step": number, "loss": loss, "tokens": number * 10, "tokens_per_second": speed}


FEW, ALL = {"rows": 2, "rows_available": 8}, {"rows": 8, "rows_available": 8}
HELD: list[tuple[int, float, dict[str, int]]] = [(2, 2.0, {}), (5, 4.0, FEW), (7, 3.5, ALL), (10, 3.0, FEW)]


def test_summary_by_hand(tmp_path: Path) -> None:
    steps = [step(1, 9.0, 1.0), *(step(number, 9.0 - number, 100.0 + number) for number in range(2, 11))]
    held = [{"kind": "evaluation", "step": at, "set": "a", "loss": loss, **rows} for at, loss, rows in HELD]
    peaks = [
        {"kind": kind, "step": 0, "peak_flops": peak, "flops_per_token": 5.0}
        for kind, peak in (("start", 510.0), ("peak", 1060.0))
    ]
    write(tmp_path, peaks[0], *steps[:3], peaks[1], *steps[3:], *held)
    found = summarize(tmp_path)
    assert found is not None
    assert (found.loss_first, found.loss_last, found.steps, found.tokens) == (9.0, -1.0, 10, 100)
    # Losses over other rows are never first and last of one figure.
    assert found.heldout == {
        "a (2 of 8 rows)": (4.0, 3.0),
        "a (all 8 rows)": (3.5, 3.5),
        "a (rows not recorded)": (2.0, 2.0),
    }
    assert found.tokens_per_second == 106.0  # the first tenth, the slow first step, does not count
    assert found.model_flops_utilization == 106.0 * 5.0 / 1060.0  # of the highest peak of the machine


def test_a_skipped_step_is_counted_and_has_no_loss(tmp_path: Path) -> None:
    skipped = [step(number, float("nan"), 1.0) | {"loss": "nan", "skipped": True} for number in (1, 4)]
    write(tmp_path, skipped[0], step(2, 8.0, 1.0), step(3, 7.0, 1.0), skipped[1])
    found = summarize(tmp_path)
    assert found is not None
    assert (found.steps, found.skipped, found.tokens, found.loss_first, found.loss_last) == (4, 2, 40, 8.0, 7.0)


def test_unknown_stays_unknown(tmp_path: Path) -> None:
    assert summarize(tmp_path) is None
    write(tmp_path, {"kind": "start", "step": 0, "peak_flops": None, "flops_per_token": 5.0}, step(1, 9.0, 1.0))
    found = summarize(tmp_path)
    assert found is not None
    assert found.model_flops_utilization is None


def test_of_a_long_run_the_newest_lines_are_summarized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"kind": "start", "step": 0, "peak_flops": 1000.0, "flops_per_token": 5.0}
    steps = [step(number, 1000.0 - number, 100.0 + number % 2) for number in range(1, 1001)]
    steps[-2] |= {"loss": "nan", "skipped": True}
    write(tmp_path, first, *steps)
    whole = summarize(tmp_path)
    assert whole is not None
    assert (whole.newest, whole.counted, whole.loss_first) == (False, 1000, 999.0)
    monkeypatch.setattr(summary, "_NEWEST_BYTES", (tmp_path / "metrics.jsonl").stat().st_size // 10)
    found = summarize(tmp_path)
    assert found is not None
    assert found.newest
    assert 90 <= found.counted <= 110
    assert (found.steps, found.tokens, found.skipped, found.loss_last) == (1000, 10_000, 1, 0.0)
    assert found.loss_first == 1000.0 - (1001 - found.counted)
    assert found.model_flops_utilization == whole.model_flops_utilization  # of the peak that an older line tells
