"""A run whose backend keeps its own state: killed between that state and the record, rolled back, continued by others,
or another run's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from record_runs import done, prepare, trainer, weftrain

from weftrain.backends.streaming.store.file import read_commit
from weftrain.cli.verify import verified_release
from weftrain.core import checkpoint, saving
from weftrain.core.evaluators import HeldOutLoss
from weftrain.core.run.ledger import Ledger, read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import lineage
from weftrain.core.run.metrics import MetricsWriter, read_metrics

Train = Callable[..., Result]
MAPPED = ("--backend", "streaming", "backend.options.tier=mapped", "backend.options.threads=1")
DIRECT = (
    "--backend",
    "streaming",
    "backend.options.tier=direct",
    "backend.options.threads=1",
    "backend.options.tile_elements=4096",
)


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs, but for what lets the next process in."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("kept")
    prepare(made)
    done(trainer(made)("--run", "straight", *MAPPED))
    return made


@pytest.fixture
def train(folder: Path, tmp_path: Path) -> Train:
    (tmp_path / "datasets").symlink_to(folder / "datasets")
    return trainer(tmp_path)


def killed_at(patch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool]) -> None:
    """Die in place of the call of owner.name for which `when` holds."""
    original = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        if when(*arguments, **named):
            raise Killed
        return original(*arguments, **named)

    patch.setattr(owner, name, call)


def story(run: Path) -> Any:
    """What the record says was trained and measured, without what differs between two equal runs."""
    measured = [
        {key: record.get(key) for key in ("kind", "step", "set", "loss", "grad_norm", "tokens", "skipped")}
        for record in read_metrics(run)
        if record["kind"] in ("step", "evaluation")
    ]
    entries = read_ledger(run / LEDGER)
    points = [
        (point.step, point.root, point.parent, point.metrics_after, point.metrics_sha256)
        for point in lineage(entries).checkpoints
    ]
    return measured, points, [(entry["step"], entry["samples"]) for entry in entries if entry["kind"] == "skip"]


PLACES = {
    "before the log line": (MetricsWriter, "step", lambda writer, record: record["step"]),
    "before the evaluation": (HeldOutLoss, "measure", lambda held, run, completed: completed),
    "before the checkpoint": (saving.checkpoint, "begin", lambda folder, state, **named: state.step),
    "before the ledger's line": (Ledger, "checkpoint", lambda *fields, step, **named: step),
}


@pytest.mark.parametrize(
    ("tier", "place", "step"),
    [
        (MAPPED, "before the log line", 6),
        (MAPPED, "before the checkpoint", 6),
        (DIRECT, "before the evaluation", 4),
        (DIRECT, "before the checkpoint", 2),
        *[
            pytest.param(tier, place, step, marks=mark)
            for tier, mark in ((MAPPED, pytest.mark.prove), (DIRECT, pytest.mark.soak))
            for place in PLACES
            for step in (1, 2, 6)
        ],
    ],
)
def test_a_step_that_the_state_has_and_the_record_lacks_is_made_up_for(
    tier: tuple[str, ...], place: str, step: int, train: Train, folder: Path, tmp_path: Path
) -> None:
    """Every step that the plan wants something of: an ordinary one, a chunk's last, the run's last."""
    data = f"data.root={folder / 'datasets'}"  # a path in the recipe, and so in a root
    owner, name, step_of = PLACES[place]
    if step == 1 and place != "before the log line":
        pytest.skip("the plan wants nothing else of it")
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, owner, name, lambda *fields, **named: step_of(*fields, **named) == step)
        with pytest.raises(Killed):
            train(*tier, data)
    run = tmp_path / "runs" / "crystal_demo"
    standing = read_commit(run / "store")
    assert standing is not None
    assert standing.step == step
    again = done(train(*tier, data))
    assert ("is recorded now" in again) == (place != "before the ledger's line")
    if tier == MAPPED:
        assert story(run) == story(folder / "runs" / "straight")
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [f"step_0000000{at}" for at in (2, 4, 6)]
    assert "is complete" in done(train(*tier, data))
    done(weftrain("release", run, "--to", tmp_path / "release", "--licence", "MIT"))
    verified_release(tmp_path / "release")


@pytest.mark.parametrize("tier", [MAPPED, pytest.param(DIRECT, marks=pytest.mark.soak)])
def test_a_rollback_holds_for_the_backends_own_state(
    tier: tuple[str, ...], train: Train, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "crystal_demo"
    done(train(*tier))
    roots = story(run)[1]
    assert "the backend's own state" not in weftrain("rollback", run, "--to", "6", "--reason", "a spike").output
    done(weftrain("rollback", run, "--to", "2", "--reason", "a spike"))
    output = done(train(*tier))
    assert "stands at 6 completed steps and belongs to training that the run has left" in output
    assert "a rollback went back to step 2" in output
    assert "resumed after step 2" in output
    left = read_commit(run / "store.superseded-1")
    assert left is not None
    assert (left.step, left.closed) == (6, True)
    assert [entry["step"] for entry in read_ledger(run / LEDGER) if entry["kind"] in ("start", "resume")] == [0, 2]
    assert story(run)[1] == roots  # the same training again: nothing was deferred
    done(weftrain("rollback", run, "--to", "4", "--reason", "once more"))
    done(weftrain("defer", run, "--chunk", "2", "--drop", "--reason", "chunk 2 is bad"))
    assert "is complete" not in done(train(*tier))
    assert (run / "store.superseded-2").is_dir()


def test_a_state_beyond_the_newest_checkpoint_is_rolled_back_and_nothing_is_deferred_below_it(
    train: Train, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "crystal_demo"
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, saving.checkpoint, "begin", lambda folder, state, **named: state.step == 4)
        with pytest.raises(Killed):
            train(*MAPPED)
    early = weftrain("defer", run, "--chunk", "1", "--reason", "a spike")
    assert "chunk 1 begins at step 2 and the backend's own state is of step 4: go back first" in early.output
    done(weftrain("rollback", run, "--to", "2", "--reason", "a spike"))
    done(weftrain("defer", run, "--chunk", "1", "--reason", "a spike"))
    assert "a rollback went back to step 2" in done(train(*MAPPED))
    spans = [lineage(read_ledger(run / LEDGER)).origin(step)[2] for step in range(6)]
    assert [span.chunk for span in spans if span is not None] == [0, 0, 2, 2, 1, 1]


def test_what_another_backend_trained_since_is_not_lost_to_an_older_state(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "crystal_demo"
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, MetricsWriter, "step", lambda writer, record: record["step"] == 6)
        with pytest.raises(Killed):  # the newest checkpoint is of step 4
            train(*MAPPED)
    keys = ("backend.name", "backend.options.tier")
    other = ("--backend", "local", "backend.options.threads=1", *(item for key in keys for item in ("--allow", key)))
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, MetricsWriter, "step", lambda writer, record: record["step"] == 6)
        with pytest.raises(Killed):  # trained step 5 again, and left no checkpoint
            train(*other)
    output = done(train(*MAPPED, *(item for key in keys for item in ("--allow", key))))
    assert "training went on without it from step 4" in output
    assert (run / "store.superseded-1").is_dir()
    resumed = [entry for entry in read_ledger(run / LEDGER) if entry["kind"] == "resume"]
    assert resumed[-1].get("continues") is None  # the record does not claim the state that it did not go on from


def test_another_runs_state_is_refused_and_left_alone(train: Train, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    store = (*MAPPED, f"backend.options.store={place}")
    done(train("--run", "one", *store))
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    refused = train("--run", "two", *store)
    assert refused.exit_code == 2
    assert (
        f"own state in {place} stands at 6 completed steps and belongs to a run with another ledger: move it away"
        in refused.output
    )
    done(train("--run", "one", *store))
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert not (tmp_path / "runs" / "two" / "checkpoints").exists()


def test_of_two_copies_of_a_run_only_the_one_that_trained_on_has_its_state(train: Train, tmp_path: Path) -> None:
    place = tmp_path / "place"
    store = (*MAPPED, f"backend.options.store={place}", "checkpoint.at_end=false")
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, MetricsWriter, "step", lambda writer, record: record["step"] == 3)
        with pytest.raises(Killed):
            train("--run", "one", *store)
    shutil.copytree(tmp_path / "runs" / "one", tmp_path / "runs" / "copy")
    done(train("--run", "one", *store))
    refused = train("--run", "copy", *store)
    assert "belongs to a run with another ledger" in refused.output


def test_other_data_is_refused_unless_it_is_allowed(train: Train, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, saving.checkpoint, "begin", lambda folder, state, **named: state.step == 2)
        with pytest.raises(Killed):
            train(*MAPPED)
    shutil.copytree(tmp_path / "datasets", tmp_path / "real")
    (tmp_path / "datasets").unlink()
    prepare_other(tmp_path)
    refused = train(*MAPPED)
    assert refused.exit_code == 2
    assert "store: was trained on dataset" in refused.output
    output = done(train(*MAPPED, "--allow", "data"))
    assert "stands at 2 completed steps: the run goes on from there" in output
    manifests = [
        checkpoint.verify(path) for path in sorted((tmp_path / "runs" / "crystal_demo" / "checkpoints").iterdir())
    ]
    # that of the step that was made up for is the old one
    assert manifests[0]["dataset_id"] != manifests[1]["dataset_id"]


@pytest.mark.parametrize("place", [(saving.checkpoint, "begin"), (Ledger, "checkpoint")])
def test_what_is_made_up_for_is_recorded_as_it_was_made(place: tuple[Any, str], train: Train, tmp_path: Path) -> None:
    """The process that goes on with another recipe dies too, before it records the step or before the ledger has its
    checkpoint.
    """
    plain = (*MAPPED, "data.chunks=null", "checkpoint.every_steps=3", "log.evaluate_every_steps=0")
    skip = "data.skip=[{source: words, rows: [0, 20], reason: bad}]"
    for dies_at, more in (((saving.checkpoint, "begin"), ()), (place, (skip, "--allow", "data.skip.0"))):
        with pytest.MonkeyPatch.context() as patch:
            killed_at(patch, *dies_at, lambda *fields, **named: True)
            with pytest.raises(Killed):
                train(*plain, *more)
    done(train(*plain, skip))
    run = tmp_path / "runs" / "crystal_demo"
    first, last = (checkpoint.verify(path) for path in sorted((run / "checkpoints").iterdir()))
    assert (first["recipe"]["data"]["skip"], first["recipe"]["data"]["continues"]) == ([], None)
    assert first["sources"]["words"]["read"] == last["recipe"]["data"]["continues"]["sources"]["words"]["read"] == 12
    done(weftrain("release", run, "--to", tmp_path / "release", "--licence", "MIT"))


def test_a_release_holds_the_datasets_that_its_links_were_trained_on(
    train: Train, folder: Path, tmp_path: Path
) -> None:
    plain = ("--backend", "local", "data.chunks=null", "log.evaluate_every_steps=0")
    (tmp_path / "datasets").unlink()
    (tmp_path / "datasets").mkdir()
    for name in ("words", "other"):
        (tmp_path / "datasets" / name).symlink_to(folder / "datasets" / "words")
    done(train(*plain, "schedule.steps=2"))
    other = (
        "data.sources=[{name: other, path: other, weight: 1}]",
        "--allow",
        "data.sources.0.name",
        "--allow",
        "data.sources.0.path",
    )
    done(train(*plain, "schedule.steps=4", "--allow", "schedule.steps", *other))
    done(weftrain("release", tmp_path / "runs" / "crystal_demo", "--to", tmp_path / "release", "--licence", "MIT"))
    assert {path.name for path in (tmp_path / "release" / "data").iterdir()} == {"words", "other"}


def test_what_a_run_began_from_is_not_asked_for_again(train: Train, folder: Path, tmp_path: Path) -> None:
    """The run stands in its own store, and its checkpoints are damaged or not made yet; the other run has gone."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(folder / "runs" / "straight", tmp_path / "runs" / "straight")
    begin = (
        *MAPPED,
        "data.chunks=null",
        "start_from={run: straight, state: all}",
        "log.evaluate_every_steps=0",
        "checkpoint.every_steps=2",
    )
    run = tmp_path / "runs" / "crystal_demo"
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, MetricsWriter, "step", lambda writer, record: record["step"] == 1)
        with pytest.raises(Killed):
            train(*begin)
    (tmp_path / "runs" / "straight").rename(tmp_path / "gone")
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, MetricsWriter, "step", lambda writer, record: record["step"] == 3)
        with pytest.raises(Killed):
            train(*begin)
    for place in (run / "checkpoints").iterdir():
        (place / "manifest.json").write_text("{}")
    (tmp_path / "gone").rename(tmp_path / "runs" / "straight")
    done(train(*begin))
    line = lineage(read_ledger(run / LEDGER))
    other = read_ledger(tmp_path / "runs" / "straight" / LEDGER)
    assert line.checkpoints[0].parent == lineage(other).checkpoints[-1].root
    assert [point.parent for point in line.checkpoints[1:]] == [point.root for point in line.checkpoints[:-1]]


