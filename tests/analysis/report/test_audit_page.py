"""The page of an audit: every text of a publisher is escaped, and a long series stays a page of bounded size."""

from __future__ import annotations

import math

from weftrain.analysis.markup import escape
from weftrain.analysis.report.audit_page import audit_html
from weftrain.exchange.audit.audit import Audit, Point
from weftrain.exchange.audit.findings import MEANING, Fact, Finding

EVIL = "<script>alert(1)</script>"


def test_texts_are_escaped_and_every_kind_has_a_meaning() -> None:
    findings = tuple(Finding(kind, (EVIL, "step2"), f"{EVIL} \u202e", "hash") for kind in MEANING)
    points = (
        Point(EVIL, EVIL, 1, 0.1, None),
        Point("step2", EVIL, 2, 0.2, 0.5),
        Point("step3", EVIL, 3, math.nan, 0.4),
    )
    facts = (Fact(EVIL, EVIL, EVIL),)
    page = audit_html(Audit(EVIL, EVIL, "deep", (EVIL, "step2", "step3"), (), facts, findings, points))
    assert "<script" not in page
    assert "\u202e" not in page
    assert page.count("<path ") == 2
    assert f"{len(MEANING)} findings" in page
    for words in MEANING.values():
        assert escape(words) in page


def test_ten_thousand_revisions_and_findings_are_a_page_of_two_megabytes() -> None:
    names = tuple(f"step{number}" for number in range(10_000))
    findings = tuple(Finding("gap", (name,), f"{name} " + "x" * 60, "name") for name in names)
    points = tuple(Point(name, "", number, number / 7, None) for number, name in enumerate(names))
    page = audit_html(Audit("series", "kind", "deep", names, (), (), findings, points))
    assert len(page) < 2_000_000
    assert "The first 2,000 are shown" in page
