"""The matrix of versions says what it could not do; nothing is installed here."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest
import version_matrix
from packaging.requirements import Requirement
from places import ROOT
from version_matrix import Pair, Result, StepError, pair_of

DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_oldest_of_the_matrix_are_the_bounds_that_pyproject_declares() -> None:
    pairs = [pair_of(word) for word in (ROOT / "Makefile").read_text().split("MATRIX ?= ")[1].splitlines()[0].split()]
    (torch,) = (Requirement(text) for text in DECLARED["dependencies"] if text.startswith("torch"))
    oldest = min((pair.torch for pair in pairs), key=lambda text: tuple(map(int, text.split("."))))
    assert str(torch.specifier) == f">={oldest.rpartition('.')[0]}"
    assert DECLARED["requires-python"] == f">={min(pair.python for pair in pairs).removeprefix('python')}"
    # A pin on one triton would replace that of another torch, or be refused beside it.
    assert DECLARED["optional-dependencies"]["triton"] == ["triton>=3.4; platform_system == 'Linux'"]


def test_a_python_that_is_not_there_is_passed_over(tmp_path: Path) -> None:
    result = version_matrix.check(Pair("python3.99", "2.6.0"), tmp_path, "")
    assert result.verdict == "passed over: this machine has no python3.99"


def test_a_torch_that_was_replaced_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter(["2.6.0", "2.13.0"])
    monkeypatch.setattr(version_matrix, "torch_in", lambda python: next(found))
    monkeypatch.setattr(version_matrix, "run", lambda *_: "")
    result = version_matrix.check(Pair(sys.executable, "2.6.0"), tmp_path, "")
    assert result.verdict == "failed: `pip install .` replaced torch 2.6.0 by 2.13.0"


def test_what_a_step_says_last_is_the_reason(tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"^torch: No matching distribution; .*log has the rest$"):
        version_matrix.run(
            "torch", [sys.executable, "-c", "raise SystemExit('No matching distribution')"], tmp_path / "log"
        )
    assert "No matching distribution" in (tmp_path / "log").read_text()


def test_a_pair_is_a_python_and_a_torch() -> None:
    assert pair_of("python3.11:2.6.0") == Pair("python3.11", "2.6.0")
    for wrong in ("python3.11", ":2.6", "python3.11:newest"):
        with pytest.raises(ValueError, match="give PYTHON:TORCH"):
            pair_of(wrong)
    assert Result("python3.11", "2.6.0", "passed", 61.2).row() == "| python3.11 | 2.6.0 | passed | 61 s |"