def test_a_store_of_another_format_says_what_to_do(train: Train, tmp_path: Path) -> None:
    store = tmp_path / "place"
    store.mkdir()
    (store / "layout.json").write_text('{"version":1}')
    refused = train(*MAPPED, f"backend.options.store={store}")
    assert (
        "the store is of format 1, and this version of weftrain reads 2: finish the run with the version that made it"
        in refused.output
    )


def prepare_other(folder: Path) -> None:
    """Another dataset of the same name, with the first one's tokenizer."""
    texts = folder / "more"
    texts.mkdir()
    for number in range(60):
        (texts / f"{number}.txt").write_text("abc def " * 40 + str(number))
    options = [
        "--name",
        "words",
        "--sequence-length",
        "13",
        "--tokenizer",
        folder / "real" / "words" / "tokenizer.json",
    ]
    done(weftrain("prep", texts, "--output", folder / "datasets", *options, "--heldout-fraction", "0.1"))


@pytest.mark.parametrize("tier", [MAPPED, pytest.param(DIRECT, marks=pytest.mark.soak)])
def test_replay_and_evaluation_take_no_path_from_a_record(tier: tuple[str, ...], train: Train, tmp_path: Path) -> None:
    """The release names the store of a run that goes on: neither it nor its own folder is touched, and nothing new is
    made.
    """
    place = tmp_path / "place"
    run = tmp_path / "runs" / "crystal_demo"
    done(train(*tier, f"backend.options.store={place}", "schedule.steps=4", "data.chunks=2"))
    done(weftrain("release", run, "--to", tmp_path / "release", "--licence", "MIT"))
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    names = sorted(path.name for path in tmp_path.iterdir())
    output = done(weftrain("replay", tmp_path / "release", "--link", "1", "--link", "2", "--device", "cpu"))
    assert output.count("equal") >= 2
    assert "not taken from the record, this machine's defaults apply: backend.options.store" in output
    for folder in (run, tmp_path / "release"):
        done(weftrain("eval", folder, "--rows", "2"))
    done(weftrain("generate", tmp_path / "release", "--ids", "1,2", "--max-new-tokens", "2"))
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.prove
def test_an_alert_takes_back_a_state_that_the_backend_keeps(train: Train, tmp_path: Path) -> None:
    """It is beyond the checkpoint that the run goes back to, and is set aside; the run ends as by hand."""
    rule = "alerts=[{rule: metric, metric: tokens, above: 104, actions: [rollback], rollbacks: 1, calm_lines: 1}]"
    halted = train(*MAPPED, rule)
    assert halted.exit_code == 6, halted.output
    assert "the run goes back to step 2, and chunk 1 is deferred" in halted.output
    done(train(*MAPPED, rule))
    done(train(*MAPPED, "--run", "by_hand", "data.skip=[{chunk: 1, action: defer, reason: x}]"))
    states = [
        checkpoint.newest(tmp_path / "runs" / name / "checkpoints", print) for name in ("crystal_demo", "by_hand")
    ]
    tensors = [checkpoint.load(state)[0].tensors for state in states if state is not None]
    assert all((tensors[0][name] == tensors[1][name]).all() for name in tensors[0])
