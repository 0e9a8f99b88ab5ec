"""The recipe's `evaluations` while a small model trains: tasks and datasets, a stop and a kill amid them, refusals."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from forgery import forge
from record_runs import CUT, done, prepare, trainer, weftrain

from weftrain.analysis.evaluation import tasks
from weftrain.analysis.evaluation.records import FOLDER, read_records
from weftrain.analysis.report.collect import collect
from weftrain.core import checkpoint
from weftrain.core.formats.canonical import parse_json, sealed
from weftrain.core.formats.checkpoint_manifest import weights_sha256_of
from weftrain.core.run.ledger import read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.metrics import METRICS, digest, read_metrics
from weftrain.core.run.run_folder import held_run
from weftrain.core.run.scores import score_sha256
from weftrain.core.stop import StopRequest

Train = Callable[..., Result]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with datasets/words and two tasks over local files, so that no network is needed."""
    pytest.importorskip("lm_eval")
    home = tmp_path_factory.mktemp("home")
    prepare(home)
    (home / "tasks").mkdir()
    rows = [{"question": f"abc {number}", "choices": [" dab", " heg"], "gold": number % 2} for number in range(4)]
    (home / "tasks" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("stub_a", "stub_b", "stub_lost"):
        (home / "tasks" / f"{name}.yaml").write_text(f"""\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {home / "tasks" / ("lost" if name == "stub_lost" else "rows")}.jsonl}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
""")
    return home


@pytest.fixture(autouse=True)
def _offline(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", home / "cache")


@pytest.fixture
def train(home: Path, tmp_path: Path) -> Train:
    """Six steps in three chunks, so with checkpoints after 2, 4 and 6, below tmp_path/runs."""
    torch.set_num_threads(1)
    (tmp_path / "datasets").symlink_to(home / "datasets")
    return trainer(tmp_path)


def both(home: Path) -> list[str]:
    code = f"{{name: code, every_steps: 2, tasks: [stub_a, stub_b], include: {home / 'tasks'}}}"
    return [f"evaluations=[{code}, {{name: texts, every_steps: 3, datasets: [words], limit: 5}}]"]


def scores(run: Path) -> list[tuple[int, str, float]]:
    return [(one["step"], one["set"], one["value"]) for one in read_metrics(run) if one["kind"] == "score"]


def entered(run: Path) -> list[tuple[int, str]]:
    return [(one["step"], one["set"]) for one in read_ledger(run / LEDGER) if one["kind"] == "evaluation"]


CODE, TEXTS = ("code/stub_a", "code/stub_b"), ("texts/words",)
WANTED = [
    (step, name) for step in (2, 3, 4, 6) for name in (CODE if step % 2 == 0 else ()) + (TEXTS if step % 3 == 0 else ())
]


def test_a_run_with_evaluations_is_the_run_without_them(train: Train, home: Path, tmp_path: Path) -> None:
    printed = done(train(*both(home), "log.evaluate_at_start=true", "--run", "with"))
    done(train("--run", "without"))
    run, other = tmp_path / "runs" / "with", tmp_path / "runs" / "without"
    found = scores(run)
    assert [one[:2] for one in found] == [(0, name) for name in CODE + TEXTS] + WANTED
    assert f"step      0  score code/stub_a: acc {found[0][2]:.4f}" in printed
    assert f"step      3  score texts/words: loss {found[5][2]:.4f}" in printed
    records = read_metrics(run)
    assert all(one["evaluation_s"] >= 0 for one in records if one["kind"] in ("score", "evaluation"))
    assert digest(one for one in records if one["step"]) == digest(read_metrics(other))
    states = [checkpoint.load(path / "checkpoints" / "step_00000006")[0] for path in (run, other)]
    assert all(torch.equal(tensor, states[1].tensors[name]) for name, tensor in states[0].tensors.items())
    stored = {one["root"]: one for one in read_records(run / FOLDER)}
    assert sorted(stored) == sorted(one["record"] for one in records if "record" in one)
    manifest = json.loads((run / "checkpoints" / "step_00000004" / "manifest.json").read_text())
    (four,) = (one for one in stored.values() if (one["step"], one["task"]) == (4, "stub_a"))
    assert four["weights_sha256"] == weights_sha256_of(manifest)
    done(weftrain("release", run, "--to", tmp_path / "release", "--licence", "Apache-2.0"))
    done(weftrain("verify", tmp_path / "release"))
    assert "score code/stub_b" in done(weftrain("log", run))
    report = collect(run, lambda recipe: [])
    assert [metric for metric, _ in report.scores] == ["acc", "loss"]
    assert [(curve.name, list(curve.points)) for curve in report.scores[1][1]] == [
        ("texts/words", [(step, value) for step, name, value in found if name == "texts/words"])
    ]
    lines = (run / METRICS).read_text().splitlines(keepends=True)
    place = next(number for number, line in enumerate(lines) if '"set": "texts/words"' in line)
    (run / METRICS).write_text(
        "".join([*lines[:place], lines[place].replace('"samples": 5', '"samples": 6'), *lines[place + 1 :]])
    )
    refused = weftrain("release", run, "--to", tmp_path / "altered", "--licence", "Apache-2.0")
    assert "the score texts/words of step 0 is not the ledger's" in refused.output


class Interrupted:
    """Stands for lm-eval's evaluation: counts its calls, and interrupts the one after `calls` of them."""

    def __init__(self, patch: pytest.MonkeyPatch, calls: int, interrupt: Callable[[], None]) -> None:
        self.made, self._evaluate = 0, tasks._Harness.evaluate

        def evaluate(harness: Any, *arguments: Any) -> Any:
            if self.made == calls:
                interrupt()
            self.made += 1
            return self._evaluate(harness, *arguments)

        patch.setattr(tasks._Harness, "evaluate", evaluate)


@pytest.fixture(scope="module")
def whole_run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "datasets").symlink_to(home / "datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", home / "cache")
        done(trainer(folder)(*both(home), "--run", "whole"))
    return folder / "runs" / "whole"


@pytest.fixture(scope="module")
def whole(whole_run: Path) -> list[tuple[int, str, float]]:
    return scores(whole_run)


@pytest.fixture(scope="module")
def released(whole_run: Path) -> Path:
    target = whole_run.parent.parent / "release"
    done(weftrain("release", whole_run, "--to", target, "--licence", "MIT"))
    return target


@pytest.fixture
def release(released: Path, tmp_path: Path) -> Path:
    """A copy that a test may edit."""
    return Path(shutil.copytree(released, tmp_path / "release"))


def flat(result: Result) -> str:
    """What it printed, with the lines that a table wraps joined."""
    return " ".join(done(result).split())


def test_scores_of_a_run_are_measured_again(released: Path, home: Path, tmp_path: Path) -> None:
    """Those of datasets at every step by the replay, those of tasks at the checkpoints by --scores."""
    told = flat(weftrain("replay", released, "--scores", "1", "--include", home / "tasks"))
    assert re.search(r"scores of datasets while it trained replay 3 of 3 links: 2 scores", told), told
    assert re.search(r"scores, evaluations, memorization replay 6 of 6 measured again", told), told
    told = flat(weftrain("verify", released))
    assert re.search(r"scores in the log derivation 6 say what their records say", told), told
    assert re.search(r"scores of datasets while it trained not covered 2 lines", told), told
    again = ("replay", released, "--link", "1", "--scores", "1")
    told = flat(weftrain(*again))
    assert re.search(r"memorization not covered inputs not given: .*give its folder of task files with", told), told
    told = flat(weftrain(*again, "--tasks"))
    assert "give its folder of task files with --include" in told
    (tmp_path / "stub_a.yaml").write_text("task: stub_a\n")
    assert "holds other task files than it was made with" in flat(weftrain(*again, "--include", tmp_path))
    assert "no effect without --scores" in weftrain("replay", released, "--include", tmp_path).output


class ForgedScores:
    """Other scores in log and ledger, with every hash made again. change: edits a line of kind score."""

    def __init__(self, change: Callable[[dict[str, Any]], None]) -> None:
        self._change, self._sha256 = change, dict[tuple[int, str], tuple[str, str | None]]()

    def metrics(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for record in (one for one in records if one["kind"] == "score"):
            self._change(record)
            self._sha256[record["step"], record["set"]] = score_sha256(record), record.get("record")
        return records

    def ledger(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for entry in (one for one in entries if one["kind"] == "evaluation"):
            entry["sha256"], record = self._sha256[entry["step"], entry["set"]]
            if record is not None:
                entry["record"] = record
        return entries

    def forge(self, folder: Path) -> None:
        forge(folder, metrics=self.metrics, ledger=self.ledger)


def better_on_words(line: dict[str, Any]) -> None:
    if (line["set"], line["step"]) == ("texts/words", 3):
        line["value"] *= 0.9
        line["metrics"] |= {"loss": line["value"], "perplexity": math.exp(line["value"])}


def test_a_forged_score_of_a_dataset_is_found_by_the_replay(release: Path) -> None:
    ForgedScores(better_on_words).forge(release)
    done(weftrain("verify", release))
    found = weftrain("replay", release, "--link", "2")
    assert found.exit_code == 3, found.output
    assert "the first line that is not equal is of step 3" in found.output


def test_a_forged_score_of_a_task_is_found(release: Path, home: Path) -> None:
    """Only in the log it contradicts its record; in the record too it takes measuring it again."""
    (path,) = (release / FOLDER).glob("00000004-stub_a-*.json")
    record = {key: value for key, value in parse_json(path.read_bytes()).items() if key != "root"}
    better = record["value"] - 0.25 if record["value"] else 0.25

    def flipped(line: dict[str, Any]) -> None:
        if (line["set"], line["step"]) == ("code/stub_a", 4):
            line["value"] = line["metrics"]["acc"] = better

    before = Path(shutil.copytree(release, release.with_name("in_the_log")))
    ForgedScores(flipped).forge(before)
    found = weftrain("verify", before)
    assert "the score code/stub_a of step 4 is not that of its record" in found.output

    record["value"] = record["metrics"]["acc"]["value"] = better
    record["value_percent"] = record["metrics"]["acc"]["value_percent"] = 100 * record["value"]
    path.write_bytes(sealed(record))
    root = parse_json(path.read_bytes())["root"]

    def also_in_the_record(line: dict[str, Any]) -> None:
        flipped(line)
        if (line["set"], line["step"]) == ("code/stub_a", 4):
            line["record"] = root

    ForgedScores(also_in_the_record).forge(release)
    done(weftrain("verify", release))
    found = weftrain("replay", release, "--link", "1", "--scores", "1", "--include", home / "tasks")
    assert found.exit_code == 3, found.output
    assert "score evaluations/00000004-stub_a" in found.output


def test_scores_left_out_of_the_log_are_missed(release: Path) -> None:
    """Also where the ledger does not know them any more."""

    def without(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [one for one in records if (one.get("set"), one.get("step")) != ("texts/words", 3)]

    forge(release, metrics=without, ledger=without)
    done(weftrain("verify", release))
    found = weftrain("replay", release, "--link", "2")
    assert found.exit_code == 3, found.output
    assert "step 3, texts/words: has no score line in the release" in found.output


def test_a_kill_amid_an_evaluation_leaves_no_score_out_and_makes_none_twice(
    train: Train, home: Path, tmp_path: Path, whole: list[tuple[int, str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        Interrupted(patch, 3, killed)  # at step 4, after the first of its two tasks
        assert train(*both(home), "--run", "killed").exit_code != 0
    run = tmp_path / "runs" / "killed"
    assert entered(run) == [*((2, name) for name in CODE), (3, "texts/words"), (4, "code/stub_a")]
    with monkeypatch.context() as patch:
        again = Interrupted(patch, -1, killed)
        done(train(*both(home), "--run", "killed"))
    assert again.made == 3  # stub_a of step 4 was found by the hash of the weights
    assert scores(run) == whole


def test_a_signal_amid_an_evaluation_saves_and_the_rest_is_made_at_the_resume(
    train: Train, home: Path, tmp_path: Path, whole: list[tuple[int, str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[StopRequest] = []
    enter = StopRequest.__enter__
    monkeypatch.setattr(StopRequest, "__enter__", lambda self: asked.append(self) or enter(self))
    with monkeypatch.context() as patch:
        Interrupted(patch, 3, lambda: asked[-1].ask(signal.SIGTERM))
        assert train(*both(home), "--run", "stopped").exit_code == 128 + signal.SIGTERM
    run = tmp_path / "runs" / "stopped"
    assert entered(run)[-1] == (4, "code/stub_a")
    assert checkpoint.newest(run / "checkpoints", pytest.fail) == run / "checkpoints" / "step_00000004"
    done(train(*both(home), "--run", "stopped"))
    assert scores(run) == whole
    assert entered(run) == WANTED


def test_a_signal_amid_the_last_evaluation_leaves_it_to_the_next_start(
    train: Train, home: Path, tmp_path: Path, whole: list[tuple[int, str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[StopRequest] = []
    enter = StopRequest.__enter__
    monkeypatch.setattr(StopRequest, "__enter__", lambda self: asked.append(self) or enter(self))
    with monkeypatch.context() as patch:
        Interrupted(patch, 5, lambda: asked[-1].ask(signal.SIGTERM))  # at step 6, the last
        assert train(*both(home), "--run", "last").exit_code == 128 + signal.SIGTERM
    run = tmp_path / "runs" / "last"
    assert checkpoint.newest(run / "checkpoints", pytest.fail) == run / "checkpoints" / "step_00000006"
    done(train(*both(home), "--run", "last"))
    assert scores(run) == whole
    assert "is complete" in done(train(*both(home), "--run", "last"))
    assert entered(run) == WANTED


def test_a_process_on_the_side_makes_the_same_scores(
    train: Train, home: Path, tmp_path: Path, whole: list[tuple[int, str, float]]
) -> None:
    """The run ends before its scores are made, but for the first, which the next start of the run enters."""
    side = [text.replace("every_steps: 3", "every_steps: 2").replace("}", ", where: side}") for text in both(home)]
    more = (*side, "checkpoint.every_steps=2", "--run", "side")
    done(train(*more, "schedule.steps=4", "data.chunks=2"))
    run = tmp_path / "runs" / "side"
    assert not scores(run)
    watch = ("eval", run, "--watch", "--device", "cpu", "--every-seconds", "0.1")
    with held_run(run):
        assert "its process enters the scores" in done(weftrain(*watch, "--until-step", "2"))
    assert len(list(read_records(run / FOLDER))) == 3
    longer = ("--allow", "schedule.steps", "--allow", "data.chunks", "schedule.steps=6", "data.chunks=3")
    printed = done(train(*more, *longer))
    assert "step      2  score code/stub_a" in printed
    assert sorted(one[:2] for one in scores(run)) == [(2, name) for name in CODE + TEXTS]
    assert "6 scores were entered" in done(weftrain(*watch))
    found = scores(run)
    assert sorted(one[:2] for one in found) == [(step, name) for step in (2, 4, 6) for name in CODE + TEXTS]
    wanted = {one[:2]: one[2] for one in whole if one[1] in CODE}
    assert {one[:2]: one[2] for one in found if one[1] in CODE} == wanted
    assert "0 scores were entered" in done(weftrain(*watch))
    assert collect(run, lambda recipe: []).status.startswith("complete")
    done(weftrain("release", run, "--to", tmp_path / "release", "--licence", "Apache-2.0"))
    done(weftrain("verify", tmp_path / "release"))


def test_an_archive_of_weights_is_evaluated_as_its_checkpoint_was(train: Train, home: Path, tmp_path: Path) -> None:
    keep = "checkpoint.keep={last: 1, chunk_ends: false, archive: weights}"
    done(train("checkpoint.every_steps=2", keep, "schedule.steps=4", "data.chunks=2", "--run", "kept"))
    run = tmp_path / "runs" / "kept"
    assert not (run / "checkpoints" / "step_00000002").exists()
    archive = run / "archive" / "step_00000002"
    (line,) = (one for one in read_metrics(run) if one["kind"] == "evaluation" and one["step"] == 2)
    measured = json.loads(done(weftrain("eval", archive, "--rows", "4", "--json")).splitlines()[-1])
    assert measured["loss"] == line["loss"]
    done(weftrain("eval", archive, "--tasks", "stub_a", "--include", home / "tasks", "--device", "cpu"))
    (record,) = read_records(run / FOLDER)
    assert (record["step"], record["task"]) == (2, "stub_a")


REFUSED = [
    (
        "{name: t, every_steps: 2, tasks: [stub_lost], include: TASKS}",
        r"evaluations 't': task 'stub_lost': it cannot be",
    ),
    ("{name: t, every_steps: 2, tasks: [stub_a], include: nowhere}", r"nowhere: no such folder of task files"),
    ("{name: t, every_steps: 2, datasets: [nothing]}", r"evaluations 't': .*nothing: no dataset for source"),
]


@pytest.mark.parametrize(("evaluation", "problem"), REFUSED)
def test_what_cannot_be_evaluated_is_refused_before_the_first_step(
    train: Train, home: Path, tmp_path: Path, evaluation: str, problem: str
) -> None:
    result = train(f"evaluations=[{evaluation.replace('TASKS', str(home / 'tasks'))}]", "--run", "refused")
    assert result.exit_code == 2
    assert re.search(problem, result.output)
    assert not (tmp_path / "runs" / "refused").exists()


def test_a_backend_without_weights_refuses_tasks(home: Path, tmp_path: Path) -> None:
    place = [f"data.root={home / 'datasets'}", "--runs", str(tmp_path), "--backend", "null"]
    result = weftrain("train", "crystal_demo", *CUT[:-1], *both(home), *place)
    assert result.exit_code == 2
    assert "evaluations 'code': the null backend has no trained weights for tasks" in result.output
