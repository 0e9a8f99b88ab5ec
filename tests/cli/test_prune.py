"""`weftrain prune`, and a run that removes its own old checkpoints: what stays can be resumed, released and replayed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from record_runs import done, prepare, trainer, weftrain

from weftrain.core import checkpoint
from weftrain.core.run.ledger import read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import lineage

Train = Callable[..., Result]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("record"))


@pytest.fixture
def train(datasets: Path, tmp_path: Path) -> Train:
    (tmp_path / "datasets").symlink_to(datasets)
    return trainer(tmp_path)


def steps(run: Path) -> list[int]:
    return sorted(checkpoint.step_folders(run / "checkpoints"))


def test_a_run_that_keeps_a_few_is_resumed_released_and_replayed(train: Train, tmp_path: Path) -> None:
    keep = [
        "checkpoint.every_steps=1",
        "checkpoint.keep={last: 1, chunk_ends: false, every_steps: 4, archive: weights}",
    ]
    done(train("--run", "all", "checkpoint.every_steps=1"))
    done(train("--run", "few", *keep))
    done(weftrain("rollback", tmp_path / "runs" / "few", "--to", "4", "--reason", "to train the end again"))
    done(train("--run", "few", *keep))
    everything, run = tmp_path / "runs" / "all", tmp_path / "runs" / "few"
    assert steps(everything) == [1, 2, 3, 4, 5, 6]
    assert steps(run) == [4, 6]
    done(
        weftrain("convert", "to-huggingface", run / "archive" / "step_00000002", tmp_path / "hf", "--dtype", "float32")
    )
    assert sorted(path.name for path in (run / "archive").iterdir()) == [f"step_{step:08d}" for step in (1, 2, 3, 5)]
    line = lineage(read_ledger(run / LEDGER))
    assert [point.step for point in line.checkpoints] == [1, 2, 3, 4, 5, 6]
    weights = {}
    for folder in (everything, run):
        tensors = checkpoint.verify(folder / "checkpoints" / "step_00000006")["tensors"]
        weights[folder.name] = {name: entry["sha256"] for name, entry in tensors.items()}
    assert weights["few"] == weights["all"]
    release = tmp_path / "release"
    done(weftrain("release", run, "--licence", "Apache-2.0", "--to", release))
    links = json.loads((release / "release.json").read_text())["links"]
    assert [(link["first_step"], link["stop_step"], link["chunk"]) for link in links] == [(0, 4, None), (4, 6, 2)]
    printed = done(weftrain("replay", release))
    assert "equal" in printed
    assert "(removed)" in done(weftrain("log", run))
    done(weftrain("report", run))


def test_prune_shows_asks_and_removes(train: Train, tmp_path: Path) -> None:
    done(train("checkpoint.every_steps=1"))
    run = tmp_path / "runs" / "crystal_demo"
    refused = weftrain("prune", run)
    assert refused.exit_code == 2
    assert "has no checkpoint.keep, so all are kept" in refused.stderr
    shown = done(weftrain("prune", run, "--keep-last", "1", "--dry-run"))
    assert "3 kept, 3 to remove, which frees" in shown  # those of steps 2, 4 and 6 end chunks
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    done(weftrain("prune", run, "--keep-last", "1", "--keep-best", "1", "--yes"))
    assert set(steps(run)) >= {2, 4, 6}
    assert len(steps(run)) < 6
    done(weftrain("prune", run, "--keep-last", "1", "--no-chunk-ends", "--yes"))
    assert steps(run) == [6]
    assert "0 to remove" in done(weftrain("prune", run, "--keep-last", "1"))
    assert "is complete" in done(train("checkpoint.every_steps=1"))
