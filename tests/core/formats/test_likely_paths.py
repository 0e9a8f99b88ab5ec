"""A misspelt path is answered with what lies there, whichever part of it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from weftrain.core.formats.likely_paths import did_you_mean


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("runs/crystl_demo", "did you mean runs/crystal_demo?"),
        ("rnus/crystal_demo", "did you mean runs/crystal_demo?"),
        ("rnus/crystal_demo/checkpoints", "did you mean runs/crystal_demo?"),
        ("rnus/other", "did you mean runs?"),
        ("runs/zzz", ""),
        ("runs/crystal_demo", ""),
        ("text.jsonl/below", ""),
    ],
)
def test_likely_paths(given: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "crystal_demo").mkdir(parents=True)
    (tmp_path / "text.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    if given == "rnus/crystal_demo/checkpoints":
        (tmp_path / "runs" / "crystal_demo" / "checkpoints").mkdir()
        meant = "did you mean runs/crystal_demo/checkpoints?"
    assert did_you_mean(Path(given)) == meant
