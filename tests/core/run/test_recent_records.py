"""What alerts read after a resume is the same as all that was recorded, as far as they can tell."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from weftrain.core.alert_rules import AlertRules
from weftrain.core.run.alerts import Alerts
from weftrain.core.run.metrics import METRICS, effective_records
from weftrain.core.run.recent_records import recent_records

RULES: TypeAdapter[Any] = TypeAdapter(AlertRules)
KINDS = [
    {"rule": "loss_spike", "window": 16, "level_lines": 4, "calm_lines": 3},
    {"rule": "throughput", "window": 16},
    {"rule": "heldout_rise"},
    {"rule": "skipped_steps", "window": 20},
]


def history(folder: Path, seed: int) -> int:
    """A run of 3,000 lines with spikes, restarts and repeated lines. Where it resumes."""
    draw, step = random.Random(seed), 0
    with (folder / METRICS).open("w") as file:
        for _ in range(3000):
            step += 1
            more = {"skipped": draw.random() < 0.01, "tokens_per_second": 1000 * draw.choice((1, 1, 1, 0.2))}
            loss = 2 + draw.gauss(0, 0.05) + 3 * (draw.random() < 0.02)
            file.write(json.dumps({"kind": "step", "time": 1.0, "step": step, "loss": loss, **more}) + "\n")
            if step % 50 == 0:
                line = {"kind": "evaluation", "time": 1.0, "step": step, "set": "words", "loss": loss}
                file.write(json.dumps(line) + "\n")
            if draw.random() < 0.01:
                step = max(0, step - draw.randrange(60))
                file.write(json.dumps({"kind": "resume", "time": 1.0, "step": step}) + "\n")
        step -= 30
        file.write(json.dumps({"kind": "resume", "time": 1.0, "step": step}) + "\n")
    return step


def alerted(alerts: Alerts, records: Any) -> list[tuple[str, int]]:
    return [(one.rule.label, one.step) for record in records for one in alerts.add(record)]


@pytest.mark.parametrize("seed", range(4))
def test_the_end_of_the_file_stands_for_all_of_it(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = history(tmp_path, seed)
    whole = list(effective_records(tmp_path))
    assert recent_records(tmp_path, step, 10, False) == whole  # a short file is read whole
    monkeypatch.setattr("weftrain.core.run.recent_records._FIRST_BYTES", 5_000)
    end = recent_records(tmp_path, step, 200, True)
    steps = [one["step"] for one in end if one["kind"] == "step"]
    assert 200 <= len(steps) < 1500
    assert steps == [one["step"] for one in whole if one["kind"] == "step"][-len(steps) :]
    evaluations = [[one for one in records if one["kind"] == "evaluation"] for records in (end, whole)]
    assert evaluations[0] == evaluations[1]
    rules = RULES.validate_python(KINDS)
    after = [
        {"kind": "step", "step": step + n, "loss": 9.0 if n % 7 == 0 else 2.0, "tokens_per_second": 500.0 * (n % 2)}
        for n in range(1, 200)
    ]
    found = []
    for records in (end, whole):
        alerts = Alerts(rules)
        alerted(alerts, records)
        found.append(alerted(alerts, after))
    assert found[0] == found[1]


def test_a_damaged_line_and_a_missing_file_are_nothing(tmp_path: Path) -> None:
    assert recent_records(tmp_path, 0, 10, True) == []
    (tmp_path / METRICS).write_bytes(b'\xff\n{"kind": "step", "step": 3, "loss": 1.0}\n{"kind": "st')
    assert recent_records(tmp_path, 9, 10, True) == [{"kind": "step", "step": 3, "loss": 1.0}]
