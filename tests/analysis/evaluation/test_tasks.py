"""Tasks of local files with a model whose answers are known, and their records."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
from evaluation_stubs import SUBJECT, WORDS, say_nothing
from tokenizers import Tokenizer

from weftrain.analysis.evaluation.records import (
    EvaluatedCheckpoint,
    EvaluationSettings,
    is_share,
    read_record,
    read_records,
)
from weftrain.analysis.evaluation.tasks import PRESETS, TaskRequest, run_tasks
from weftrain.core.errors import DataError


class KnownModel:
    """Prefers one word after another: ln p is -1 for the word that `after` names, -5 for any other; greedy follows
    `after`.
    """

    def __init__(self, after: dict[str, str]) -> None:
        self.after = {WORDS.index(word): WORDS.index(then) for word, then in after.items()}
        self.calls = 0

    def log_likelihoods(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 16
    ) -> list[tuple[float, bool]]:
        self.calls += 1
        results = []
        for context, continuation in rows:
            pairs = list(zip([context[-1], *continuation], continuation, strict=False))
            hits = [self.after.get(before) == then for before, then in pairs]
            results.append((sum(-1.0 if hit else -5.0 for hit in hits), all(hits)))
        return results

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, stop_ids: Collection[int] = (), **_: Any
    ) -> list[list[int]]:
        self.calls += 1
        results = []
        for prompt in prompts:
            row: list[int] = []
            last = prompt[-1]
            for _step in range(max_new_tokens):
                last = self.after.get(last, 0)
                if last in stop_ids:
                    break
                row.append(last)
            results.append(row)
        return results


@pytest.fixture
def task_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One task of each kind over local JSON lines, without any network."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [("the sky is", 0), ("the grass is", 1), ("the sea is", 0), ("a sky is", 2)]
    documents = [{"question": question, "choices": ["blue", "green", "red"], "gold": gold} for question, gold in rows]
    (folder / "colours.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "colours.yaml").write_text(f"""\
task: stub_colours
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder / "colours.jsonl"}}}}}
output_type: multiple_choice
validation_split: validation
fewshot_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 7}}
""")
    (folder / "answers.yaml").write_text(f"""\
task: stub_answers
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder / "colours.jsonl"}}}}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: [","], max_gen_toks: 6}}
filter_list:
  - name: none
    filter: [{{function: remove_whitespace}}, {{function: take_first}}]
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2}}
""")
    (folder / "both.yaml").write_text("""\
group: stub_both
task: [stub_colours, stub_answers]
""")
    (folder / "sum.yaml").write_text("""\
