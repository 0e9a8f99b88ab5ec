"""The decoder's parameters as data: canonical name, shape and role, in execution order, with no tensor and no torch.

What a parameter is (its role) is decided here once, where its name is made. Nothing else looks into names: parameter
groups, initialisation and conversion all read `role`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from weftrain.core.experts_section import ExpertsConfig
from weftrain.core.model_config import ModelConfig


class Role(Enum):
    """What a parameter does; learning-rate group, decay and initialisation follow from it."""

    EMBEDDING = "embedding"  # the token embedding, which is the head too where embeddings are tied
    HEAD = "head"  # an untied head
    NORM_WEIGHT = "norm_weight"
    NORM_BIAS = "norm_bias"
    BIAS = "bias"  # of a linear map
    MATRIX = "matrix"  # q, k, v, gate, up
    OUTPUT_MATRIX = "output_matrix"  # o and down: the two projections back into the residual stream
    ROUTER = "router"  # of a mixture of experts, which computes in fp32
    ROUTER_BIAS = "router_bias"  # of the choice of experts: the loads of a step move it, not the optimizer
    LORA_A = "lora_a"  # of an adapter (core/tuning.py): from the input to its rank
    LORA_B = "lora_b"  # from its rank to the output


# in fp32 whatever the compute dtype is, and never cut
FP32_ROLES = (Role.NORM_WEIGHT, Role.NORM_BIAS, Role.ROUTER, Role.ROUTER_BIAS)
PRODUCTS = (Role.MATRIX, Role.OUTPUT_MATRIX, Role.ROUTER)  # of matrix products with a token
PLANES = ("weights", "exp_avg", "exp_avg_sq")  # of the state of a parameter that AdamW trains
# Muon's momentum is a moving average of gradients, as AdamW's first moment is; it has no second one.
PLANES_OF = {"adamw": PLANES, "muon": PLANES[:2]}


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter. Matrices are [out, in], as torch.nn.Linear stores them, and those of all experts [E, out, in].
    trained: core/tuning.py decides; a frozen one has no gradient and no moments. optimizer: of a trained one
    (core/muon.py).
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    trained: bool = True
    optimizer: Literal["adamw", "muon"] = "adamw"

    @property
    def planes(self) -> tuple[str, ...]:
        """What the state holds of it."""
        return PLANES_OF[self.optimizer] if self.trained else PLANES[:1]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def is_adapter(spec: ParameterSpec) -> bool:
    return spec.role in (Role.LORA_A, Role.LORA_B)


def parameter_specs(config: ModelConfig) -> tuple[ParameterSpec, ...]:
    """Every parameter of the model in execution order, which is also the order of Decoder.named_parameters()."""
    specs = [ParameterSpec("embedding.weight", (config.vocab_size, config.hidden_size), Role.EMBEDDING)]
    for layer in range(config.num_layers):
        specs += _block(config, f"layers.{layer}", config.experts_of(layer))
    specs += _norm(config, "final_norm", config.hidden_size)
    if not config.tie_embeddings:
        specs.append(ParameterSpec("head.weight", (config.vocab_size, config.hidden_size), Role.HEAD))
    return tuple(specs)


def parameter_count(config: ModelConfig) -> int:
    """Amber-7B: 6,738,415,616; CrystalCoder-7B: 6,575,278,720 (a tied matrix counts once)."""
    return sum(spec.size for spec in parameter_specs(config))


def active_size(config: ModelConfig, spec: ParameterSpec) -> int:
    """How many elements of a parameter one token is computed with: of all experts' matrices those of top_k."""
    if len(spec.shape) < 3 or config.experts is None:
        return spec.size
    return spec.size // config.experts.count * config.experts.top_k


