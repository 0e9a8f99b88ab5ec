"""The checkpoint that a start reads: the run's own, or another run's at step 0, whole or its weights alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_cases import save

from weftrain.core.backend import State
from weftrain.core.config import Recipe, StartFrom
from weftrain.core.errors import CheckpointError
from weftrain.core.parameters import parameter_specs
from weftrain.core.run.start_weights import WHOLE_STATE
from weftrain.core.run.starting_checkpoint import other_checkpoint, own_checkpoint

Tiny = Callable[..., Recipe]


def whole_state(recipe: Recipe) -> State:
    names = {f"{plane}/{spec.name}": spec.shape for plane in WHOLE_STATE for spec in parameter_specs(recipe.model)}
    return State(7, 6, {name: torch.zeros(shape) for name, shape in names.items()})


def asking(tiny_recipe: Tiny, state: str, *more: str) -> Recipe:
    return tiny_recipe("crystal", f"start_from={{run: other, state: {state}{''.join(more)}}}")


@pytest.mark.parametrize("state", ["all", "weights"])
def test_another_runs_checkpoint_stands_at_step_0(state: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = asking(tiny_recipe, state)
    saved = save(tmp_path / "other" / "checkpoints", 7, whole_state(recipe), recipe=recipe.model_dump(mode="json"))
    found = other_checkpoint(recipe, tmp_path, print)
    assert (found.state.step, found.root, found.own) == (0, saved.root, False)
    assert found.has_optimizer is (state == "all")
    assert found.check_model(recipe, print) == {}
    weights = found.weights(recipe, {})
    assert (weights is None) is (state == "all")
    if weights is not None:
        assert set(weights) == {spec.name for spec in parameter_specs(recipe.model)}
    own = own_checkpoint(saved.path)
    assert (own.state.step, own.state.optimizer_updates, own.own) == (7, 6, True)


def test_without_a_whole_checkpoint_of_the_other_run_nothing_starts(tiny_recipe: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no whole checkpoint, and start_from needs one: train 'other' first"):
        other_checkpoint(asking(tiny_recipe, "all"), tmp_path, print)


def test_a_step_may_be_named_and_a_folder_of_a_run_or_of_one_checkpoint(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe, run = asking(tiny_recipe, "all"), tmp_path / "away" / "other"
    for step in (7, 9):
        save(run / "checkpoints", step, replace(whole_state(recipe), step=step), recipe=recipe.model_dump(mode="json"))

    def of(**named: object) -> int:
        start = StartFrom.model_validate({"state": "all", **named})
        found = other_checkpoint(recipe.model_copy(update={"start_from": start}), tmp_path / "away", print)
        assert found.state.step == 0
        step: int = found.manifest["step"]
        return step

    assert (of(run="other"), of(run="other", step=7), of(folder=str(run), step=7), of(folder=str(run))) == (9, 7, 7, 9)
    one = str(run / "checkpoints" / "step_00000007")
    assert (of(folder=one), of(folder=one, step=7)) == (7, 7)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 8; there are: 7, 9"):
        of(run="other", step=8)
    with pytest.raises(CheckpointError, match=r"is the checkpoint of step 7, not of 9"):
        of(folder=one, step=9)
    with pytest.raises(ValueError, match="exactly one of 'run', 'folder' and 'huggingface'"):
        StartFrom.model_validate({"state": "all", "run": "a", "folder": "b"})


def test_another_model_is_refused(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = asking(tiny_recipe, "weights")
    save(tmp_path / "other" / "checkpoints", 7, whole_state(recipe), recipe=recipe.model_dump(mode="json"))
    found = other_checkpoint(recipe, tmp_path, print)
    wider = recipe.model_copy(update={"model": recipe.model.model_copy(update={"intermediate_size": 8})})
    with pytest.raises(CheckpointError, match="start_from: step 7 of run 'other': does not fit"):
        found.check_model(wider, print)
