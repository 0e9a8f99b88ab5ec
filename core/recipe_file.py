"""Training recipes from YAML files, from checkpoints and from run folders, with overrides: `load_recipe` and
`recorded_recipe`. How strictly they are read: core/formats/strict_yaml.py.
"""

from __future__ import annotations

import copy
import functools
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
from weftrain.core.recipe_expansion import expand, one_length

# What other trainers call a key -> the key here.
OTHER_NAMES = {
    name: key
    for key, names in {
        "schedule.learning_rate": "lr learning_rate max_lr min_lr lr_min warmup_steps warmup_ratio lr_scheduler "
        "lr_warmup_steps lr_warmup_iters lr_warmup_samples lr_decay_style lr_decay_iters lr_decay_samples "
        "lr_scheduler_type decay_ratio decay_type",
        "schedule.steps": "max_steps train_steps train_iters num_steps train_samples max_tokens num_train_epochs",
        "batch.global_batch_size": "batch_size global_bs train_batch_size gradient_accumulation_steps",
        "batch.micro_batch_size": "micro_batch per_device_train_batch_size local_batch_size",
        "batch.replicas": "data_parallel_replicate_degree data_parallel_shard_degree num_csx",
        "model.num_layers": "n_layers n_layer num_hidden_layers layers",
        "model.hidden_size": "dim n_embd d_model embed_dim",
        "model.num_heads": "n_heads n_head num_attention_heads",
        "model.intermediate_size": "ffn_hidden_size mlp_hidden_size filter_size n_inner",
        "model.vocab_size": "padded_vocab_size",
        "model.num_kv_heads": "n_kv_heads n_kv_head num_key_value_heads num_query_groups n_query_groups n_local_heads "
        "num_kv_groups group_query_attention multi_query_attention",
        "model.head_dim": "kv_channels head_size d_head",
        "model.qkv_bias": "add_qkv_bias qkv_proj_bias use_projection_bias_in_attention",
        "model.qk_norm": "qk_layernorm use_qk_norm norm_qk attention_layer_norm",
        "model.norm_placement": "norm_after post_norm",
        "model.norm_weight_offset": "apply_layernorm_1p layernorm_zero_centered_gamma zero_centered_gamma",
        "model.residual": "parallel_residual use_parallel_residual gpt_j_residual parallel_attn_mlp_res",
        "model.feed_forward": "swiglu nonlinearity hidden_act activation_type hidden_activation mlp_class_name",
        "model.rotary_scaling": "rope_scaling rope_parameters use_rope_scaling rope_scaling_factor scale_factor "
        "use_scaled_rope rope_adjustments",
        "model.layer_pattern": "sliding_window sliding_window_size window_size window_attn_skip_freq layer_types "
        "sliding_window_pattern no_rope_layers no_rope_layer_interval no_rope_freq nope_layer_interval",
        "model.logits_softcap": "final_logit_softcapping final_logit_softcap",
        "model.max_position_embeddings": "n_positions",
        "model.norm_eps": "layer_norm_epsilon layer_norm_eps rms_norm_eps norm_epsilon",
        "model.rotary_dim": "rotary_percent rotary_percentage",
        "model.rope_theta": "rotary_base rope_base",
        "model.tie_embeddings": "share_embedding_weights tie_word_embeddings untie_embeddings_and_output_weights",
        "model.linear_bias": "disable_bias_linear mlp_bias include_bias",
        "model.dropout": "dropout_rate hidden_dropout",
        "model.initialization": "init_method_std",
        "model.embedding_scale": "embeddings_scale",
        "model.logits_scale": "output_logits_scale",
        "data.sequence_length": "seq_len seq_length block_size max_sequence_length max_seq_length",
        "data.sources": "dataset_path data_path data_dir train_data_path",
        "optimizer.clip_norm": "grad_clip clip_grad max_grad_norm gradient_clip_val max_norm max_gradient_norm",
        "optimizer.weight_decay": "weight_decay_rate",
        "optimizer.beta1": "adam_beta1",
        "optimizer.beta2": "adam_beta2",
        "optimizer.eps": "adam_eps adam_epsilon",
        "precision.compute": "dtype mixed_precision mixed_precision_param bf16 use_bfloat16 fp16_type",
        "kernels.preferences": "use_liger_kernel attention_backend",
        "checkpoint.every_steps": "save_every save_interval save_steps checkpoint_steps",
        "log.evaluate_every_steps": "eval_every eval_interval eval_steps eval_frequency",
        "log.evaluate_rows": "eval_iters",
        "log.every_steps": "log_every log_interval log_freq log_steps logging_steps",
        "log.tensorboard": "enable_tensorboard",
        "log.trackers": "enable_wandb report_to wandb_project use_wandb logger",
        "start_from": "initial_load_path",
        "backend.options.activation_checkpointing": "activation_checkpoint gradient_checkpointing "
        "recompute_granularity",
        "backend.options.device": "device",
        "backend.options.compile": "compile torch_compile",
        "backend.options.threads": "threads",
        "backend.options.tensor_parallel": "tensor_parallel tensor_parallel_degree tensor_model_parallel_size",
        "backend.options.context_parallel": "context_parallel context_parallel_degree context_parallel_size",
        "backend.options.expert_parallel": "expert_parallel expert_parallel_degree expert_model_parallel_size",
        "backend.options.pipeline_parallel": "pipeline_parallel pipeline_parallel_degree pipeline_model_parallel_size",
        "backend.options.pipeline_schedule": "pipeline_parallel_schedule",
        "backend.options.cpu_offload": "cpu_offload enable_cpu_offload",
        "backend.options.reshard_after_forward": "fsdp_reshard_after_forward",
        "backend.options.reduce": "grad_reduce_in_bf16",
        "backend.options.timeout_s": "train_timeout_seconds distributed_timeout_minutes",
        "backend.options.precision_level": "precision_opt_level",
    }.items()
    for name in names.split()
}


