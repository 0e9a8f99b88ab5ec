"""`weftrain log`, `rollback`, `defer`: what one does after a loss spike, and what the ledger says of it afterwards."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from record_runs import done, prepare, trainer, weftrain

from weftrain.core import checkpoint
from weftrain.core.run.ledger import read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import lineage
from weftrain.core.run.metrics import digest, read_metrics

Train = Callable[..., Result]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("record"))


@pytest.fixture
def train(datasets: Path, tmp_path: Path) -> Train:
    (tmp_path / "datasets").symlink_to(datasets)
    return trainer(tmp_path)


def kinds(run: Path) -> list[tuple[str, int]]:
    return [(entry["kind"], entry["step"]) for entry in read_ledger(run / LEDGER)]


def test_a_run_in_chunks_writes_its_ledger(train: Train, tmp_path: Path) -> None:
    done(train())
    run = tmp_path / "runs" / "crystal_demo"
    expected = [("start", 0), ("chunk_begin", 0)]
    for step in (2, 4, 6):
        expected += [("checkpoint", step), ("chunk_end", step), ("chunk_begin", step)]
    assert kinds(run) == [*expected[:-1], ("end", 6)]
    line = lineage(read_ledger(run / LEDGER))
    manifests = [checkpoint.verify(path) for path in sorted((run / "checkpoints").iterdir())]
    assert [point.root for point in line.checkpoints] == [manifest["root"] for manifest in manifests]
    records = [record for record in read_metrics(run) if record["kind"] in ("step", "evaluation")]
    for point in line.checkpoints:
        assert (
            digest([record for record in records if point.metrics_after < record["step"] <= point.step])
            == point.metrics_sha256
        )
    printed = done(weftrain("log", run))
    for words in (
        "start from scratch",
        "chunk 1 begins  place 1, samples 8..15",
        "chunk 2 ends",
        f"checkpoint {manifests[2]['root'][:12]}",
    ):
        assert words in printed
    assert "samples 12..15, chunk 1 at place 1" in done(weftrain("log", run, "--samples", "3"))
    assert [json.loads(line)["n"] for line in done(weftrain("log", run, "--json")).splitlines()] == list(
        range(len(expected))
    )


def test_interrupted_anywhere_the_bits_and_the_metrics_digests_are_those_of_a_straight_run(
    train: Train, tmp_path: Path
) -> None:
    done(train("--run", "straight"))
    for stop in (1, 3, 4, 5, 6):  # each start is told to stop there, as if a signal came
        done(
            train(
                "--run",
                "halting",
                f"schedule.steps={stop}",
                "data.chunks=null",
                "--allow",
                "schedule.steps",
                "--allow",
                "data.chunks",
            )
        )
    runs = tmp_path / "runs"
    ends = [lineage(read_ledger(runs / name / LEDGER)) for name in ("straight", "halting")]
    states = [checkpoint.load(runs / name / "checkpoints" / "step_00000006")[0] for name in ("straight", "halting")]
    for name, tensor in states[0].tensors.items():
        assert tensor.equal(states[1].tensors[name]), name
    assert [point.step for point in ends[1].checkpoints] == [1, 3, 4, 5, 6]
    assert [ends[1].origin(step)[1] for step in range(6)] == [ends[0].origin(step)[1] for step in range(6)]
    assert [entry["kind"] for entry in read_ledger(runs / "halting" / LEDGER)].count("recipe") == 4


def test_a_rollback_and_a_deferred_chunk(train: Train, tmp_path: Path) -> None:
    done(train())
    run = tmp_path / "runs" / "crystal_demo"
    roots = {point.step: point.root for point in lineage(read_ledger(run / LEDGER)).checkpoints}
    early = weftrain("defer", run, "--chunk", "1", "--reason", "a spike")
    assert early.exit_code == 2
    assert "begins at step 2 and the newest checkpoint is of step 6: go back first, with `" in early.output
    command = shlex.split(early.output.split("`")[1])
    assert command[0] == "weftrain"
    printed = done(weftrain(*command[1:-1], "the loss rose in chunk 1"))
    assert "begin another run" in weftrain("defer", run, "--chunk", "0", "--reason", "a spike").output
    assert "goes on from step 2; 2 later checkpoints are in" in printed
    assert sorted(path.name for path in (run / "branches" / "1").iterdir()) == ["step_00000004", "step_00000006"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]
    for path in (run / "branches" / "1").iterdir():
        assert checkpoint.verify(path)["root"] in roots.values()  # nothing is lost
    done(weftrain("defer", run, "--chunk", "1", "--reason", "the loss rose"))
    again = weftrain("defer", run, "--chunk", "1", "--reason", "again")
    assert "chunk 1 is deferred or dropped already" in again.output
    output = done(train())
    assert "chunk 1 is deferred, as the ledger says: the loss rose" in output
    assert "resumed after step 2" in output
    plain = done(weftrain("train", "crystal_demo", "--runs", run.parent))  # without the overrides it was made with
    assert "is complete" in plain
    assert "chunk 1 is deferred, as the ledger says" in plain
    assert "  data.skip" not in plain
    line = lineage(read_ledger(run / LEDGER))
    spans = [line.origin(step)[2] for step in range(6)]
    assert [span.chunk for span in spans if span is not None] == [0, 0, 2, 2, 1, 1]
    assert [branch.abandoned for branch in line.branches] == [((4, roots[4]), (6, roots[6]))]
    assert line.checkpoints[0].root == roots[2]
    assert line.checkpoints[1].root != roots[4]
    printed = done(weftrain("log", run))
    for words in (
        "rolled back to",
        "2 checkpoints on branch 1: the loss rose in chunk 1",
        "chunk 1 deferred: the loss rose",
        "(abandoned)",
    ):
        assert words in printed
    done(weftrain("rollback", run, "--to", "4", "--reason", "once more"))
    assert [path.name for path in (run / "branches" / "2").iterdir()] == ["step_00000006"]


def test_a_crash_between_the_line_and_the_move_is_finished_by_the_next_start(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weftrain.core.run import rollback

    done(train())
    run = tmp_path / "runs" / "crystal_demo"
    with monkeypatch.context() as patch:
        patch.setattr(rollback, "finish_rollback", lambda run, ledger: [])
        done(weftrain("rollback", run, "--to", "2", "--reason", "a spike"))
    assert len(list((run / "checkpoints").iterdir())) == 3
    assert "resumed after step 2" in done(train())
    assert sorted(path.name for path in (run / "branches" / "1").iterdir()) == ["step_00000004", "step_00000006"]
    assert len(list((run / "checkpoints").iterdir())) == 3


def test_a_second_rollback_first_finishes_the_first(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weftrain.core.run import rollback

    done(train())
    run = tmp_path / "runs" / "crystal_demo"
    with monkeypatch.context() as patch:  # a crash after the line
        patch.setattr(rollback, "finish_rollback", lambda run, ledger: [])
        done(weftrain("rollback", run, "--to", "4", "--reason", "a spike"))
    done(weftrain("rollback", run, "--to", "2", "--reason", "another"))
    assert [path.name for path in (run / "branches" / "1").iterdir()] == ["step_00000006"]
    assert [path.name for path in (run / "branches" / "2").iterdir()] == ["step_00000004"]
    assert [[step for step, _ in branch.abandoned] for branch in lineage(read_ledger(run / LEDGER)).branches] == [
        [6],
        [4],
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rollback", "--to", "3", "--reason", "x"), "there is no checkpoint of step 3; there are: 2, 4, 6"),
        (("rollback", "--to", "6", "--reason", "x"), "is the newest checkpoint already"),
        (("defer", "--chunk", "7", "--reason", "x"), "there is no chunk 7: the run has 3"),
        (("log", "--samples", "6"), "step 6 is not in the ledger"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[str, ...], words: str, train: Train, tmp_path: Path) -> None:
    done(train())
    run = tmp_path / "runs" / "crystal_demo"
    before = (run / LEDGER).read_bytes()
    result = weftrain(arguments[0], run, *arguments[1:])
    assert result.exit_code == 2
    assert (run / LEDGER).read_bytes() == before
    assert words in result.output


def test_an_edited_ledger_stops_the_run(train: Train, tmp_path: Path) -> None:
    done(train())
    path = tmp_path / "runs" / "crystal_demo" / LEDGER
    path.write_bytes(path.read_bytes().replace(b'"kind":"checkpoint"', b'"kind":"chockpoint"', 1))
    result = train()
    assert result.exit_code == 2
    assert "ledger.jsonl:3: kind 'chockpoint'" in result.output


def test_a_decision_outlives_the_rollback_behind_it(train: Train, tmp_path: Path) -> None:
    """What a person decided of a chunk is of the data, not of the branch on which it was decided: the ledger keeps it,
    and the run's own recipe, from which `train` goes on, has it once and no more.
    """
    run = tmp_path / "runs" / "crystal_demo"
    again = ("train", "crystal_demo", "--runs", run.parent)
    done(train("data.chunks=6", "schedule.steps=6"))
    done(weftrain("rollback", run, "--to", "4", "--reason", "the loss rose"))
    done(weftrain("defer", run, "--chunk", "4", "--reason", "a spike"))
    assert "chunk 4 is deferred, as the ledger says: a spike" in done(weftrain(*again))
    done(weftrain("rollback", run, "--to", "2", "--reason", "further back"))
    printed = done(weftrain(*again))
    assert "resumed after step 2" in printed
    assert printed.count("chunk 4 is deferred") == 1
    assert "recipe changed" not in printed
    skip = json.loads((run / "recipe.json").read_bytes())["data"]["skip"]
    assert [(entry["chunk"], entry["action"], entry["reason"]) for entry in skip] == [(4, "defer", "a spike")]
    line = lineage(read_ledger(run / LEDGER))
    assert [span.chunk for step in range(6) if (span := line.origin(step)[2])] == [0, 1, 2, 3, 5, 4]
    assert "is complete" in done(weftrain(*again))
    # What the recipe itself says of a chunk comes before the ledger, also when `train` goes on from the run's recipe.
    done(weftrain("rollback", run, "--to", "4", "--reason", "once more"))
    own = ["data.chunks=6", "data.skip=[{chunk: 4, action: defer, reason: mine}]", "--allow", "data.skip.0.reason"]
    done(weftrain(*again, *own))
    assert "is complete" in done(weftrain(*again))
    (entry,) = json.loads((run / "recipe.json").read_bytes())["data"]["skip"]
    assert entry["reason"] == "mine"
