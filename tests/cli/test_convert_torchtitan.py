"""`weftrain convert to-torchtitan`, as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from click.testing import Result

from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.parameters import parameter_count, parameter_specs
from weftrain.core.recipe_file import load_recipe

Weftrain = Callable[..., Result]
SMALL = ["model.num_layers=1", "model.hidden_size=32", "model.num_heads=2", "model.rotary_dim=16"]


def saved(recipe: str, overrides: list[str], run: Path) -> str:
    """A checkpoint of a run at step 3; its root."""
    loaded = load_recipe(recipe, overrides).recipe
    tensors = {f"weights/{spec.name}": torch.ones(spec.shape) for spec in parameter_specs(loaded.model)}
    info = checkpoint.save(
        run / "checkpoints",
        State(3, 3, tensors),
        recipe=loaded.model_dump(mode="json"),
        dataset_id="x",
        fingerprint={},
        tokens=7,
        position=7,
        parent=None,
        kernels={},
    )
    return str(json.loads((info.path / "manifest.json").read_text())["root"])


def test_a_run_as_a_folder_for_torchtitan(weftrain: Weftrain, tmp_path: Path) -> None:
    root = saved("amber_demo", SMALL, tmp_path / "amber")
    done = weftrain("convert", "to-torchtitan", tmp_path / "amber", tmp_path / "titan", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    size = 2 * parameter_count(load_recipe("amber_demo", SMALL).recipe.model)
    assert f"titan: step 3, {size:,} bytes of bfloat16" in done.stdout
    said = json.loads((tmp_path / "titan" / "model.json").read_text())
    assert (said["model"], said["weftrain_checkpoint"], said["weftrain_step"]) == ("llama3", root, 3)


def test_a_crystalcoder_is_refused_in_one_line(weftrain: Weftrain, tmp_path: Path, tiny_overrides: list[str]) -> None:
    saved("crystal_demo", tiny_overrides, tmp_path / "crystal")
    done = weftrain("convert", "to-torchtitan", tmp_path / "crystal", tmp_path / "titan", "--dtype", "float32")
    assert (done.exit_code, "torchtitan's llama3 and qwen3 cannot hold this model" in done.output) == (2, True)
    assert not (tmp_path / "titan").exists()
