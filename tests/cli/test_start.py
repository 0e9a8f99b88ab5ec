"""How `weftrain train` starts: a refused start leaves no trace, and a run goes on from its own checkpoints alone."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from weftrain.core.formats import checkpoint_files
from weftrain.core.formats.canonical import canonical_json, sha256_json
from weftrain.core.formats.checkpoint_manifest import read_checkpoint_manifest
from weftrain.core.run.ledger import TORN, Ledger, read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import lineage
from weftrain.core.run.metrics import METRICS, read_metrics
from weftrain.core.run.run_folder import RunFolder

Train = Callable[..., Result]
BASE = ["--backend", "null", "schedule.steps=6", "checkpoint.every_steps=2"]
MORE = ["--backend", "null", "schedule.steps=8", "checkpoint.every_steps=2", "--allow", "schedule.steps"]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder; of a lock, only that it is there: it says who held it last."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and path.name != "lock" else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def run(train_tiny: Train, tmp_path: Path) -> Path:
    """A run of 6 steps with checkpoints of steps 2, 4 and 6."""
    done = train_tiny(*BASE)
    assert done.exit_code == 0, done.output
    return tmp_path / "runs" / "crystal_demo"


def went_on(result: Result, run: Path) -> list[int]:
    """Steps of the checkpoints on the ledger's line, after a start that went well."""
    assert result.exit_code == 0, result.output
    return [point.step for point in lineage(read_ledger(run / LEDGER)).checkpoints]


def refused(result: Result, *wanted: str) -> None:
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), result.output  # no traceback
    for words in wanted:
        assert words in result.output


REFUSED = {
    "kernels pin": ["kernels.pins.rope=nobody"],
    "unknown option": ["backend.options.devise=cpu"],
    "backend": ["backend.name=nobody"],
    "replicas": ["batch.replicas=2", "batch.micro_batch_size=2"],
    "data": ["data.synthetic_rows=null", "data.sources=[{name: a, path: not_there, weight: 1}]"],
    "start_from": ["start_from={run: not_there, state: all}"],
    "model": ["model.num_layers=3"],
}


def test_a_refused_start_leaves_no_trace(train_tiny: Train, tmp_path: Path) -> None:
    """Of a new run, not even its folder; of another, every file as it was, so that the first command and the intended
    one still work.
    """
    for name, arguments in REFUSED.items():
        if name != "model":  # a new run may have any
            refused(train_tiny("schedule.steps=2", *arguments))
            assert not (tmp_path / "runs").exists(), name
    assert train_tiny("schedule.steps=2", "--backend", "local").exit_code == 0
    before = tree(tmp_path)
    for name, arguments in REFUSED.items():
        keys = [item.split("=")[0] for item in arguments]
        allowed = [word for key in [*keys, "schedule.steps", "data"] for word in ("--allow", key)]
        allowed += [
            word
            for leaf in ("name", "path", "weight", "epochs", "tokens", "fim")
            for word in ("--allow", f"data.sources.0.{leaf}")
        ]
        if name != "start_from":  # looked at where a run begins
            refused(train_tiny("schedule.steps=4", *arguments, *allowed))
            assert tree(tmp_path) == before, name
    refused(train_tiny("schedule.steps=4", "seed=2"), "--allow")
    assert tree(tmp_path) == before
    assert "is complete" in train_tiny("schedule.steps=2", "--backend", "local").output
    assert train_tiny("schedule.steps=3", "--allow", "schedule.steps").exit_code == 0


def test_a_name_that_a_killed_start_left_behind_is_free(train_tiny: Train, tmp_path: Path) -> None:
    """An empty folder with a lock is no run: whatever recipe comes next may have the name."""
    folder = tmp_path / "runs" / "crystal_demo"
    folder.mkdir(parents=True)
    (folder / "lock").write_text("{}")
    refused(train_tiny(*BASE, "kernels.pins.rope=nobody", "--backend", "local"))
    assert (folder / "lock").exists()
    assert train_tiny(*BASE, "seed=5").exit_code == 0


def foreign(train_tiny: Train, run: Path, *more: str) -> Path:
    """The newest checkpoint of another run put beside this one's."""
    assert train_tiny(*MORE[:4], "--run", "other", *more).exit_code == 0
    other = run.parent / "other" / "checkpoints" / "step_00000008"
    return Path(shutil.copytree(other, run / "checkpoints" / other.name))


