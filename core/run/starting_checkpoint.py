"""The checkpoint that a start reads: the run's own newest one, or by `start_from` that of another run or of a release,
at step 0 unless its steps are counted on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.config import Recipe, StartFrom
from weftrain.core.errors import CheckpointError
from weftrain.core.formats.checkpoint_manifest import MANIFEST
from weftrain.core.formats.lazy_tensors import LazyTensors, select
from weftrain.core.model_config import ModelConfig
from weftrain.core.parameters import ParameterSpec, is_adapter
from weftrain.core.run.start_weights import WHOLE_STATE, GrownWeights, check_fit, check_function, grown_rows
from weftrain.core.tuning import TuningConfig


@dataclass(frozen=True)
class StartingCheckpoint:
    """A checkpoint to start from: its state, its root hash and its manifest. own: of the run itself. release: what it
    is of, where that is a release: JSON values of ledger_schema.ParentRelease.
    """

    state: State
    manifest: Mapping[str, Any]
    own: bool
    release: Mapping[str, Any] | None = None

    @property
    def root(self) -> str:
        return str(self.manifest["root"])

    @property
    def has_optimizer(self) -> bool:
        return any(not name.startswith("weights/") for name in self.state.tensors)

    def check_model(self, recipe: Recipe, say: Callable[[str], None]) -> dict[str, tuple[int, int]]:
        """Refuse tensors that are not those of the recipe's model. Rows [first, stop) of each parameter that
        start_from.grow leaves to be drawn.

        Keys of the model without a shape are compared here for another run's checkpoint alone: a resume compares all
        keys of the recipe. Raises CheckpointError.
        """
        planes = WHOLE_STATE if self.has_optimizer else ("weights",)
        if self.own:
            where = f"the run's checkpoint of step {self.state.step}"
            check_fit(self.manifest, recipe.model, where, planes, specs=recipe.parameters)
            return {}
        assert recipe.start_from is not None
        step = "" if recipe.start_from.huggingface is not None else f"step {self.manifest['step']} of "
        where = f"start_from: {step}{recipe.start_from.source}"
        check_fit(self.manifest, recipe.model, where, planes, recipe.start_from.grow, self._specs(recipe))
        _check_scale(self.manifest, recipe, where)
        for line in check_function(self.manifest, recipe.model, where, recipe.start_from.change):
            say(f"{where}: {line}")
        drawn = grown_rows(self.manifest, recipe.model)
        for name, (first, stop) in drawn.items():
            say(f"{where}: rows {first}..{stop - 1} of {name} are drawn from seed {recipe.seed}")
        return drawn

    def _specs(self, recipe: Recipe) -> list[ParameterSpec]:
        """What is taken of another run's state: of weights alone, adapters that it lacks are drawn."""
        if self.has_optimizer:
            return list(recipe.parameters)
        there = self.state.tensors
        return [spec for spec in recipe.parameters if not is_adapter(spec) or f"weights/{spec.name}" in there]

    def weights(self, recipe: Recipe, drawn: Mapping[str, tuple[int, int]]) -> Mapping[str, Tensor] | None:
        """Canonical name -> weight, if weights are all there is to start from; None if the whole state is imported."""
        if self.has_optimizer:
            return None
        weights = checkpoint.Weights(self.state.tensors)
        return GrownWeights(weights, drawn, recipe.model, recipe.seed) if drawn else weights


def _check_scale(manifest: Mapping[str, Any], recipe: Recipe, where: str) -> None:
    """Refuse adapters that were trained with another alpha / rank: they would compute something else."""
    recorded = TuningConfig.model_validate(dict(manifest["recipe"]).get("tuning") or {}).lora
    mine = recipe.tuning.lora
    if recorded is not None and mine is not None and recorded.scale != mine.scale:
        raise CheckpointError(
            f"{where}: its adapters were trained with alpha / rank = {recorded.scale:g}, the recipe's tuning.lora has "
            f"{mine.scale:g}: give it alpha={recorded.alpha:g} and rank={recorded.rank}"
        )


def own_checkpoint(newest: Path) -> StartingCheckpoint:
    """The run's own checkpoint in `newest`, which the caller has just verified. Raises CheckpointError."""
    state, manifest = checkpoint.load(newest, verified=True)
    return StartingCheckpoint(state, manifest, own=True)


@dataclass(frozen=True)
class ForeignWeights:
    """Weights from outside, 'weights/<name>' -> fp32 tensor; the model that they are of; a hash of their files."""

    tensors: LazyTensors
    model: ModelConfig
    sha256: str


