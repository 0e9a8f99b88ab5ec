"""`weftrain convert`: the verbs around the Model Zoo's forms; what the forms hold is tested in
tests/backends/cerebras.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from weftrain.cli.main import main
from weftrain.core import checkpoint
from weftrain.core.recipe_file import load_recipe


def weftrain(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def trained(tmp_path: Path, tiny_overrides: list[str]) -> Path:
    done = weftrain("train", "crystal_demo", "--runs", tmp_path / "runs", *tiny_overrides, "schedule.steps=2")
    assert done.exit_code == 0, done.output
    return tmp_path / "runs" / "crystal_demo"


def test_a_checkpoint_goes_there_and_back_with_every_bit(
    trained: Path, tmp_path: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weftrain.cli.display.QUIET_SECONDS", -1)  # every line of the progress, as a log has them
    file = tmp_path / "step_2.mdl"
    done = weftrain("convert", "checkpoint-to-cerebras", trained, file)
    assert done.exit_code == 0, done.output
    _check_progress(done, trained.name, "verified", "written")
    assert f"{file}: step 2, {file.stat().st_size:,} bytes" in done.output
    done = weftrain(
        "convert",
        "checkpoint-from-cerebras",
        file,
        "crystal_demo",
        *tiny_overrides,
        "--runs",
        tmp_path / "other",
        "--run",
        "back",
    )
    assert done.exit_code == 0, done.output
    _check_progress(done, file.name, "hashed", "written")
    states = []
    for folder in (trained, tmp_path / "other" / "back"):
        path = checkpoint.newest(folder / "checkpoints", print)
        assert path is not None
        states.append(checkpoint.load(path)[0])
    ours, back = states
    assert (ours.step, ours.optimizer_updates) == (back.step, back.optimizer_updates) == (2, 2)
    assert ours.tensors.keys() == back.tensors.keys()
    assert all(torch.equal(ours.tensors[name], back.tensors[name]) for name in ours.tensors)


def _check_progress(done: Result, name: str, *words: str) -> None:
    """stderr is a plain log in which each of `words` is said in GB until all are done; stdout has none of it."""
    lines = [line.partition(f"convert {name} ")[2] for line in done.stderr.splitlines()]
    for word in words:
        counts = [tuple(map(float, line.split(" ")[0].split("/"))) for line in lines if line.endswith(f" GB {word}")]
        assert counts, (word, lines)
        assert counts == sorted(counts), counts
    assert " GB " not in done.stdout


def test_a_run_starts_from_what_was_read_in(trained: Path, tmp_path: Path, tiny_overrides: list[str]) -> None:
    file = tmp_path / "weights.mdl"
    assert weftrain("convert", "checkpoint-to-cerebras", trained, file, "--weights-only").exit_code == 0
    command = [
        "convert",
        "checkpoint-from-cerebras",
        file,
        "crystal_demo",
        *tiny_overrides,
        "--runs",
        tmp_path / "runs",
        "--run",
        "read_in",
    ]
    assert weftrain(*command).exit_code != 0  # the file holds no optimizer state
    done = weftrain(*command, "--weights-only")
    assert done.exit_code == 0, done.output
    losses = []
    for source in ("read_in", trained.name):  # the same weights, by way of the file and straight
        follow = [
            "train",
            "crystal_demo",
            "--runs",
            tmp_path / "runs",
            "--run",
            f"from_{source}",
            *tiny_overrides,
            "schedule.steps=1",
        ]
        done = weftrain(*follow, f"start_from={{run: {source}, state: weights}}")
        assert done.exit_code == 0, done.output
        lines = (tmp_path / "runs" / f"from_{source}" / "metrics.jsonl").read_text().splitlines()
        losses += [record["loss"] for record in map(json.loads, lines) if record["kind"] == "step"]
    assert losses[0] == losses[1]
    again = weftrain(*command, "--weights-only")
    assert again.exit_code == 2
    assert "name another --run" in again.output


def test_params_go_there_and_back(tmp_path: Path) -> None:
    done = weftrain("convert", "params-from-recipe", "crystalcoder_7b_phase1")
    assert done.exit_code == 0, done.output
    params = tmp_path / "params.yaml"
    params.write_text(done.output)
    assert yaml.safe_load(done.output)["optimizer"]["adjust_learning_rate"]["decoder_kernel"] == 0.0625
    done = CliRunner().invoke(
        main, ["convert", "recipe-from-params", str(params), "--name", "back", "--micro-batch-size", "66"]
    )
    assert done.exit_code == 0, done.output
    recipe = tmp_path / "back.yaml"
    recipe.write_text(done.stdout)
    back, ours = load_recipe(str(recipe)).recipe, load_recipe("crystalcoder_7b_phase1").recipe
    for section in ("model", "optimizer", "schedule", "precision", "batch"):
        assert getattr(back, section) == getattr(ours, section), section


def test_a_wrong_key_is_named(tmp_path: Path) -> None:
    done = weftrain("convert", "params-from-recipe", "crystalcoder_7b_phase1")
    params = tmp_path / "params.yaml"
    params.write_text(done.output.replace("filter_size:", "filter_sizes:"))
    done = weftrain("convert", "recipe-from-params", params, "--name", "back")
    assert done.exit_code == 2
    assert "filter_sizes" in done.output
    assert "filter_size'" in done.output


def test_what_the_form_cannot_say_is_refused() -> None:
    done = weftrain("convert", "params-from-recipe", "amber_7b")
    assert done.exit_code == 2
    assert "it needs model.norm: layer_norm" in done.output
    assert len(done.output.strip().splitlines()) == 1
