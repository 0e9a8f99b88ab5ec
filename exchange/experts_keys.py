"""How config.json says a mixture of experts: parts of Mixtral, OLMoE and Qwen 3 MoE, for exchange/families.py."""

from __future__ import annotations

from weftrain.core.errors import RecipeError
from weftrain.core.model_config import ModelConfig
from weftrain.exchange.config_keys import Fields, Part
from weftrain.exchange.known_keys import Keys, short

_COUNTS = ("num_experts", "num_local_experts")  # two names of one number: releases of transformers differ in which


def _part(count_key: str, inner_key: str, *, always_renormalizes: bool = False, dense: bool = False) -> Part:
    """always_renormalizes: without a key that says it. dense: mlp_only_layers names layers without experts."""
    keys_of = [*_COUNTS, inner_key, "num_experts_per_tok", "router_aux_loss_coef"]
    keys_of += [] if always_renormalizes else ["norm_topk_prob"]
    keys_of += ["mlp_only_layers"] if dense else []

    def read(keys: Keys) -> Fields:
        factor = keys.get("router_aux_loss_coef")
        if type(factor) not in (int, float) or not 0 <= factor < 1e30:
            raise RecipeError(f"config.json: router_aux_loss_coef is {short(factor)}, not a number of 0 or more")
        experts = {
            "count": _count(keys, count_key),
            "top_k": keys.count("num_experts_per_tok"),
            "intermediate_size": keys.count(inner_key),
            "renormalize": always_renormalizes or keys.flag("norm_topk_prob"),
            "aux_loss": float(factor),
            "dense_layers": _dense_layers(keys) if dense else 0,
        }
        return {"experts": experts}

    def write(config: ModelConfig) -> Fields:
        experts = config.experts
        if experts is None:
            return {}  # what is read back then has experts, and so differs
        found: Fields = {
            count_key: experts.count,
            "num_experts_per_tok": experts.top_k,
            "router_aux_loss_coef": experts.aux_loss,
        }
        if inner_key != "intermediate_size":  # else the model's own, from which experts of another size differ
            found[inner_key] = experts.intermediate_size
        if not always_renormalizes:
            found["norm_topk_prob"] = experts.renormalize
        if dense:
            found["mlp_only_layers"] = list(range(experts.dense_layers))
        return found

    return Part(tuple(keys_of), read, write)


def _count(keys: Keys, written: str) -> int:
    """Raises RecipeError where the two names differ."""
    given = {keys.count(key) for key in _COUNTS if keys.given.get(key) is not None}
    if len(given) > 1:
        raise RecipeError(
            f"config.json: num_experts is {keys.count('num_experts')} and num_local_experts "
            f"{keys.count('num_local_experts')}: one number has both names"
        )
    return given.pop() if given else keys.count(next((key for key in _COUNTS if keys.optional(key)), written))


def _dense_layers(keys: Keys) -> int:
    listed = keys.get("mlp_only_layers") or []
    if not isinstance(listed, list) or listed != list(range(len(listed))):
        raise RecipeError(
            f"config.json: mlp_only_layers is {short(listed)}; this decoder has its layers without experts first: [0, "
            "1, ..]"
        )
    return len(listed)


MIXTRAL_EXPERTS = _part("num_local_experts", "intermediate_size", always_renormalizes=True)
OLMOE_EXPERTS = _part("num_experts", "intermediate_size")
QWEN3_EXPERTS = _part("num_experts", "moe_intermediate_size", dense=True)
