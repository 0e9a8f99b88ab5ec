"""`weftrain audit`: its tables, JSON, page and exit codes; what it finds is tested in tests/exchange/audit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from hub_server import Hub, served
from json_page import documented
from planted_series import clean, revision, trained

Weftrain = Callable[..., Result]


@pytest.fixture
def series() -> dict[str, dict[str, bytes]]:
    found = clean([1000, 2000, 3000, 4000, 5000])
    found["step2000"] = dict(found["step4000"])
    found["step9000-<b>"] = revision(trained([9000])[9000])
    return found


def test_findings_are_shown_and_the_exit_code_is_1(
    weftrain: Weftrain, series: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(Hub(series)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        result = weftrain("audit", "hub:owner/name", "--to", tmp_path / "out" / "page.html")
        told = weftrain("audit", "hub:owner/name", "--json", "--deep")
        clean_now = {name: files for name, files in series.items() if name not in ("step2000", "step9000-<b>")}
        hub.revisions = clean_now | {"step2000": revision(trained([1000, 2000])[2000])}
        fine = weftrain("audit", "hub:owner/name", "--listing", "--endpoint", hub.endpoint)
    assert (result.exit_code, told.exit_code, fine.exit_code) == (1, 1, 0), result.output + told.output + fine.output
    assert "step2000 = step4000: the same weights" in " ".join(result.output.split())
    assert "6 revisions, 1 finding: 1 duplicate" in result.output
    assert "5 revisions, no mistake found" in fine.output
    page = (tmp_path / "out" / "page.html").read_text()
    assert "1 finding" in page
    assert "step9000-&lt;b&gt;" in page
    assert "-<b>" not in page
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", page)
    found = json.loads(told.stdout)
    assert set(found) - {"schema_version"} | set(found["facts"][0]) | set(found["findings"][0]) == documented(
        "audit SERIES"
    )
    assert [finding["revisions"] for finding in found["findings"]] == [["step2000", "step4000"]]


def test_a_page_of_a_deep_audit_has_curves(weftrain: Weftrain, tmp_path: Path) -> None:
    for name, files in clean([1000, 2000, 3000]).items():
        for path, data in files.items() if name != "main" else ():
            (tmp_path / "series" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "series" / name / path).write_bytes(data)
    result = weftrain("audit", tmp_path / "series", "--deep", "--to", tmp_path / "page.html", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["depth"] == "deep"
    page = (tmp_path / "page.html").read_text()
    assert page.count("<path ") == 2
    assert "no mistake found" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hub:a/b/c"], "name it as hub:owner/name"),
        (["hub:a/b", "--endpoint", "ftp://x"], "no http or https address"),
        (["nowhere"], "does not exist"),
        (["FOLDER"], "holds no revision with a step in its name"),
        (["FOLDER", "--listing", "--deep"], "leave one of them out"),
        (["FOLDER", "--to", "page.txt"], "does not end in .html"),
    ],
)
def test_what_is_refused(weftrain: Weftrain, tmp_path: Path, words: list[str], said: str) -> None:
    result = weftrain("audit", *(word.replace("FOLDER", str(tmp_path)) for word in words))
    assert (result.exit_code, said in " ".join(result.output.split())) == (2, True), result.output