def forged(place: Path, **claims: object) -> Path:
    """A checkpoint with other claims in its manifest, consistent in itself."""
    from weftrain.core.formats.canonical import root_of, sha256_json

    manifest = json.loads((place / "manifest.json").read_bytes()) | claims
    manifest["recipe_sha256"] = sha256_json(manifest["recipe"])
    manifest["root"] = root_of(manifest)
    (place / "manifest.json").write_bytes(canonical_json(manifest) + b"\n")
    return place


def test_a_foreign_checkpoint_is_refused_and_named(train_tiny: Train, run: Path) -> None:
    before = tree(run)
    place = foreign(train_tiny, run)
    refused(train_tiny(*MORE), str(place), "its parent is", "move the folder away")
    last = read_checkpoint_manifest(run / "checkpoints" / "step_00000006")
    forged(place, parent=last["root"], recipe=last["recipe"] | {"seed": 77})
    refused(train_tiny(*MORE), "made with another recipe (seed: ")
    forged(place, recipe=last["recipe"], dataset_id="e" * 64)
    refused(train_tiny(*MORE, "--allow", "data"), "was trained on dataset eeeeeeeeeeee")
    shutil.rmtree(place)
    assert tree(run) == before
    assert went_on(train_tiny(*MORE), run) == [2, 4, 6, 8]


def cut_ledger(run: Path, after: str, count: int) -> None:
    """Keep the ledger's lines up to the `count`-th of kind `after`."""
    lines, kept = (run / LEDGER).read_bytes().splitlines(keepends=True), []
    for line in lines:
        kept.append(line)
        count -= json.loads(line)["kind"] == after
        if not count:
            break
    (run / LEDGER).write_bytes(b"".join(kept))


def test_a_shortened_ledger_is_refused_or_repaired_on_the_record(train_tiny: Train, run: Path) -> None:
    cut_ledger(run, "checkpoint", 1)
    before = tree(run)
    refused(train_tiny(*MORE), "does not list the checkpoints of steps 4, 6", "--repair-ledger")
    assert tree(run) == before
    assert went_on(train_tiny(*MORE, "--repair-ledger"), run) == [2, 4, 6, 8]
    entries = read_ledger(run / LEDGER)
    assert [entry["step"] for entry in entries if entry.get("entered") == "repair"] == [4, 6]
    assert entries[-3]["kind"] == "resume"
    assert entries[-3]["repaired"]


def test_a_lost_ledger_is_refused_or_begun_anew_on_the_record(train_tiny: Train, run: Path) -> None:
    (run / LEDGER).unlink()
    refused(train_tiny(*MORE), "no ledger.jsonl", "--repair-ledger")
    complete = train_tiny(*BASE, "--repair-ledger")  # no training begins, so no line is written, which is said
    assert complete.exit_code == 0
    assert (
        f"{run / LEDGER} is still missing: a new one begins when the run is continued with --repair-ledger"
        in complete.output
    )
    assert train_tiny(*MORE, "--repair-ledger").exit_code == 0
    assert read_ledger(run / LEDGER)[0]["repaired"]


@pytest.mark.parametrize("complete", [False, True])
def test_what_one_crash_leaves_out_is_entered(train_tiny: Train, run: Path, complete: bool) -> None:
    """The newest checkpoint alone, with its line torn; also where nothing is left to train."""
    cut_ledger(run, "checkpoint", 2)
    with (run / LEDGER).open("ab") as file:
        file.write(b'{"dataset')
    result = train_tiny(*(BASE if complete else MORE))
    assert "a crash tore the last line: its 9 bytes are moved to ledger.torn" in result.output
    assert went_on(result, run) == ([2, 4, 6] if complete else [2, 4, 6, 8])
    entered = [entry for entry in read_ledger(run / LEDGER) if entry.get("entered")]
    assert [(entry["step"], entry["entered"], entry["torn_bytes"]) for entry in entered] == [(6, "resume", 9)]
    assert (run / TORN).read_bytes() == b'{"dataset\n'


def test_the_end_that_a_crash_left_out_is_entered_once(train_tiny: Train, run: Path) -> None:
    """Killed between the last checkpoint and the line that says so, for which followers of the run wait."""
    for name in (LEDGER, METRICS):
        lines = (run / name).read_bytes().splitlines(keepends=True)
        assert json.loads(lines[-1])["kind"] == "end"
        (run / name).write_bytes(b"".join(lines[:-1]))
    for _ in range(2):
        assert "is complete: 6 of 6 steps" in train_tiny(*BASE).output
        for name in (LEDGER, METRICS):
            kinds = [json.loads(line)["kind"] for line in (run / name).read_bytes().splitlines()]
            assert kinds.count("end") == 1
            assert kinds[-1] == "end"
    assert went_on(train_tiny(*MORE), run) == [2, 4, 6, 8]


