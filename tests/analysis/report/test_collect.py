"""A run's page: what is collected from the record, that no spike and no branch is lost, and that a stranger's words
stay words.
"""

from __future__ import annotations

import json
import re

from made_runs import Made, evaluate, memorize, page_of, report_of

from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.metrics import METRICS


def test_memorization_is_a_matrix_with_its_figures_written_out(eventful: Made) -> None:
    for step, matches in ((6, [4, 1, 0, 3]), (12, [2, 2, 2, 2])):
        memorize(eventful.run, step, eventful.roots[step], "chunk_00000", matches, 6)
    memorize(eventful.run, 6, eventful.roots[6], "heldout_words", [0, 0, 0, 1], None)
    damaged = memorize(eventful.run, 12, eventful.roots[12], "heldout_words", [0, 0, 0, 1], None)
    damaged.write_bytes(damaged.read_bytes().replace(b'"matches":[0,0,0,1]', b'"matches":[0,0,0,2]'))
    moved = damaged.with_name("chunk_00001.json")
    moved.write_bytes((damaged.parent / "chunk_00000.json").read_bytes())
    report = report_of(eventful.run)
    (matrix,) = report.memorization
    assert matrix.chunks == ("chunk_00000", "heldout_words")
    assert [step for step, _ in matrix.rows] == [6, 12]
    assert len(report.warnings) == 2
    assert str(moved) in report.warnings[0]
    assert str(damaged) in report.warnings[1]
    page = page_of(eventful.run)
    assert "<b>25.00 %</b> 0.5000 *</td>" in page
    assert "<b>0.00 %</b> 0.5000 +</td>" in page
    assert "<b>0.00 %</b> 0.0625</td>" in page
    assert page.count('title="not measured"') == 1
    assert 'role="note" aria-label="warnings"' in page


def test_evaluations_are_a_table_and_a_damaged_one_is_said(eventful: Made) -> None:
    evaluate(eventful.run, 24, eventful.roots[24], "mmlu", samples=10)
    evaluate(eventful.run, 18, "e" * 64, "arc", stderr_percent=None, value_percent=None)
    damaged = evaluate(eventful.run, 6, eventful.roots[6], "copa")
    damaged.write_bytes(damaged.read_bytes().replace(b"25.0", b"95.0"))
    report = report_of(eventful.run)
    assert [record["task"] for record in report.evaluations] == ["arc", "mmlu"]
    assert str(damaged) in report.warnings[0]
    page = page_of(eventful.run)
    row = page[page.index('<th scope="row">mmlu') :]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row[: row.index("</tr>")])
    assert cells[:7] == ["1.0", "5", "acc", "25.00 ± 1.50", "0.25", "10", "24"]
    assert eventful.roots[24] in cells[7]
    assert cells[8] == "partial"
    assert "not on the line" in page


def test_alerts_are_marks_and_a_tile(eventful: Made) -> None:
    line = {"kind": "alert", "time": 1.0, "step": 7, "rule": "r", "action": "log", "value": 9.0, "words": "r: <bad>"}
    with (eventful.run / METRICS).open("a") as file:
        file.write(json.dumps(line) + "\n")
    report = report_of(eventful.run)
    assert [(mark.step, mark.words) for mark in report.marks if mark.kind == "alert"] == [(7, "r: <bad>")]
    assert ("alerts", "1", "the last at step 7: r: <bad>") in report.tiles
    assert "r: &lt;bad&gt;" in page_of(eventful.run)


def test_a_run_without_a_ledger_still_has_its_curves_and_marks(eventful: Made) -> None:
    (eventful.run / LEDGER).unlink()
    report = report_of(eventful.run)
    assert [(mark.kind, mark.step) for mark in report.marks] == [("restart", 6), ("skip", 9), ("restart", 12)]
    assert [curve.abandoned for curve in report.loss] == [
        None,
        "made again after the restart at step 6",
        "made again after the restart at step 12",
    ]
    assert "made before there was one" in page_of(eventful.run)
