"""Going back: checkpoints move to a branch, also if a crash came between the ledger's line and the move."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_cases import save
from small_ledgers import Tiny, chunked, started

from weftrain.core.errors import CheckpointError, RunFolderError
from weftrain.core.run.ledger import Ledger
from weftrain.core.run.rollback import abandoned, defer_chunk, finish_rollback, rollback


@pytest.fixture
def ledger(tmp_path: Path, tiny_recipe: Tiny) -> Ledger:
    """Of a run in tmp_path with checkpoints of steps 1 and 2."""
    found, parent = started(tmp_path, tiny_recipe()), None
    for step in (1, 2):
        root = save(tmp_path / "checkpoints", step, parent=parent).root
        found.add("checkpoint", step=step, root=root, parent=parent, metrics_after=0, metrics_sha256="0" * 64)
        parent = root
    return found


def test_what_lies_beyond_the_step_becomes_a_branch(ledger: Ledger, tmp_path: Path) -> None:
    branch = rollback(tmp_path, ledger, 1, "a spike")
    assert (branch.number, branch.step, branch.reason) == (1, 1, "a spike")
    assert [step for step, _ in branch.abandoned] == [2]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert [path.name for path in (tmp_path / "branches" / "1").iterdir()] == ["step_00000002"]


def test_a_crash_before_the_move_is_finished_by_whoever_comes_next(ledger: Ledger, tmp_path: Path) -> None:
    first, second = (entry["root"] for entry in ledger.entries[1:])
    ledger.add("rollback", step=1, root=first, branch=1, abandoned=[[2, second]], reason="a spike")
    assert [path.name for path in abandoned(tmp_path, ledger.entries)] == ["step_00000002"]
    assert finish_rollback(tmp_path, ledger) == [tmp_path / "branches" / "1" / "step_00000002"]
    assert abandoned(tmp_path, ledger.entries) == finish_rollback(tmp_path, ledger) == []


def test_where_there_is_nothing_to_go_back_to_nothing_changes(ledger: Ledger, tmp_path: Path) -> None:
    count = len(ledger.entries)
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; there are: 1, 2"):
        rollback(tmp_path, ledger, 5, "a spike")
    with pytest.raises(RunFolderError, match="is the newest checkpoint already"):
        rollback(tmp_path, ledger, 2, "a spike")
    assert len(ledger.entries) == count


def test_a_chunk_is_deferred_before_it_begins_and_once(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = chunked(tiny_recipe)
    ledger = started(tmp_path, recipe)
    assert defer_chunk(tmp_path, ledger, recipe, 1, "defer", "a spike")["chunk"] == 1
    for chunk, words in ((1, "deferred or dropped already"), (3, "there is no chunk 3: the run has 3")):
        with pytest.raises(RunFolderError, match=words):
            defer_chunk(tmp_path, ledger, recipe, chunk, "drop", "a spike")
    save(tmp_path / "checkpoints", 1)
    with pytest.raises(RunFolderError, match="chunk 0 begins at step 0 and the newest checkpoint is of step 1"):
        defer_chunk(tmp_path, ledger, recipe, 0, "drop", "a spike")
    with pytest.raises(RunFolderError, match="not cut in chunks"):
        defer_chunk(tmp_path, ledger, tiny_recipe(), 0, "drop", "a spike")
