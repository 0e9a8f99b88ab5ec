"""`weftrain verify`: whatever contradicts itself or the folder is refused, naming the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forgery import forge, write_release
from record_runs import done, trainer, weftrain
from release_cases import edited, flip

from weftrain.core.formats.canonical import canonical_json


def test_a_removed_link_is_seen_though_all_else_was_made_to_fit(release: Path) -> None:
    forge(release, drop_step=4)
    result = weftrain("verify", release)
    assert result.exit_code == 2
    assert "no checkpoint at the end of chunk 1 (step 4)" in result.output


def test_a_removed_link_of_a_run_without_chunks_is_seen_by_the_parent_that_is_not_there(
    made: Path, tmp_path: Path
) -> None:
    (tmp_path / "datasets").symlink_to(made / "datasets")
    done(trainer(tmp_path)("data.chunks=null", "checkpoint.every_steps=2"))
    target = tmp_path / "release"
    done(weftrain("release", tmp_path / "runs" / "crystal_demo", "--to", target, "--licence", "MIT"))
    forge(target, drop_step=4, keep_parents=True)
    result = weftrain("verify", target)
    assert result.exit_code == 2
    assert "the checkpoint of step 6 does not follow that of step 2: a link was removed" in result.output


def swap_chunks_in_release(release: Path) -> None:
    links = json.loads((release / "release.json").read_bytes())["links"]
    links[0]["chunk"], links[1]["chunk"] = links[1]["chunk"], links[0]["chunk"]
    edited(release, links=links)


def outside(release: Path) -> None:
    value = json.loads((release / "release.json").read_bytes())
    edited(release, files=value["files"] | {"../../etc/passwd": {"size": 1, "sha256": "0" * 64}})


def another_chunk(release: Path) -> None:
    shutil.rmtree(release / "checkpoints" / "step_00000004")
    shutil.copytree(release / "checkpoints" / "step_00000006", release / "checkpoints" / "step_00000004")
    write_release(release)


def link_out(release: Path) -> None:
    (release / "metrics.jsonl").rename(release.parent / "metrics.jsonl")
    (release / "metrics.jsonl").symlink_to(release.parent / "metrics.jsonl")


def change_metrics(release: Path) -> None:
    text = (release / "metrics.jsonl").read_text().splitlines()
    record = next(number for number, line in enumerate(text) if '"kind": "step"' in line)
    value = json.loads(text[record]) | {"loss": 0.5}
    text[record] = json.dumps(value)
    (release / "metrics.jsonl").write_text("\n".join(text) + "\n")
    write_release(release)


def change_recipe(release: Path) -> None:
    value = json.loads((release / "recipe.json").read_bytes())
    value["seed"] = 99
    (release / "recipe.json").write_bytes(canonical_json(value) + b"\n")
    write_release(release)


def change_hub_weights(release: Path) -> None:
    path = release / "revisions" / "ckpt_002" / "model.safetensors"
    flip(path)
    write_release(release)


def another_tokenizer(release: Path) -> None:
    path = release / "data" / "words" / "tokenizer.json"
    path.write_text(path.read_text().replace('"added_tokens"', '"added_tokens" ', 1))
    write_release(release)


def another_dataset(release: Path) -> None:
    """A valid dataset, whole in itself, that the run was not trained on."""
    own = release / "data" / "words"
    tokenizer = Path(shutil.copy(own / "tokenizer.json", release.parent / "tokenizer.json"))
    shutil.rmtree(own)
    options = [
        "--name",
        "words",
        "--sequence-length",
        "13",
        "--heldout-fraction",
        "0.1",
        "--tokenizer",
        tokenizer,
        "--eos",
        "</s>",
    ]
    texts = release.parent / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(f"other words {number} " * 30)
    done(weftrain("prep", texts, "--output", release.parent / "other", *options))
    shutil.copytree(release.parent / "other" / "words", own, ignore=shutil.ignore_patterns("failures.jsonl"))
    write_release(release)


def truncate_ledger(release: Path) -> None:
    lines = (release / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (release / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))
    write_release(release)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda release: flip(release / "README.md"), "README.md: has changed"),
        (
            lambda release: flip(release / "checkpoints" / "step_00000004" / "state-00001-of-00001.safetensors"),
            "step_00000004/state-00001-of-00001.safetensors: has changed",
        ),
        (lambda release: flip(release / "data" / "words" / "train" / "00000.h5", 5000), "00000.h5: has changed"),
        (lambda release: (release / "metrics.jsonl").unlink(), "metrics.jsonl: is missing"),
        (lambda release: (release / "extra.txt").write_text("x"), "extra.txt: does not belong there"),
        (
            lambda release: (release / "checkpoints" / "step_00000004" / "x").mkdir(),
            "step_00000004: x: does not belong there",
        ),
        (link_out, "metrics.jsonl: is a symbolic link"),
        (another_chunk, "step_00000004.*so the folder was renamed"),
        (outside, "'../../etc/passwd' is not a path within the folder"),
        (swap_chunks_in_release, "links are not the 3 that follow from the ledger"),
        (change_metrics, "measurements up to step 2 are not those of the ledger"),
        (change_recipe, "recipe.json: is not the recipe of the ledger's last segment"),
        (change_hub_weights, "ckpt_002: weight .* is not that of step 4"),
        (another_tokenizer, "tokenizer.json: SHA-256 .* the shards were made with another tokenizer"),
        (another_dataset, "data: holds dataset .* step . was trained on"),
        (truncate_ledger, "does not end in the line that release.json names"),
        (lambda release: edited(release, version=2), "version 2 is not one that this program reads"),
        (lambda release: edited(release, format="else"), "is not a file of the format"),
        (lambda release: (release / "release.json").write_text("{"), "release.json"),
        (lambda release: (release / "release.json").unlink(), "release.json: No such file"),
    ],
)
def test_what_contradicts_is_refused_with_its_file(damage: Callable[[Path], Any], words: str, release: Path) -> None:
    import re

    damage(release)
    result = weftrain("verify", release)
    assert re.search(words, result.output), result.output
    assert result.exit_code == 2
    assert len(result.output.strip().splitlines()) == 1


def test_code_of_a_strangers_in_a_revision_fails_verify(release: Path) -> None:
    path = release / "revisions" / "ckpt_002" / "modeling_crystalcoder.py"
    path.write_text(path.read_text() + "\nimport os\n")
    write_release(release)
    result = weftrain("verify", release)
    assert result.exit_code == 2
    assert "ckpt_002/modeling_crystalcoder.py: is code, and no modelling code that weftrain wrote" in result.output


def test_folders_without_end_are_refused(release: Path) -> None:
    (release / "analyses" / "/".join("a" * 40)).mkdir(parents=True)
    result = weftrain("verify", release)
    assert result.exit_code == 2
    assert "more than 16 folders deep" in result.output
