"""Retention: a removal is a ledger line first, finished by whoever comes next."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_cases import save
from small_ledgers import Tiny, started

from weftrain.core import checkpoint
from weftrain.core.config import KeepConfig
from weftrain.core.errors import CheckpointError, RunFolderError
from weftrain.core.formats import fsops
from weftrain.core.run.ledger import Ledger, read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import lineage
from weftrain.core.run.retention import ARCHIVE, begun_from, finish_removals, plan, prune, remove
from weftrain.core.run.rollback import rollback


@pytest.fixture
def ledger(tmp_path: Path, tiny_recipe: Tiny) -> Ledger:
    """Of a run in tmp_path/run with checkpoints of steps 1 to 5."""
    run = tmp_path / "run"
    run.mkdir()
    found, parent = started(run, tiny_recipe()), None
    for step in range(1, 6):
        parent = add(found, run, step, parent)
    return found


def add(ledger: Ledger, run: Path, step: int, parent: str | None) -> str:
    root = save(run / "checkpoints", step, parent=parent).root
    ledger.add("checkpoint", step=step, root=root, parent=parent, metrics_after=0, metrics_sha256="0" * 64)
    return root


def steps(run: Path) -> list[int]:
    return sorted(checkpoint.step_folders(run / "checkpoints"))


def test_removed_checkpoints_are_told_and_the_chain_of_roots_stays(
    ledger: Ledger, tmp_path: Path, tiny_recipe: Tiny
) -> None:
    run, before = tmp_path / "run", [point.root for point in lineage(ledger.entries).checkpoints]
    found = prune(run, ledger, KeepConfig(last=1, every_steps=2), tiny_recipe())
    assert steps(run) == sorted(found.kept) == [2, 4, 5]
    line = lineage(read_ledger(run / LEDGER))
    assert [point.root for point in line.checkpoints] == before
    assert line.removed == {before[0], before[2]}
    assert ledger.entries[-1]["removed"] == [[1, before[0], None], [3, before[2], None]]
    assert prune(run, ledger, KeepConfig(last=1, every_steps=2), tiny_recipe()).removals == ()
    with pytest.raises(CheckpointError, match="the checkpoint of step 3 was removed; there are: 2, 4, 5"):
        rollback(run, ledger, 3, "a spike")


def test_nothing_is_written_without_consent(ledger: Ledger, tmp_path: Path, tiny_recipe: Tiny) -> None:
    run, count = tmp_path / "run", len(ledger.entries)
    found = prune(run, ledger, KeepConfig(last=1), tiny_recipe(), confirm=lambda found: False)
    assert [one.step for one in found.removals] == [1, 2, 3, 4]
    size = sum(path.stat().st_size for path in found.removals[0].path.glob("*.safetensors"))
    assert found.removals[0].size_bytes == found.removals[0].frees_bytes == size
    assert steps(run) == [1, 2, 3, 4, 5]
    assert len(ledger.entries) == count


@pytest.mark.parametrize("after", range(1, 5))
def test_a_crash_in_a_removal_is_finished_by_whoever_comes_next(
    ledger: Ledger, tmp_path: Path, tiny_recipe: Tiny, after: int
) -> None:
    run = tmp_path / "run"

    class Death(BaseException):
        pass

    left = after

    def dies(path: Path) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Death
        fsops.remove_tree(path)

    found = plan(run, lineage(ledger.entries), KeepConfig(last=1), tiny_recipe(), {})
    with pytest.raises(Death):
        remove(run, ledger, found.removals, KeepConfig(last=1), {}, dies)
    again = Ledger(run)
    finish_removals(run, again)
    fsops.remove_leftovers(run / "checkpoints")
    assert steps(run) == [5]
    assert len(list((run / "checkpoints").iterdir())) == 1
    assert finish_removals(run, again) == []


def test_a_checkpoint_that_is_made_again_is_not_removed_again(
    ledger: Ledger, tmp_path: Path, tiny_recipe: Tiny
) -> None:
    run = tmp_path / "run"
    fourth = lineage(ledger.entries).checkpoints[3].root
    prune(run, ledger, KeepConfig(last=1, every_steps=3), tiny_recipe())
    assert steps(run) == [3, 5]
    rollback(run, ledger, 3, "again")
    third = lineage(ledger.entries).checkpoints[-1].root
    assert add(ledger, run, 4, third) == fourth  # the same bits
    assert fourth not in lineage(ledger.entries).removed
    assert finish_removals(run, ledger) == []
    assert steps(run) == [3, 4]


def test_another_checkpoint_of_a_removed_step_stays(ledger: Ledger, tmp_path: Path, tiny_recipe: Tiny) -> None:
    run = tmp_path / "run"
    prune(run, ledger, KeepConfig(last=1), tiny_recipe())
    save(run / "checkpoints", 2, parent="f" * 64)
    assert finish_removals(run, ledger) == []
    assert steps(run) == [2, 5]


def test_weights_of_removed_checkpoints_are_archived_bit_for_bit(
    ledger: Ledger, tmp_path: Path, tiny_recipe: Tiny
) -> None:
    run = tmp_path / "run"
    manifest = checkpoint.verify(run / "checkpoints" / "step_00000002")
    weights = {name: entry["sha256"] for name, entry in manifest["tensors"].items() if name.startswith("weights/")}
    found = prune(run, ledger, KeepConfig(last=1, archive="weights"), tiny_recipe())
    assert 0 < found.removals[0].frees_bytes < found.removals[0].size_bytes
    claims = checkpoint.verify(run / ARCHIVE / "step_00000002")
    assert claims["parent"] == manifest["root"]
    assert {name: entry["sha256"] for name, entry in claims["tensors"].items()} == weights
    assert ledger.entries[-1]["removed"][1] == [2, manifest["root"], claims["root"]]


def test_a_damaged_checkpoint_stops_an_archive_and_nothing_is_removed(
    ledger: Ledger, tmp_path: Path, tiny_recipe: Tiny
) -> None:
    run = tmp_path / "run"
    (file,) = (run / "checkpoints" / "step_00000002").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="step_00000002"):
        prune(run, ledger, KeepConfig(last=1, archive="weights"), tiny_recipe())
    assert steps(run) == [1, 2, 3, 4, 5]


def test_the_newest_must_be_whole_before_others_go(ledger: Ledger, tmp_path: Path, tiny_recipe: Tiny) -> None:
    run = tmp_path / "run"
    (file,) = (run / "checkpoints" / "step_00000005").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="step_00000005"):
        prune(run, ledger, KeepConfig(last=1), tiny_recipe())
    assert steps(run) == [1, 2, 3, 4, 5]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RunFolderError, match="lists no checkpoint"):
        prune(empty, started(empty, tiny_recipe()), KeepConfig(last=1), tiny_recipe())


def test_what_another_run_began_from_is_kept(ledger: Ledger, tmp_path: Path, tiny_recipe: Tiny) -> None:
    run, root = tmp_path / "run", lineage(ledger.entries).checkpoints[1].root
    other = tmp_path / "other"
    other.mkdir()
    Ledger(other).open_run(0, tiny_recipe().model_dump(mode="json"), "d", {}, root)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / LEDGER).write_text("no line\n")
    assert begun_from(run) == {root: "other"}
    prune(run, ledger, KeepConfig(last=1), tiny_recipe())
    assert steps(run) == [2, 5]


def test_what_is_not_the_ledgers_checkpoint_is_neither_kept_nor_removed(
    ledger: Ledger, tmp_path: Path, tiny_recipe: Tiny
) -> None:
    run, line = tmp_path / "run", lineage(ledger.entries)
    folders = checkpoint.step_folders(run / "checkpoints")
    (folders[1] / "manifest.json").unlink()
    for step in (2, 4):
        data = (folders[step] / "manifest.json").read_bytes()
        (folders[step] / "manifest.json").write_bytes(data.replace(b'"tokens":', b'"tokens":1', 1))
    found = plan(run, line, KeepConfig(last=1), tiny_recipe(), {})
    assert (list(found.kept), [removal.step for removal in found.removals]) == ([5], [3])
