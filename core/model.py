"""One decoder: Amber and CrystalCoder differ by config only, and every op comes through a kernel selection.

What a reader would get wrong: a Decoder's weights are undefined until `initialize` or a checkpoint fills them, and it
sets no precision: it computes in the dtype of its parameters; `residual_dtype` alone may differ. There is no `.item()`,
no condition on a tensor and no recomputation in here, so a backend can trace, compile, checkpoint or stream it segment
by segment.

Letters for shapes: B sequences, T tokens, C hidden size, H heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weftrain.core.config import ModelConfig
from weftrain.core.dropout import EMBEDDING_PLACE, at_place, block_place, dropout
from weftrain.core.mup import resolve_scales
from weftrain.core.parameters import ParameterSpec, Role, parameter_specs
from weftrain.kernels import Selection, Spec


class Linear(nn.Linear):
    """nn.Linear that does not draw weights only to have them overwritten; `initialize` or a checkpoint fills them."""

    def reset_parameters(self) -> None:
        """Leave the weights as allocated."""


class Norm(nn.Module):
    """RMSNorm or LayerNorm: [..., C] -> [..., C] in the dtype of its input."""

    def __init__(self, config: ModelConfig, selection: Selection, name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if config.norm == "layer_norm" else None
        self.eps = config.norm_eps
        self.function = selection.function(config.norm, name)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return self.function(x, self.weight, eps=self.eps)
        return self.function(x, self.weight, self.bias, eps=self.eps)


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions: [B, T, C] -> [B, T, C] in the weights' dtype."""

    def __init__(self, config: ModelConfig, selection: Selection, name: str) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.linear_bias
        self.q_proj = Linear(hidden, hidden, bias)
        self.k_proj = Linear(hidden, hidden, bias)
        self.v_proj = Linear(hidden, hidden, bias)
        self.o_proj = Linear(hidden, hidden, bias)
        self.heads = (config.num_heads, config.head_dim)
        self.scale = attention_scale(config)
        self.rotary_dim, self.interleaved = config.rotary_dim, config.rotary_interleaved
        self.rope = selection.function("rope", name)
        self.attention = selection.function("attention", name)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, document_start: Tensor | None = None) -> Tensor:
        x = x.to(self.q_proj.weight.dtype)
        q = self.q_proj(x).unflatten(-1, self.heads)  # [B, T, C] -> [B, T, H, D]
        k = self.k_proj(x).unflatten(-1, self.heads)
        v = self.v_proj(x).unflatten(-1, self.heads)
        q, k = self.rope(q, k, cos, sin, rotary_dim=self.rotary_dim, interleaved=self.interleaved)
        mixed = self.attention(q, k, v, scale=self.scale, document_start=document_start)
        return self.o_proj(mixed.flatten(-2))  # [B, T, H, D] -> [B, T, C]


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), [B, T, C] -> [B, T, C] in the weights' dtype."""

    def __init__(self, config: ModelConfig, selection: Selection, name: str) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.linear_bias
        self.gate_proj = Linear(hidden, inner, bias)
        self.up_proj = Linear(hidden, inner, bias)
        self.down_proj = Linear(inner, hidden, bias)
        self.swiglu = selection.function("swiglu", name)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.gate_proj.weight.dtype)
        return self.down_proj(self.swiglu(self.gate_proj(x), self.up_proj(x)))


