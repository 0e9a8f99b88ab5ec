"""Reads a params file of the Cerebras Model Zoo, release 1.9, into a recipe. CrystalCoder's training was released in
this format.

Every key of a file is translated into the recipe, or checked because this decoder supports one value of it, or only
concerns a run on the vendor's cluster and is then named in `Imported.notes`. Any other key is an error that names its
line. The file knows neither the names of sources, FIM, the micro-batch nor the run it starts from: the caller gives
those, as arguments and `overrides`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from weftrain.core.config import Recipe
from weftrain.core.errors import RecipeError
from weftrain.core.formats.strict_yaml import LineMap, Location, dotted, parse, read_text, validate
from weftrain.core.recipe_file import recorded_recipe
from weftrain.exchange.modelzoo.params_model import RELATIVE_ERROR, import_model
from weftrain.exchange.modelzoo.params_schema import (
    DTYPE_OF_PRECISION,
    SUPPORTED_VALUES,
    UNUSED_KEYS,
    Component,
    InputSection,
    ModelSection,
    OptimizerSection,
    ParamsFile,
    Schedule,
)


@dataclass(frozen=True)
class Imported:
    """tree: the recipe as a file would hold it, defaults left out. notes: a line for each key that it does not hold,
    and each guess.
    """

    recipe: Recipe
    tree: dict[str, Any]
    notes: tuple[str, ...]


def import_params(
    path: Path,
    *,
    name: str,
    description: str | None = None,
    micro_batch_size: int | None = None,
    start_from: str | None = None,
    data_root: str | None = None,
    overrides: Iterable[str] = (),
) -> Imported:
    """A params file as a recipe called `name`.

    micro_batch_size: None: no accumulation, thus train_input.batch_size / runconfig.num_csx, unless the file says one.
    start_from: the run whose newest checkpoint the first step starts from; needed where is_pretrained_checkpoint is
    set, and then its weights alone are taken. data_root: the folder above which every data_dir lies; None: each keeps
    its last component only. overrides: `key.sub=value`, laid over the recipe. Raises RecipeError naming file, line, key
    and remedy.
    """
    tree, at = _load(path)
    params = validate(ParamsFile, tree, at)
    notes, run = _check(tree, params, at), params.runconfig
    recipe: dict[str, Any] = {
        "name": name,
        "description": description if description is not None else f"from {path.name}, a params file of Model Zoo 1.9",
        "seed": _seed(params, at),
        "model": import_model(params, at).model_dump(exclude_none=True),
        "objective": {"normalizer": _normalizer(params.model, at)},
        "optimizer": _optimizer(params.optimizer),
        "schedule": {"steps": run.max_steps, "learning_rate": _segments(params, at, notes)},
        "precision": {"compute": _precision(params.model, at)},
        "data": _data(params, at, data_root, notes),
        "batch": _batch(params, at, micro_batch_size, notes),
        "backend": {"name": "local"},
        "checkpoint": {"every_steps": run.checkpoint_steps},
        "log": {"every_steps": run.log_steps, "evaluate_every_steps": run.eval_steps},
    }
    for key, given in (
        ("is_pretrained_checkpoint", run.is_pretrained_checkpoint),
        ("checkpoint_path", run.checkpoint_path),
    ):
        if given and start_from is None:
            raise RecipeError(
                f"{at(('runconfig', key))}: runconfig.{key} starts from another run: say which (start_from)"
            )
    if start_from is not None:
        recipe["start_from"] = {"run": start_from, "state": "weights" if run.is_pretrained_checkpoint else "all"}
    checked = recorded_recipe(recipe, f"recipe from {path}", overrides).recipe
    return Imported(checked, checked.model_dump(mode="json", exclude_unset=True), tuple(notes))


def _load(path: Path) -> tuple[Any, Any]:
    source = LineMap(str(path))
    tree = parse(read_text(path), source, empty_is_null=True)
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a params file is a mapping of sections; is this the right file?")
    if isinstance(tree.get("optimizer"), dict):
        _as_list(tree["optimizer"], source)
    return tree, source.at


def _as_list(optimizer: dict[str, Any], source: LineMap) -> None:
    """The format also takes one schedule, or one number, for the list of schedules."""
    value = optimizer.get("learning_rate")
    if isinstance(value, dict):
        optimizer["learning_rate"] = [value]
        moved = {key: mark for key, mark in source.marks.items() if key[:2] == ("optimizer", "learning_rate")}
        source.marks |= {(*key[:2], 0, *key[2:]): mark for key, mark in moved.items()}
    elif isinstance(value, int | float) and not isinstance(value, bool):
        optimizer["learning_rate"] = [{"scheduler": "Constant", "learning_rate": value}]


def _check(tree: dict[str, Any], params: ParamsFile, at: Any) -> list[str]:
    """Refuse what this decoder does otherwise; a note for every key that a recipe does not hold."""
    notes = []
    for key, (only, why) in SUPPORTED_VALUES.items():
        section, _, name = key.partition(".")
        if name == "scale_glu_initialization" and params.model.nonlinearity.lower() == "gelu":
            continue  # without a gate it has no effect
        value = getattr(getattr(params, section), name)
        same = value.lower() == only.lower() if isinstance(value, str) and isinstance(only, str) else value == only
        if not same:
            raise RecipeError(
                f"{at((section, name))}: {key} is {value!r}; this decoder {why}: only {only!r} can be imported"
            )
    for section, content in tree.items():
        if section in UNUSED_KEYS:
            notes.append(f"{section}: not in a recipe: {UNUSED_KEYS[section]}")
        for name, value in content.items() if isinstance(content, dict) else ():
            if f"{section}.{name}" in UNUSED_KEYS:
                why = UNUSED_KEYS[f"{section}.{name}"] or "it concerns the vendor's cluster or its programs"
                notes.append(f"{section}.{name} ({value!r}): not in a recipe: {why}")
    inputs: list[tuple[str, InputSection | None]] = [
        ("train_input", params.train_input),
        ("eval_input", params.eval_input),
    ]
    for section, given in inputs:
        if given is not None and given.vocab_size not in (None, params.model.vocab_size):
            where = at((section, "vocab_size"))
            raise RecipeError(
                f"{where}: {section}.vocab_size is {given.vocab_size}, model.vocab_size {params.model.vocab_size}: "
                "they must agree"
            )
    return notes


def _seed(params: ParamsFile, at: Any) -> int:
    weights, run = params.model.weight_initialization_seed, params.runconfig.seed
    if weights is not None and run is not None and weights != run:
        where = at(("model", "weight_initialization_seed"))
        raise RecipeError(
            f"{where}: model.weight_initialization_seed is {weights} and runconfig.seed {run}; a recipe has one seed: "
            "make them equal"
        )
    if weights is None and run is None:
        raise RecipeError(f"{at(('runconfig',))}: missing key 'runconfig.seed' (int); add it")
    return weights if weights is not None else run  # type: ignore[return-value]


def _optimizer(given: OptimizerSection) -> dict[str, Any]:
    return {
        "name": "adamw",
        "beta1": given.beta1,
        "beta2": given.beta2,
        "eps": given.eps,
        "eps_placement": "before_bias_correction",
        "weight_decay": given.weight_decay_rate,
        "decay": "matrices_and_embeddings",
        "clip_norm": given.max_gradient_norm or None,  # 0 is the form's word for none
    }


def _segments(params: ParamsFile, at: Any, notes: list[str]) -> list[dict[str, Any]]:
    total = params.runconfig.max_steps
    result: list[dict[str, Any]] = []
    schedules = params.optimizer.learning_rate
    for index, item in enumerate(schedules):
        where: Location = ("optimizer", "learning_rate", index)
        covered = sum(segment["steps"] for segment in result)
        result.append(_segment(item, where, at, rest=max(total - covered, 1) if index == len(schedules) - 1 else None))
    if not result:
        raise RecipeError(f"{at(('optimizer', 'learning_rate'))}: optimizer.learning_rate is empty: give it a schedule")
    if (rest := total - sum(segment["steps"] for segment in result)) > 0:
        last = result[-1].get("end", result[-1]["start"])
        result.append({"shape": "constant", "steps": rest, "start": last})
        notes.append(
            f"optimizer.learning_rate ends {rest} steps before runconfig.max_steps: the last rate, {last}, holds for "
            "them"
        )
    return result


def _segment(item: Schedule, where: Location, at: Any, rest: int | None) -> dict[str, Any]:
    """One schedule. rest: steps that are left, for the last one, which may leave them out."""
    shapes = {"linear": "linear", "cosinedecay": "cosine", "constant": "constant"}
    key = dotted(where)
    shape = shapes.get(item.scheduler.lower())
    if shape is None:
        raise RecipeError(
            f"{at((*where, 'scheduler'))}: {key}.scheduler is '{item.scheduler}'; Linear, CosineDecay and Constant are "
            "known here"
        )
    lengths = {steps for steps in (item.steps, item.decay_steps) if steps is not None}
    if len(lengths) > 1:
        raise RecipeError(
            f"{at((*where, 'steps'))}: {key}: steps {item.steps} and decay_steps {item.decay_steps} differ: keep one"
        )
    if not lengths and (rest is None or shape != "constant"):
        raise RecipeError(f"{at(where)}: missing key '{key}.steps' (int); add it")
    steps = lengths.pop() if lengths else rest
    start = item.learning_rate if shape == "constant" else item.initial_learning_rate
    if start is None:
        name = "learning_rate" if shape == "constant" else "initial_learning_rate"
        raise RecipeError(f"{at(where)}: missing key '{key}.{name}' (float); add it")
    # the vendor's tools write the first rate under each of them
    for name in ("base_lr", "learning_rate", "initial_learning_rate"):
        if getattr(item, name) not in (None, start):
            raise RecipeError(
                f"{at((*where, name))}: {key}.{name} is {getattr(item, name)}, the schedule starts at {start}: make "
                "them equal"
            )
    if shape == "constant":
        if item.end_learning_rate not in (None, start):
            raise RecipeError(
                f"{at((*where, 'end_learning_rate'))}: {key}.end_learning_rate has no meaning for Constant: remove it"
            )
        return {"shape": shape, "steps": steps, "start": start}
    if item.end_learning_rate is None:
        raise RecipeError(f"{at(where)}: missing key '{key}.end_learning_rate' (float); add it")
    return {"shape": shape, "steps": steps, "start": start, "end": item.end_learning_rate}


def _precision(given: ModelSection, at: Any) -> str:
    for compute, on in DTYPE_OF_PRECISION.items():
        if (given.mixed_precision, given.use_bfloat16) == (on, on):
            return compute
    raise RecipeError(
        f"{at(('model', 'use_bfloat16'))}: model.mixed_precision is {given.mixed_precision} and use_bfloat16 "
        f"{given.use_bfloat16}; "
        "weftrain computes in bfloat16 (both true) or float32 (both false)"
    )


def _normalizer(given: ModelSection, at: Any) -> str:
    scaling = given.loss_scaling.lower()
    if scaling == "batch_size":
        return "all_positions"  # with loss_weight's 1 / length
    if scaling != "num_tokens":
        raise RecipeError(
            f"{at(('model', 'loss_scaling'))}: model.loss_scaling is {given.loss_scaling!r}; it is batch_size or "
            "num_tokens"
        )
    if given.loss_weight != 1:
        raise RecipeError(
            f"{at(('model', 'loss_weight'))}: model.loss_weight is {given.loss_weight}, and loss_scaling num_tokens "
            "takes none: set it "
            "to 1.0, or loss_scaling to batch_size"
        )
    return "bearing_tokens"


def _length(model: ModelSection, at: Any) -> int:
    """The sequences' length, which the form says by the weight of the loss."""
    length = round(min(1 / model.loss_weight, model.max_position_embeddings + 1))
    if (
        not math.isclose(length * model.loss_weight, 1, rel_tol=RELATIVE_ERROR)
        or length > model.max_position_embeddings
    ):
        raise RecipeError(
            f"{at(('model', 'loss_weight'))}: model.loss_weight is {model.loss_weight}; it is 1 / sequence length, at "
            "most "
            f"max_position_embeddings {model.max_position_embeddings}"
        )
    return length


