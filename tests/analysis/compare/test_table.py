"""Columns, token positions and notes of a comparison; as JSON and Markdown."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from compare_cases import series

from weftrain.analysis.compare.plot import plot
from weftrain.analysis.compare.series import (
    TRAIN_LOSS,
    MeasureColumn,
    heldout_column,
)
from weftrain.analysis.compare.table import as_json, as_markdown, cells, compare, headings, names_of, read_series
from weftrain.core.errors import RunFolderError
from weftrain.core.formats.canonical import canonical_json


def test_what_is_no_series_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunFolderError, match="none of them: name one"):
        read_series(tmp_path / "empty", "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(RunFolderError, match="is one model: name the folder that holds its revisions"):
        read_series(tmp_path / "empty", "empty")


def test_names_tell_the_series_apart(tmp_path: Path) -> None:
    assert names_of([tmp_path / "a" / "demo", tmp_path / "b" / "other"]) == ["demo", "other"]
    assert names_of([tmp_path / "a" / "demo", tmp_path / "b" / "demo"]) == ["a/demo", "b/demo"]
    with pytest.raises(RunFolderError, match="named twice"):
        names_of([tmp_path / "a", tmp_path / "b" / ".." / "a"])


def test_other_sets_versions_and_shots_are_other_columns() -> None:
    one, two = heldout_column("words", "1" * 64, 52, False), heldout_column("words", "2" * 64, 52, False)
    task = MeasureColumn("score", "arc", "acc, %", (("version", "1"), ("shots", "5")))
    other = MeasureColumn("score", "arc", "acc, %", (("version", "2"), ("shots", "5")))
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


def test_pairs_are_columns_of_their_own_and_other_objectives_are_said() -> None:
    """The rewards stand beside the loss of the same pairs: only losses are held against each other."""
    held = heldout_column("pairs", "1" * 64, 52, False)

    def of(beta: float) -> dict[MeasureColumn, float]:
        details = (*held.details, ("objective", f"beta {beta}, name dpo"))
        return {MeasureColumn("preference", "pairs", name, details): 0.5 for name in ("loss", "reward_margin")}

    a, b, c = series("A", {1: of(0.1)}), series("B", {1: of(0.2)}), series("C", {1: {held: 2.0}})
    trained = [
        replace(one, objective=name, losses=((1, 8, 0.7),)) for one, name in ((a, "dpo"), (b, "dpo"), (c, "next_token"))
    ]
    found = compare(trained)
    assert len([column for column in found.columns if column.kind == "preference"]) == 4
    assert [column.name for column in found.columns if column.kind == "held-out loss"] == ["pairs"]
    assert "preference reward margin pairs 11111111, rows not recorded, objective beta 0.1, name dpo" in cells(found)[0]
    notes = "\n".join(found.notes)
    assert "train losses are of different objectives: A dpo, B dpo, C next_token" in notes
    assert "preferences are of different pairs or objectives: pairs: A: objective beta 0.1, name dpo; B: " in notes


def test_what_differs_between_models_is_said() -> None:
    held = heldout_column("words", "1" * 64, 52, False)
    seen = MeasureColumn("memorization", "trained on", "extractible, %", (("k", "5"), ("l", "6")))
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
    task = MeasureColumn("score", "a|rc\x1b[2J", "acc, %", (("shots", "5"),))
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