def written_by_an_earlier_version(run: Path) -> None:
    """Killed before its first checkpoint; the recipe has a key less."""
    start, recipe = read_ledger(run / LEDGER)[0], json.loads((run / "recipe.json").read_bytes())
    shutil.rmtree(run / "checkpoints")
    (run / LEDGER).unlink()
    (run / "metrics.jsonl").unlink()
    del recipe["objective"]
    (run / "recipe.json").write_bytes(canonical_json(recipe) + b"\n")
    kept = {key: start[key] for key in ("dataset_id", "environment", "parent", "stretch")}
    Ledger(run).add("start", step=0, recipe=recipe, recipe_sha256=sha256_json(recipe), **kept)


def test_the_ledger_tells_the_recipe_that_trains(train_tiny: Train, run: Path, weftrain: Train, tmp_path: Path) -> None:
    """After an earlier version's start, and after a start with a change that a crash ended and nobody asks for
    again.
    """
    written_by_an_earlier_version(run)
    assert went_on(train_tiny(*BASE), run) == [2, 4, 6]
    assert [entry["changes"] for entry in read_ledger(run / LEDGER) if entry["kind"] == "recipe"] == [[]]
    assert "objective" not in json.loads((run / "recipe.0.json").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "record_recipe", lambda folder, check, step: 1 / 0)
        assert isinstance(train_tiny(*MORE, "seed=7", "--allow", "seed").exception, ZeroDivisionError)
    assert went_on(train_tiny(*MORE), run) == [2, 4, 6, 8]
    changes = [entry["changes"] for entry in read_ledger(run / LEDGER) if entry["kind"] == "recipe"]
    assert changes[2:] == [[["seed", 7, 1]]]
    told = weftrain("log", run)
    assert "the same, recorded with the keys that this version has beside" in told.output
    assert "null on cpu, dataset" in told.output  # a backend that computes without threads has none to tell
    released = weftrain("release", run, "--to", tmp_path / "release", "--licence", "MIT")
    assert released.exit_code == 0, released.output


