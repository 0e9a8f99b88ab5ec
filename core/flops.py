"""Model FLOPs of a training step by token: what forward and backward need, with what is frozen left out.

A product of a matrix [out, in] with a token takes 2 x out x in FLOPs forward, as many again for the gradient of its
input, and as many for that of its weight: to train all takes 6 (PaLM, arXiv 2204.02311, appendix B). A frozen matrix
has no gradient of its own, and one of its input only where something trained lies before it. Recomputation is not
counted, nor is the first pass of objective dpo through the head; both rows of its pairs are tokens of the batch.
"""

from __future__ import annotations

from typing import NamedTuple

from weftrain.core.config import Recipe
from weftrain.core.parameters import ParameterSpec, Role, active_size


class TokenFlops(NamedTuple):
    """FLOPs of a token on average over a row. recomputed: of the forward, that of blocks which have a backward."""

    forward: int = 0
    input_gradients: int = 0
    weight_gradients: int = 0
    recomputed: int = 0

    @property
    def total(self) -> int:
        """Of training: of `recomputed`, nothing."""
        return self.forward + self.input_gradients + self.weight_gradients


def formula(recipe: Recipe) -> str:
    """How `training_flops` counts, in words."""
    moved = (spec for spec in recipe.parameters if spec.role is not Role.ROUTER_BIAS)
    if all(spec.trained for spec in moved) and recipe.tuning.lora is None:
        return "6 x parameters in matrix products + 12 x heads x head dimension x keys, over the layers"
    found = training_flops(recipe)
    gradients = f"{found.input_gradients:,} for gradients of inputs + {found.weight_gradients:,} of trained matrices"
    return f"{found.forward:,} forward + {gradients}"


def training_flops(recipe: Recipe, row_length: int | None = None) -> TokenFlops:
    """The FLOPs of a token of a recipe's step; of one that trains everything `parameters.flops_per_token`. row_length:
    instead of the recipe's; 0 leaves attention's products out.
    """
    model, length = recipe.model, recipe.data.sequence_length if row_length is None else row_length
    specs = {spec.name: spec for spec in recipe.parameters}
    below = specs["embedding.weight"].trained  # whether what the next block reads has a gradient
    parts: list[TokenFlops] = []
    for layer in range(model.num_layers):
        block = {name: spec for name, spec in specs.items() if name.startswith(f"layers.{layer}.")}
        keys = min(model.kind_of(layer).window or length, length)
        found = _block(recipe, block, f"layers.{layer}", 4 * model.num_heads * model.head_dim * keys, below)
        below = below or any(spec.trained for spec in block.values())
        parts.append(found._replace(recomputed=found.forward if below else 0))
    below = below or any(specs[name].trained for name in specs if name.startswith("final_norm"))
    head = specs["embedding.weight" if model.tie_embeddings else "head.weight"]
    parts.append(_product(head, below, head.size))
    return TokenFlops(*map(sum, zip(*parts, strict=True)))


def _block(recipe: Recipe, specs: dict[str, ParameterSpec], name: str, attention: int, below: bool) -> TokenFlops:
    """attention: FLOPs of its two products forward. Backward it has the gradients of values, of probabilities, of
    queries and of keys, each half as many.
    """
    before = recipe.model.norm_placement == "before"

    def trained(*modules: str) -> bool:
        return any(specs[key].trained for key in specs for module in modules if key.startswith(f"{name}.{module}."))

    read = below or (before and trained("attention_norm"))
    queries = read or trained("attention.q_proj", "attention.q_norm")
    keys = read or trained("attention.k_proj", "attention.k_norm")
    values = read or trained("attention.v_proj")
    scores = queries or keys or values
    added = below
    if recipe.model.residual == "sequential":
        added = scores or trained("attention.o_proj", "attention_norm")
    widened = added or (before and trained("ffn_norm"))
    narrowed = widened or trained("ffn.gate_proj", "ffn.up_proj", "ffn.experts.gate_proj", "ffn.experts.up_proj")
    narrowed = narrowed or trained("ffn.shared.gate_proj", "ffn.shared.up_proj")
    has_gradient = {"q_proj": read, "k_proj": read, "v_proj": read, "o_proj": scores}
    has_gradient |= {"gate_proj": widened, "up_proj": widened, "down_proj": narrowed, "router": widened}
    products = sum((values, queries or keys, queries, keys))
    parts = [TokenFlops(attention, attention // 2 * products)]
    for key, spec in specs.items():
        *_, module, kind = key.split(".")
        if len(spec.shape) >= 2:  # B reads what A gives
            read_has = has_gradient[module] or (kind == "lora_b" and trained(_module(key, name)))
            parts.append(_product(spec, read_has, active_size(recipe.model, spec)))
    return TokenFlops(*map(sum, zip(*parts, strict=True)))


def _module(key: str, block: str) -> str:
    return key.removeprefix(f"{block}.").rpartition(".")[0]


def _product(spec: ParameterSpec, input_has_gradient: bool, size: int) -> TokenFlops:
    """size: of the elements that a token is multiplied with."""
    once = 2 * size
    return TokenFlops(once, once if input_has_gradient else 0, once if spec.trained else 0)
