"""What several verbs need before step 0: the data, a recorded recipe and checkpoint, and the peak of MFU."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from weftrain.analysis.machine.peak import measured_peak
from weftrain.cli.resolve import resolve_foreign
from weftrain.core import checkpoint
from weftrain.core.backend import Backend, Run
from weftrain.core.config import Recipe, StartFrom
from weftrain.core.errors import BackendError, CheckpointError
from weftrain.core.evaluators import Evaluator, HeldOutLoss
from weftrain.core.flops import training_flops
from weftrain.core.formats.lazy_tensors import Progress
from weftrain.core.formats.plain_file import real_path
from weftrain.core.order.batch import BatchSource, EvaluationSource
from weftrain.core.recipe_file import RecipeFile
from weftrain.core.run.speed import Peak, Speed, machine_name, recorded_peak
from weftrain.core.run.start_weights import check_fit
from weftrain.core.run.starting_checkpoint import ForeignWeights, OpenedPlace
from weftrain.exchange.release.release import RELEASE


def open_data(recipe: Recipe) -> tuple[BatchSource, Sequence[EvaluationSource]]:
    """The training rows and the held-out sets of a recipe. Raises DataError."""
    from weftrain.core.data import training_source
    from weftrain.core.order.source_sets import open_heldout

    source = training_source(recipe)
    vocab_size, rows = recipe.model.vocab_size, recipe.log.evaluate_rows
    return source, open_heldout(recipe.data, vocab_size, rows, reference=recipe.objective.reference)


def open_evaluators(
    recipe: Recipe,
    backend: Backend,
    heldout: Sequence[EvaluationSource],
    run: Path,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Evaluator]:
    """All that the run in the folder `run` measures between two steps, in that order; its tasks and data are loaded.

    stopped: whether the run is asked to stop. Raises BackendError, DataError.
    """
    evaluators: list[Evaluator] = [HeldOutLoss(heldout)] if heldout else []
    if recipe.log.sample_prompts:
        from weftrain.analysis.evaluation.samples import PromptSampler

        _check_weights(backend, "log.sample_prompts", "to write text with")
        evaluators.append(PromptSampler(recipe))
    for evaluation in recipe.evaluations:
        if evaluation.where == "train":
            from weftrain.analysis.evaluation.scores import DatasetScores, TaskScores

            if evaluation.datasets:
                evaluators.append(DatasetScores(evaluation, recipe, stopped))
            else:
                _check_weights(backend, f"evaluations '{evaluation.name}'", "for tasks")
                evaluators.append(TaskScores(evaluation, recipe, run, stopped))
    if side := [one.name for one in recipe.evaluations if one.where == "side"]:
        from weftrain.analysis.evaluation.scores import SideScores

        evaluators.append(SideScores(run, side))
    return evaluators


def _check_weights(backend: Backend, key: str, purpose: str) -> None:
    if "samples" in backend.unsupported:
        raise BackendError(
            f"{key}: the {backend.name} backend has no trained weights {purpose}: leave the key out, or use another "
            "backend"
        )


def newest_or_named(path: Path, say: Callable[[str], None], progress: Progress = lambda done, total: None) -> Path:
    """The newest whole checkpoint of a run or release, with every byte verified; or `path` if it is a checkpoint's
    folder.

    say: called with a line for each damaged checkpoint that is passed over. Raises CheckpointError if there is none.
    """
    if not (path / "checkpoints").is_dir():
        return path
    newest = checkpoint.newest(path / "checkpoints", lambda line: say(f"warning: {line}"), progress=progress)
    if newest is None:
        raise CheckpointError(f"{path}: no whole checkpoint; train the run further, or name a checkpoint's folder")
    return newest


def recipe_of_checkpoint(
    path: Path,
    manifest: dict[str, Any],
    overrides: Iterable[str] = (),
    backend: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> RecipeFile:
    """The recipe of the checkpoint in `path`, with overrides, to compute with here: see resolve.resolve_foreign.

    A release's data are read from the release unless an override says otherwise. Raises RecipeError, ReleaseError, and
    CheckpointError if an override asks for a model of other shapes.
    """
    tree, release = copy.deepcopy(manifest["recipe"]), real_path(path).parent.parent
    if real_path(path).parent.name == "checkpoints" and (release / RELEASE).exists():
        tree["data"]["root"] = str(release / "data")
    file = resolve_foreign(tree, f"{path}/manifest.json: recipe", overrides, backend, say)
    check_fit(manifest, file.recipe.model, str(path), specs=file.recipe.parameters)
    return file


def run_speed(recipe: Recipe, backend: Backend, run: Run, metrics: Path) -> Speed:
    """What the run's MFU is computed from: FLOPs of a token, and its devices' matrix-multiply peak in the compute
    dtype.

    The peak is read from `metrics`, the run's metrics.jsonl, if that has one for this machine, else measured now. It is
    unknown for a backend that computes nothing here.
    """
    per_token = training_flops(recipe).total
    if not backend.returns_gradients:
        return Speed(per_token, Peak(None, f"the {backend.name} backend does not compute here"))
    fingerprint = run.fingerprint()
    machine = machine_name(fingerprint, recipe.precision.compute)
    device, dtype = torch.device(fingerprint.device_type), getattr(torch, recipe.precision.compute)

    def measure() -> Peak:
        return dataclasses.replace(measured_peak(device, dtype).of(fingerprint.ranks or 1), machine=machine)

    return Speed(per_token, recorded_peak(metrics, machine) or measure(), measure)


def check_stages(file: RecipeFile, backend: Backend, say: Callable[[str], None]) -> None:
    """Refuse now what a later change of the recipe would be refused for. Data that are not there yet may come."""
    from weftrain.cli.resolve import backend_options
    from weftrain.core.data import training_source
    from weftrain.core.errors import DataError
    from weftrain.core.run.prepare import refuse_unsupported

    for step, _, stage in list(file.recipe.stages())[1:]:
        backend_options(dataclasses.replace(file, recipe=stage))
        refuse_unsupported(backend.name, backend.unsupported, stage)
        try:
            training_source(stage)
        except DataError as error:
            say(f"warning: the recipe changes at step {step}, and its data are not there yet: {error}")


def open_place(ending: contextlib.ExitStack, named: StartFrom) -> OpenedPlace:
    """What start_from.folder names: a run, a checkpoint or a release by its path or its address, whose local folder
    stands until `ending` ends.

    Raises ReleaseError, RemoteError.
    """
    from weftrain.exchange.release.ancestry import opened_place
    from weftrain.exchange.remote.opening import opened
    from weftrain.exchange.remote.store import is_address

    place = str(named.folder)
    return opened_place(ending.enter_context(opened(place)) if is_address(place) else Path(place), named)


def open_folder(folder: Path) -> ForeignWeights:
    from weftrain.exchange.huggingface.importing import open_start

    return open_start(folder)
