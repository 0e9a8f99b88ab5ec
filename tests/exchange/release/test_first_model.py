"""A run whose objective reads the model that it began with: it keeps that model, goes on to the same bits,
and its release is replayed by somebody who has nothing else.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from record_runs import done, trainer, weftrain
from release_cases import verdicts

from weftrain.core import checkpoint

RMU = [
    "start_from={run: crystal_demo, state: weights}",
    "data.sources=[{name: bio, path: words, weight: 0.5}, {name: wiki, path: words, weight: 0.5}]",
    "objective={name: rmu, forget: [bio], layer: 0, steering: 2.0}",
    "checkpoint.keep={last: 1, chunk_ends: false}",
]

FOUR = ["schedule.steps=4", "data.chunks=2"]
SIX = ["--allow", "schedule.steps", "--allow", "data.chunks"]


def test_a_run_of_rmu_goes_on_with_the_model_that_it_kept_and_is_replayed(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "runs", tmp_path / "runs")
    (tmp_path / "datasets").symlink_to(made / "datasets")
    train = trainer(tmp_path)
    done(train("--run", "whole", *RMU))
    run = tmp_path / "runs" / "killed"
    done(train("--run", "killed", *RMU, *FOUR))
    begun_with = checkpoint.verify(run / "checkpoints" / "step_00000000")
    assert begun_with["parent"] == checkpoint.verify(tmp_path / "runs/crystal_demo/checkpoints/step_00000006")["root"]
    shutil.rmtree(tmp_path / "runs" / "crystal_demo")  # nobody needs it any more
    (run / "checkpoints" / "step_00000000").rename(tmp_path / "away")
    refused = train("--run", "killed", *RMU, *SIX)
    assert refused.exit_code == 2
    assert "step_00000000: is gone, and objective rmu reads the model that the run began with" in refused.output
    (tmp_path / "away").rename(run / "checkpoints" / "step_00000000")
    assert "resumed after step 4" in done(train("--run", "killed", *RMU, *SIX))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000000", "step_00000006"]
    states = [
        checkpoint.load(tmp_path / "runs" / name / "checkpoints" / "step_00000006")[0] for name in ("whole", "killed")
    ]
    assert states[0].tensors.keys() == states[1].tensors.keys()
    assert all(torch.equal(states[0].tensors[name], states[1].tensors[name]) for name in states[0].tensors)
    done(weftrain("release", run, "--to", tmp_path / "release", "--licence", "MIT"))
    shutil.rmtree(tmp_path / "runs")
    replayed = weftrain("replay", tmp_path / "release")
    assert verdicts(replayed) == ["equal"], replayed.output
