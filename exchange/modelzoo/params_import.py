"""Recipes from and to the params files of the vendor's Model Zoo, release 1.9: the form in which CrystalCoder's
training was released.

Every key of a file is one of three things: translated into the recipe; checked, because this decoder does one value
only; or about a run on the vendor's cluster, in which case `Imported.notes` names it. Anything else is an error, with
its line. Names of the file are dotted here as in messages: `optimizer.adjust_learning_rate.decoder_kernel`.

What a reader would get wrong: the file says results, a recipe says causes. Its standard deviations, logits scale and
learning-rate multiplier are what muP made of a proxy, so the proxy is derived back and must reproduce every number to
rounding; where it does not, they are taken as they stand, unless the multiplier is not 1, which a recipe cannot say
without muP. Decay skips biases and norms always. And the file does not know names of sources, FIM, the micro-batch or
the run it starts from: those are the caller's (`overrides`, arguments).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from weftrain.core.config import Initialization, ModelConfig, Recipe
from weftrain.core.errors import RecipeError
from weftrain.core.formats.strict_model import Count, NonNegative, Positive, PositiveInt, Scalar, StrictModel
from weftrain.core.formats.strict_yaml import LineMap, Location, dotted, parse, read_text, validate
from weftrain.core.mup import resolve_scales
from weftrain.core.order.mixture import source_shares
from weftrain.core.recipe_file import recorded_recipe

DTYPE_OF_PRECISION = {"bfloat16": True, "float32": False}  # model.mixed_precision and model.use_bfloat16 alike
TRUNCATED_AT = 2.0  # standard deviations, of core.config.Initialization's truncated_normal
# between a number of the file and the one that muP derives: both are rounded, neither more than this
_RELATIVE_ERROR = 1e-12
_ONE_LINE = "the vendor's cluster or its programs"


class Initializer(StrictModel):
    name: str
    mean: float
    std: Positive
    a: float | None = None
    b: float | None = None


class ModelSection(StrictModel):
    """`model`: keys without a default must be there."""

    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_heads: PositiveInt
    filter_size: PositiveInt
    max_position_embeddings: PositiveInt
    vocab_size: PositiveInt
    rotary_dim: PositiveInt
    layer_norm_epsilon: Positive
    share_embedding_weights: bool
    use_ffn_bias: bool
    use_ffn_bias_in_attention: bool
    use_projection_bias_in_attention: bool
    embedding_initializer: Initializer
    initializer: Initializer
    output_layer_initializer: Initializer
    embeddings_scale: Positive = 1.0
    output_logits_scale: Positive = 1.0
    scale_qk_dot_by_d: bool = False
    weight_initialization_seed: Count | None = None
    mixed_precision: bool
    use_bfloat16: bool
    loss_scaling: str
    loss_weight: Positive
    position_embedding_type: str
    use_position_embedding: bool = True
    nonlinearity: str
    attention_type: str
    attention_softmax_fp32: bool = True
    attention_dropout_rate: float
    dropout_rate: float
    use_bias_in_output: bool
    boundary_casting: bool = False
    scale_glu_initialization: bool = True
    attention_kernel: str | None = None


class Schedule(StrictModel):
    """An item of `optimizer.learning_rate`."""

    scheduler: str
    initial_learning_rate: NonNegative | None = None
    end_learning_rate: NonNegative | None = None
    learning_rate: NonNegative | None = None
    base_lr: NonNegative | None = None
    steps: PositiveInt | None = None
    decay_steps: PositiveInt | None = None


class AdjustLearningRate(StrictModel):
    decoder_kernel: Positive


class OptimizerSection(StrictModel):
    optimizer_type: str
    beta1: float
    beta2: float
    eps: Positive
    weight_decay_rate: NonNegative
    correct_bias: bool
    learning_rate: list[Schedule]
    max_gradient_norm: NonNegative | None = None
    adjust_learning_rate: AdjustLearningRate | None = None
    amsgrad: bool = False
    loss_scaling_factor: float | str = 1.0
    log_summaries: bool | None = None


class Component(StrictModel):
    """An item of `train_input.mixture`."""

    data_dir: str
    weight: Positive
    data_subset: str | None = None


class InputSection(StrictModel):
    """`train_input` and `eval_input`."""

    batch_size: PositiveInt
    data_processor: str
    data_dir: str | list[str] | None = None
    mixture: list[Component] | None = None
    vocab_size: PositiveInt | None = None
    shuffle: bool = False
    shuffle_seed: Count | None = None
    repeat: bool = True
    micro_batch_size: PositiveInt | None = None
    num_workers: int | None = None
    persistent_workers: bool | None = None
    prefetch_factor: int | None = None
    use_worker_cache: bool | None = None


class RunSection(StrictModel):
    """`runconfig`: first what is translated or checked, then what only a run on the cluster needs."""

    max_steps: PositiveInt
    checkpoint_steps: Count
    eval_steps: Count = 0
    log_steps: PositiveInt
    seed: Count | None = None
    num_csx: PositiveInt = 1
    is_pretrained_checkpoint: bool = False
    checkpoint_path: str | None = None
    mode: str = "train"
    num_epochs: int | None = None
    num_steps: int | None = None
    compile_dir: Scalar | None = None
    compile_only: Scalar | None = None
    credentials_path: Scalar | None = None
    debug_args_path: Scalar | None = None
    disable_version_check: Scalar | None = None
    dist_addr: Scalar | None = None
    dist_backend: Scalar | None = None
    enable_distributed: Scalar | None = None
    experimental_api: Scalar | None = None
    init_method: Scalar | None = None
    job_labels: list[Scalar] | None = None
    job_time_sec: Scalar | None = None
    logging: Scalar | None = None
    mgmt_address: Scalar | None = None
    mgmt_namespace: Scalar | None = None
    model_dir: Scalar | None = None
    mount_dirs: list[Scalar] | None = None
    num_act_servers: Scalar | None = None
    num_wgt_servers: Scalar | None = None
    num_workers_per_csx: Scalar | None = None
    precision_opt_level: Scalar | None = None
    python_paths: list[Scalar] | None = None
    save_initial_checkpoint: Scalar | None = None
    save_losses: Scalar | None = None
    service_dir: Scalar | None = None
    target_device: Scalar | None = None
    use_appliance_data: Scalar | None = None
    use_cs_grad_accum: Scalar | None = None
    validate_only: Scalar | None = None
    wrk_memory_gi: Scalar | None = None


class ClusterSection(StrictModel):
    save_iter_state_path: Scalar | None = None


class ParamsFile(StrictModel):
    model: ModelSection
    optimizer: OptimizerSection
    runconfig: RunSection
    train_input: InputSection
    eval_input: InputSection | None = None
    cerebras: ClusterSection | None = None


# Keys of which this decoder does one value, and what that is. Absent keys have it (or are missing, above).
_ONLY: dict[str, tuple[Any, str]] = {
    "model.position_embedding_type": ("rotary", "rotates, and learns no positions"),
    "model.use_position_embedding": (True, "rotates"),
    "model.nonlinearity": ("swiglu", "has SwiGLU feed-forward layers"),
    "model.attention_type": ("scaled_dot_product", "scales by scale_qk_dot_by_d"),
    "model.attention_softmax_fp32": (True, "takes the softmax in fp32"),
    "model.attention_dropout_rate": (0.0, "has no dropout"),
    "model.dropout_rate": (0.0, "has no dropout"),
    "model.use_bias_in_output": (False, "has no bias on the head"),
    "model.boundary_casting": (False, "casts nothing between layers"),
    "model.scale_glu_initialization": (True, "was only ever compared with files that set it"),
    "optimizer.optimizer_type": ("AdamW", "trains with AdamW"),
    "optimizer.correct_bias": (True, "corrects the bias of both moments"),
    "optimizer.amsgrad": (False, "keeps no maximum of the second moment"),
    "optimizer.loss_scaling_factor": (1.0, "scales no loss: bfloat16 needs none"),
    "train_input.repeat": (True, "repeats each source"),
    "runconfig.mode": ("train", "trains, this is a recipe"),
    "runconfig.num_epochs": (None, "counts steps (max_steps)"),
    "runconfig.num_steps": (None, "counts max_steps"),
}
# Keys that mean something to the vendor's programs, and nothing to a recipe.
_NOTED: dict[str, str] = {
    "model.attention_kernel": "which kernel computes attention is `kernels` in a recipe",
    "optimizer.log_summaries": "what is logged is weftrain's own choice",
    "train_input.data_processor": "weftrain reads its own prepared datasets: see `weftrain prep`",
    "train_input.shuffle": "the order is weftrain's own, from data.shuffle_seed",
    "train_input.num_workers": "",
    "train_input.persistent_workers": "",
    "train_input.prefetch_factor": "",
    "train_input.use_worker_cache": "",
    "eval_input": "held-out sets belong to the prepared datasets; log.evaluate_rows says how much of each is read",
    "cerebras.save_iter_state_path": "",
    "runconfig.checkpoint_path": "start_from names the run",
} | {
    f"runconfig.{name}": ""
    for name in list(RunSection.model_fields)[list(RunSection.model_fields).index("compile_dir") :]
}


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
        "model": _model(params, at).model_dump(exclude_none=True),
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


def export_params(recipe: Recipe) -> dict[str, Any]:
    """The params file that asks for this training. What it has no keys for is left out: names, FIM, kernels, backend,
    evaluate_rows.

    Raises RecipeError for what the form cannot say.
    """
    _check_exportable(recipe)
    run: dict[str, Any] = {
        "max_steps": recipe.schedule.steps,
        "checkpoint_steps": recipe.checkpoint.every_steps,
        "eval_steps": recipe.log.evaluate_every_steps,
        "log_steps": recipe.log.every_steps,
        "seed": recipe.seed,
        "num_csx": recipe.batch.replicas,
        "is_pretrained_checkpoint": recipe.start_from is not None and recipe.start_from.state == "weights",
        "mode": "train",
    }
    return {
        "train_input": _input_params(recipe),
        "model": _model_params(recipe),
        "optimizer": _optimizer_params(recipe),
        "runconfig": run,
    }


def dump(params: dict[str, Any]) -> str:
    """The text of a params file. Its numbers read back as they were, by this program's loader and by YAML 1.1's."""
    return yaml.dump(params, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)


# Import


def _load(path: Path) -> tuple[Any, Any]:
    source = LineMap(str(path))
    tree = parse(read_text(path), source, empty_is_null=True)
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a params file is a mapping of sections; is this the right file?")
    if isinstance(tree.get("optimizer"), dict):
        _as_list(tree["optimizer"], source)
    return tree, source.at


def _as_list(optimizer: dict[str, Any], source: LineMap) -> None:
    """The form also takes one schedule, or one number, for the list of schedules."""
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
    for key, (only, why) in _ONLY.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(params, section), name)
        same = value.lower() == only.lower() if isinstance(value, str) and isinstance(only, str) else value == only
        if not same:
            raise RecipeError(
                f"{at((section, name))}: {key} is {value!r}; this decoder {why}: only {only!r} can be imported"
            )
    for section, content in tree.items():
        if section in _NOTED:
            notes.append(f"{section}: not in a recipe: {_NOTED[section]}")
        for name, value in content.items() if isinstance(content, dict) else ():
            if f"{section}.{name}" in _NOTED:
                why = _NOTED[f"{section}.{name}"] or f"it concerns {_ONE_LINE}"
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


def _model(params: ParamsFile, at: Any) -> ModelConfig:
    given = params.model
    biases = {given.use_ffn_bias, given.use_ffn_bias_in_attention, given.use_projection_bias_in_attention}
    if len(biases) > 1:
        where = at(("model", "use_ffn_bias"))
        raise RecipeError(
            f"{where}: model.use_ffn_bias, use_ffn_bias_in_attention and use_projection_bias_in_attention differ; "
            "this decoder has biases on all linear maps or on none"
        )
    fields: dict[str, Any] = {
        "vocab_size": given.vocab_size,
        "hidden_size": given.hidden_size,
        "num_layers": given.num_hidden_layers,
        "num_heads": given.num_heads,
        "intermediate_size": given.filter_size,
        "max_position_embeddings": given.max_position_embeddings,
        "norm": "layer_norm",
        "norm_eps": given.layer_norm_epsilon,
        "linear_bias": given.use_ffn_bias,
        "rotary_dim": given.rotary_dim,
        "rotary_interleaved": True,
        "rope_theta": 10000.0,
        "attention_scale": "inverse_head_dim" if given.scale_qk_dot_by_d else "inverse_sqrt_head_dim",
        "tie_embeddings": given.share_embedding_weights,
    }

    def nowhere(_: Location) -> str:
        return at(("model",))  # type: ignore[no-any-return]

    initialization = _initialization(given, at)
    plain: dict[str, Any] = {
        "initialization": initialization,
        "embedding_scale": given.embeddings_scale if given.embeddings_scale != 1 else None,
        "logits_scale": given.output_logits_scale if given.output_logits_scale != 1 else None,
    }
    adjust = params.optimizer.adjust_learning_rate
    if adjust is None:
        return validate(ModelConfig, fields | plain, nowhere)
    mup, problem = _mup(given, adjust.decoder_kernel, initialization)
    if mup is not None:
        config = validate(ModelConfig, fields | {"mup": mup}, nowhere)
        difference = _difference(config, given, adjust.decoder_kernel)
        if difference is None:
            return config
        problem = difference
    if adjust.decoder_kernel != 1:
        where = at(("optimizer", "adjust_learning_rate", "decoder_kernel"))
        raise RecipeError(
            f"{where}: optimizer.adjust_learning_rate.decoder_kernel is {adjust.decoder_kernel}, and muP does not "
            f"explain it: {problem}; "
            "a recipe has this multiplier from muP only"
        )
    return validate(ModelConfig, fields | plain, nowhere)


def _initialization(given: ModelSection, at: Any) -> Initialization:
    """The three initializers, which must be of one kind, with mean 0 and cut where ours is."""
    kinds: dict[str, Literal["normal", "truncated_normal"]] = {
        "normal": "normal",
        "truncated_normal": "truncated_normal",
    }
    for key in ("embedding_initializer", "initializer", "output_layer_initializer"):
        one: Initializer = getattr(given, key)
        where = at(("model", key))
        if one.name not in kinds or one.name != given.initializer.name:
            raise RecipeError(
                f"{where}: model.{key}.name is '{one.name}'; a recipe has one of {', '.join(kinds)} for all three"
            )
        if one.mean != 0:
            raise RecipeError(f"{where}: model.{key}.mean is {one.mean}; this decoder starts from mean 0 only")
        cut = TRUNCATED_AT * one.std
        cut_there = (
            one.a is not None
            and one.b is not None
            and math.isclose(-one.a, cut, rel_tol=1e-9)
            and math.isclose(one.b, cut, rel_tol=1e-9)
        )
        if cut_there != (one.name == "truncated_normal") or (one.name == "normal" and (one.a, one.b) != (None, None)):
            raise RecipeError(
                f"{where}: model.{key} is '{one.name}' from a = {one.a} to b = {one.b}; "
                f"truncated_normal is cut at two standard deviations here ({-cut:g} to {cut:g}), normal not at all"
            )
    return Initialization(
        distribution=kinds[given.initializer.name],
        embedding_std=given.embedding_initializer.std,
        matrix_std=given.initializer.std,
        output_matrix_std=given.output_layer_initializer.std,
    )


def _mup(given: ModelSection, multiplier: float, initialization: Initialization) -> tuple[dict[str, Any] | None, str]:
    """The proxy that the multiplier implies (a core.config.Mup, still unchecked), or why there is none."""
    width = given.hidden_size * multiplier
    if not (0.5 <= width <= given.hidden_size**2) or not math.isclose(round(width), width, rel_tol=_RELATIVE_ERROR):
        return None, f"the proxy's width, {given.hidden_size} x {multiplier}, is no whole number"
    return {
        "base_hidden_size": round(width),
        "distribution": initialization.distribution,
        "base_std": initialization.embedding_std,
        "embedding_scale": given.embeddings_scale,
        "base_logits_scale": _shortest(given.output_logits_scale, given.hidden_size / round(width)),
    }, ""


def _shortest(quotient: float, divisor: float) -> float:
    """The number with fewest digits that, divided by `divisor`, gives `quotient` to rounding: what a person wrote
    before the division.
    """
    product = quotient * divisor
    for digits in range(1, 17):
        candidate = float(f"{product:.{digits}g}")
        if math.isclose(candidate / divisor, quotient, rel_tol=4e-16):
            return candidate
    return product


def _difference(config: ModelConfig, given: ModelSection, multiplier: float) -> str | None:
    """The first number of the file that muP does not give, or None."""
    scales = resolve_scales(config)
    for key, ours, theirs in (
        ("optimizer.adjust_learning_rate.decoder_kernel", scales.matrix_learning_rate_multiplier, multiplier),
        ("model.embeddings_scale", scales.embedding_scale, given.embeddings_scale),
        ("model.output_logits_scale", scales.logits_scale, given.output_logits_scale),
        ("model.embedding_initializer.std", scales.embedding_std, given.embedding_initializer.std),
        ("model.initializer.std", scales.matrix_std, given.initializer.std),
        ("model.output_layer_initializer.std", scales.output_matrix_std, given.output_layer_initializer.std),
    ):
        if not math.isclose(ours, theirs, rel_tol=_RELATIVE_ERROR):
            return f"{key} would be {ours:.8g}, not {theirs:.8g}"
    return None


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
        not math.isclose(length * model.loss_weight, 1, rel_tol=_RELATIVE_ERROR)
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


# Export


def _check_exportable(recipe: Recipe) -> None:
    model, optimizer = recipe.model, recipe.optimizer
    says_length = (
        recipe.objective.normalizer == "all_positions" or recipe.data.sequence_length == model.max_position_embeddings
    )
    needs = {
        "objective.normalizer: all_positions, or data.sequence_length = model.max_position_embeddings": says_length,
        "model.norm: layer_norm": model.norm == "layer_norm",
        "model.rotary_interleaved: true": model.rotary_interleaved,
        "model.rope_theta: 10000": model.rope_theta == 10000,
        "optimizer.eps_placement: before_bias_correction": optimizer.eps_placement == "before_bias_correction",
        "optimizer.decay: matrices_and_embeddings": optimizer.decay == "matrices_and_embeddings",
        "optimizer.non_finite: halt": optimizer.non_finite == "halt",
        "data.sources": bool(recipe.data.sources),
        "no data.document_attention": not recipe.data.document_attention,
        "no data.chunks": recipe.data.chunks is None,
        "no data.skip": not recipe.data.skip,
    }
    unmet = [need for need, met in needs.items() if not met]
    if unmet:
        raise RecipeError(
            f"recipe '{recipe.name}': a params file of Model Zoo 1.9 cannot say this: it needs {'; '.join(unmet)}"
        )


def _model_params(recipe: Recipe) -> dict[str, Any]:
    model, scales, on = recipe.model, resolve_scales(recipe.model), DTYPE_OF_PRECISION[recipe.precision.compute]
    positions = recipe.objective.normalizer == "all_positions"

    def initializer(std: float) -> dict[str, Any]:
        cut = {"a": -TRUNCATED_AT * std, "b": TRUNCATED_AT * std} if scales.distribution == "truncated_normal" else {}
        return {"mean": 0.0, "name": scales.distribution, "std": std, **cut}

    return {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_heads": model.num_heads,
        "filter_size": model.intermediate_size,
        "max_position_embeddings": model.max_position_embeddings,
        "vocab_size": model.vocab_size,
        "use_position_embedding": True,
        "position_embedding_type": "rotary",
        "rotary_dim": model.rotary_dim,
        "share_embedding_weights": model.tie_embeddings,
        "nonlinearity": "swiglu",
        "layer_norm_epsilon": model.norm_eps,
        "use_ffn_bias": model.linear_bias,
        "use_ffn_bias_in_attention": model.linear_bias,
        "use_projection_bias_in_attention": model.linear_bias,
        "use_bias_in_output": False,
        "attention_type": "scaled_dot_product",
        "attention_softmax_fp32": True,
        "scale_qk_dot_by_d": model.attention_scale == "inverse_head_dim",
        "attention_dropout_rate": 0.0,
        "dropout_rate": 0.0,
        "embeddings_scale": scales.embedding_scale,
        "output_logits_scale": scales.logits_scale,
        "embedding_initializer": initializer(scales.embedding_std),
        "initializer": initializer(scales.matrix_std),
        "output_layer_initializer": initializer(scales.output_matrix_std),
        "scale_glu_initialization": True,
        "weight_initialization_seed": recipe.seed,
        "mixed_precision": on,
        "use_bfloat16": on,
        "boundary_casting": False,
        "loss_scaling": "batch_size" if positions else "num_tokens",
        "loss_weight": 1 / recipe.data.sequence_length if positions else 1.0,
    }


def _optimizer_params(recipe: Recipe) -> dict[str, Any]:
    given = recipe.optimizer
    names = {"linear": "Linear", "cosine": "CosineDecay", "constant": "Constant"}
    schedules: list[dict[str, Any]] = []
    for segment in recipe.schedule.learning_rate:
        one: dict[str, Any] = {"scheduler": names[segment.shape]}
        if segment.end is None:
            one |= {"learning_rate": segment.start, "steps": segment.steps}
        else:
            one |= {"initial_learning_rate": segment.start, "end_learning_rate": segment.end}
            # the form wants the one for Linear, the other for CosineDecay
            one |= {"steps": segment.steps, "decay_steps": segment.steps}
        schedules.append(one)
    params: dict[str, Any] = {
        "optimizer_type": "AdamW",
        "beta1": given.beta1,
        "beta2": given.beta2,
        "eps": given.eps,
        "correct_bias": True,
        "weight_decay_rate": given.weight_decay,
        "max_gradient_norm": given.clip_norm or 0.0,
        "loss_scaling_factor": 1.0,
        "learning_rate": schedules,
    }
    if recipe.model.mup is not None:
        params["adjust_learning_rate"] = {
            "decoder_kernel": resolve_scales(recipe.model).matrix_learning_rate_multiplier
        }
    return params


def _input_params(recipe: Recipe) -> dict[str, Any]:
    mixture: list[dict[str, Any]] = []
    shares = source_shares(recipe.data.sources)
    weights = [
        float(share / sum(shares)) if recipe.data.sources[0].weight is None else float(share) for share in shares
    ]
    for source, weight in zip(recipe.data.sources, weights, strict=True):
        component: dict[str, Any] = {"data_dir": str(PurePosixPath(recipe.data.root) / source.path), "weight": weight}
        if source.subset != (0.0, 1.0):
            component["data_subset"] = "-".join(_plain(bound) for bound in source.subset)
        mixture.append(component)
    return {
        "data_processor": "GptHDF5MapDataProcessor",
        "batch_size": recipe.batch.global_batch_size,
        "vocab_size": recipe.model.vocab_size,
        "mixture": mixture,
        "repeat": True,
        "shuffle": False,
        "shuffle_seed": recipe.data.shuffle_seed,
    }


def _plain(number: float) -> str:
    """A float without an exponent, whose minus would read as the dash between two numbers: 1e-05 -> '0.00001'."""
    return format(Decimal(repr(number)), "f")


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper with floats that both YAML 1.1 and 1.2 take for floats, and without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    text = repr(float(value))
    if "e" in text and "." not in text:  # 1e-09 is a string to YAML 1.1, which would get a tag to say otherwise
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _float)
