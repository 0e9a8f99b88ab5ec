"""Scores in the record: each once, in metrics and ledger, also after a resume, a rollback and a crash between the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from weftrain.core.run.ledger import Ledger, read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import lineage
from weftrain.core.run.metrics import METRICS, MetricsWriter, read_metrics
from weftrain.core.run.scores import ScoreBook, score_sha256


def line(step: int, name: str = "t/a", **more: Any) -> dict[str, Any]:
    score = {"metric": "acc", "value": 0.5, "metrics": {"acc": 0.5}, "samples": 4, "evaluation_s": 1.0}
    return {"kind": "score", "step": step, "set": name, **score, **more}


def resumed(folder: Path, step: int) -> tuple[ScoreBook, MetricsWriter]:
    """A book of a start from `step`, as commit and MetricsWriter record one."""
    ledger, metrics = Ledger(folder), MetricsWriter(folder, step or None)
    kind = "start" if not ledger.entries else "resume"
    where = {"recipe_sha256": "0" * 64, "dataset_id": "d", "environment": {}, "parent": None}
    ledger.add(kind, step=step, **where, **({"recipe": {}} if kind == "start" else {"from_scratch": step == 0}))
    return ScoreBook(metrics, ledger), metrics


def scores(folder: Path) -> list[tuple[int, str]]:
    return [(one["step"], one["set"]) for one in read_metrics(folder) if one["kind"] == "score"]


def test_a_score_is_entered_once_with_its_hash(tmp_path: Path) -> None:
    book, metrics = resumed(tmp_path, 0)
    assert book.enter(line(2))
    assert book.enter(line(2, "t/b"))
    assert not book.enter(line(2, evaluation_s=9.0))
    assert book.entered(2) == {"t/a", "t/b"}
    assert not book.entered(3)
    metrics.close()
    assert scores(tmp_path) == [(2, "t/a"), (2, "t/b")]
    entries = [entry for entry in read_ledger(tmp_path / LEDGER) if entry["kind"] == "evaluation"]
    read_back = [one for one in read_metrics(tmp_path) if one["kind"] == "score"]
    assert [entry["sha256"] for entry in entries] == [score_sha256(one) for one in read_back]
    assert score_sha256(line(2)) != score_sha256(line(2, value=0.6))


def test_numbers_that_json_lacks_have_a_hash_too(tmp_path: Path) -> None:
    book, metrics = resumed(tmp_path, 0)
    book.enter(line(2, value=float("nan"), metrics={}))
    metrics.close()
    (entry,) = (entry for entry in read_ledger(tmp_path / LEDGER) if entry["kind"] == "evaluation")
    (found,) = (one for one in read_metrics(tmp_path) if one["kind"] == "score")
    assert entry["sha256"] == score_sha256(found)


def test_what_a_resume_goes_back_behind_is_measured_again(tmp_path: Path) -> None:
    book, metrics = resumed(tmp_path, 0)
    for step in (2, 4):
        book.enter(line(step))
    metrics.close()
    book, metrics = resumed(tmp_path, 0)  # from scratch
    assert book.enter(line(2, value=0.7))
    metrics.close()
    assert scores(tmp_path) == [(2, "t/a")]
    assert list(lineage(read_ledger(tmp_path / LEDGER)).scores) == [(2, "t/a")]


def test_a_crash_between_metrics_and_ledger_makes_no_double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book, metrics = resumed(tmp_path, 0)

    def fails(*_: Any, **__: Any) -> None:
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "add", fails)
        with pytest.raises(OSError):
            book.enter(line(2))
    metrics.close()
    book = ScoreBook(metrics, Ledger(tmp_path))
    assert book.enter(line(2))
    assert scores(tmp_path) == [(2, "t/a")]
    assert sum('"score"' in text for text in (tmp_path / METRICS).read_text().splitlines()) == 2


def test_a_score_of_another_lines_checkpoint_is_left_out(tmp_path: Path) -> None:
    book, metrics = resumed(tmp_path, 0)
    assert not book.enter(line(2, checkpoint="a" * 64))
    metrics.close()
    assert not (tmp_path / METRICS).exists() or not scores(tmp_path)