@dataclass(frozen=True)
class RecipeFile:
    """A checked recipe, and where each of its keys was given: at(('model', 'num_layers')) -> 'recipes/x.yaml:12'."""

    recipe: Recipe
    at: Callable[[Location], str]


def builtin_recipes() -> list[str]:
    """Names of the recipes that ship with weftrain, sorted."""
    return builtin_names("weftrain.core")


def is_path(recipe: str) -> bool:
    """Whether a recipe's name on the command line is the path of a file, not a built-in recipe's name."""
    return recipe.endswith((".yaml", ".yml")) or "/" in recipe


def load_recipe(
    recipe: str, overrides: Iterable[str] = (), backend: str | None = None, kept_options: Collection[str] = ()
) -> RecipeFile:
    """A recipe by built-in name or by the path of a .yaml file, with `key.sub=value` overrides.

    backend: replaces the recipe's own, and with it backend.options except those named in kept_options; overrides give
    the new backend's. Raises RecipeError naming file, line, key and remedy.
    """
    if is_path(recipe):
        name, text = str(Path(recipe)), read_text(Path(recipe))
    else:
        name, text = f"recipes/{recipe}.yaml", read_builtin("weftrain.core", recipe)
    tree, marks = _parsed(name, text)
    return _checked(copy.deepcopy(tree), LineMap(name, dict(marks)), overrides, backend, kept_options)


@functools.lru_cache(maxsize=64)
def _parsed(name: str, text: str) -> tuple[dict[str, Any], dict[Location, str]]:
    """The tree of a recipe's text, and the line of each value. Kept, since what reads all built-in recipes does so for
    half a second: whoever changes the tree takes a copy.
    """
    lines = LineMap(name)
    return parse_mapping(text, lines), lines.marks


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
    for each in one_length(tree, tuple(overrides)):
        override(tree, each, lines)
    expand(tree, lines.at)
    return RecipeFile(validate(Recipe, tree, lines.at, OTHER_NAMES), lines.at)
