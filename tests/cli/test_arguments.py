"""Completion in the shell."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from weftrain.cli.main import main


def completed(*words: str) -> list[str]:
    complete = ShellComplete(main, {}, "weftrain", "_WEFTRAIN_COMPLETE")
    return [item.value for item in complete.get_completions(list(words[:-1]), words[-1])]


def test_verbs_recipes_runs_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "recipe.json").write_text("{}")
    (tmp_path / "runs" / "no_run").mkdir()
    assert completed("ro") == ["rollback"]
    assert completed("show", "amber_") == ["amber_7b", "amber_demo"]
    assert completed("recipe", "bench_7") == ["bench_70m"]
    assert completed("eval", "ru") == completed("report", "") == ["runs/first"]
    assert completed("show", "crystal_demo", "optimizer.b") == ["optimizer.beta1=", "optimizer.beta2="]
    assert completed("show", "--st") == ["--step"]
