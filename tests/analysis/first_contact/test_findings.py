"""A finding is on disk before the next question, and an exception is one."""

from __future__ import annotations

import json
import math
from pathlib import Path

from weftrain.analysis.first_contact.findings import RESULTS, Answer, Findings, in_words, read_findings
from weftrain.core.errors import BackendError, OutOfMemoryError


def test_each_finding_is_a_line_at_once(tmp_path: Path) -> None:
    told: list[str] = []
    findings = Findings(tmp_path, "bits", told.append)
    findings.ask("a good one", lambda: Answer(figures={"apart": 2e-6}))
    assert len((tmp_path / RESULTS).read_text().splitlines()) == 1

    def fails() -> Answer:
        raise RuntimeError("CUDA error:\nan illegal memory access")

    findings.ask("a crash", fails)
    findings.write("", Answer(None, details={"why": "no time was left"}))
    found = read_findings(tmp_path)
    assert [one.ok for one in found] == [True, False, None]
    assert found[1].details["why"] == "RuntimeError: CUDA error: an illegal memory access"
    assert found[1].details["where"][-1].startswith("test_findings.py:")
    assert told[0] == "ok   bits: a good one; apart 2e-06"
    assert told[1].startswith("BAD  bits: a crash; RuntimeError")


def test_what_is_refused_in_words_was_not_asked(tmp_path: Path) -> None:
    def needs_more() -> Answer:
        raise OutOfMemoryError("needs 112 GiB: weights 26 GiB; set activation_checkpointing=full")

    def needs_a_package() -> Answer:
        raise BackendError("backend.options.float8 needs torchao: pip install 'weftrain[float8]'")

    Findings(tmp_path, "7B").ask("as it comes", needs_more)
    Findings(tmp_path, "ranks").ask("float8", needs_a_package)
    found = read_findings(tmp_path)
    assert [one.ok for one in found] == [None, None]
    assert found[0].details["why"].startswith("needs 112 GiB")


def test_what_is_not_finite_stays_json_and_a_cut_line_is_passed_over(tmp_path: Path) -> None:
    Findings(tmp_path, "parity").write("losses", Answer(False, {"apart": math.inf}, {"losses": [1.0, math.nan]}))
    path = tmp_path / RESULTS
    path.write_bytes(path.read_bytes() + b'{"check": "parity", "wha')
    (found,) = read_findings(tmp_path)
    assert found.details["losses"] == [1.0, "nan"]
    assert json.loads(found.line())["figures"] == {"apart": "inf"}
    assert "apart inf" in in_words(found)
