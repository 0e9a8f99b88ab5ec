"""The segments of a decoder before its head: embedding and blocks, and the modules that a block is made of.

They read a ModelConfig and call every op through a kernel selection; core/model.py puts them together. The letters of
shapes are explained there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weftrain.core.dropout import adapter_dropout, dropout
from weftrain.core.experts import MixtureOfExperts
from weftrain.core.model_config import ModelConfig
from weftrain.core.mup import resolve_scales
from weftrain.core.parts import Parts
from weftrain.core.rotary import Rotary
from weftrain.kernels import Selection


class Linear(nn.Linear):
    """nn.Linear that does not draw weights only to have them overwritten; `initialize` or a checkpoint fills them.

    With an adapter (core/lora.py), lora_a [rank, in] and lora_b [out, rank], it adds lora_scale B A dropout(x).
    """

    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)
        self.lora_scale, self.lora_dropout = 1.0, 0.0

    def reset_parameters(self) -> None:
        """Leave the weights as allocated."""

    def forward(self, input: Tensor, dropout_keys: Tensor | None = None, use: int = 0) -> Tensor:
        """[..., in] -> [..., out] in the weight's dtype. dropout_keys, use: of `adapter_dropout`."""
        found = super().forward(input)
        if self.lora_a is None or self.lora_b is None:
            return found
        read = adapter_dropout(input, dropout_keys, use, self.lora_dropout)
        return found + F.linear(F.linear(read, self.lora_a), self.lora_b) * self.lora_scale


