"""Which checkpoints are the run's own by its ledger, and what a start makes of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import save

from weftrain.core.checkpoint import CheckpointInfo
from weftrain.core.errors import CheckpointError, RunFolderError
from weftrain.core.formats.checkpoint_manifest import read_checkpoint_manifest
from weftrain.core.run.own_checkpoints import Standing, standing


def entry(saved: CheckpointInfo) -> dict[str, Any]:
    return {
        "kind": "checkpoint",
        "n": 0,
        "step": saved.step,
        "root": saved.root,
        "parent": None,
        "metrics_after": 0,
        "metrics_sha256": "0" * 64,
    }


def stand(run: Path, *entries: dict[str, Any], repair: bool = False) -> Standing:
    return standing(run, entries, repair, lambda line: None)


def test_without_a_ledger_checkpoints_stand_only_if_that_is_asked_for(tmp_path: Path) -> None:
    assert stand(tmp_path) == Standing(None, (), (), False)
    saved = save(tmp_path / "checkpoints", 1)
    with pytest.raises(RunFolderError, match=r"holds checkpoints and no ledger\.jsonl"):
        stand(tmp_path)
    assert stand(tmp_path, repair=True).newest == saved.path


def test_damaged_and_missing_ones_are_passed_over(tmp_path: Path) -> None:
    first, second, third = (save(tmp_path / "checkpoints", step) for step in (1, 2, 3))
    next(second.path.glob("*.safetensors")).write_bytes(b"")
    third.path.rename(tmp_path / "elsewhere")
    found = stand(tmp_path, entry(first), entry(second), entry(third))
    assert (found.newest, found.passed_over) == (first.path, ((2, "damaged"), (3, "missing")))


def test_one_unlisted_checkpoint_is_entered_and_more_only_if_that_is_asked_for(tmp_path: Path) -> None:
    first = save(tmp_path / "checkpoints", 1)
    second = save(tmp_path / "checkpoints", 2, parent=first.root)
    assert [one["root"] for one in stand(tmp_path, entry(first)).to_enter] == [second.root]
    third = save(tmp_path / "checkpoints", 3, parent=second.root)
    with pytest.raises(RunFolderError, match=r"does not list the checkpoints of steps 2, 3"):
        stand(tmp_path, entry(first))
    entered = stand(tmp_path, entry(first), repair=True).to_enter
    assert [one["root"] for one in entered] == [second.root, third.root]


def test_a_checkpoint_with_another_parent_is_refused(tmp_path: Path) -> None:
    first = save(tmp_path / "checkpoints", 1)
    save(tmp_path / "checkpoints", 2, parent="e" * 64)
    with pytest.raises(
        CheckpointError, match="its parent is eeeeeeeeeeee, and the ledger's last checkpoint, of step 1"
    ):
        stand(tmp_path, entry(first))


def test_one_that_a_rollback_left_and_that_training_made_again_is_entered(tmp_path: Path) -> None:
    first = save(tmp_path / "checkpoints", 1)
    second = save(tmp_path / "checkpoints", 2, parent=first.root)
    manifest = read_checkpoint_manifest(second.path)
    begins = {"dataset_id": manifest["dataset_id"], "environment": {}, "parent": None}
    start = {"kind": "start", "n": 0, "step": 0, "recipe": manifest["recipe"], **begins}
    left = {"kind": "rollback", "n": 3, "step": 1, "branch": 1, "abandoned": [[2, second.root]], "reason": "a spike"}
    before = (start, entry(first), entry(second), left)
    assert stand(tmp_path, *before).newest == first.path  # it waits to be moved to its branch
    found = stand(tmp_path, *before, {"kind": "resume", "n": 4, "step": 1, **begins, "parent": first.root})
    assert [one["root"] for one in found.to_enter] == [second.root]
