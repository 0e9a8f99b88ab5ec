"""`weftrain replay`: a third party with the folder alone, and forgeries that only replay can detect."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forgery import Tensors, forge
from record_runs import done, prepare, weftrain
from release_cases import verdicts

from weftrain.core.formats.dataset import read_dataset_manifest


def test_a_third_party_verifies_replays_resumes_and_evaluates(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = done(weftrain("verify", release))
    assert "3 links: complete and consistent" in output
    assert "not signed" in output
    assert verdicts(weftrain("replay", release)) == ["equal"] * 3
    sampled = done(weftrain("replay", release, "--sample", "0.3", "--seed", "1"))
    assert len(verdicts(weftrain("replay", release, "--sample", "0.3"))) == 1
    assert "drawn with seed 1" in sampled
    # resume: the release's folder is laid out as a run's
    run = tmp_path / "runs" / "crystal_demo"
    shutil.copytree(release, run)
    more = ["schedule.steps=8", "data.chunks=4", "log.tensorboard=false"]
    allow = [word for key in ("schedule.steps", "data.chunks", "data.root") for word in ("--allow", key)]
    output = done(
        weftrain(
            "train", run / "recipe.yaml", *more, f"data.root={release / 'data'}", "--runs", tmp_path / "runs", *allow
        )
    )
    assert "resumed after step 6" in output
    assert (run / "checkpoints" / "step_00000008").is_dir()
    # evaluate
    assert "words" in done(weftrain("eval", release))
    assert "words" in done(weftrain("eval", release / "checkpoints" / "step_00000002"))


def one_ulp(step: int, tensors: Tensors) -> None:
    if step == 4:
        weight = tensors["weights/layers.1.ffn.up_proj.weight"].view(torch.int32)
        weight[3, 5] += 1


def a_moment(step: int, tensors: Tensors) -> None:
    if step == 4:
        tensors["exp_avg_sq/embedding.weight"] *= 1.5


def swapped(recipe: dict[str, Any]) -> None:
    recipe["data"]["skip"] = [{"reason": "x", "chunk": 0, "action": "defer", "source": None, "rows": None}]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ({}, ["equal", "equal", "equal"]),
        ({"tensors": one_ulp}, ["equal", "different", "different"]),
        ({"tensors": a_moment}, ["equal", "different", "different"]),
        ({"recipe": swapped, "chunks": {0: 1, 1: 2, 2: 0}}, ["different", "different", "different"]),
    ],
    ids=["nothing", "one weight by 1 ulp", "an optimizer moment", "chunks swapped"],
)
def test_a_consistent_forgery_passes_verify_and_fails_replay(
    edit: dict[str, Any], expected: list[str], release: Path
) -> None:
    forge(release, **edit)
    done(weftrain("verify", release))
    result = weftrain("replay", release)
    assert verdicts(result) == expected, result.output
    assert result.exit_code == (0 if set(expected) == {"equal"} else 3)
    if "different" in expected:
        assert "the fingerprint is the same, so every bit must be: the release was altered" in result.output
    if edit.get("tensors") is one_ulp:
        assert "weights/layers.1.ffn.up_proj.weight: 1 of 3,360 elements differ, by up to 1 ulp" in result.output


def test_reordered_rows_consistently_hashed_fail_replay(release: Path, tmp_path: Path) -> None:
    """The same documents in another order: a valid dataset with an id of its own, put in the place of the run's."""
    datasets = prepare(tmp_path)
    shutil.rmtree(datasets)
    own = release / "data" / "words"
    options = [
        "--name",
        "words",
        "--sequence-length",
        "13",
        "--heldout-fraction",
        "0.1",
        "--tokenizer",
        own / "tokenizer.json",
        "--eos",
        "</s>",
    ]
    done(weftrain("prep", tmp_path / "texts", "--output", datasets, *options, "--seed", "7"))
    new_id = read_dataset_manifest(datasets / "words").train.id
    assert new_id != read_dataset_manifest(own).train.id
    shutil.rmtree(own)
    shutil.copytree(datasets / "words", own, ignore=shutil.ignore_patterns("failures.jsonl"))
    forge(release, dataset_id=new_id)
    done(weftrain("verify", release))
    assert verdicts(weftrain("replay", release)) == ["different"] * 3


def test_another_fingerprint_gets_a_tolerance_report(release: Path) -> None:
    """Other threads change bits: the states differ, by little, and the report says what differs in the fingerprint."""
    result = weftrain("replay", release, "--link", "2", "--backend", "cuda")
    assert result.exit_code == 0, result.output
    assert verdicts(result) in (["tolerance"], ["equal"])
    assert "fingerprint: backend: released local, here cuda" in result.output
    strict = weftrain("replay", release, "--link", "2", "--backend", "cuda", "--tolerance", "0")
    assert strict.exit_code == (3 if verdicts(result) == ["tolerance"] else 0)


def test_links_that_are_not_there_are_refused(release: Path) -> None:
    for arguments, words in (
        (("--link", "4"), "there is no link 4: the release has 3"),
        (("--sample", "0"), "above 0 and up to 1"),
    ):
        result = weftrain("replay", release, *arguments)
        assert result.exit_code == 2
        assert words in result.output
