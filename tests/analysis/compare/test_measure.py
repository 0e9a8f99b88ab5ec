"""Losses and memorization measured for every series, once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare_cases import SETTINGS, make_run, save_neox, transformers

from weftrain.analysis.compare.huggingface import load_revision, read_huggingface, revision_root
from weftrain.analysis.compare.measure import MeasureRequest, measure_series, open_held, open_sample, why_not
from weftrain.analysis.compare.series import (
    TRAIN_LOSS,
    read_run,
)
from weftrain.core.config import Recipe
from weftrain.core.errors import DataError


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    rows = np.random.default_rng(0).integers(0, 64, (4, 9)).tolist()
    path = tmp_path / "released.jsonl"
    path.write_text(
        "".join(json.dumps({"source": "s", "prompt": row[:4], "continuation": row[4:]}) + "\n" for row in rows)
    )
    return path


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
        model = transformers.AutoModelForCausalLM.from_pretrained(neox / f"step{point.step}").requires_grad_(False)
        losses = [
            float(model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss) * (len(row) - 1)
            for row in rows
        ]
        (loss,) = point.of("held-out loss").items()
        assert loss[0].detail("tokens") == "17"
        assert loss[1] == pytest.approx(sum(losses) / 17, rel=1e-6)
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

    monkeypatch.setattr("weftrain.analysis.compare.measure.load_revision", refuse)
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
