"""`weftrain eval` with tasks, code and --watch on a tiny model, and a watcher that is told what happens and when."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from weftrain.analysis.evaluation.records import read_record
from weftrain.analysis.evaluation.sandbox import reason_unavailable
from weftrain.analysis.evaluation.watcher import watch
from weftrain.cli.main import main
from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.errors import CheckpointError, DataError
from weftrain.core.initialization import draw
from weftrain.core.parameters import parameter_specs
from weftrain.core.recipe_file import load_recipe

Weftrain = Callable[..., Result]

TINY = ["data.sequence_length=32", "batch.global_batch_size=2", "batch.micro_batch_size=2", "model.num_layers=1"]
TINY += [
    "model.vocab_size=332",
    "model.hidden_size=48",
    "model.num_heads=3",
    "model.intermediate_size=70",
    "model.rotary_dim=4",
]
TINY += ["model.max_position_embeddings=64", "model.mup.base_hidden_size=16"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with datasets/text, runs/demo with checkpoints of steps 2, 4 and 6, and tasks/."""
    home = tmp_path_factory.mktemp("home")
    (home / "texts").mkdir()
    for index in range(20):
        (home / "texts" / f"{index}.txt").write_text(
            "the sky is blue and the grass is green ; def f ( x ) : return x\n" * (5 + index)
            + "many other words are needed here, too; a red rose smells\n"
        )

    def run(*arguments: object) -> None:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output

    settings = ["--name", "text", "--vocab-size", "300", "--sequence-length", "32", "--heldout-fraction", "0.3"]
    run("prep", home / "texts", "--output", home / "datasets", *settings)
    source = "data.sources=[{name: text, path: text, weight: 1.0}]"
    file = load_recipe("crystal_demo", [f"data.root={home / 'datasets'}", source, *TINY])
    for step in (2, 4, 6):  # as a run leaves them, without the time that a run takes
        tensors = {
            f"weights/{spec.name}": draw(spec, file.recipe.model, step) for spec in parameter_specs(file.recipe.model)
        }
        claims = {"dataset_id": "d", "fingerprint": {}, "tokens": 0, "position": 0, "parent": None, "kernels": {}}
        recipe = file.recipe.model_dump(mode="json")
        checkpoint.save(home / "runs" / "demo" / "checkpoints", State(step, step, tensors), recipe=recipe, **claims)
    events = [f'{{"kind":"{kind}","step":6,"time":0.0}}\n' for kind in ("start", "end")]
    (home / "runs" / "demo" / "metrics.jsonl").write_text("".join(events))

    (home / "tasks").mkdir()
    questions = [f"the {thing} is" for thing in ("sky", "grass") * 2]
    rows = [
        {"question": question, "choices": [" blue", " green"], "gold": index % 2}
        for index, question in enumerate(questions)
    ]
    (home / "tasks" / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "tasks" / "colours.yaml").write_text(f"""\
task: stub_colours
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {home / "tasks" / "colours.jsonl"}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
""")
    problem = {
        "task_id": "T/0",
        "prompt": "def f(x):\n",
        "entry_point": "f",
        "test": "def check(f):\n    assert f(1) == 1\n",
    }
    (home / "problems.jsonl").write_text(json.dumps(problem) + "\n" + json.dumps(problem | {"task_id": "T/1"}) + "\n")
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, for a test to write in; the dataset and the tasks stay where they are."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path


def records(home: Path) -> list[dict[str, Any]]:
    return [read_record(path) for path in sorted((home / "runs" / "demo" / "analyses" / "evaluations").glob("*.json"))]