OpenFolder = Callable[[Path], ForeignWeights]  # reads the folder of start_from.huggingface


@dataclass(frozen=True)
class OpenedPlace:
    """What start_from.folder names, as a folder of this machine. step: the checkpoint that start_from.step or revision
    names; None: the newest. of_release: says, of a release's folder, which of its revisions a checkpoint's root is.
    Raises ReleaseError where it is none.
    """

    folder: Path
    step: int | None = None
    of_release: Callable[[str], Mapping[str, Any]] | None = None


OpenPlace = Callable[[StartFrom], OpenedPlace]  # start_from.folder may be an address, or a release


def local_place(named: StartFrom) -> OpenedPlace:
    """A folder of this machine that is no release. Raises CheckpointError for a revision."""
    if named.revision is not None:
        raise CheckpointError(f"start_from: {named.source}: no release is read here: name a step")
    return OpenedPlace(Path(str(named.folder)), named.step)


def foreign_start(recipe: Recipe, found: ForeignWeights) -> StartingCheckpoint:
    """Weights from outside as a checkpoint at step 0, whose root hash is that of their files.

    The recipe of its manifest is the one asked for, with the model that the weights are of.
    """
    tensors = {name: {"dtype": "F32", "shape": list(found.tensors.meta(name).shape)} for name in found.tensors}
    told = {**recipe.model_dump(mode="json"), "model": found.model.model_dump(mode="json")}
    manifest = {"root": found.sha256, "step": 0, "tensors": tensors, "recipe": told}
    return StartingCheckpoint(State(0, 0, found.tensors), manifest, own=False)


def _chosen(opened: OpenedPlace, named: StartFrom, report: Callable[[str], None]) -> Path:
    """The checkpoint that start_from names in the folder of a run, or which that folder is; verified."""
    place, step = opened.folder, opened.step
    if (place / MANIFEST).exists() and not (place / "checkpoints").exists():
        manifest = checkpoint.verify(place)
        if step not in (None, manifest["step"]):
            raise CheckpointError(f"{place}: is the checkpoint of step {manifest['step']}, not of {step}")
        return place
    other = place / "checkpoints"
    if step is not None:
        found = checkpoint.step_folders(other) if other.is_dir() else {}
        if step not in found:
            have = ", ".join(map(str, sorted(found))) or "none"
            raise CheckpointError(f"start_from: {other}: no checkpoint of step {step}; there are: {have}")
        checkpoint.verify(found[step])
        return found[step]
    newest = checkpoint.newest(other, report)
    if newest is None:
        trained = "train it" if named.run is None else f"train '{named.run}'"
        raise CheckpointError(
            f"{other}: no whole checkpoint, and start_from needs one: {trained} first, or remove start_from"
        )
    return newest


def other_checkpoint(
    recipe: Recipe,
    runs: Path,
    report: Callable[[str], None],
    open_folder: OpenFolder | None = None,
    open_place: OpenPlace = local_place,
) -> StartingCheckpoint:
    """What the recipe's start_from names, at step 0 unless its steps are counted on: a whole checkpoint, the newest or
    that of a step or revision, of a run below `runs` or in a folder; or a folder of weights.

    report: gets one line for each damaged checkpoint passed over. Raises CheckpointError if there is no whole one,
    ReleaseError for one that is not the release's.
    """
    assert recipe.start_from is not None
    if recipe.start_from.huggingface is not None:
        if open_folder is None:
            raise CheckpointError(f"start_from: {recipe.start_from.source} cannot be read here: convert it to a run")
        return foreign_start(recipe, open_folder(Path(str(recipe.start_from.huggingface))))
    named = recipe.start_from
    opened = OpenedPlace(runs / named.run, named.step) if named.run is not None else open_place(named)
    state, manifest = checkpoint.load(_chosen(opened, named, report), verified=True)
    release = None if opened.of_release is None else opened.of_release(manifest["root"])
    if named.state == "weights":
        names = {name: name for name in state.tensors if name.startswith("weights/")}
        state = State(0, 0, select(state.tensors, names))
    found = StartingCheckpoint(state, manifest, own=False, release=release)
    if named.state == "all" and not found.has_optimizer:
        raise CheckpointError(
            f"start_from: step {manifest['step']} of {named.source}: holds weights and no optimizer state: give state: "
            "weights, which begins at step 0"
        )
    return found if named.steps == "continue" else replace(found, state=replace(state, step=0))