def _data(params: ParamsFile, at: Any, data_root: str | None, notes: list[str]) -> dict[str, Any]:
    given, model = params.train_input, params.model
    if _normalizer(model, at) == "bearing_tokens":
        length = model.max_position_embeddings
        notes.append(
            f"model.loss_scaling is num_tokens, so nothing says the sequences' length: data.sequence_length is {length}"
        )
    else:
        length = _length(model, at)
    if given.mixture is not None and given.data_dir is not None:
        raise RecipeError(f"{at(('train_input', 'mixture'))}: train_input has both mixture and data_dir: keep one")
    if given.mixture is not None:
        components = given.mixture
    else:
        folders = [given.data_dir] if isinstance(given.data_dir, str) else given.data_dir or []
        components = [Component(data_dir=folder, weight=1 / len(folders)) for folder in folders]
        if len(folders) > 1:
            notes.append(
                "train_input.data_dir has several folders: equal weights; give data.sources.N.weight their shares"
            )
    if not components:
        raise RecipeError(
            f"{at(('train_input',))}: missing key 'train_input.mixture' (list); add it, or train_input.data_dir"
        )
    if given.shuffle_seed is None:
        notes.append("train_input.shuffle_seed is not there: data.shuffle_seed is 0")
    sources: list[dict[str, Any]] = []
    total = sum(component.weight for component in components)
    scale = 1.0 if math.isclose(total, 1, abs_tol=1e-9) else total  # theirs are normalised when they are read
    if scale != 1:
        notes.append(f"train_input.mixture: the weights add up to {total:g}; each is divided by it")
    for index, component in enumerate(components):
        path = _relative(component.data_dir, data_root, at(("train_input", "mixture", index, "data_dir")))
        source: dict[str, Any] = {"name": _source_name(path, sources), "path": path, "weight": component.weight / scale}
        if component.data_subset is not None:
            source["subset"] = _subset(component.data_subset, at(("train_input", "mixture", index, "data_subset")))
        if "fim" in component.data_dir.lower():
            notes.append(
                f"data.sources.{index} ({component.data_dir}) seems to hold fill-in-the-middle: the file does not say "
                "its rate; give .fim"
            )
        sources.append(source)
    data: dict[str, Any] = {"sequence_length": length, "shuffle_seed": given.shuffle_seed or 0, "sources": sources}
    if data_root is not None:
        data["root"] = data_root
    return data