def test_tasks_of_a_run(weftrain: Weftrain, home: Path, trained: Path) -> None:
    arguments = [
        "eval",
        home / "runs" / "demo",
        "--tasks",
        "stub_colours",
        "--include",
        trained / "tasks",
        "--device",
        "cpu",
    ]
    result = weftrain(*arguments)
    assert result.exit_code == 0, result.output
    (record,) = records(home)
    assert (record["task"], record["step"], record["samples"], record["precision"]) == ("stub_colours", 6, 4, "float32")
    assert f"{record['value_percent']:.2f} %" in result.output
    manifest = json.loads((home / "runs" / "demo" / "checkpoints" / "step_00000006" / "manifest.json").read_text())
    assert record["checkpoint"] == manifest["root"]

    # Again: read, not computed, even where the weights are gone; and one checkpoint's folder is the same evaluation.
    path = home / "runs" / "demo" / "checkpoints" / "step_00000006"
    again = weftrain("eval", path, *arguments[2:], "--json")
    assert json.loads(again.output.splitlines()[-1]) == record
    (state,) = path.glob("*.safetensors")
    state.write_bytes(state.read_bytes()[:-1])
    assert weftrain("eval", path, *arguments[2:]).exit_code == 0
    damaged = weftrain("eval", path, *arguments[2:], "--limit", "2")
    assert damaged.exit_code == 2
    assert str(path) in damaged.output
    assert records(home) == [record]


def test_a_hugging_face_folder_scores_as_the_run_it_was_made_of(weftrain: Weftrain, home: Path, trained: Path) -> None:
    tokenizer = trained / "datasets" / "text" / "tokenizer.json"
    folder, run = home / "step6", home / "runs" / "demo"
    done = weftrain("convert", "to-huggingface", run, folder, "--dtype", "float32", "--tokenizer", tokenizer)
    assert done.exit_code == 0, done.output
    task = ["--tasks", "stub_colours", "--include", trained / "tasks", "--device", "cpu"]
    for path in (run, folder):
        done = weftrain("eval", path, *task)
        assert done.exit_code == 0, done.output
    (ours,), (path,) = records(home), (folder / "analyses" / "evaluations").glob("*.json")
    theirs = read_record(path)
    assert (theirs["metrics"], theirs["step"], theirs["samples"]) == (ours["metrics"], 6, 4)


def test_tokenizer_must_fit(weftrain: Weftrain, home: Path, trained: Path) -> None:
    from tokenizers import Tokenizer, models

    other, large = home / "other.json", home / "large.json"
    Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="a")).save(str(other))
    Tokenizer(models.WordLevel({"</s>": 0, "a": 332}, unk_token="a")).save(str(large))
    arguments = ["eval", home / "runs" / "demo", "--tasks", "stub_colours", "--include", trained / "tasks"]
    for path, said in ((other, "SHA-256"), (large, "vocabulary of 332"), (home / "absent.json", "cannot read")):
        result = weftrain(*arguments, "--tokenizer", path)
        assert result.exit_code == 2
        assert str(path) in result.output
        assert said in result.output
        assert "--tokenizer" in result.output
    moved = weftrain(*arguments, "data.root=/nowhere")
    assert moved.exit_code == 2
    assert "--tokenizer" in moved.output
    assert not records(home)


def test_code_of_a_run(weftrain: Weftrain, home: Path, trained: Path) -> None:
    if (reason := reason_unavailable()) is not None:
        pytest.skip(reason)
    arguments = ["eval", home / "runs" / "demo", "--code", trained / "problems.jsonl", "--samples", "2", "--k", "1,2"]
    result = weftrain(*arguments, "--temperature", "0.8", "--max-new-tokens", "40", "--limit", "1")
    assert result.exit_code == 0, result.output
    (record,) = records(home)
    assert (record["task"], record["metric"], record["partial"]) == ("problems", "pass@1", True)
    assert set(record["metrics"]) == {"pass@1", "pass@2"}
    assert record["decoding"] == {
        "kind": "generate",
        "ks": [1, 2],
        "max_new_tokens": 40,
        "samples": 2,
        "temperature": 0.8,
        "top_p": None,
    }
    assert "0.00 %" in result.output  # these weights have learned nothing


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shots", "5"], "--shots has no effect without --tasks or --preset"),
        (["--until-step", "5"], "--until-step has no effect without --watch"),
        (["--temperature", "1"], "--temperature has no effect without --code"),
        (["--preset", "llm360", "--shots", "3"], "a preset says how many"),
        (["--tasks", "x", "--backend", "null"], "--backend has no effect with --tasks"),
        (["--tasks", "x", "--rows", "3"], "--limit is for tasks"),
        (["--code", "absent.jsonl", "--max-new-tokens", "8"], "absent.jsonl"),
        (["--code", "absent.jsonl", "--samples", "5", "--k", "1"], "--temperature"),
        (["--code", "absent.jsonl", "--k", "2"], "--samples"),
        (["--code", "absent.jsonl", "--k", "two"], "--k two"),
        (["--tasks", "stub_colour"], "did you mean stub_colours"),
    ],
)
def test_what_is_refused(weftrain: Weftrain, home: Path, trained: Path, arguments: list[str], said: str) -> None:
    more = ["--include", trained / "tasks"] if arguments[-1] == "stub_colour" else []
    if more:  # not the 14,000 of lm-eval, which take seconds to list
        with pytest.MonkeyPatch.context() as patch:
            from lm_eval.tasks import TaskManager

            make = TaskManager.__init__
            patch.setattr(
                TaskManager, "__init__", lambda self, **given: make(self, **given | {"include_defaults": False})
            )
            result = weftrain("eval", home / "runs" / "demo", *arguments, *more)
    else:
        result = weftrain("eval", home / "runs" / "demo", *arguments)
    assert result.exit_code == 2
    assert said in result.output