group: stub_sum
task: [stub_colours]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 3}
""")
    return folder


@pytest.fixture
def make_lm(stub_tokenizer: Tokenizer) -> Callable[[KnownModel], Any]:
    def make(model: KnownModel) -> Any:
        from weftrain.analysis.evaluation.lm_eval_model import CheckpointLM

        return CheckpointLM(model, stub_tokenizer, 0, 24)

    return make


def test_tasks_of_a_model_whose_answers_are_known(
    task_folder: Path, tmp_path: Path, make_lm: Callable[..., Any]
) -> None:
    """It says blue always: two of four are right, and its text "is -> blue , ..." ends at the stop word."""
    model = KnownModel({"is": "blue", "blue": ",", ",": "red"})
    settings, folder = EvaluationSettings(batch_size=2, include=task_folder), tmp_path / "records"
    requests = [TaskRequest("stub_colours"), TaskRequest("stub_answers")]
    choice, text = run_tasks(requests, SUBJECT, settings, lambda: make_lm(model), folder, say_nothing)
    for record, metric, version, kind in (
        (choice, "acc", "7", "log_likelihood"),
        (text, "exact_match", "2", "generate"),
    ):
        assert (record["metric"], record["value"], record["value_percent"], record["samples"]) == (metric, 0.5, 50.0, 4)
        assert record["stderr"] == pytest.approx(math.sqrt(0.25 / 3))  # of a mean of four, sample deviation
        assert record["stderr_percent"] == pytest.approx(100 * record["stderr"], abs=1e-5)
        assert (record["task_version"], record["shots"], record["decoding"]["kind"]) == (version, 0, kind)
        assert (record["checkpoint"], record["step"], record["seed"], record["batch_size"]) == ("a" * 64, 40, 1234, 2)
        assert (record["limit"], "partial" in record) == (None, False)
        assert set(record["software"]) == {"weftrain", "lm_eval", "torch", "tokenizers"}
        assert all(record["software"].values())
    assert text["decoding"]["until"] == [","]
    assert [record["task"] for record in read_records(folder)] == ["stub_answers", "stub_colours"]


def test_what_is_there_is_not_computed_again(task_folder: Path, tmp_path: Path, make_lm: Callable[..., Any]) -> None:
    model, folder = KnownModel({"is": "green"}), tmp_path / "records"
    models = 0

    def run(
        settings: EvaluationSettings,
        subject: EvaluatedCheckpoint = SUBJECT,
        shots: int | None = 1,
        say: Callable[[str], None] = say_nothing,
    ) -> Any:
        nonlocal models

        def open_model() -> Any:
            nonlocal models
            models += 1
            return make_lm(model)

        (record,) = run_tasks([TaskRequest("stub_colours", shots)], subject, settings, open_model, folder, say)
        return record

    settings = EvaluationSettings(include=task_folder)
    first = run(settings)
    assert (first["shots"], first["value_percent"]) == (1, 25.0)
    (path,) = folder.iterdir()
    assert path.name.startswith("00000040-stub_colours-1-")
    data = path.read_bytes()
    assert run(settings) == first
    assert (models, path.read_bytes()) == (1, data)

    # One that is damaged is said to be, and made again.
    path.write_bytes(data.replace(b'"value":0.25', b'"value":0.75'))
    with pytest.raises(DataError, match="altered"):
        read_record(path)
    said: list[str] = []
    assert run(settings, say=said.append) == first
    assert (models, path.read_bytes(), len(said)) == (2, data, 1)
    assert str(path) in said[0]

    # Each of these is another evaluation.
    run(settings, shots=0)
    run(EvaluationSettings(include=task_folder, limit=2))
    run(settings, EvaluatedCheckpoint("c" * 64, 40, "b" * 64))
    run(settings, EvaluatedCheckpoint("a" * 64, 40, "d" * 64))
    (task_folder / "colours.jsonl").write_text((task_folder / "colours.jsonl").read_text().replace("grass", "sea"))
    run(settings)
    assert (models, len(list(folder.iterdir()))) == (7, 6)


def test_limited_is_partial(task_folder: Path, tmp_path: Path, make_lm: Callable[..., Any]) -> None:
    def run(limit: int) -> Any:
        settings, model = EvaluationSettings(include=task_folder, limit=limit), KnownModel({"is": "blue"})
        (record,) = run_tasks(
            [TaskRequest("stub_colours")], SUBJECT, settings, lambda: make_lm(model), tmp_path / "r", say_nothing
        )
        return record

    limited = run(2)
    assert (limited["partial"], limited["samples"], limited["samples_available"], limited["limit"]) == (True, 2, 4, 2)
    assert "partial" not in run(9)


def test_groups(task_folder: Path, tmp_path: Path, make_lm: Callable[..., Any]) -> None:
    """A group with a score of its own is one record; one without is its members'."""
    model = KnownModel({"is": "blue", "blue": ","})

    def run(name: str) -> Any:
        settings = EvaluationSettings(include=task_folder)
        return run_tasks([TaskRequest(name)], SUBJECT, settings, lambda: make_lm(model), tmp_path / "r", say_nothing)

    assert [record["task"] for record in run("stub_both")] == ["stub_colours", "stub_answers"]
    (record,) = run("stub_sum")
    assert (record["value_percent"], record["task_version"], record["samples"]) == (50.0, "3", 4)
    assert record["subtasks"]["stub_colours"]["value_percent"] == 50.0


def test_tasks_that_cannot_be(task_folder: Path, tmp_path: Path, make_lm: Callable[..., Any]) -> None:
    def run(request: TaskRequest, include: Path = task_folder) -> Any:
        model = KnownModel({})
        return run_tasks(
            [request], SUBJECT, EvaluationSettings(include=include), lambda: make_lm(model), tmp_path / "r", say_nothing
        )

    with pytest.raises(DataError, match="no metric 'acc_norm'; it has acc"):
        run(TaskRequest("stub_colours", metric="acc_norm"))
    with pytest.raises(DataError, match="no such folder"):
        run(TaskRequest("stub_colours"), tmp_path / "absent")
    (task_folder / "zero.yaml").write_text(
        (task_folder / "colours.yaml").read_text().replace("stub_colours", "stub_zero") + "num_fewshot: 0\n"
    )
    with pytest.raises(DataError, match="fixes it at 0 shots"):
        run(TaskRequest("stub_zero", 5))
    (task_folder / "lost.yaml").write_text(
        (task_folder / "colours.yaml")
        .read_text()
        .replace("stub_colours", "stub_lost")
        .replace("colours.jsonl", "lost.jsonl")
    )
    with pytest.raises(DataError, match=r"stub_lost.*cannot be loaded"):
        run(TaskRequest("stub_lost"))
    assert not (tmp_path / "r").exists()


def test_preset_and_shares() -> None:
    """The paper's table: shots, metric and score of each task."""
    table = {
        request.task: (request.shots, request.metric, *map(request.published.get, ("amber", "crystalcoder")))
        for request in PRESETS["llm360"]
    }
    assert table == {
        "arc_challenge": (25, "acc_norm", 42.57, 47.01),
        "hellaswag": (10, "acc_norm", 73.91, 71.97),
        "mmlu": (5, "acc", 28.53, 48.78),
        "truthfulqa_mc2": (0, "acc", 43.67, 35.91),
        "winogrande": (5, "acc", 64.35, None),
    }
    assert [is_share(name) for name in ("acc", "acc_norm", "exact_match", "pass@1", "bleu", "word_perplexity")] == [
        True
    ] * 4 + [False] * 2
