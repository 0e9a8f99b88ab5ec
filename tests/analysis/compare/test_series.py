"""Runs and releases read as series, with what is left out named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from compare_cases import make_run, score

from weftrain.analysis.compare.series import (
    TRAIN_LOSS,
    memorization_values,
    read_run,
)
from weftrain.analysis.compare.table import compare, read_series
from weftrain.analysis.compare.window import windowed
from weftrain.analysis.memorization.scores import MemorizationResult
from weftrain.core import checkpoint
from weftrain.core.config import Recipe, StartFrom
from weftrain.core.formats.canonical import canonical_json
from weftrain.core.run.ledger import Ledger


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


def test_a_run_that_starts_from_other_weights_says_so(tmp_path: Path, recipe: Recipe) -> None:
    make_run(tmp_path / "scratch", recipe)
    start = StartFrom(huggingface="olmo", state="weights")
    make_run(tmp_path / "tuned", recipe.model_copy(update={"start_from": start}))
    assert not any("starts from" in remark for remark in read_run(tmp_path / "scratch", "scratch").remarks)
    said = "tuned starts from the folder 'olmo': its tokens are counted from there, without those seen before"
    assert said in read_run(tmp_path / "tuned", "tuned").remarks


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
