"""A ledger as marks, chunks, checkpoints and starts, and what is refused."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

from made_runs import Made, page_of, refusal_of, report_of

from weftrain.core.formats.canonical import canonical_json, parse_json, sha256_json
from weftrain.core.run.ledger_schema import LEDGER


def test_every_event_is_marked(eventful: Made) -> None:
    report = report_of(eventful.run)
    marks = [(mark.kind, mark.step, mark.abandoned) for mark in report.marks]
    assert marks == [
        ("restart", 6, False),
        ("skip", 9, False),
        ("skip", 14, True),
        ("rollback", 12, False),
        ("defer", 12, False),
        ("restart", 12, False),
    ]
    told = [(one.kind, one.step) for one in report.ledger if one.abandoned]
    # Of the crash, then of the rollback: a chunk that begins at the step to which the run went back is begun again.
    assert told == [
        ("chunk_begin", 6),
        ("chunk_begin", 12),
        ("skip", 14),
        ("checkpoint", 18),
        ("chunk_end", 18),
        ("chunk_begin", 18),
    ]
    lines = list(report.ledger)
    assert [one.number for one in lines] == list(range(len(lines)))
    assert (report.ledger[2:5], report.ledger[-3:], report.ledger[-1]) == (lines[2:5], lines[-3:], lines[-1])
    page = page_of(eventful.run)
    for words in (
        "step 9: step skipped",
        "step 14: step skipped, samples 208 to 223 (abandoned)",
        "step 6: restarted from checkpoint",
    ):
        assert page.count(words) >= 4, words  # in each of the charts
    assert page.count("on branch 1: the loss rose") >= 4
    assert report.status == "complete: 24 steps"
    assert ("incidents", "4", "2 restarts, 1 rollback, 1 skip") in report.tiles


def test_chunks_and_checkpoints(eventful: Made) -> None:
    saved = report_of(eventful.run).checkpoints
    batch, roots = eventful.batch, eventful.roots
    told = [(one.step, one.first_step, one.samples, one.chunk, one.place, one.abandoned is None) for one in saved]
    assert told == [
        (6, 0, (0, 6 * batch), "0", "checkpoints/step_00000006", True),
        (12, 6, (6 * batch, 12 * batch), "1", "checkpoints/step_00000012", True),
        (18, 12, (12 * batch, 18 * batch), "2", "branches/1/step_00000018", False),
        (18, 12, (12 * batch, 18 * batch), "2", "checkpoints/step_00000018", True),
        (24, 18, (18 * batch, 24 * batch), "3", "checkpoints/step_00000024", True),
    ]
    assert [one.parent for one in saved] == [None, roots[6], roots[12], roots[12], roots[18]]
    assert saved[2].abandoned == "abandoned on branch 1: the loss rose"
    assert saved[-1].metrics_sha256 == sha256_json(["metrics", 24, 1.0])
    page = page_of(eventful.run)
    assert '<a href="./checkpoints/step_00000024/">' in page
    assert '<a href="./branches/1/step_00000018/">' in page
    bands = [(band.chunk, band.first_step, band.stop_step) for band in report_of(eventful.run).bands]
    assert bands == [(0, 0, 6), (1, 6, 12), (2, 12, 18), (3, 18, 24)]


def test_a_checkpoint_within_a_chunk_and_one_without_chunks(tmp_path: Path) -> None:
    made = Made(tmp_path / "chunks")
    made.go(0, 8, save=[4, 6, 8])
    assert [(one.step, one.chunk) for one in report_of(made.run).checkpoints] == [
        (4, "0, in part"),
        (6, "0"),
        (8, "1, in part"),
    ]
    made.roll_back(4, 1, "back into chunk 0")
    made.go(4, 5, save=[5])
    assert [(one.step, one.chunk) for one in report_of(made.run).checkpoints][3:] == [(5, "0, in part")]
    plain = Made(tmp_path / "plain", chunks=None)
    plain.go(0, 8, save=[4])
    assert [(one.step, one.chunk) for one in report_of(plain.run).checkpoints] == [(4, "")]


def test_starts_tell_what_counts_and_what_differs(eventful: Made) -> None:
    begun = report_of(eventful.run).starts
    assert [(one.first_step, one.kept, one.reached) for one in begun] == [(0, 6, 8), (6, 12, 18), (12, 24, 24)]
    page = page_of(eventful.run)
    assert re.findall(r'<td class="changed">([^<]*)</td>', page) == ["now other", "now triton"]
    same = page[page.index("The same in every start") :]
    assert "<dt>backend</dt><dd>local</dd>" in same
    assert "<dt>device</dt>" not in same


ODD_JSON: list[Any] = [None, "x", [[1]], {"a": {"b": [1]}}, -1, 10**60]


def test_a_ledger_of_odd_types_is_refused_by_line_and_key(eventful: Made) -> None:
    """Its chain is right: whoever wrote it wrote it so."""
    entries = [parse_json(line) for line in (eventful.run / LEDGER).read_bytes().splitlines()]
    keys = sorted({key for entry in entries for key in entry} - {"n", "previous", "hash", "kind", "step"})
    pages = []
    for key, odd in itertools.product(keys, ODD_JSON):
        lines, previous = [], None
        for entry in entries:
            changed = {**entry, "previous": previous} | ({key: odd} if key in entry else {})
            del changed["hash"]
            changed["hash"] = previous = sha256_json(changed)
            lines.append(canonical_json(changed))
        (eventful.run / LEDGER).write_bytes(b"\n".join(lines) + b"\n")
        refusal = refusal_of(eventful.run)
        assert refusal is None or re.search(rf"{LEDGER}:\d+: (key '{key}|resumes from checkpoint)", refusal), (
            key,
            odd,
            refusal,
        )
        if refusal is None:
            pages.append((key, odd))
    assert ("environment", {"a": {"b": [1]}}) in pages
    assert ("reason", "x") in pages
    assert not {key for key, _ in pages} & {
        "root",
        "parent",
        "branch",
        "samples",
        "time",
        "abandoned",
        "recipe_sha256",
        "metrics_sha256",
    }
