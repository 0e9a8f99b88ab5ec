"""Metrics: whole lines, nothing lost, and the effective series after any history."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fault_injection import KINDS, Death, Faults, injected
from small_metrics import step_record, train

from weftrain.core.errors import RunFolderError
from weftrain.core.run.metrics import MetricsWriter, read_metrics


def series(folder: Path, kind: str = "step") -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(folder) if record["kind"] == kind]


def clock() -> float:
    return 1_700_000_000.25


def test_each_line_is_one_json_object_with_kind_step_and_time(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, clock=clock) as writer:
        train(writer, 1, 4)
        writer.event("checkpoint", step=4, root="ab")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"kind": "step", "time": 1_700_000_000.25, **step_record(1)}
    assert [line["kind"] for line in lines] == ["step"] * 4 + ["evaluation", "checkpoint"]


def test_non_finite_numbers_keep_the_json_valid_and_come_back(tmp_path: Path) -> None:
    values = {"loss": math.nan, "grad_norm": math.inf, "learning_rate": {"a": -math.inf}, "list": [math.nan]}
    with MetricsWriter(tmp_path) as writer:
        writer.step({"step": 1, **values})
        writer.evaluation({"step": 1, "set": "nan", "loss": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"loss": "nan", "grad_norm": "inf", "learning_rate": {"a": "-inf"}' in text
    step, evaluation = read_metrics(tmp_path)
    assert math.isnan(step["loss"])
    assert (step["grad_norm"], step["learning_rate"]) == (math.inf, {"a": -math.inf})
    assert math.isnan(step["list"][0])
    assert evaluation["set"] == "nan"


def test_a_resumed_run_reads_like_an_uninterrupted_one(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 9)
    with MetricsWriter(tmp_path, resume_step=6) as writer:
        train(writer, 7, 7, run=1)
    assert series(tmp_path) == [(step, 10 / step) for step in range(1, 7)] + [(7, 10 / 7 + 1)]
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        train(writer, 4, 9, run=2)
    assert series(tmp_path) == [(step, 10 / step + (2 if step > 3 else 0)) for step in range(1, 10)]
    assert series(tmp_path, "evaluation") == [(4, 5.0), (8, 5.0)]
    assert [record["step"] for record in read_metrics(tmp_path) if record["kind"] == "resume"] == [6, 3]


def test_the_last_record_of_a_step_counts(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        train(writer, 4, 4)
        writer.evaluation({"step": 4, "set": "other", "loss": 7.0})
        train(writer, 4, 4, run=1)
    assert series(tmp_path) == [(4, 3.5)]
    assert series(tmp_path, "evaluation") == [(4, 7.0), (4, 4.0)]


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 5)
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        train(writer, 1, 2, run=1)
    assert series(tmp_path) == [(1, 11.0), (2, 6.0)]


@pytest.mark.parametrize(
    ("damage", "moved"),
    [
        (lambda data: data[:-7], b'{"kind"'),
        (lambda data: data + b"\0" * 30, b"\0" * 30),
        (lambda data: data.replace(b'"step": 2', b'"step: 2', 1), b'"step: 2'),
        (lambda data: data.replace(b'"step": 2', b'"step": "2"', 1), b'"step": "2"'),
    ],
    ids=["torn", "zeros", "damaged line", "mistyped line"],
)
def test_damaged_lines_are_moved_not_lost(tmp_path: Path, damage: Any, moved: bytes) -> None:
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 3)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    (tmp_path / "metrics.torn").write_bytes(b"from an earlier crash\n")
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        train(writer, 4, 4)
    kept, torn = path.read_bytes(), (tmp_path / "metrics.torn").read_bytes()
    assert torn.startswith(b"from an earlier crash\n")
    assert moved in torn
    assert {line for line in damage(whole).split(b"\n") if line} <= set(kept.split(b"\n")) | set(torn.split(b"\n"))
    repaired = next(record for record in read_metrics(tmp_path) if record["kind"] == "repair")
    assert len(repaired["lines"]) + (repaired["torn_bytes"] > 0) == 1


def test_reading_leaves_out_a_torn_end_and_refuses_damage_elsewhere(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert [step for step, _ in series(tmp_path)] == [1, 2]
    path.write_bytes(b"[]\n" + path.read_bytes())
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:1: not a metrics line"):
        read_metrics(tmp_path)


def test_an_event_syncs_the_file(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 3)
        with injected(Faults()) as counted:
            writer.event("checkpoint", step=3)
        assert counted.trace[-1] == ("sync_file", tmp_path / "metrics.jsonl")


def session(folder: Path) -> None:
    with MetricsWriter(folder, resume_step=3) as writer:
        train(writer, 4, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_may_fail_or_be_the_last(tmp_path: Path, kind: str) -> None:
    def torn_history(folder: Path) -> None:
        folder.mkdir()
        with MetricsWriter(folder) as writer:
            train(writer, 1, 4)
        path = folder / "metrics.jsonl"
        path.write_bytes(path.read_bytes()[:-5])

    torn_history(tmp_path / "count")
    with injected(Faults()) as counted:
        session(tmp_path / "count")
    for at in range(len(counted.trace)):
        folder = tmp_path / f"{at}"
        torn_history(folder)
        with injected(Faults(kind, at)), suppress(Death):
            try:
                session(folder)
            except RunFolderError as error:
                assert str(folder) in str(error)  # noqa: PT017
        session(folder)
        assert series(folder) == [(step, 10 / step) for step in range(1, 6)]


def test_the_digest_is_of_what_was_measured_and_not_of_how_fast() -> None:
    from weftrain.core.run.metrics import digest

    step = {
        "kind": "step",
        "step": 1,
        "loss": 2.5,
        "grad_norm": 1.0,
        "learning_rate": {"a": 0.1},
        "tokens": 52,
        "skipped": False,
    }
    evaluation = {
        "kind": "evaluation",
        "step": 1,
        "set": "x",
        "loss": float("inf"),
        "tokens": 9,
        "perplexity": float("inf"),
    }
    base = digest([step, evaluation])
    assert (
        digest(
            [step | {"time": 1.0, "step_ms": 3.0, "tokens_per_second": 9.0}, {"kind": "resume", "step": 0}, evaluation]
        )
        == base
    )
    for changed in (
        {"loss": 2.5000001},
        {"grad_norm": float("nan")},
        {"learning_rate": {"a": 0.2}},
        {"skipped": True},
        {"step": 2},
    ):
        assert digest([step | changed, evaluation]) != base
    assert digest([evaluation, step]) != base
    assert digest([step]) != base


@pytest.mark.parametrize("given", ["[1]", "null", "{}"])
def test_an_evaluation_of_no_set_is_a_damaged_line(given: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "evaluation", "step": 1, "set": ' + given + "}\n")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:1: not a metrics line"):
        read_metrics(tmp_path)


def test_samples_are_records(tmp_path: Path) -> None:
    def written(writer: MetricsWriter, step: int, text: str) -> None:
        failed = {"text": "", "problem": "logits are not finite"}
        writer.samples([{"step": step, "prompt": "nan", "text": text}, {"step": step, "prompt": "b", **failed}])

    with MetricsWriter(tmp_path) as writer:
        written(writer, 2, "inf")
        written(writer, 4, "one")
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        written(writer, 4, "another")
    found = [record for record in read_metrics(tmp_path) if record["kind"] == "sample"]
    assert [(one["step"], one["prompt"], one["text"]) for one in found] == [
        (2, "nan", "inf"),
        (2, "b", ""),
        (4, "nan", "another"),
        (4, "b", ""),
    ]