class Embedding(nn.Module):
    """First segment: ids int64 [B, T] -> the residual stream [B, T, C], in `residual_dtype` or the weight's dtype."""

    prefix = "embedding."

    def __init__(self, config: ModelConfig, residual_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.scale = resolve_scales(config).embedding_scale
        self.residual_dtype = residual_dtype
        self.dropout = config.dropout

    def forward(self, ids: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        x = F.embedding(ids, self.weight)
        if self.residual_dtype is not None:
            x = x.to(self.residual_dtype)
        x = x if self.scale == 1.0 else x * self.scale
        return dropout(x, dropout_keys, 0, self.dropout)


class Block(nn.Module):
    """Middle segment, one decoder layer: the residual stream [B, T, C] -> [B, T, C] in the same dtype.

    cos, sin: fp32 [T, rotary_dim / 2] of `Decoder.rotary`. document_start: int32 [B, T] or None, the first key that
    each query sees. dropout_keys: int64 [B, 2] of `dropout.at_place(keys, block_place(layer))`, or None where nothing
    is dropped, as in evaluation. Nothing that differs from layer to layer is read in `forward`, so that one compiled
    graph serves all of them.
    """

    def __init__(self, config: ModelConfig, selection: Selection, layer: int) -> None:
        super().__init__()
        self.prefix = f"layers.{layer}."
        self.attention_norm = Norm(config, selection, f"{self.prefix}attention_norm")
        self.attention = Attention(config, selection, f"{self.prefix}attention")
        self.ffn_norm = Norm(config, selection, f"{self.prefix}ffn_norm")
        self.ffn = FeedForward(config, selection, f"{self.prefix}ffn")
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        document_start: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        mixed = self.attention(self.attention_norm(x), cos, sin, document_start)
        x = x + dropout(mixed, dropout_keys, 0, self.dropout)
        fed = self.ffn(self.ffn_norm(x))
        return x + dropout(fed, dropout_keys, 1, self.dropout)


class Head(nn.Module):
    """Last segment: final norm and head. `weight`: the embedding's [V, C] where embeddings are tied, else None."""

    prefix = ""

    def __init__(self, config: ModelConfig, selection: Selection, final_norm: Norm, head: Linear | None) -> None:
        super().__init__()
        self.final_norm = final_norm
        self.head = head
        self.logits_scale = resolve_scales(config).logits_scale
        self.linear_cross_entropy = selection.function("linear_cross_entropy", "head")

    def forward(self, x: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """x [B, T, C], labels int64 [B, T] -> fp32 scalar: the sum of the token losses; a label of -100 bears none."""
        weight = self._weight(weight)
        hidden = self.final_norm(x).to(weight.dtype).flatten(0, -2)  # [B, T, C] -> [B T, C]
        return self.linear_cross_entropy(hidden, weight, labels.flatten(), logits_scale=self.logits_scale)

    def logits(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """x [..., C] -> [..., V] in the weight's dtype."""
        weight = self._weight(weight)
        logits = F.linear(self.final_norm(x).to(weight.dtype), weight)
        return logits if self.logits_scale == 1.0 else logits * self.logits_scale

    def _weight(self, weight: Tensor | None) -> Tensor:
        if self.head is not None and weight is None:
            return self.head.weight
        if self.head is None and weight is not None:
            return weight
        raise ValueError("head: pass the embedding's weight where embeddings are tied, and only there")


class Decoder(nn.Module):
    """The whole model. Parameter names are the canonical ones of core/parameters.py, in the same order.

    selection: of `kernel_specs(config, ...)`. residual_dtype: dtype of the residual stream, and so of the norms'
    inputs; None: that of the embedding weight. With bf16 parameters and residual_dtype=torch.float32 the numerics are
    those of autocast. Built under `torch.device("meta")` it allocates nothing; after `to_empty` call
    `reset_rotary_tables`.
    """

    prefix = ""
    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, selection: Selection, residual_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config, residual_dtype)
        self.layers = nn.ModuleList(Block(config, selection, layer) for layer in range(config.num_layers))
        self.final_norm = Norm(config, selection, "final_norm")
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        # A module in a tuple is not registered: the head segment joins the two modules above, under their own names.
        self._last_segment = (Head(config, selection, self.final_norm, self.head),)
        for name, table in zip(("cos", "sin"), rotary_tables(config), strict=True):
            self.register_buffer(name, table.to(self.embedding.weight.device), persistent=False)

    def forward(
        self,
        ids: Tensor,
        labels: Tensor,
        document_start: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """ids, labels int64 [B, T], document_start int32 [B, T] or None -> fp32 scalar, the sum of the token losses.

        A label of -100 bears none. rotary: cos and sin of the positions, where ids are not a row's first T tokens but a
        part of it. dropout_keys: int64 [B] of `dropout.row_keys`, or None.
        """
        x = self._residual_stream(ids, document_start, rotary, dropout_keys)
        return self._last_segment[0](x, labels, self.tied_weight())

    def logits(self, ids: Tensor, document_start: Tensor | None = None) -> Tensor:
        """ids int64 [B, T], document_start int32 [B, T] or None -> [B, T, V] in the weights' dtype."""
        return self._last_segment[0].logits(self._residual_stream(ids, document_start), self.tied_weight())

    def segments(self) -> tuple[nn.Module, ...]:
        """Embedding, Blocks, Head: `forward` is exactly their composition.

        Each has a `prefix` such that prefix + its own parameter name is the canonical name. A tied weight belongs to
        the Embedding and is handed to the Head at each call (`tied_weight`).
        """
        return (self.embedding, *self.layers, *self._last_segment)

    def rotary(self, tokens: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the first `tokens` positions, fp32 [T, rotary_dim / 2], as every Block takes them."""
        return self.cos[:tokens], self.sin[:tokens]

    def tied_weight(self) -> Tensor | None:
        """What the Head is called with: the embedding's weight where embeddings are tied, else None."""
        return self.embedding.weight if self.head is None else None

    def reset_rotary_tables(self) -> None:
        """Fill the rotary tables again, in place: `to_empty` leaves them undefined, as it does the weights."""
        for buffer, table in zip((self.cos, self.sin), rotary_tables(self.config), strict=True):
            buffer.copy_(table)

    def _residual_stream(
        self,
        ids: Tensor,
        document_start: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        cos, sin = self.rotary(ids.shape[1]) if rotary is None else rotary
        x = self.embedding(ids, at_place(dropout_keys, EMBEDDING_PLACE))
        for layer, block in enumerate(self.layers):
            x = block(x, cos, sin, document_start, at_place(dropout_keys, block_place(layer)))
        return x


def attention_scale(config: ModelConfig) -> float:
    """1/sqrt(D), or muP's 1/D (arXiv 2203.03466, definition 4.1)."""
    return 1 / config.head_dim if config.attention_scale == "inverse_head_dim" else 1 / math.sqrt(config.head_dim)


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [max_position_embeddings, rotary_dim / 2], of position x theta^(-2i / rotary_dim).

    The reciprocal is taken last, as Hugging Face's Llama and the Cerebras Model Zoo do: theta^(-x) differs in the last
    bit. Computed on the CPU, so they are the same everywhere; the meta device's `arange` would import torch's compiler.
    """
    exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device="cpu") / config.rotary_dim
    frequency = 1.0 / config.rope_theta**exponent
    angle = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float32, device="cpu"), frequency)
    return angle.cos(), angle.sin()


def kernel_specs(
    config: ModelConfig,
    device: str,
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None = None,
    documents: bool = False,
) -> list[Spec]:
    """Every use of an op by the model, for `select`, in execution order.

    device: torch device type. dtype: of parameters and activations. residual_dtype: as for Decoder. documents: whether
    attention will be given document_start.
    """
    norm = {"hidden_size": config.hidden_size, "eps": config.norm_eps}
    rope = {"head_dim": config.head_dim, "rotary_dim": config.rotary_dim, "interleaved": config.rotary_interleaved}
    attention = {"head_dim": config.head_dim, "scale": attention_scale(config), "document_start": documents}
    swiglu = {"intermediate_size": config.intermediate_size}
    head = {
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "logits_scale": resolve_scales(config).logits_scale,
        "z_loss": 0.0,
    }
    norm_dtype = residual_dtype or dtype
    specs = []
    for layer in range(config.num_layers):
        name = f"layers.{layer}"
        specs += [
            Spec(config.norm, f"{name}.attention_norm", device, norm_dtype, norm),
            Spec("rope", f"{name}.attention", device, dtype, rope),
            Spec("attention", f"{name}.attention", device, dtype, attention),
            Spec(config.norm, f"{name}.ffn_norm", device, norm_dtype, norm),
            Spec("swiglu", f"{name}.ffn", device, dtype, swiglu),
        ]
    specs.append(Spec(config.norm, "final_norm", device, norm_dtype, norm))
    specs.append(Spec("linear_cross_entropy", "head", device, dtype, head))
    return specs


def draw(spec: ParameterSpec, config: ModelConfig, seed: int) -> Tensor:
    """The initial value of one parameter, fp32 on the CPU: a pure function of (spec, config, seed).

    The key of a counter-based generator (Philox) is a hash of seed and name, so a layer can be drawn alone, in any
    order, in any process. Normal by inversion; `truncated_normal` stops at two standard deviations.
    """
    if spec.role is Role.NORM_WEIGHT:
        return torch.ones(spec.shape)
    if spec.role in (Role.NORM_BIAS, Role.BIAS):
        return torch.zeros(spec.shape)
    scales = resolve_scales(config)
    std = {
        Role.EMBEDDING: scales.embedding_std,
        Role.HEAD: scales.head_std,
        Role.MATRIX: scales.matrix_std,
        Role.OUTPUT_MATRIX: scales.output_matrix_std,
    }[spec.role]
    key = hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
    uniform = torch.from_numpy(generator.random(spec.shape, dtype=np.float32))  # multiples of 2^-24 in [0, 1)
    uniform.mul_(2).add_(2**-24 - 1)  # odd multiples of 2^-24, symmetric about 0 and inside (-1, 1): exact
    if scales.distribution == "truncated_normal":
        uniform.mul_(math.erf(math.sqrt(2)))  # the probability of two standard deviations
    return uniform.erfinv_().mul_(std * math.sqrt(2))


@torch.no_grad()
def initialize(module: nn.Module, config: ModelConfig, seed: int) -> None:
    """Draw every parameter of a Decoder, or of one of its segments, in place, into whatever device and dtype it has."""
    specs = {spec.name: spec for spec in parameter_specs(config)}
    for name, parameter in module.named_parameters():
        parameter.copy_(draw(specs[f"{module.prefix}{name}"], config, seed))
