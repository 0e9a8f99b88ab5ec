"""A run of a mixture of experts is released, verified and replayed; what no file of another program can hold is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from record_runs import CUT, done, weftrain
from release_cases import verdicts

OTHER = ("model.rotary_dim", "model.num_heads", "model.mup", "model.intermediate_size")
TINY = [
    *(item for item in CUT if not item.startswith(OTHER)),
    "model.num_heads=4",
    "model.rotary_dim=12",
    "model.intermediate_size=32",
    "model.experts.intermediate_size=32",
    "precision.numerics=replayable",
]
OLMOE = ["model.experts.shared=0", "model.experts.dense_layers=0", "model.experts.renormalize=false"]


def train(made: Path, runs: Path, *more: str) -> Path:
    shutil.rmtree(runs, ignore_errors=True)
    done(weftrain("train", "moe_demo", *TINY, f"data.root={made / 'datasets'}", *more, "--runs", runs))
    return runs / "moe_demo"


@pytest.mark.parametrize("backend", ["local", "streaming"])
def test_a_run_with_experts_is_released_verified_and_replayed(backend: str, made: Path, tmp_path: Path) -> None:
    run = train(made, tmp_path / "runs", *OLMOE, f"backend.name={backend}")
    release = tmp_path / "release"
    done(weftrain("release", run, "--to", release, "--licence", "MIT"))
    shutil.rmtree(tmp_path / "runs")
    assert "3 links: complete and consistent" in done(weftrain("verify", release))
    replayed = weftrain("replay", release)
    assert verdicts(replayed) == ["equal"] * 3, replayed.output


def test_a_model_that_no_family_can_hold_is_not_released(made: Path, tmp_path: Path) -> None:
    """moe_demo as it is, with biases that loads move."""
    run = train(made, tmp_path / "runs", "model.experts.bias_update=0.01", "schedule.steps=3")
    refused = weftrain("release", run, "--to", tmp_path / "release", "--licence", "MIT")
    assert refused.exit_code == 2
    assert "no family of Hugging Face can hold this model; 'olmoe' comes nearest, which needs" in refused.output
    assert '"shared": 0' in refused.output
    assert not (tmp_path / "release").exists()
