"""What the rules of a recipe call an alert: planted cases of each rule, none in ordinary curves, and replay."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from weftrain.core.alert_rules import AlertRules
from weftrain.core.run.alerts import Alerts

RULES: TypeAdapter[Any] = TypeAdapter(AlertRules)


def watching(*rules: dict[str, Any]) -> Alerts:
    return Alerts(RULES.validate_python(list(rules)))


def step(number: int, **more: Any) -> dict[str, Any]:
    return {"kind": "step", "step": number, "loss": 2.0, "grad_norm": 1.0, "skipped": False, **more}


def evaluation(number: int, loss: float, name: str = "words") -> dict[str, Any]:
    return {"kind": "evaluation", "step": number, "set": name, "loss": loss}


def alerted(alerts: Alerts, records: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(alert.rule.label, alert.step) for record in records for alert in alerts.add(record)]


def noisy(steps: int, seed: int) -> list[dict[str, Any]]:
    """A training curve: a loss that falls as a power law with 2 % noise, and a gradient norm that varies by a third."""
    draw = random.Random(seed)
    return [
        step(
            number,
            loss=1.8 + 8 * number**-0.5 + draw.gauss(0, 0.04),
            grad_norm=0.5 * math.exp(draw.gauss(0, 0.3)),
            tokens_per_second=1000 * (1 + draw.gauss(0, 0.05)),
        )
        for number in range(1, steps + 1)
    ]


DEFAULTS = ({"rule": "loss_spike"}, {"rule": "grad_norm"}, {"rule": "throughput"}, {"rule": "skipped_steps"})


@pytest.mark.parametrize("seed", range(3))
def test_an_ordinary_curve_makes_no_alert(seed: int) -> None:
    assert alerted(watching(*DEFAULTS), noisy(3000, seed)) == []


@pytest.mark.parametrize("at", [85, 130, 400, 999])
@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("loss_spike", {"loss": 3.4}),
        ("loss_spike", {"loss": math.inf}),
        ("grad_norm", {"grad_norm": 20.0}),
        ("grad_norm", {"grad_norm": math.inf}),
    ],
)
def test_a_planted_spike_is_found_at_its_line(at: int, rule: str, change: dict[str, float]) -> None:
    records = noisy(1000, 7)
    records[at] |= change
    assert alerted(watching(*DEFAULTS), records) == [(rule, at + 1)]


@pytest.mark.parametrize("seed", range(3))
def test_noise_beyond_the_ratio_is_no_spike_and_neither_is_a_skipped_step(seed: int) -> None:
    draw = random.Random(seed)
    records = [step(number, loss=2 + draw.gauss(0, 0.3)) for number in range(1, 600)]
    records[400] |= {"loss": 50.0, "skipped": True}
    assert alerted(watching({"rule": "loss_spike"}), records) == []
    records[500] |= {"loss": 5.0}
    assert alerted(watching({"rule": "loss_spike"}), records) == [("loss_spike", 501)]


def test_a_stretch_alerts_once_and_again_after_calm_lines() -> None:
    records = noisy(1000, 3)
    for place in (*range(300, 330), 345, 390):  # the third is within the calm of the first
        records[place]["loss"] = 9.0
    found = watching({"rule": "loss_spike", "calm_lines": 40, "level_lines": 80})
    assert alerted(found, records) == [("loss_spike", 301), ("loss_spike", 391)]


def test_an_alert_waits_for_its_lines_and_says_since_when() -> None:
    alerts = watching({"rule": "metric", "metric": "data_wait_ms", "above": 5, "for_lines": 3})
    records = [step(number, data_wait_ms=wait) for number, wait in enumerate((9, 9, 1, 6, 7, 8, 9), 1)]
    found = [alert for record in records for alert in alerts.add(record)]
    assert [(one.step, one.since, one.reading.value, one.words) for one in found] == [
        (6, 4, 8, "data_wait_ms 8 is above 5")
    ]


def test_slow_steps_are_found_against_the_median() -> None:
    records = noisy(300, 1)
    for place in (100, 101, 102, 103, *range(200, 206)):  # four slow lines are none yet
        records[place]["tokens_per_second"] = 450.0
    assert alerted(watching({"rule": "throughput"}), records) == [("throughput", 205)]


def test_skipped_steps_are_counted_over_steps() -> None:
    records = [step(number, skipped=number in (10, 150, 160)) for number in range(1, 300)]
    assert alerted(watching({"rule": "skipped_steps"}), records) == [("skipped_steps", 160)]


def test_disk_memory_and_keys_within_others() -> None:
    rules = (
        {"rule": "disk", "below_gb": 10},
        {"rule": "memory", "above_gib": 70},
        {"rule": "memory", "name": "host", "of": "host", "above_gib": 1},
        {"rule": "metric", "name": "rate", "metric": "learning_rate.matrices", "below": 1e-4},
    )
    fine: dict[str, Any] = {
        "disk_free_bytes": 11e9,
        "device_peak_memory_bytes": 60.0 * 2**30,
        "memory_bytes": 1.0,
        "learning_rate": {"matrices": 1e-3},
    }
    bad = {
        "disk_free_bytes": 9e9,
        "device_peak_memory_max_bytes": 71.0 * 2**30,  # of another rank than the one below
        "memory_bytes": 2.0**31,
        "learning_rate": {"matrices": 1e-5},
    }
    found = alerted(watching(*rules), [step(1, **fine), step(2, **fine | bad)])
    assert found == [("disk", 2), ("memory", 2), ("host", 2), ("rate", 2)]


def test_a_held_out_loss_that_rises_is_found_for_each_set() -> None:
    words, code = (2.0, 1.5, 1.6, 1.58, 1.4, 1.5), (3.0, 2.9, 2.8, 2.7, 2.84, 2.86)
    records = [
        line
        for number, losses in enumerate(zip(words, code, strict=True), 1)
        for line in (evaluation(number, losses[0]), evaluation(number, losses[1], "code"))
    ]
    assert alerted(watching({"rule": "heldout_rise"}), records) == [("heldout_rise", 4), ("heldout_rise", 6)]
    assert alerted(watching({"rule": "heldout_rise", "set": "code"}), records) == [("heldout_rise", 6)]


def test_a_score_that_falls_is_found_for_its_task() -> None:
    rule = {"rule": "metric", "lines": "score", "set": "arc", "metric": "value", "below": 0.3}
    values = (("arc", 0.35), ("mmlu", 0.25), ("arc", 0.29))
    records = [
        {"kind": "score", "step": step, "set": name, "metric": "acc", "value": value}
        for step, (name, value) in enumerate(values, 1)
    ]
    assert alerted(watching(rule), records) == [("metric", 3)]


def test_a_replay_stands_where_the_run_stood() -> None:
    records = noisy(600, 5)
    for place in (*range(200, 203), 390, 391, *range(500, 520)):
        records[place] |= {"loss": 8.0, "tokens_per_second": 10.0, "skipped": place % 2 == 0}
    records.insert(300, evaluation(300, 2.0))
    records += [evaluation(600, 2.2), evaluation(601, 2.3)]
    rules = (*DEFAULTS, {"rule": "heldout_rise"})
    whole = alerted(watching(*rules), records)
    assert len(whole) > 5
    for cut in range(0, len(records), 37):
        again = watching(*rules)
        alerted(again, records[:cut])
        assert alerted(again, records[cut:]) == alerted_after(rules, records, cut)


def alerted_after(rules: tuple[dict[str, Any], ...], records: list[dict[str, Any]], cut: int) -> list[tuple[str, int]]:
    alerts = watching(*rules)
    found = [(place, alert) for place, record in enumerate(records) for alert in alerts.add(record)]
    return [(alert.rule.label, alert.step) for place, alert in found if place >= cut]


def test_a_rule_whose_metric_no_line_has_is_known() -> None:
    alerts = watching(
        {"rule": "metric", "metric": "los", "above": 1},
        {"rule": "metric", "name": "there", "metric": "loss", "above": 5},
        {"rule": "memory", "above_gib": 1},
    )
    assert alerts.unread() == ()
    alerts.add(step(1))
    keys = ("grad_norm", "loss", "step")
    assert alerts.unread() == (("metric", "los", keys), ("memory", "device_peak_memory_bytes", keys))


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"rule": "los_spike"}, "does not match any of the expected tags"),
        ({"rule": "disk"}, "Field required"),
        ({"rule": "loss_spike", "above": 3}, "Extra inputs"),
        ({"rule": "metric", "metric": "loss"}, "exactly one of 'above' and 'below'"),
        ({"rule": "metric", "metric": "loss", "above": 1, "below": 0}, "exactly one of"),
        ({"rule": "metric", "metric": "a b", "above": 1}, "match pattern"),
        ({"rule": "metric", "metric": "loss", "set": "words", "above": 1}, "'lines' says step"),
        ({"rule": "loss_spike", "actions": []}, "at least 1 item"),
        ({"rule": "loss_spike", "actions": ["webhook"]}, "webhook_env"),
        ({"rule": "loss_spike", "webhook_env": "A"}, "webhook_env"),
        ({"rule": "loss_spike", "actions": ["webhook"], "webhook_env": "https://x.invalid/secret"}, "match pattern"),
        ({"rule": "loss_spike", "actions": ["halt", "rollback"]}, "exclude each other"),
        ({"rule": "loss_spike", "ratio": 0.5}, "greater than or equal to 1"),
    ],
)
def test_a_wrong_rule_is_refused(rule: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        RULES.validate_python([rule])
    assert words in str(refused.value)
