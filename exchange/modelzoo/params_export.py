"""Writes a recipe as a params file of the Cerebras Model Zoo, release 1.9: `export_params` gives its tree, `dump` its
text.
"""

from __future__ import annotations

from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any

import yaml

from weftrain.core.config import Recipe
from weftrain.core.errors import RecipeError
from weftrain.core.mup import resolve_scales
from weftrain.core.order.mixture import source_shares
from weftrain.exchange.modelzoo.params_schema import DTYPE_OF_PRECISION, SAID_FIELDS, TRUNCATED_AT


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


def _check_exportable(recipe: Recipe) -> None:
    model, optimizer = recipe.model, recipe.optimizer
    says_length = recipe.objective.divides_by_positions or recipe.data.sequence_length == model.max_position_embeddings
    needs = {
        "objective.normalizer: all_positions, or data.sequence_length = model.max_position_embeddings": says_length,
        "objective.name: next_token with no other key than normalizer": not recipe.objective.features,
        "model.norm: layer_norm": model.norm == "layer_norm",
        "model.rotary_interleaved: true": model.rotary_interleaved,
        "model.rope_theta: 10000": model.rope_theta == 10000,
        "model.num_kv_heads: 1 or num_heads (its groups take query heads in turn)": model.num_kv_heads
        in (1, model.num_heads),
        "optimizer.eps_placement: before_bias_correction": optimizer.eps_placement == "before_bias_correction",
        "optimizer.decay: matrices_and_embeddings": optimizer.decay == "matrices_and_embeddings",
        "optimizer.non_finite: halt": optimizer.non_finite == "halt",
        "data.sources": bool(recipe.data.sources),
        "no data.document_attention": not recipe.data.document_attention,
        "no data.chunks": recipe.data.chunks is None,
        "no data.skip": not recipe.data.skip,
    }
    unmet = [need for need, met in needs.items() if not met]
    unmet += [f"the default of model.{key}" for key in model.later_fields() if key not in SAID_FIELDS]
    if unmet:
        raise RecipeError(
            f"recipe '{recipe.name}': a params file of Model Zoo 1.9 cannot say this: it needs {'; '.join(unmet)}"
        )


def _model_params(recipe: Recipe) -> dict[str, Any]:
    model, scales, on = recipe.model, resolve_scales(recipe.model), DTYPE_OF_PRECISION[recipe.precision.compute]
    positions = recipe.objective.divides_by_positions

    def initializer(std: float) -> dict[str, Any]:
        cut = {"a": -TRUNCATED_AT * std, "b": TRUNCATED_AT * std} if scales.distribution == "truncated_normal" else {}
        return {"mean": 0.0, "name": scales.distribution, "std": std, **cut}

    shared_heads: dict[str, Any] = {}
    if model.num_kv_heads != model.num_heads:
        shared_heads["attention_module"] = "multiquery_attention"
        shared_heads["extra_attention_params"] = {"num_kv_groups": model.num_kv_heads}
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
        "nonlinearity": model.feed_forward,
        "layer_norm_epsilon": model.norm_eps,
        "use_ffn_bias": model.linear_bias,
        "use_ffn_bias_in_attention": model.linear_bias,
        "use_projection_bias_in_attention": model.qkv_bias,
        "use_bias_in_output": False,
        "attention_type": "scaled_dot_product",
        **shared_heads,
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
    for number, segment in enumerate(recipe.schedule.learning_rate):
        if segment.shape not in names:
            raise RecipeError(
                f"schedule.learning_rate.{number}: the Model Zoo has no schedule of shape {segment.shape}: use "
                f"{', '.join(names)}"
            )
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