def _relative(folder: str, root: str | None, where: str) -> str:
    path = PurePosixPath(folder)
    if not path.name or ".." in path.parts:
        raise RecipeError(f"{where}: data_dir '{folder}' names no folder")
    if root is None:
        return path.name
    if not path.is_relative_to(root) or path == PurePosixPath(root):
        raise RecipeError(f"{where}: data_dir '{folder}' does not lie below data_root '{root}'")
    return str(path.relative_to(root))


def _source_name(path: str, others: list[dict[str, Any]]) -> str:
    """The folder's name; its whole path where another source has that name."""
    taken = {other["name"] for other in others}
    names = [PurePosixPath(path).name, path]
    return next((name for name in names if name not in taken), f"{path}#{len(others)}")


def _subset(text: str, where: str) -> list[float]:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", text)
    if match is None:
        raise RecipeError(f"{where}: data_subset '{text}' is not START-END, e.g. 0.0-0.1")
    return [float(match[1]), float(match[2])]


def _batch(params: ParamsFile, at: Any, micro_batch_size: int | None, notes: list[str]) -> dict[str, Any]:
    total, replicas = params.train_input.batch_size, params.runconfig.num_csx
    if "num_csx" not in params.runconfig.model_fields_set:
        notes.append("runconfig.num_csx is not there: batch.replicas is 1")
    if micro_batch_size is None:
        micro_batch_size = params.train_input.micro_batch_size
    if micro_batch_size is None:
        if total % replicas:
            where = at(("train_input", "batch_size"))
            raise RecipeError(
                f"{where}: train_input.batch_size {total} is not a multiple of runconfig.num_csx {replicas}: give "
                "micro_batch_size"
            )
        micro_batch_size = total // replicas
        notes.append(
            f"the file has no micro-batch: batch.micro_batch_size is {total} / {replicas} = {micro_batch_size}, no "
            "accumulation"
        )
    return {"global_batch_size": total, "micro_batch_size": micro_batch_size, "replicas": replicas}
