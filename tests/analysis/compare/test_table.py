"""Series, columns, token positions and notes of a comparison; how a Hugging Face series is refused, computed,
restarted.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weftrain.analysis.compare import huggingface as compare_huggingface
from weftrain.analysis.compare.huggingface import check_revision, load_revision, read_huggingface, revision_root
from weftrain.analysis.compare.measure import MeasureRequest, measure_series, open_held, open_sample, why_not
from weftrain.analysis.compare.plot import plot
from weftrain.analysis.compare.series import (
    TRAIN_LOSS,
    Column,
    Series,
    SeriesPoint,
    heldout_column,
    memorization_values,
    read_run,
)
from weftrain.analysis.compare.table import as_json, as_markdown, cells, compare, headings, names_of, read_series
from weftrain.analysis.compare.text import as_text
from weftrain.analysis.compare.window import default_window, smoothed_at, smoothed_curve, windowed
from weftrain.analysis.evaluation.records import EvaluatedCheckpoint, EvaluationSettings, inputs_of, once
from weftrain.analysis.evaluation.tasks import Perplexity
from weftrain.analysis.memorization.scores import MemorizationResult
from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.config import Recipe
from weftrain.core.errors import CheckpointError, DataError, NonFiniteError, RunFolderError
from weftrain.core.formats.canonical import canonical_json
from weftrain.core.model import draw
from weftrain.core.parameters import parameter_specs
from weftrain.core.run.ledger import Ledger
from weftrain.core.run.metrics import MetricsWriter

transformers = pytest.importorskip("transformers")

SETTINGS = EvaluationSettings(batch_size=2)
PYTHIA_TOKENS_PER_STEP = 2_097_152  # 1024 x 2048, arXiv 2304.01373


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Recipe]) -> Recipe:
    return tiny_recipe("crystal", "schedule.steps=6", "log.every_steps=1")


def make_run(
    folder: Path, recipe: Recipe, steps: tuple[int, ...] = (2, 4), losses: Mapping[int, float] | None = None
) -> list[str]:
    """A run's folder with checkpoints of random weights; their roots."""
    roots = []
    for step in steps:
        tensors = {f"weights/{spec.name}": draw(spec, recipe.model, step) for spec in parameter_specs(recipe.model)}
        claims: dict[str, Any] = {
            "recipe": recipe.model_dump(mode="json"),
            "dataset_id": "d",
            "fingerprint": {},
            "kernels": {},
        }
        state = State(step, step, tensors)
        roots.append(checkpoint.save(folder / "checkpoints", state, tokens=0, position=0, parent=None, **claims).root)
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "recipe.json").write_bytes(canonical_json(recipe.model_dump(mode="json")) + b"\n")
    with MetricsWriter(folder, tensorboard=False) as metrics:
        for step, loss in (losses if losses is not None else {step: 5.0 - step for step in range(1, 5)}).items():
            metrics.step({"step": step, "loss": loss, "skipped": False})
    return roots


def score(folder: Path, root: str, step: int, value: float, **other: Any) -> None:
    """A record of a task's score in a run's folder."""
    inputs = (
        inputs_of("task", EvaluatedCheckpoint(root, step, "t" * 64), SETTINGS)
        | {"task": "arc", "include_sha256": None}
        | other.pop("inputs", {})
    )
    measured: dict[str, Any] = {
        "task": "arc",
        "task_version": "1",
        "shots": 5,
        "metric": "acc",
        "samples": 10,
        "samples_available": 10,
    }
    measured |= {
        "value": value,
        "value_percent": 100 * value,
        "stderr": None,
        "stderr_percent": None,
        "decoding": {"kind": "log_likelihood"},
    }
    once(folder / "analyses" / "evaluations", inputs, "arc", lambda: measured | other, print)


def series(name: str, values: Mapping[int, Mapping[Column, float]], **other: Any) -> Series:
    points = tuple(SeriesPoint(step, 10 * step, "c", some) for step, some in values.items())
    return Series(name, "run", Path(name), points, "step x 10", {}, **other)


# Reading runs


