"""The page of a run: in order, equal bytes for equal records, and a stranger's words stay words."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from made_runs import HOSTILE, Made, check_markup, data_of, evaluate, hostile_run, memorize, page_of, report_of

from weftrain.analysis.report.collect import collect
from weftrain.analysis.report.page import page_html, relative_link, write_page
from weftrain.core.errors import RunFolderError


def test_equal_records_give_equal_bytes(eventful: Made, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_page(report_of(eventful.run), tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_what_is_absent_is_said(tmp_path: Path) -> None:
    made = Made(tmp_path / "bare")
    page = page_of(made.run)
    for words in (
        "No evaluation was recorded: <code>weftrain eval RUN --tasks ...</code>",
        "No memorization was measured: <code>weftrain memorize RUN</code>",
        "No step was logged",
        "No checkpoint was entered",
        "The run has no ledger.jsonl",
    ):
        assert words in page
    with pytest.raises(RunFolderError, match="name the folder of a run"):
        report_of(tmp_path)


def test_a_stranger_s_words_stay_words(tmp_path: Path) -> None:
    run = hostile_run(tmp_path).run
    report = collect(run, lambda recipe: [f"{HOSTILE}  {HOSTILE}"])
    page = page_html(report, run)
    markup = check_markup(page)
    page.encode()
    assert page.count("&lt;script&gt;alert(1)") > 10
    names = [curve["name"] for chart in data_of(page)["charts"] for curve in chart["curves"]]
    assert sum("<script>alert(1)" in name for name in names) >= 2  # as data, in a block that no browser runs
    assert "<script>alert(1)" not in page
    assert "\u202e" not in page
    assert "\\u202e" in page
    assert list(markup.all("img")) == []
    assert len(list(markup.all("script"))) == 4


def test_links_are_relative_and_never_a_scheme(tmp_path: Path) -> None:
    target = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert relative_link(target, tmp_path / "run") == "./checkpoints/step_00000002/"
    assert relative_link(target, tmp_path / "pages") == "../run/checkpoints/step_00000002/"
    assert relative_link(tmp_path / "javascript:alert(1)" / "x", tmp_path) == "./javascript%3Aalert%281%29/x/"


def test_the_page_is_in_order(eventful: Made) -> None:
    memorize(eventful.run, 6, eventful.roots[6], "chunk_00000", [1], 6)
    evaluate(eventful.run, 6, eventful.roots[6], "copa")
    markup = check_markup(page_of(eventful.run))
    levels = [int(tag[1]) for tag, _ in markup.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert len(list(markup.all("caption"))) == len(list(markup.all("table"))) == 5
    pictures = [one for one in markup.all("div") if one.get("role") == "img"]
    assert len(pictures) == 4
    assert all(len(one["aria-label"] or "") > 30 for one in pictures)
    assert all(one.get("scope") in ("row", "col") for one in markup.all("th"))
    identities = [attributes["id"] for _, attributes in markup.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    targets = {(one["href"] or "")[1:] for one in markup.all("a") if (one["href"] or "").startswith("#")}
    assert targets <= set(identities)
    assert next(markup.all("html"))["lang"] == "en"


def test_very_many_checkpoints_are_shown_from_both_ends(eventful: Made) -> None:
    report = report_of(eventful.run)
    page = page_html(replace(report, checkpoints=report.checkpoints * 1000), eventful.run)
    assert f"of which {len(report.checkpoints) * 1000 - 3000:,} in the middle are not shown" in page
    assert page.count('<th scope="row" class="n">') < 3200


def test_without_bokeh_the_tables_are_written_and_the_remedy_named(
    eventful: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bokeh", None)
    page = page_of(eventful.run)
    markup = check_markup(page)
    assert list(markup.all("script")) == []
    assert "pip install bokeh" in page
    assert "Loss: training" in page
