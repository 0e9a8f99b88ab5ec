"""The model section of a params file as a ModelConfig, with muP derived back from the numbers that it left.

The file holds results: standard deviations, the logits scale and the learning-rate multiplier, as muP computes them
from a proxy's width. A recipe holds the proxy. So the proxy is derived from the multiplier and must reproduce every
number of the file to rounding. Where it does not, the numbers themselves go into the recipe, unless the multiplier is
not 1: a recipe can express that through muP only.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from weftrain.core.errors import RecipeError
from weftrain.core.formats.strict_yaml import Location, validate
from weftrain.core.model_config import Initialization, ModelConfig
from weftrain.core.mup import resolve_scales
from weftrain.exchange.modelzoo.params_schema import (
    FEED_FORWARD,
    TRUNCATED_AT,
    Initializer,
    ModelSection,
    ParamsFile,
)

# Largest relative difference between a number of the file and the one that muP derives; both are rounded.
RELATIVE_ERROR = 1e-12


def import_model(params: ParamsFile, at: Any) -> ModelConfig:
    given = params.model
    if given.use_ffn_bias != given.use_ffn_bias_in_attention:
        where = at(("model", "use_ffn_bias"))
        raise RecipeError(
            f"{where}: model.use_ffn_bias and use_ffn_bias_in_attention differ; this decoder has biases on o and the "
            "feed-forward, or on neither"
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
        "num_kv_heads": _kv_heads(given, at),
        "qkv_bias": given.use_projection_bias_in_attention,
        "feed_forward": _feed_forward(given, at),
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


def _feed_forward(given: ModelSection, at: Any) -> str:
    feed_forward = FEED_FORWARD.get(given.nonlinearity.lower())
    if feed_forward is None:
        raise RecipeError(
            f"{at(('model', 'nonlinearity'))}: model.nonlinearity is {given.nonlinearity!r}; this decoder has "
            f"{' and '.join(FEED_FORWARD)} feed-forward layers"
        )
    return feed_forward


def _kv_heads(given: ModelSection, at: Any) -> int:
    """The key and value heads. Of several, fewer than the query heads, query head h reads number h mod groups there."""
    module, extra = given.attention_module.lower(), given.extra_attention_params
    if module not in ("aiayn_attention", "multiquery_attention"):
        raise RecipeError(
            f"{at(('model', 'attention_module'))}: model.attention_module is {given.attention_module!r}; "
            "aiayn_attention and multiquery_attention are known here"
        )
    if module == "aiayn_attention":
        if extra is not None:
            raise RecipeError(
                f"{at(('model', 'extra_attention_params'))}: model.extra_attention_params are of multiquery_attention, "
                "and attention_module is aiayn_attention: remove them"
            )
        return given.num_heads
    groups = 1 if extra is None else extra.num_kv_groups
    if groups not in (1, given.num_heads):
        where = at(("model", "extra_attention_params", "num_kv_groups"))
        raise RecipeError(
            f"{where}: model.extra_attention_params.num_kv_groups is {groups}: there query head h reads group h mod "
            f"{groups}, here neighbouring query heads share one: only 1 and num_heads can be imported"
        )
    return groups


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
    if not (0.5 <= width <= given.hidden_size**2) or not math.isclose(round(width), width, rel_tol=RELATIVE_ERROR):
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
        if not math.isclose(ours, theirs, rel_tol=RELATIVE_ERROR):
            return f"{key} would be {ours:.8g}, not {theirs:.8g}"
    return None
