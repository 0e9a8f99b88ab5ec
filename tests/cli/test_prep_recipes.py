"""`weftrain prep RECIPE`: several datasets of one recipe, and what belongs to recipes only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from made_texts import sentences

Weftrain = Callable[..., Result]
RECIPE = """
name: two
description: two datasets of one tokenizer
licence: none
tokenizer: tokenizer.json
sequence_length: 16
heldout_fraction: 0.1
normalise: [newlines]
datasets:
  - {name: two/prose, inputs: [{addresses: [prose.jsonl], source: prose}]}
  - name: two/code
    fim: {rate: 0.9, spm_share: 0.5}
    epochs: 2
    inputs: [{addresses: [code], suffixes: [.py]}]
"""


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    from weftrain.data_prep.tokens.training import train_encoder

    texts = sentences(120)
    folder = tmp_path / "in"
    (folder / "code").mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(train_encoder(texts, 320).data)
    (folder / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for number, text in enumerate(texts):
        (folder / "code" / f"{number}.py").write_text(text)
        (folder / "code" / f"{number}.txt").write_text("not wanted")
    (tmp_path / "two.yaml").write_text(RECIPE)
    return folder


def test_a_recipe_makes_its_datasets(weftrain: Weftrain, inputs: Path, tmp_path: Path) -> None:
    arguments = ["prep", tmp_path / "two.yaml", "--inputs", inputs, "--output", tmp_path / "out", "--workers", "1"]
    made = weftrain(*arguments)
    assert made.exit_code == 0, made.output
    assert made.output.count("is ready: two: two/") == 2
    code = json.loads((tmp_path / "out" / "two" / "code" / "manifest.json").read_text())
    assert (code["fim"]["rate"], len(code["train"]["epochs"]), code["preparation"]["normalise"]) == (0.9, 2, "newlines")
    assert code["corpus"]["files"] == 120
    again = weftrain(*arguments, "--only", "two/prose")
    assert again.output.count("is up to date") == 1
    other = weftrain(*arguments, "--only", "two/prose", "--set", "sequence_length=8")
    assert other.exit_code == 2
    assert "prepared with sequence_length 16, not 8" in other.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "three"], "the recipe makes two/prose, two/code"),
        (["--sequence-length", "8"], "the recipe decides --sequence-length"),
        (["--index", "0"], "belong to --executor task"),
        (["--executor", "task"], "needs --index and --of"),
        (["--executor", "ray", "--output", "memory://x"], "--output must be a folder that all of them see"),
        (["--set", "sequence_lenth=8"], "did you mean 'sequence_length'"),
    ],
)
def test_what_does_not_go_together(
    weftrain: Weftrain, inputs: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = weftrain("prep", tmp_path / "two.yaml", "--inputs", inputs, "--output", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_without_inputs_and_without_a_recipe(weftrain: Weftrain, inputs: Path, tmp_path: Path) -> None:
    assert "say with --inputs" in weftrain("prep", tmp_path / "two.yaml").output
    assert "belongs to a recipe" in weftrain("prep", inputs / "prose.jsonl", "--name", "x", "--only", "y").output
    missing = weftrain("prep", "amber", "--inputs", inputs)
    assert missing.exit_code == 2
    assert "arxiv" in missing.output


def test_members_of_an_array(weftrain: Weftrain, inputs: Path, tmp_path: Path) -> None:
    arguments = ["prep", tmp_path / "two.yaml", "--inputs", inputs, "--output", tmp_path / "out", "--only", "two/prose"]
    share = weftrain(*arguments, "--executor", "task", "--index", "0", "--of", "1", "--stage", "tokenize")
    assert share.exit_code == 0, share.output
    assert "this member's share is done" in share.output
    whole = weftrain(*arguments, "--executor", "task", "--index", "0", "--of", "1")
    assert "is ready" in whole.output
