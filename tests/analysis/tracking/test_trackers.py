"""Which trackers there are, and those of other packages: a broken one is named, and the run goes on without it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from small_metrics import train

from weftrain.analysis.tracking.follower import Follower
from weftrain.analysis.tracking.trackers import UnknownTrackerError, find_tracker, problem_of
from weftrain.analysis.tracking.weights_and_biases import WeightsAndBiases
from weftrain.core.run.metrics import MetricsWriter

GIVEN = """[weftrain.trackers]
whole = other_trackers:Whole
broken = other_trackers:missing
raising = other_trackers:raising
"""
MODULE = """
class Whole:
    def problem(self): return "no pen"
def raising(): raise RuntimeError("two\\nlines")
"""


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other_trackers.py").write_text(MODULE)
    info = tmp_path / "other_trackers-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-trackers\nVersion: 1\n")
    (info / "entry_points.txt").write_text(GIVEN)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("others")
def test_trackers_of_other_packages_are_found_and_broken_ones_named() -> None:
    assert problem_of("whole") == "no pen"
    assert problem_of("broken").startswith("entry point 'broken' (other_trackers:missing) failed: AttributeError")
    assert "failed: RuntimeError: two lines: repair or uninstall" in problem_of("raising")
    with pytest.raises(UnknownTrackerError, match="no tracker 'wand': there are tensorboard, wandb, mlflow, broken, r"):
        find_tracker("wand")


def test_weights_and_biases_says_what_is_missing_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert WeightsAndBiases().problem().startswith("no credentials: run `wandb login` or set WANDB_API_KEY")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert WeightsAndBiases().problem() == ""
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert "no credentials" in WeightsAndBiases().problem()
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_API_KEY", "x")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert WeightsAndBiases().problem() == ""


def test_the_tracker_of_the_page_is_whole(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "track-a-run.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    with MetricsWriter(tmp_path) as writer:
        train(writer, 1, 2)
        writer.event("end", step=2)
    follower = Follower(tmp_path, "notebook", names["Notebook"]())
    follower.advance()
    follower.close()
    lines = (tmp_path / "notebook.txt").read_text().splitlines()
    assert lines[0].startswith("1 {'train/loss': 10.0, ")
    assert lines[2] == "2 ended after step 2"
