"""Training recipes from YAML files, from checkpoints and from run folders, with overrides: `load_recipe` and
`recorded_recipe`. How strictly they are read: core/formats/strict_yaml.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftrain.core.config import Recipe, with_earlier_keys
from weftrain.core.errors import RecipeError
from weftrain.core.formats.strict_yaml import (
    LineMap,
    Location,
    builtin_names,
    kind_of,
    override,
    parse_mapping,
    read_builtin,
    read_text,
    validate,
)

# What other trainers call a key -> the key here.
OTHER_NAMES = {
    **dict.fromkeys(("lr", "learning_rate", "max_lr", "warmup_steps", "lr_scheduler"), "schedule.learning_rate"),
    **dict.fromkeys(("max_steps", "train_steps", "train_iters", "num_steps"), "schedule.steps"),
    **dict.fromkeys(("batch_size", "global_bs", "train_batch_size"), "batch.global_batch_size"),
    **dict.fromkeys(("micro_batch", "per_device_train_batch_size", "local_batch_size"), "batch.micro_batch_size"),
    **dict.fromkeys(("n_layers", "n_layer", "num_hidden_layers", "layers"), "model.num_layers"),
    **dict.fromkeys(("dim", "n_embd", "d_model", "embed_dim"), "model.hidden_size"),
    **dict.fromkeys(("n_heads", "n_head", "num_attention_heads"), "model.num_heads"),
    **dict.fromkeys(("ffn_hidden_size", "mlp_hidden_size", "filter_size"), "model.intermediate_size"),
    **dict.fromkeys(("seq_len", "seq_length", "block_size", "max_sequence_length"), "data.sequence_length"),
    **dict.fromkeys(("grad_clip", "clip_grad", "max_grad_norm", "gradient_clip_val"), "optimizer.clip_norm"),
    **dict.fromkeys(("dtype", "mixed_precision", "bf16"), "precision.compute"),
    **dict.fromkeys(("save_every", "save_interval", "save_steps"), "checkpoint.every_steps"),
    **dict.fromkeys(("eval_every", "eval_interval", "eval_steps"), "log.evaluate_every_steps"),
    **dict.fromkeys(("log_every", "log_interval", "logging_steps"), "log.every_steps"),
    **dict.fromkeys(("activation_checkpoint", "gradient_checkpointing"), "backend.options.activation_checkpointing"),
    **{name: f"backend.options.{name}" for name in ("device", "compile", "threads", "tensor_parallel")},
}


@dataclass(frozen=True)
class RecipeFile:
    """A checked recipe, and where each of its keys was given: at(('model', 'num_layers')) -> 'recipes/x.yaml:12'."""

    recipe: Recipe
    at: Callable[[Location], str]


def builtin_recipes() -> list[str]:
    """Names of the recipes that ship with weftrain, sorted."""
    return builtin_names("weftrain.core")


def load_recipe(
    recipe: str, overrides: Iterable[str] = (), backend: str | None = None, kept_options: Collection[str] = ()
) -> RecipeFile:
    """A recipe by built-in name or by the path of a .yaml file, with `key.sub=value` overrides.

    backend: replaces the recipe's own, and with it backend.options except those named in kept_options; overrides give
    the new backend's. Raises RecipeError naming file, line, key and remedy.
    """
    if recipe.endswith((".yaml", ".yml")) or "/" in recipe:
        name, text = str(Path(recipe)), read_text(Path(recipe))
    else:
        name, text = f"recipes/{recipe}.yaml", read_builtin("weftrain.core", recipe)
    lines = LineMap(name)
    return _checked(parse_mapping(text, lines), lines, overrides, backend, kept_options)


def recorded_recipe(
    tree: Any,
    origin: str,
    overrides: Iterable[str] = (),
    backend: str | None = None,
    kept_options: Collection[str] = (),
) -> RecipeFile:
    """The recipe that a checkpoint or run folder records (`origin`, in messages); otherwise as `load_recipe`.

    Raises RecipeError naming the key: what is recorded may be a stranger's, or of a version with other keys.
    """
    if not isinstance(tree, dict):
        raise RecipeError(f"{origin}: a recipe is a mapping of sections, this is {kind_of(tree)}")
    return _checked(copy.deepcopy(with_earlier_keys(tree)), LineMap(origin), overrides, backend, kept_options)


def _checked(
    tree: dict[str, Any],
    lines: LineMap,
    overrides: Iterable[str],
    backend: str | None,
    kept_options: Collection[str],
) -> RecipeFile:
    own = tree.get("backend")
    if backend is not None and not (isinstance(own, dict) and own.get("name") == backend):
        options = own.get("options") if isinstance(own, dict) else None
        kept = {name: options[name] for name in options if name in kept_options} if isinstance(options, dict) else {}
        tree["backend"] = {"name": backend, **({"options": kept} if kept else {})}
    for each in overrides:
        override(tree, each, lines)
    return RecipeFile(validate(Recipe, tree, lines.at, OTHER_NAMES), lines.at)