class _NormParameters(nn.Module):
    """What a norm holds; `op` is the op that applies it, by the config's `norm`."""

    op: str

    def __init__(self, config: ModelConfig, selection: Selection, name: str, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if config.norm == "layer_norm" else None
        self.eps, self.offset = config.norm_eps, config.norm_weight_offset
        self.function = selection.function(self.op.format(norm=config.norm), name)

    def affine(self) -> tuple[Tensor, ...]:
        """The weight that is applied, and the bias if there is one."""
        # 1 + weight is taken in fp32: weights near 0 would lose their low bits in a narrower sum
        weight = self.offset + self.weight.float() if self.offset else self.weight
        return (weight,) if self.bias is None else (weight, self.bias)


class Norm(_NormParameters):
    """RMSNorm or LayerNorm over the last dimension: [..., size] -> [..., size] in the dtype of its input."""

    op = "{norm}"

    def forward(self, x: Tensor, affine: tuple[Tensor, ...] | None = None) -> Tensor:
        """affine: in place of `affine()`."""
        return self.function(x, *(self.affine() if affine is None else affine), eps=self.eps)


class SumNorm(_NormParameters):
    """The residual stream plus a branch, and the norm of that sum in `dtype`, in one pass."""

    op = "add_{norm}"

    def forward(self, x: Tensor, branch: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.function(x, branch, *self.affine(), eps=self.eps, dtype=dtype)


class Attention(nn.Module):
    """Causal self-attention, H query heads over H_kv key and value heads: [B, T, C] -> [B, T, C] in the weights' dtype.

    rotary: cos and sin as the op `rope` takes them, or None: no rotary positions. document_start: see Block. attend:
    (q, k, v) -> [B, T, H, D], in place of the attention op, for one who keeps the keys and values of earlier tokens;
    of a model that is not computed in parts. parts: how it is computed in parts (core/parts.py); None: as a whole.
    """

    def __init__(self, config: ModelConfig, selection: Selection, layer: int, parts: Parts | None = None) -> None:
        super().__init__()
        self.parts = parts
        name, hidden = f"layers.{layer}.attention", config.hidden_size
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(hidden, queries, config.qkv_bias)
        self.k_proj = Linear(hidden, keys, config.qkv_bias)
        self.v_proj = Linear(hidden, keys, config.qkv_bias)
        self.q_norm = self.k_norm = None
        self.norm_heads = config.qk_norm == "per_head"
        if config.qk_norm != "none":
            sizes = (config.head_dim, config.head_dim) if self.norm_heads else (queries, keys)
            self.q_norm = Norm(config, selection, f"{name}.q_norm", sizes[0])
            self.k_norm = Norm(config, selection, f"{name}.k_norm", sizes[1])
        self.o_proj = Linear(queries, hidden, config.linear_bias)
        self.head_dim, self.scale = config.head_dim, attention_scale(config)
        self.window = config.kind_of(layer).window
        self.rotary_dim, self.interleaved = config.rotary_dim, config.rotary_interleaved
        self.rope = selection.function("rope", name) if config.kind_of(layer).rotary != "none" else None
        self.attention = selection.function("attention", name)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        document_start: Tensor | None = None,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        x = x.to(self.q_proj.weight.dtype)
        if self.parts is not None:
            assert attend is None, "attend is of a model that is not computed in parts"
            return self._in_parts(self.parts, x, rotary, document_start)
        q = self._heads(_linear(self.q_proj, x, dropout_keys, 0), self.q_norm)  # [B, T, C] -> [B, T, H, D]
        k = self._heads(_linear(self.k_proj, x, dropout_keys, 1), self.k_norm)
        v = self._heads(_linear(self.v_proj, x, dropout_keys, 2), None)
        q, k = self._turned(q, k, rotary)
        mixed = self.attend(q, k, v, document_start) if attend is None else attend(q, k, v)
        return _linear(self.o_proj, mixed.flatten(-2), dropout_keys, 3)  # [B, T, H, D] -> [B, T, C]

    def _in_parts(self, parts: Parts, x: Tensor, rotary: Rotary | None, document_start: Tensor | None) -> Tensor:
        """The same, each part with its own heads, by itself."""
        xs = parts.spread(x)
        queries, keys, values = (parts.columns(xs, one) for one in (self.q_proj, self.k_proj, self.v_proj))
        of_q, of_k = (_affine_of_parts(parts, norm) for norm in (self.q_norm, self.k_norm))
        mixed = []
        for number, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
            q, k = self._heads(q, self.q_norm, of_q[number]), self._heads(k, self.k_norm, of_k[number])
            q, k = self._turned(q, k, rotary)
            mixed.append(self.attend(q, k, self._heads(v, None), document_start).flatten(-2))
        return parts.sum_of_rows(mixed, self.o_proj)

    def _turned(self, q: Tensor, k: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        if self.rope is None or rotary is None:
            return q, k
        turned: tuple[Tensor, Tensor] = self.rope(
            q, k, *rotary, rotary_dim=self.rotary_dim, interleaved=self.interleaved
        )
        return turned

    def attend(self, q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None = None) -> Tensor:
        """The attention op: q [B, T, H, D], k and v [B, T, H_kv, D] -> [B, T, H, D]."""
        return self.attention(q, k, v, scale=self.scale, document_start=document_start, window=self.window)

    def _heads(self, x: Tensor, norm: Norm | None, affine: tuple[Tensor, ...] | None = None) -> Tensor:
        """[B, T, heads x D] -> [B, T, heads, D]. The heads are counted here, since a rank may hold some of them.
        affine: see Norm.
        """
        if norm is not None and not self.norm_heads:
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        return norm(x, affine) if norm is not None and self.norm_heads else x


def _affine_of_parts(parts: Parts, norm: Norm | None) -> list[tuple[Tensor, ...] | None]:
    """For each part here what the norm of its heads applies; their gradients are added over all parts."""
    if norm is None:
        return [None] * parts.here
    return list(zip(*(parts.spread(one) for one in norm.affine()), strict=True))


class FeedForward(nn.Module):
    """[B, T, C] -> [B, T, C] in the weights' dtype: down(silu(gate(x)) * up(x)) (SwiGLU), or down(gelu(up(x))).

    parts: see Attention.
    """

    def __init__(
        self, config: ModelConfig, selection: Selection, name: str, inner: int, parts: Parts | None = None
    ) -> None:
        super().__init__()
        self.parts = parts
        hidden, bias = config.hidden_size, config.linear_bias
        self.gate_proj = self.swiglu = None
        if config.feed_forward == "swiglu":
            self.gate_proj = Linear(hidden, inner, bias)
            self.swiglu = selection.function("swiglu", name)
        self.up_proj = Linear(hidden, inner, bias)
        self.down_proj = Linear(inner, hidden, bias)

    @property
    def dtype(self) -> torch.dtype:
        """Of what it reads and gives."""
        return self.up_proj.weight.dtype

    def forward(self, x: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        x = x.to(self.dtype)
        if self.parts is not None:
            return self._in_parts(self.parts, x)
        if self.gate_proj is None or self.swiglu is None:
            return _linear(self.down_proj, F.gelu(_linear(self.up_proj, x, dropout_keys, 5)), dropout_keys, 6)
        gate = _linear(self.gate_proj, x, dropout_keys, 4)
        return _linear(self.down_proj, self.swiglu(gate, _linear(self.up_proj, x, dropout_keys, 5)), dropout_keys, 6)

    def _in_parts(self, parts: Parts, x: Tensor) -> Tensor:
        xs = parts.spread(x)
        ups = parts.columns(xs, self.up_proj)
        if self.gate_proj is None or self.swiglu is None:
            return parts.sum_of_rows([F.gelu(up) for up in ups], self.down_proj)
        gates = parts.columns(xs, self.gate_proj)
        return parts.sum_of_rows([self.swiglu(*pair) for pair in zip(gates, ups, strict=True)], self.down_proj)


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

    rotary: the layer's entry of `Decoder.rotary`. document_start: int32 [B, T] or None, the first key that each query
    sees. dropout_keys: int64 [B, 2] of `dropout.at_place(keys, block_place(layer))`, or None where nothing is dropped,
    as in evaluation. attend: see Attention. Layers of one kind read nothing else that differs between them, so that one
    compiled graph serves them all. positions, parts: see Decoder.
    """

    def __init__(
        self,
        config: ModelConfig,
        selection: Selection,
        layer: int,
        positions: int = 1,
        parts: Parts | None = None,
    ) -> None:
        super().__init__()
        self.prefix = f"layers.{layer}."
        self.attention_norm = Norm(config, selection, f"{self.prefix}attention_norm", config.hidden_size)
        self.attention = Attention(config, selection, layer, parts)
        self.norm_after, self.parallel = config.norm_placement == "after", config.residual == "parallel"
        norm = SumNorm if sums_before_ffn_norm(config) else Norm
        self.ffn_norm = norm(config, selection, f"{self.prefix}ffn_norm", config.hidden_size)
        self.ffn = _feed_forward(config, selection, layer, positions, parts)
        self.dropout, self.residual_multiplier = config.dropout, config.residual_multiplier

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        document_start: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        read = x if self.norm_after else self.attention_norm(x)
        mixed = self.attention(read, rotary, document_start, attend, dropout_keys)
        mixed = self._branch(mixed, self.attention_norm, dropout_keys, 0)
        if self.parallel:
            read = x if self.norm_after else self.ffn_norm(x)
        elif self.norm_after:
            x = read = x + mixed
        else:
            x, read = self.ffn_norm(x, mixed, self.ffn.dtype)
        fed = self._branch(self.ffn(read, dropout_keys), self.ffn_norm, dropout_keys, 1)
        if self.parallel:
            return (fed.to(x.dtype) + mixed) + x  # GPT-NeoX's order of the two sums
        return x + fed

    def _branch(self, x: Tensor, norm: nn.Module, dropout_keys: Tensor | None, place: int) -> Tensor:
        """What attention or feed-forward adds to the residual stream, of its output [B, T, C]."""
        x = dropout(norm(x) if self.norm_after else x, dropout_keys, place, self.dropout)
        return x if self.residual_multiplier == 1.0 else x * self.residual_multiplier


def _feed_forward(
    config: ModelConfig, selection: Selection, layer: int, positions: int, parts: Parts | None
) -> FeedForward | MixtureOfExperts:
    name, experts = f"layers.{layer}.ffn", config.experts_of(layer)
    if experts is None:
        return FeedForward(config, selection, name, config.intermediate_size, parts)
    shared = None
    if experts.shared:
        shared = FeedForward(config, selection, f"{name}.shared", experts.shared * experts.intermediate_size)
    return MixtureOfExperts(config, selection, layer, shared, positions)


def _linear(module: nn.Module, x: Tensor, dropout_keys: Tensor | None, use: int) -> Tensor:
    """The module of x; what stands in the place of a Linear (float8) has no adapter."""
    found: Tensor = module(x, dropout_keys, use) if isinstance(module, Linear) else module(x)
    return found


def attention_scale(config: ModelConfig) -> float:
    """1/sqrt(D), or muP's 1/D (arXiv 2203.03466, definition 4.1), or the number that a config gives in their place."""
    if config.attention_multiplier is not None:
        return config.attention_multiplier
    return 1 / config.head_dim if config.attention_scale == "inverse_head_dim" else 1 / math.sqrt(config.head_dim)


def sums_before_ffn_norm(config: ModelConfig) -> bool:
    """Whether ffn_norm follows the sum of the residual stream and the attention's branch, and so is a SumNorm."""
    return config.norm_placement == "before" and config.residual == "sequential"