def test_watch_evaluates_each_checkpoint_once(weftrain: Weftrain, home: Path) -> None:
    """Of a run that has ended: held-out loss of steps 2, 4 and 6, and then the end; a damaged one is passed over
    aloud.
    """
    (state,) = (home / "runs" / "demo" / "checkpoints" / "step_00000004").glob("*.safetensors")
    state.write_bytes(state.read_bytes()[:-1])
    arguments = ["eval", home / "runs" / "demo", "--watch", "--device", "cpu"]
    result = weftrain(*arguments)
    assert result.exit_code == 0, result.output
    assert result.output.count("WARNING") == 1
    assert "WARNING: step 4" in result.output
    assert [(record["step"], record["task"]) for record in records(home)] == [(2, "heldout/text"), (6, "heldout/text")]
    times = {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("evaluations/*.json")}
    assert weftrain(*arguments, "--until-step", "2").exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times

    # The same number as held-out loss on the run's own backend, which computes in bf16.
    shown = weftrain("eval", home / "runs" / "demo", "--json")
    assert records(home)[-1]["value"] == pytest.approx(json.loads(shown.output.splitlines()[-1])["loss"], rel=2e-3)


# The watcher alone


class World:
    """A run whose events happen while the watcher sleeps; a checkpoint is an empty folder."""

    def __init__(self, run: Path, *events: Callable[[], object]) -> None:
        self.run, self.events, self.now, self.slept = run, list(events), 0.0, []  # type: ignore[var-annotated]
        (run / "checkpoints").mkdir(parents=True)
        self.said: list[str] = []
        self.evaluated: list[str] = []
        self.damaged: set[str] = set()

    def appears(self, step: int) -> None:
        temporary = self.run / "checkpoints" / f".tmp-{step}"
        temporary.mkdir()
        temporary.rename(self.run / "checkpoints" / f"step_{step:08d}")

    def writes(self, kind: str, step: int = 0) -> None:
        with open(self.run / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"kind": kind, "step": step, "time": 0.0}) + "\n")

    def evaluate(self, path: Path) -> None:
        self.now += 7
        if path.name in self.damaged:
            raise CheckpointError(f"{path}: torn")
        self.evaluated.append(path.name)

    def sleep(self, seconds: float) -> None:
        assert self.events, "the watcher waits, and nothing will happen any more"
        self.slept.append(seconds)
        self.now += seconds
        self.events.pop(0)()

    def watch(self, **settings: Any) -> list[int]:
        return watch(
            self.run, self.evaluate, say=self.said.append, clock=lambda: self.now, sleep=self.sleep, **settings
        )