def test_train_loss_is_the_mean_over_a_window_that_was_trained() -> None:
    losses = [(step, 10 * step, float(step)) for step in (1, 2, 3, 4, 10)]
    assert smoothed_at(losses, 4, 2, 1) == 3.5
    assert smoothed_at(losses, 4, 1, 1) == 4.0
    assert smoothed_at(losses, 4, 4, 1) == 2.5
    assert smoothed_at(losses, 4, 5, 1) is None, "only four steps were trained"
    assert smoothed_at(losses, 9, 9, 1) is None, "the newest logged loss is older than the log's rhythm"
    assert smoothed_at(losses, 9, 9, 6) == 2.5
    assert smoothed_at(losses, 0, 1, 1) is None
    assert smoothed_curve(losses, 2) == [(20, 1.5), (30, 2.5), (40, 3.5), (100, 10.0)]
    assert smoothed_curve(losses, 11) == []
    for tokens, mean in smoothed_curve(losses, 3):
        assert mean == smoothed_at(losses, tokens // 10, 3, 1)


def test_the_window_lies_within_every_series() -> None:
    """A run of 24 steps has no mean of 100: that was 8.90 for 6.12."""

    def run(name: str, steps: int, every: int = 1) -> Series:
        losses = tuple(
            (step, 10 * step, 20.0 - step / 10) for step in range(1, steps + 1) if step == 1 or step % every == 0
        )
        return series(name, {step: {} for step in (2, steps)}, losses=losses, log_every_steps=every)

    assert [default_window([run("a", steps)]) for steps in (3, 24, 240, 5000)] == [1, 2, 24, 100]
    assert default_window([run("a", 240), run("b", 36)]) == 3
    assert default_window([run("a", 24, every=10)]) == 10
    assert default_window([series("a", {1: {}})]) == 1
    found = compare([run("a", 24), run("b", 240)])
    assert found.window_steps == 2
    assert [point.values.get(TRAIN_LOSS) for point in found.series[0].points] == [
        pytest.approx(19.85),
        pytest.approx(17.65),
    ]
    assert headings(found.columns, found.window_steps) == ["train loss, mean of 2 steps"]
    asked = compare([run("a", 24), run("b", 240)], window_steps=100)
    assert [point.values for point in asked.series[0].points] == [{}, {}]
    assert asked.series[1].points[1].values[TRAIN_LOSS] == pytest.approx(20 - 190.5 / 10)
    assert "a: no train loss: 24 steps were logged, the window is 100: give a smaller --window" in asked.notes


def test_the_table_fits_a_terminal(tmp_path: Path) -> None:
    one, two = heldout_column("words", "1" * 64, 52, False, 4, 9), heldout_column("words", "1" * 64, 117, False, 9, 9)
    task = Column("score", "arc_challenge_with_a_long_name", "acc_norm, %", (("version", "1"), ("shots", "25")))
    names = [f"a_run_with_a_rather_long_name_{number}" for number in range(12)]
    some = [series(name, {1: {one: 2.0, task: 40.0}, 2_000_000_000: {one: 1.5}}) for name in names[:11]]
    found = compare([*some, series(names[11], {1: {two: 3.0}})], every_position=True)
    lines = as_text(found, 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[:2] == [f"A  {names[0]}", f"B  {names[1]}"]
    assert "held-out loss words 11111111, 4 of 9 rows" in lines
    assert "held-out loss words 11111111, all 9 rows" in lines
    narrow = compare([series("a", {1: {one: 2.0}, 3: {one: 1.0}}), series("b", {1: {one: 2.5}})], every_position=True)
    assert as_text(narrow, 80).splitlines() == [
        "held-out loss words 11111111, 4 of 9 rows",
        " tokens seen       a       b",
        "          10  2.0000  2.5000",
        "          30  1.0000       -",
    ]


def test_the_picture_has_no_empty_panel(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import struct

    def size(path: Path) -> tuple[int, ...]:
        return struct.unpack(">II", path.read_bytes()[16:24])

    held, task = heldout_column("words", "1" * 64, 52, False), Column("score", "arc", "acc, %", (("shots", "5"),))
    assert plot(compare([series("a", {1: {held: 2.0}, 2: {held: 1.0}})]), tmp_path / "one.png")
    assert plot(compare([series("a", {1: {held: 2.0, task: 40.0}})]), tmp_path / "two.png")
    assert (size(tmp_path / "one.png"), size(tmp_path / "two.png")) == ((1800, 600), (1800, 1200))
    assert not plot(compare([series("a", {1: {held: math.inf}, 2: {}})]), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_run_by_tokens(tmp_path: Path, recipe: Recipe) -> None:
    roots = make_run(tmp_path / "run", recipe, losses={1: 4.0, 2: 3.0, 3: math.nan, 4: 2.0})
    found = windowed(read_series(tmp_path / "run", "run"), 2)
    assert (found.kind, found.vocab_size, found.positions) == ("run", 97, 16)
    assert [(point.step, point.tokens, point.checkpoint) for point in found.points] == [
        (2, 2 * 4 * 13, roots[0]),
        (4, 4 * 4 * 13, roots[1]),
    ]
    assert found.tokens_words == "step x 4 x 13 = step x 52"
    # What is not finite is in no mean, and is no gap.
    assert [point.values[TRAIN_LOSS] for point in found.points] == [3.5, 2.0]
    assert [tokens for tokens, _ in found.curve] == [104, 208]
    assert found.left_out == ()


def test_tokens_follow_the_ledger_where_the_batch_was_changed(tmp_path: Path, recipe: Recipe) -> None:
    make_run(tmp_path / "run", recipe)
    small = recipe.model_copy(
        update={"batch": recipe.batch.model_copy(update={"global_batch_size": 2, "micro_batch_size": 2})}
    )
    ledger = Ledger(tmp_path / "run")
    ledger.open_run(0, small.model_dump(mode="json"), "d", {}, None)
    roots = [checkpoint.verify(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")["root"] for step in (2, 4)]
    ledger.add("checkpoint", step=2, root=roots[0], parent=None, metrics_after=0, metrics_sha256="0" * 64)
    ledger.add("recipe", step=2, changes=[], recipe=recipe.model_dump(mode="json"), recipe_sha256="0" * 64)
    ledger.open_run(2, recipe.model_dump(mode="json"), "d", {}, roots[0])
    ledger.add("checkpoint", step=4, root=roots[1], parent=roots[0], metrics_after=2, metrics_sha256="0" * 64)
    found = read_run(tmp_path / "run", "run")
    assert [point.tokens for point in found.points] == [2 * 26, 2 * 26 + 2 * 52]
    assert [tokens for _, tokens, _ in found.losses] == [26, 52, 104, 156]
    assert "26 a step from step 0, 52 a step from step 2" in found.tokens_words


def test_a_checkpoint_that_is_not_on_the_ledgers_line_is_named(tmp_path: Path, recipe: Recipe) -> None:
    roots = make_run(tmp_path / "run", recipe)
    ledger = Ledger(tmp_path / "run")
    ledger.open_run(0, recipe.model_dump(mode="json"), "d", {}, None)
    ledger.add("checkpoint", step=2, root=roots[0], parent=None, metrics_after=0, metrics_sha256="0" * 64)
    found = read_run(tmp_path / "run", "run")
    assert [point.checkpoint for point in found.points] == [roots[0]]
    assert roots[1][:12] in found.left_out[0]
    assert "not on the ledger's line" in found.left_out[0]


def test_records_of_a_foreign_root_are_left_out_and_named(tmp_path: Path, recipe: Recipe) -> None:
    folder = tmp_path / "run"
    roots = make_run(folder, recipe)
    score(folder, roots[0], 2, 0.25)
    score(folder, "f" * 64, 2, 0.99)
    score(folder, roots[0], 4, 0.98)  # its root, another step
    result_file(folder, roots[1], 4, "chunk_00000", [3, 6])
    result_file(folder, "e" * 64, 2, "chunk_00000", [6, 6])
    found = read_run(folder, "run")
    values = {point.step: {column.name: value for column, value in point.values.items()} for point in found.points}
    assert values[2]["arc"] == 25.0
    assert "arc" not in values[4]
    assert values[4]["trained on"] == pytest.approx(0.75)  # of its two measures the mean score is put last
    assert "trained on" not in values[2]
    assert len(found.left_out) == 3
    notes = "\n".join(compare([found]).notes)
    for words in (
        "of checkpoint ffffffffffff at step 2",
        f"of checkpoint {roots[0][:12]} at step 4",
        "of checkpoint eeeeeeeeeeee at step 2",
    ):
        assert words in notes


def test_damaged_records_are_named_and_the_rest_is_read(tmp_path: Path, recipe: Recipe) -> None:
    folder = tmp_path / "run"
    roots = make_run(folder, recipe)
    score(folder, roots[0], 2, 0.25)
    score(folder, roots[1], 4, 0.5)
    (first, _) = sorted((folder / "analyses" / "evaluations").iterdir())
    first.write_bytes(first.read_bytes().replace(b'"value":0.25', b'"value":0.75'))
    path = result_file(folder, roots[1], 4, "chunk_00000", [3, 6])
    path.write_bytes(path.read_bytes().replace(b'"mean_score":0.75', b'"mean_score":0.85'))
    found = read_run(folder, "run")
    assert [list(point.of("score").values()) for point in found.points] == [[], [50.0]]
    assert not any(point.of("memorization") for point in found.points)
    assert "was altered" in found.left_out[0]
    assert "chunk_00000.json: damaged" in found.left_out[1]


def test_one_score_in_two_precisions_shows_one_and_says_so(tmp_path: Path, recipe: Recipe) -> None:
    roots = make_run(tmp_path / "run", recipe)
    score(tmp_path / "run", roots[0], 2, 0.5, inputs={"precision": "bfloat16"})
    score(tmp_path / "run", roots[0], 2, 0.25)
    found = read_run(tmp_path / "run", "run")
    assert list(found.points[0].of("score").values()) == [25.0]
    assert "2 records" in found.remarks[0]
    assert "bfloat16 on cpu, 2 at once: 50" in found.remarks[0]


def result_file(folder: Path, root: str, step: int, chunk: str, matches: list[int], **other: Any) -> Path:
    """A memorization result of k = 5, l = 6 in a run's folder."""
    path = folder / "analyses" / "memorization" / "k5_l6_samples2_seed0" / f"step_{step:08d}" / f"{chunk}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(canonical_json(result(root, step, chunk, matches, **other).model_dump(mode="json")) + b"\n")
    return path


def result(root: str, step: int, chunk: str, matches: list[int], **other: Any) -> MemorizationResult:
    fields: dict[str, Any] = {
        "kind": "training",
        "first_step": 0,
        "stop_step": 2,
        "dataset_id": "d",
        "repeated": 0,
        **other,
    }
    return MemorizationResult(
        format="weftrain-memorization",
        version=1,
        software={},
        step=step,
        root=root,
        chunk=chunk,
        parameters={"prompt_tokens": 5, "continuation_tokens": 6, "samples": 2, "seed": 0},
        sample_numbers=tuple(range(len(matches))),
        rows_sha256="a" * 64,
        matches=tuple(matches),
        mean_score=sum(matches) / (6 * len(matches)),
        extractible_percent=100 * matches.count(6) / len(matches),
        **fields,
    )


def test_memorization_is_over_all_rows_that_a_checkpoint_saw() -> None:
    root = "a" * 64
    results = [
        result(root, 2, "chunk_00000", [6, 6, 6]),
        result(root, 2, "chunk_00001", [0], first_step=0, stop_step=1),
        result(root, 2, "chunk_00002", [3], first_step=2, stop_step=4),
        result(root, 2, "chunk_00003", [6], first_step=1, stop_step=3),  # in part
        result(root, 2, "heldout_words", [1], kind="heldout", first_step=None, stop_step=None, dataset_id="h"),
    ]
    values = {(column.name, column.measure): value for column, value in memorization_values(results).items()}
    assert values == {
        ("trained on", "extractible, %"): 75.0,  # of four rows, not the mean of the chunks' 100 and 0
        ("trained on", "mean score"): 0.75,
        ("not yet seen", "extractible, %"): 0.0,
        ("not yet seen", "mean score"): 0.5,
        ("heldout_words", "extractible, %"): 0.0,
        ("heldout_words", "mean score"): pytest.approx(1 / 6),
    }


def test_what_is_no_series_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunFolderError, match="none of them: name one"):
        read_series(tmp_path / "empty", "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(RunFolderError, match="is one model: name the folder that holds its revisions"):
        read_series(tmp_path / "empty", "empty")


# Columns, positions, notes


def test_names_tell_the_series_apart(tmp_path: Path) -> None:
    assert names_of([tmp_path / "a" / "demo", tmp_path / "b" / "other"]) == ["demo", "other"]
    assert names_of([tmp_path / "a" / "demo", tmp_path / "b" / "demo"]) == ["a/demo", "b/demo"]
    with pytest.raises(RunFolderError, match="named twice"):
        names_of([tmp_path / "a", tmp_path / "b" / ".." / "a"])


def test_other_sets_versions_and_shots_are_other_columns() -> None:
    one, two = heldout_column("words", "1" * 64, 52, False), heldout_column("words", "2" * 64, 52, False)
    task = Column("score", "arc", "acc, %", (("version", "1"), ("shots", "5")))
    other = Column("score", "arc", "acc, %", (("version", "2"), ("shots", "5")))
    found = compare([series("A", {1: {one: 2.0, task: 40.0}}), series("B", {1: {two: 3.0, other: 50.0}})])
    table = cells(found)
    assert len(table[0]) == 3 + 4
    assert [row[3:] for row in table[1:]] == [["2.0000", "-", "40.00", "-"], ["-", "3.0000", "-", "50.00"]]
    assert table[0][3:] == [
        "held-out loss words 11111111, rows not recorded",
        "held-out loss words 22222222, rows not recorded",
        "arc, acc, %, 5 shots, version 1",
        "arc, acc, %, 5 shots, version 2",
    ]
    notes = "\n".join(found.notes)
    assert (
        "held-out losses are over different sets: words: A: dataset_id 111111111111; B: dataset_id 222222222222"
        in notes
    )
    assert "scores are of different tasks or settings: arc: A: version 1; B: version 2" in notes


def test_one_set_over_other_rows_or_another_mask_is_another_column() -> None:
    columns = [
        heldout_column("w", "1" * 64, 52, False),
        heldout_column("w", "1" * 64, 104, False),
        heldout_column("w", "1" * 64, 52, True),
    ]
    texts = headings(columns, 1)
    assert len(set(texts)) == 3
    assert "tokens 104" in texts[1]
    assert "within documents" in texts[2]


def test_what_differs_between_models_is_said() -> None:
    held = heldout_column("words", "1" * 64, 52, False)
    seen = Column("memorization", "trained on", "extractible, %", (("k", "5"), ("l", "6")))
    values = {1: {held: 2.0, TRAIN_LOSS: 2.0, seen: 1.0}}
    a = series("A", values, tokenizer_sha256="a" * 64, vocab_size=100, dataset_id="c" * 64)
    b = series("B", values, tokenizer_sha256="b" * 64, vocab_size=200, dataset_id="d" * 64)
    notes = "\n".join(compare([a, b]).notes)
    for words in (
        "tokenizers differ or are unknown, so losses per token may not be comparable: A aaaaaaaaaaaa, B bbbbbbbbbbbb",
        "vocabularies differ: A 100 ids, B 200 ids",
        "train losses are over different data: A cccccccccccc, B dddddddddddd",
        "memorization of training rows is of different data: A cccccccccccc, B dddddddddddd",
    ):
        assert words in notes
    alike = "\n".join(compare([a, replace(a, name="B")]).notes)
    assert "differ" not in alike


def test_rows_are_the_common_positions_and_nothing_is_interpolated() -> None:
    a, b = (
        series("A", {1: {TRAIN_LOSS: 3.0}, 2: {TRAIN_LOSS: 2.0}, 3: {}}),
        series("B", {2: {TRAIN_LOSS: 2.5}, 3: {TRAIN_LOSS: 2.25}}),
    )
    found = compare([a, b])
    assert [(one.name, point.tokens) for one, point in found.rows()] == [("A", 20), ("B", 20), ("A", 30), ("B", 30)]
    assert [row[3] for row in cells(found)[1:]] == ["2.0000", "2.5000", "-", "2.2500"]
    assert "shown are the 2 of 3 token positions" in found.notes[0]
    assert found.positions == (20, 30)
    assert compare([a, b], every_position=True).positions == (10, 20, 30)
    # No position in common: all are shown, and it is said.
    apart = compare([a, series("B", {7: {TRAIN_LOSS: 2.0}})])
    assert apart.positions == (10, 20, 30, 70)
    assert "no number of tokens is common" in apart.notes[0]


def test_json_and_markdown(tmp_path: Path) -> None:
    task = Column("score", "a|rc\x1b[2J", "acc, %", (("shots", "5"),))
    found = compare([series("A", {1: {task: 0.0, TRAIN_LOSS: math.inf}})])
    value = json.loads(canonical_json(as_json(found)))
    (point,) = value["series"][0]["points"]
    assert sorted(point["values"].values(), key=str) == [0.0, "inf"]
    assert {column["key"] for column in value["columns"]} == point["values"].keys()
    text = as_markdown(found, "compare.png")
    assert "a\\|rc?[2J" in text
    assert "| A | 1 | 10 | inf | 0.00 |" in text
    assert "(compare.png)" in text
    plot(found, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


# Hugging Face series


def save_neox(folder: Path, seed: int, **other: Any) -> Any:
    """A GPT-NeoX of about 4,000 parameters with random weights, as transformers saves it."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    model = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**settings, max_position_embeddings=32, initializer_range=0.5, **other)
    )
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return model.eval().requires_grad_(False)


@pytest.fixture
def neox(tmp_path: Path) -> Path:
    """A series of two revisions."""
    for step in (1000, 2000):
        save_neox(tmp_path / "pythia" / f"step{step}", step)
    return tmp_path / "pythia"


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """Three rows of unequal length."""
    rows = [np.random.default_rng(length).integers(0, 64, length).tolist() for length in (5, 12, 3)]
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps(row if number else {"ids": row}) + "\n" for number, row in enumerate(rows)))
    return path


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    rows = np.random.default_rng(0).integers(0, 64, (4, 9)).tolist()
    path = tmp_path / "released.jsonl"
    path.write_text(
        "".join(json.dumps({"source": "s", "prompt": row[:4], "continuation": row[4:]}) + "\n" for row in rows)
    )
    return path


def test_tokens_of_a_hugging_face_series(neox: Path) -> None:
    found = read_series(neox, "pythia", tokens_per_step=PYTHIA_TOKENS_PER_STEP)
    assert found.kind == "huggingface"
    assert [(point.step, point.tokens, point.checkpoint) for point in found.points] == [
        (1000, 2_097_152_000, "step1000"),
        (2000, 4_194_304_000, "step2000"),
    ]
    assert (found.vocab_size, found.positions, found.tokenizer_sha256) == (64, 32, None)
    with pytest.raises(DataError, match="--tokens-per-step N"):
        read_series(neox, "pythia")
    save_neox(neox / "ckpt_002000", 0)
    with pytest.raises(CheckpointError, match="are both step 2000"):
        read_huggingface(neox, "pythia", 1)
    shutil.rmtree(neox / "ckpt_002000")
    shutil.copytree(neox / "step2000", neox / "step3000")
    with pytest.raises(CheckpointError, match=r"several steps have the same weights: step2000 = step3000 \(sha256 "):
        read_huggingface(neox, "pythia", 1)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_other_architectures_pickles_and_code_are_refused_with_the_file(neox: Path, tmp_path: Path) -> None:
    path = neox / "step2000"
    config = (path / "config.json").read_text()
    for changes, words in (
        (
            {"model_type": "nonesuch"},
            "model_type 'nonesuch' is no causal language model that transformers .* knows: upgrade",
        ),
        ({"model_type": "vit"}, "model_type 'vit' is no causal language model"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.X"}}, "'auto_map' asks for code of the model's own"),
        ({"quantization_config": {}}, "quantized weights"),
    ):
        edit(path / "config.json", **changes)
        with pytest.raises(CheckpointError, match=f"step2000/config.json: .*{words}"):
            read_huggingface(neox, "pythia", 1)
        (path / "config.json").write_text(config)
    edit(path / "config.json", vocab_size=65)
    with pytest.raises(CheckpointError, match="'vocab_size' is 65, the first revision's 64: not one series"):
        read_huggingface(neox, "pythia", 1)
    (path / "config.json").write_text(config)
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        check_revision(path)
    (path / "adapter_config.json").unlink()
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the tensors end at byte"):
        check_revision(path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is missing: download"):
        check_revision(path)
    (path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(
        CheckpointError, match=r"step2000/pytorch_model\.bin: is pickled, which is never loaded here: download"
    ):
        read_huggingface(neox, "pythia", 1)
    (tmp_path / "elsewhere").write_bytes(whole)
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a symbolic link"):
        check_revision(path)


def test_weights_that_are_missing_are_never_drawn_at_random(tmp_path: Path) -> None:
    path = tmp_path / "step1"
    model = save_neox(path, 1)
    state = {name: tensor for name, tensor in model.state_dict().items() if "dense_4h_to_h.bias" not in name}
    from safetensors.torch import save_file

    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing keys, '.*dense_4h_to_h\.bias'"):
        load_revision(path)


def test_loss_and_greedy_tokens_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_neox(tmp_path / "step1", 1)
    ours = load_revision(tmp_path / "step1")
    ids = torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 1:].clone()
    labels[1, 4:] = -100
    expected = sum(float(model(input_ids=ids[row : row + 1], labels=ids[row : row + 1]).loss) * 9 for row in (0, 2))
    expected += float(model(input_ids=ids[1:2, :5], labels=ids[1:2, :5]).loss) * 4
    assert float(ours(ids[:, :-1], labels, None)) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(compare_huggingface, "_LOGITS_AT_ONCE", 1)  # a row at a time
    assert float(ours(ids[:, :-1], labels, None)) == pytest.approx(expected, rel=1e-6)
    greedy = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )[:, 10:].tolist()
    assert ours.generate(ids.tolist(), 6, batch_size=2) == greedy
    with pytest.raises(DataError, match="within documents"):
        ours(ids[:, :-1], labels, torch.zeros(3, 9, dtype=torch.int32))
    with pytest.raises(DataError, match="vocabulary of 64"):
        ours.generate([[64]], 1)
    ours.model.get_output_embeddings().weight.data.fill_(math.nan)
    with pytest.raises(NonFiniteError):
        ours.generate(ids.tolist(), 1)


def test_half_precision_weights_are_computed_in_fp32(tmp_path: Path) -> None:
    save_neox(tmp_path / "step1", 1).half().save_pretrained(tmp_path / "step1")
    assert {parameter.dtype for parameter in load_revision(tmp_path / "step1").model.parameters()} == {torch.float32}


def test_a_series_is_measured_and_a_restart_loads_no_model(
    neox: Path, ids: Path, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_huggingface(neox, "pythia", 10)
    wanted = MeasureRequest((open_held(ids),), (open_sample(sample),))
    done: list[str] = []
    measured, notes = measure_series(found, wanted, tmp_path / "to", SETTINGS, progress=done.append)
    assert done == ["pythia, step 1000", "pythia, step 2000"]
    assert any("no tokenizer is known" in note for note in notes)
    rows = [json.loads(line) for line in ids.read_text().splitlines()]
    rows = [row["ids"] if isinstance(row, dict) else row for row in rows]
    for point in measured.points:
        model = load_revision(neox / f"step{point.step}").model
        losses = [
            float(model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss) * (len(row) - 1)
            for row in rows
        ]
        (loss,) = point.of("held-out loss").items()
        assert loss[0].detail("tokens") == "17"
        assert loss[1] == pytest.approx(Perplexity(sum(losses) / 17, 17).loss, rel=1e-6)
        tokens = [json.loads(line) for line in sample.read_text().splitlines()]
        prompts = torch.tensor([row["prompt"] for row in tokens])
        decoded = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[:, 4:].tolist()
        matches = sum(
            a == b
            for row, new in zip(tokens, decoded, strict=True)
            for a, b in zip(row["continuation"], new, strict=True)
        )
        scores = {column.measure: value for column, value in point.of("memorization").items()}
        assert scores["mean score"] == pytest.approx(matches / 20)

    kept = {path: path.read_bytes() for path in (tmp_path / "to").rglob("*.json")}
    assert len(kept) == 4

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    again, _ = measure_series(found, wanted, tmp_path / "to", SETTINGS)
    assert again.points == measured.points
    assert {path: path.read_bytes() for path in (tmp_path / "to").rglob("*.json")} == kept
    # Stopped after the first: only what is missing is measured. And other weights are another checkpoint.
    monkeypatch.undo()
    loaded: list[str] = []
    monkeypatch.setattr(
        "weftrain.analysis.compare.measure.load_revision",
        lambda path, device: loaded.append(path.name) or load_revision(path),
    )
    next(path for path in kept if path.name.startswith("00002000-heldout")).unlink()
    assert measure_series(found, wanted, tmp_path / "to", SETTINGS)[0].points == measured.points
    assert loaded == ["step2000"]
    before = revision_root(neox / "step1000")
    save_neox(neox / "step1000", 7)
    assert revision_root(neox / "step1000") != before
    assert measure_series(found, wanted, tmp_path / "to", SETTINGS)[0].points != measured.points
    assert loaded == ["step2000", "step1000"]


def test_one_model_is_in_memory_at_a_time(
    neox: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc
    import weakref

    alive: list[weakref.ref[Any]] = []

    def load(path: Path, device: str) -> Any:
        gc.collect()
        assert not any(one() is not None for one in alive), "the model before is still there"
        model = load_revision(path, device)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr("weftrain.analysis.compare.measure.load_revision", load)
    measure_series(read_huggingface(neox, "pythia", 10), MeasureRequest((open_held(ids),)), tmp_path / "to", SETTINGS)
    assert len(alive) == 2


def test_runs_are_measured_on_the_same_tokens(tmp_path: Path, recipe: Recipe, neox: Path, sample: Path) -> None:
    make_run(tmp_path / "run", recipe)
    rows = tmp_path / "short.jsonl"
    rows.write_text(json.dumps([1, 2, 3, 4]) + "\n")
    wanted = MeasureRequest((open_held(rows),), (open_sample(sample),))
    both = [read_run(tmp_path / "run", "run"), read_huggingface(neox, "pythia", 26)]
    measured = [measure_series(one, wanted, tmp_path / "to", SETTINGS)[0] for one in both]
    columns = [{column for column in one.points[0].values if column != TRAIN_LOSS} for one in measured]
    assert columns[0] == columns[1], "the same tokens are one column"
    assert len(columns[0]) == 3


def test_tokens_that_a_series_cannot_read_are_left_out_and_said(neox: Path, tmp_path: Path) -> None:
    found = read_huggingface(neox, "pythia", 10)
    path = tmp_path / "x.jsonl"
    for row, words in (([1, 64], "does not hold id 64"), ([1] * 34, "32 positions do not hold rows of 33 tokens")):
        path.write_text(json.dumps(row) + "\n")
        held = open_held(path)
        assert words in str(why_not(found, held))
        measured, notes = measure_series(found, MeasureRequest((held,)), tmp_path / "to", SETTINGS)
        assert not measured.points[0].values
        assert any("not measured" in note and words in note for note in notes)
    assert not (tmp_path / "to").exists()
    for text in ("", "[1]\n", "[1, true]\n", "[1, -2]\n", "nonsense\n", '{"id": [1, 2]}\n'):
        path.write_text("[1, 2]\n" * bool(text) + text)
        with pytest.raises(DataError, match=rf"x\.jsonl:{2 if text else 1}: "):
            open_held(path)


def test_another_tokenizer_is_no_vocabulary_that_matches(neox: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    def write(path: Path, *words: str, pretty: bool = False) -> Path:
        Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="a")).save(
            str(path), pretty=pretty
        )
        return path

    path = tmp_path / "ids.jsonl"
    path.write_text("[1, 0, 1]\n")
    theirs = write(tmp_path / "tokenizer.json", "a", "b")
    held = replace(open_held(path), tokenizer=(theirs, "0" * 64))
    for step in (1000, 2000):
        write(neox / f"step{step}" / "tokenizer.json", "b", "a")
    assert "is not the one the tokens were made with" in str(why_not(read_huggingface(neox, "pythia", 1), held))
    write(neox / "step1000" / "tokenizer.json", "a", "b", pretty=True)  # other bytes, the same ids
    assert why_not(read_huggingface(neox, "pythia", 1), held) is None