def damage(place: Path) -> None:
    path = next(place.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


def test_what_was_passed_over_is_in_the_ledger(train_tiny: Train, run: Path) -> None:
    damage(run / "checkpoints" / "step_00000004")
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    result = train_tiny(*BASE)
    assert "the ledger lists a checkpoint of step 6" in result.output
    assert "passed over a damaged checkpoint" in result.output
    assert went_on(result, run) == [2, 4, 6]
    resume = next(entry for entry in read_ledger(run / LEDGER) if entry["kind"] == "resume")
    assert resume["passed_over"] == [[4, "damaged"], [6, "missing"]]


def test_no_whole_checkpoint_left_is_no_reason_to_begin_again(train_tiny: Train, run: Path) -> None:
    refused(train_tiny(*MORE, "--from-scratch"), "stands at step 6")
    for step in (2, 4):
        damage(run / "checkpoints" / f"step_{step:08d}")
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    before = tree(run)
    refused(train_tiny(*BASE), "(step 2: damaged, step 4: damaged, step 6: missing)", "--from-scratch")
    assert tree(run) == before
    assert went_on(train_tiny(*BASE, "--from-scratch"), run) == [2, 4, 6]
    resume = next(entry for entry in read_ledger(run / LEDGER) if entry["kind"] == "resume")
    assert (resume["step"], resume["from_scratch"], resume["parent"]) == (0, True, None)


def test_an_unreadable_checkpoint_is_not_a_damaged_one(
    train_tiny: Train, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails, or permissions: nobody knows whether it is whole, so nothing older takes its place."""
    opened = checkpoint_files.open_regular

    def fails(path: Path) -> object:
        if path.parent.name == "step_00000006":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return opened(path)

    before = tree(run)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "open_regular", fails)
        refused(train_tiny(*MORE), "step_00000006", "cannot be read: Input/output error")
    assert tree(run) == before


@pytest.mark.parametrize("complete", [False, True])
def test_a_damaged_metrics_line_is_moved_by_the_next_start(
    train_tiny: Train, run: Path, weftrain: Train, complete: bool
) -> None:
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
    lines[2] = b"\0" * len(lines[2])
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines))
    refused(weftrain("report", run, "--to", run.parent / "report.html"), "metrics.jsonl:3", "weftrain train")
    result = train_tiny(*(BASE if complete else MORE))
    assert result.exit_code == 0, result.output
    assert "metrics.jsonl:3: not a metrics line: it is moved to metrics.torn" in result.output
    assert lines[2] in (run / "metrics.torn").read_bytes()
    assert [record["lines"] for record in read_metrics(run) if record["kind"] == "repair"] == [[3]]
    assert weftrain("report", run, "--to", run.parent / "report.html").exit_code == 0


def test_a_damaged_metrics_line_stops_no_run_that_goes_on_from_its_store(train_tiny: Train, tmp_path: Path) -> None:
    streamed = [
        "--backend",
        "streaming",
        "backend.options.tier=mapped",
        "backend.options.threads=1",
        "checkpoint.every_steps=0",
    ]
    assert train_tiny("schedule.steps=2", *streamed, "checkpoint.at_end=false").exit_code == 0
    path = tmp_path / "runs" / "crystal_demo" / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0][:-1], *lines[1:]]))
    result = train_tiny("schedule.steps=3", *streamed, "checkpoint.at_end=false", "--allow", "schedule.steps")
    assert result.exit_code == 0, result.output
    assert "metrics.jsonl:1: not a metrics line: it is moved to metrics.torn" in result.output
    assert "the run goes on from there" in result.output


START_FROM = "start_from={{run: crystal_demo, state: {}}}"


def test_start_from_another_model_is_refused_before_anything_is_made(train_tiny: Train, run: Path) -> None:
    for change in (
        "model.intermediate_size=72",
        "model.num_layers=1",
        "model.num_layers=3",
        "model.rope_theta=500",
        "model.vocab_size=128",
    ):
        for state in ("weights", "all"):
            refused(
                train_tiny(*BASE, "--run", "second", START_FROM.format(state), change),
                "start_from: step 6 of run 'crystal_demo'",
            )
    refused(
        train_tiny(*MORE, "model.intermediate_size=72", "--allow", "model.intermediate_size"),
        "[70, 48], the model's is F32 [72, 48]",
    )
    assert sorted(path.name for path in run.parent.iterdir()) == ["crystal_demo"]
    result = train_tiny(
        *BASE,
        "--run",
        "second",
        "start_from={run: crystal_demo, state: weights, change: [rope_theta]}",
        "model.rope_theta=500",
    )
    assert result.exit_code == 0, result.output
    assert "model.rope_theta: 10000.0 -> 500.0" in result.output


def test_a_grown_vocabulary_is_said_and_recorded(train_tiny: Train, run: Path) -> None:
    grown = [
        "--run",
        "second",
        "start_from={run: crystal_demo, state: weights, grow: [vocab_size]}",
        "model.vocab_size=100",
    ]
    result = train_tiny(*BASE, *grown)
    assert result.exit_code == 0, result.output
    assert "rows 97..99 of embedding.weight are drawn from seed" in result.output
    assert read_ledger(run.parent / "second" / LEDGER)[0]["drawn"] == {"embedding.weight": [97, 100]}
    assert went_on(train_tiny(*MORE, *grown), run.parent / "second") == [2, 4, 6, 8]
    refused(
        train_tiny(*BASE, "--run", "third", "start_from={run: crystal_demo, state: all, grow: [vocab_size]}"),
        "grow needs state: weights",
    )


def test_an_override_that_asks_for_another_model_is_refused(run: Path, weftrain: Train, tmp_path: Path) -> None:
    """eval, generate and the others that read a checkpoint's recipe with overrides."""
    refused(weftrain("eval", run, "model.num_layers=1"), "does not fit the recipe's model", "model.num_layers: 2 -> 1")
    refused(
        weftrain("generate", run, "model.intermediate_size=72", "--prompt", "a"), "model.intermediate_size: 70 -> 72"
    )
    place = run / "checkpoints" / "step_00000006"
    recipe = read_checkpoint_manifest(place)["recipe"]
    forged(place, recipe=recipe | {"model": recipe["model"] | {"num_layers": 1}})
    refused(
        weftrain("convert", "to-huggingface", run, tmp_path / "hf", "--dtype", "float32"),
        "does not fit the recipe's model",
    )
    assert not (tmp_path / "hf").exists()


def test_release_builds_nothing_that_does_not_verify(
    train_tiny: Train, run: Path, weftrain: Train, tmp_path: Path
) -> None:
    """A shortened ledger, or measurements that are not the ledger's: said of the run, and nothing is left."""
    command = ["release", run, "--to", tmp_path / "release", "--licence", "MIT"]
    whole = (run / LEDGER).read_bytes()
    cut_ledger(run, "checkpoint", 1)
    refused(weftrain(*command), "holds a checkpoint of step 4, and its ledger ends with that of step 2")
    (run / LEDGER).write_bytes(whole)
    metrics = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(metrics.replace(b'"loss": 0.0', b'"loss": 1.0', 1))
    refused(
        weftrain(*command),
        f"{run}/metrics.jsonl: the measurements up to step 2 are not those of the ledger",
        "nothing was released",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    (run / "metrics.jsonl").write_bytes(metrics)
    done = weftrain(*command)
    assert done.exit_code == 0, done.output


def test_a_refused_command_leaves_no_trace(run: Path, weftrain: Train, tmp_path: Path) -> None:
    """Every verb that writes: what it makes before its last check it takes back, and no folder is taken for a run's."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("of somebody else")
    hf = tmp_path / "hf"
    assert weftrain("convert", "to-huggingface", run, hf, "--dtype", "float32").exit_code == 0
    damage(hf)
    (tmp_path / "file.mdl").write_bytes(b"no HDF5")
    recipe = run / "recipe.yaml"
    before = tree(tmp_path)
    for command in (
        ["rollback", tmp_path / "other", "--to", "3", "--reason", "x"],
        ["rollback", run, "--to", "3", "--reason", "x"],
        ["defer", tmp_path / "other", "--chunk", "0", "--reason", "x"],
        ["defer", run, "--chunk", "0", "--reason", "x"],
        ["release", tmp_path / "other", "--to", tmp_path / "a" / "release", "--licence", "MIT"],
        ["convert", "from-huggingface", hf, recipe, "--runs", tmp_path / "b", "--run", "new"],
        [
            "convert",
            "checkpoint-from-cerebras",
            tmp_path / "file.mdl",
            recipe,
            "--runs",
            tmp_path / "c",
            "--run",
            "new",
        ],
        ["prep", tmp_path / "not_there", "--name", "x", "--output", tmp_path / "d"],
        ["eval", tmp_path / "other", "--watch"],
        ["generate", tmp_path / "other", "--prompt", "a"],
        ["memorize", tmp_path / "other"],
        ["report", tmp_path / "other", "--to", tmp_path / "e" / "report.html"],
        ["compare", tmp_path / "other", run, "--to", tmp_path / "f"],
    ):
        refused(weftrain(*command))
        assert tree(tmp_path) == before, command


def test_a_run_goes_on_without_the_overrides_it_was_made_with(
    run: Path, weftrain: Train, tiny_overrides: list[str], tmp_path: Path
) -> None:
    """A built-in recipe's run goes on from its own recipe, and says so; values are laid over that and checked."""
    again = ["train", "crystal_demo", "--runs", run.parent]
    result = weftrain(*again)
    assert result.exit_code == 0, result.output
    assert f"{run} goes on with the recipe it was made with; crystal_demo differs from that in:" in result.output
    assert '  backend.name: "null" (crystal_demo: "local")' in result.output
    assert "6 of 6 steps" in result.output
    refused(weftrain(*again, "schedule.steps=8"), "schedule.steps: 6 -> 8", "--allow schedule.steps")
    longer = weftrain(*again, "schedule.steps=8", "--allow", "schedule.steps")
    assert went_on(longer, run) == [2, 4, 6, 8]
    assert "schedule.steps: 6" not in longer.output.partition("batch  ")[0]  # it was asked for, so it is not kept
    # crystal_demo itself, of width 256, takes no six heads: overrides need only fit the run that is continued
    refused(weftrain(*again, "model.num_heads=6"), "model.num_heads: 3 -> 6")
    refused(weftrain(*again, "model.num_heads=7"), "hidden_size 48 is not a multiple of num_heads 7")
    # The command that is printed to go on works without the overrides too.
    assert "weftrain train crystal_demo schedule.steps=16" in longer.output

    # A file may have been edited on purpose, and another recipe's run is another run.
    file = tmp_path / "mine.yaml"
    file.write_text(weftrain("recipe", "crystal_demo").output)
    refused(
        weftrain("train", file, *tiny_overrides, "--runs", run.parent),
        "the recipe is not the one",
        "--allow backend.name",
    )
    other = ["train", "amber_demo", "data.synthetic_rows=8", "data.sources=[]", "--runs", run.parent, "--run", run.name]
    refused(weftrain(*other), "the recipe is not the one", "--allow name")


def test_a_rank_that_follows_describes_nothing(train_tiny: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "parameters   " not in train_tiny("kernels.pins.rope=nobody").output