def test_watcher_follows_a_run(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.appears(4)
    world.appears(2)
    (tmp_path / "checkpoints" / "step_00000003.damaged-1").mkdir()
    (tmp_path / "checkpoints" / ".tmp-step_00000009").mkdir()
    world.writes("start")

    def last() -> None:
        world.appears(8)
        world.writes("end", 8)

    world.events += [lambda: world.appears(6), lambda: None, last]
    assert world.watch(every_seconds=10) == [2, 4, 6, 8]
    assert world.evaluated == [f"step_{step:08d}" for step in (2, 4, 6, 8)]
    # two evaluations of 7 s outlast the interval, one leaves 3 s, none leaves all
    assert world.slept == [0.0, 3.0, 10.0]
    assert not world.said


def test_watcher_does_not_take_an_old_end_for_the_end(tmp_path: Path) -> None:
    """The run was lengthened and resumed after its first end."""
    world = World(tmp_path)
    for kind in ("start", "end", "resume", "start"):
        world.writes(kind)
    world.events += [lambda: world.appears(2), lambda: world.writes("end")]
    assert world.watch() == [2]


def test_watcher_sees_what_appears_between_its_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint and the end come after the run's metrics were read: the next look finds both."""
    from weftrain.analysis.evaluation import watcher

    world = World(tmp_path)
    asked = watcher._has_ended
    late = [lambda: world.appears(2)]

    def has_ended(run: Path, say: Callable[[str], None]) -> bool:
        found = asked(run, say)
        if late:
            late.pop()()
            world.writes("end", 2)
        return found

    monkeypatch.setattr(watcher, "_has_ended", has_ended)
    world.events += [lambda: None]
    assert world.watch() == [2]


def test_watcher_until_a_step(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.appears(2)
    world.events += [lambda: world.appears(4), lambda: world.appears(10)]
    assert world.watch(until_step=6) == [2, 4]


def test_watcher_passes_a_damaged_checkpoint_over_once(tmp_path: Path) -> None:
    """One line, however often it is looked at; and another that takes its place is evaluated."""
    world = World(tmp_path)
    world.damaged.add("step_00000002")
    world.appears(2)
    world.appears(4)

    def replaced() -> None:
        world.damaged.clear()
        (tmp_path / "checkpoints" / "step_00000002").rename(tmp_path / "checkpoints" / "step_00000002.damaged-1")
        world.appears(2)

    world.events += [lambda: None, replaced, lambda: world.writes("end")]
    assert world.watch() == [4, 2]
    assert [line[:60] for line in world.said] == [
        "WARNING: step 2 is passed over, its checkpoint is damaged: " + str(tmp_path)[:1]
    ]


def test_watcher_of_unreadable_metrics_goes_on(tmp_path: Path) -> None:
    world = World(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("nonsense\n")

    def mended() -> None:
        (tmp_path / "metrics.jsonl").write_text("")
        world.writes("end")

    world.events += [lambda: world.appears(2), mended]
    assert world.watch() == [2]
    assert len(world.said) == 1


def test_watcher_stops_at_what_is_no_damage(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.appears(2)

    def evaluate(path: Path) -> None:
        raise DataError("no such task")

    with pytest.raises(DataError):
        watch(tmp_path, evaluate, say=world.said.append, sleep=world.sleep)


KILLED = """
import os, sys
from weftrain.core.formats import fsops
perform, count = fsops._perform, [0]
def dying(name, path, action):
    count[0] += 1
    if count[0] == int(sys.argv[1]):
        os._exit(9)
    return perform(name, path, action)
fsops._perform = dying
from weftrain.cli.main import main
from weftrain.core import checkpoint
from weftrain.core.backend import State
main(["eval", sys.argv[2], "--watch", "--device", "cpu"])
"""


@pytest.mark.prove
def test_watch_killed_at_any_write_goes_on(weftrain: Weftrain, home: Path) -> None:
    """Killed before each operation on the disk in turn: started again, it makes what is missing, and what was there is
    untouched.
    """
    run = home / "runs" / "demo"
    folder = run / "analyses" / "evaluations"
    assert weftrain("eval", run, "--watch", "--device", "cpu").exit_code == 0
    wanted = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(wanted) == 3
    shutil.rmtree(run / "analyses")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for operation in range(1, 6):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(operation), str(run)], capture_output=True, timeout=60, env=environment
        )
        assert done.returncode == 9, done.stderr
        whole = {path.name: path.read_bytes() for path in folder.glob("*.json")}
        assert whole.items() <= wanted.items()
    assert weftrain("eval", run, "--watch", "--device", "cpu").exit_code == 0
    assert {path.name: path.read_bytes() for path in folder.glob("*.json")} == wanted