def active_parameter_count(config: ModelConfig) -> int:
    """The parameters that a token is computed with. Mixtral-8x7B: 12,879,925,248 of 46,702,792,704."""
    return sum(active_size(config, spec) for spec in parameter_specs(config))


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Model FLOPs of one token's forward and backward pass, as PaLM counts them (arXiv 2204.02311, appendix B):
    6 x (parameters in a token's matrix products) + 12 x num_heads x head_dim x keys, summed over the layers.

    keys: sequence_length, or a layer's window where that is shorter. The head is a matrix product, tied or not; the
    embedding is a lookup. Attention is counted without the saving of causality; heads that share keys and values save
    memory and no FLOPs. Recomputation is not counted.
    """
    products = config.vocab_size * config.hidden_size  # the head
    products += sum(active_size(config, spec) for spec in parameter_specs(config) if spec.role in PRODUCTS)
    windows = [config.kind_of(layer).window for layer in range(config.num_layers)]
    keys = sum(min(window or sequence_length, sequence_length) for window in windows)
    return 6 * products + 12 * config.num_heads * config.head_dim * keys


def _block(config: ModelConfig, name: str, experts: ExpertsConfig | None) -> Iterator[ParameterSpec]:
    """A norm stands before its branch, whichever of the two is computed first."""
    hidden = config.hidden_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qk_norm = {"none": None, "per_head": (config.head_dim,) * 2, "full": (queries, keys)}[config.qk_norm]
    yield from _norm(config, f"{name}.attention_norm", hidden)
    for projection, size in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield from _linear(f"{name}.attention.{projection}", (size, hidden), Role.MATRIX, config.qkv_bias)
    if qk_norm is not None:
        for norm, size in zip(("q_norm", "k_norm"), qk_norm, strict=True):
            yield from _norm(config, f"{name}.attention.{norm}", size)
    yield from _linear(f"{name}.attention.o_proj", (hidden, queries), Role.OUTPUT_MATRIX, config.linear_bias)
    yield from _norm(config, f"{name}.ffn_norm", hidden)
    if experts is None:
        yield from _feed_forward(config, f"{name}.ffn", config.intermediate_size)
    else:
        yield from _experts(config, experts, f"{name}.ffn")


def _feed_forward(config: ModelConfig, name: str, inner: int) -> Iterator[ParameterSpec]:
    hidden = config.hidden_size
    for projection in ("gate_proj", "up_proj") if config.feed_forward == "swiglu" else ("up_proj",):
        yield from _linear(f"{name}.{projection}", (inner, hidden), Role.MATRIX, config.linear_bias)
    yield from _linear(f"{name}.down_proj", (hidden, inner), Role.OUTPUT_MATRIX, config.linear_bias)


def _experts(config: ModelConfig, experts: ExpertsConfig, name: str) -> Iterator[ParameterSpec]:
    """The experts' matrices lie in three tensors [E, out, in]: a state has few names, an expert's part of each is
    contiguous, and any process can hold some of them.
    """
    hidden, inner, count = config.hidden_size, experts.intermediate_size, experts.count
    yield ParameterSpec(f"{name}.router.weight", (count, hidden), Role.ROUTER)
    if experts.bias_update:
        yield ParameterSpec(f"{name}.router.bias", (count,), Role.ROUTER_BIAS, trained=False)
    for projection in ("gate_proj", "up_proj"):
        yield ParameterSpec(f"{name}.experts.{projection}.weight", (count, inner, hidden), Role.MATRIX)
    yield ParameterSpec(f"{name}.experts.down_proj.weight", (count, hidden, inner), Role.OUTPUT_MATRIX)
    if experts.shared:
        yield from _feed_forward(config, f"{name}.shared", experts.shared * inner)


def _norm(config: ModelConfig, name: str, size: int) -> Iterator[ParameterSpec]:
    yield ParameterSpec(f"{name}.weight", (size,), Role.NORM_WEIGHT)
    if config.norm == "layer_norm":
        yield ParameterSpec(f"{name}.bias", (size,), Role.NORM_BIAS)


def _linear(name: str, shape: tuple[int, int], role: Role, bias: bool) -> Iterator[ParameterSpec]:
    yield ParameterSpec(f"{name}.weight", shape, role)
    if bias:
        yield ParameterSpec(f"{name}.bias", shape[:1], Role.BIAS)
