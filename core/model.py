"""One decoder: the model families differ by config only, and every op comes through a kernel selection.

What a reader would get wrong: a Decoder's weights are undefined until `initialize` or a checkpoint fills them, and it
sets no precision: it computes in the dtype of its parameters; `residual_dtype` alone may differ. There is no `.item()`,
no condition on a tensor and no recomputation in here, so a backend can trace, compile, checkpoint or stream it segment
by segment.

Letters for shapes: B sequences, T tokens, C hidden size, H heads, H_kv key and value heads, D head dimension,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weftrain.core.dropout import EMBEDDING_PLACE, adapter_dropout, at_place, block_place, dropout
from weftrain.core.model_config import ModelConfig
from weftrain.core.mup import resolve_scales
from weftrain.core.objectives import NEXT_TOKEN, Extras, head_loss, row_log_probabilities
from weftrain.core.objectives_section import Objective
from weftrain.core.rotary import Rotary, rotary_kind, rotary_kinds, rotary_tables
from weftrain.kernels import Attribute, Selection, Spec

_TABLES = {"unscaled": ("cos", "sin"), "scaled": ("scaled_cos", "scaled_sin")}  # kind -> buffers of a Decoder


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

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.affine(), eps=self.eps)


class SumNorm(_NormParameters):
    """The residual stream plus a branch, and the norm of that sum in `dtype`, in one pass."""

    op = "add_{norm}"

    def forward(self, x: Tensor, branch: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.function(x, branch, *self.affine(), eps=self.eps, dtype=dtype)


class Attention(nn.Module):
    """Causal self-attention, H query heads over H_kv key and value heads: [B, T, C] -> [B, T, C] in the weights' dtype.

    rotary: cos and sin as the op `rope` takes them, or None: no rotary positions. document_start: see Block. attend:
    (q, k, v) -> [B, T, H, D], in place of the attention op, for one who keeps the keys and values of earlier tokens.
    """

    def __init__(self, config: ModelConfig, selection: Selection, layer: int) -> None:
        super().__init__()
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
        q = self._heads(_linear(self.q_proj, x, dropout_keys, 0), self.q_norm)  # [B, T, C] -> [B, T, H, D]
        k = self._heads(_linear(self.k_proj, x, dropout_keys, 1), self.k_norm)
        v = self._heads(_linear(self.v_proj, x, dropout_keys, 2), None)
        if self.rope is not None and rotary is not None:
            q, k = self.rope(q, k, *rotary, rotary_dim=self.rotary_dim, interleaved=self.interleaved)
        mixed = self.attend(q, k, v, document_start) if attend is None else attend(q, k, v)
        return _linear(self.o_proj, mixed.flatten(-2), dropout_keys, 3)  # [B, T, H, D] -> [B, T, C]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None = None) -> Tensor:
        """The attention op: q [B, T, H, D], k and v [B, T, H_kv, D] -> [B, T, H, D]."""
        return self.attention(q, k, v, scale=self.scale, document_start=document_start, window=self.window)

    def _heads(self, x: Tensor, norm: Norm | None) -> Tensor:
        """[B, T, heads x D] -> [B, T, heads, D]. The heads are counted here, since a rank may hold some of them."""
        if norm is not None and not self.norm_heads:
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        return norm(x) if norm is not None and self.norm_heads else x


class FeedForward(nn.Module):
    """[B, T, C] -> [B, T, C] in the weights' dtype: down(silu(gate(x)) * up(x)) (SwiGLU), or down(gelu(up(x)))."""

    def __init__(self, config: ModelConfig, selection: Selection, layer: int) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.linear_bias
        self.gate_proj = self.swiglu = None
        if config.feed_forward == "swiglu":
            self.gate_proj = Linear(hidden, inner, bias)
            self.swiglu = selection.function("swiglu", f"layers.{layer}.ffn")
        self.up_proj = Linear(hidden, inner, bias)
        self.down_proj = Linear(inner, hidden, bias)

    def forward(self, x: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        x = x.to(self.up_proj.weight.dtype)
        if self.gate_proj is None or self.swiglu is None:
            return _linear(self.down_proj, F.gelu(_linear(self.up_proj, x, dropout_keys, 5)), dropout_keys, 6)
        gate = _linear(self.gate_proj, x, dropout_keys, 4)
        return _linear(self.down_proj, self.swiglu(gate, _linear(self.up_proj, x, dropout_keys, 5)), dropout_keys, 6)


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
    compiled graph serves them all.
    """

    def __init__(self, config: ModelConfig, selection: Selection, layer: int) -> None:
        super().__init__()
        self.prefix = f"layers.{layer}."
        self.attention_norm = Norm(config, selection, f"{self.prefix}attention_norm", config.hidden_size)
        self.attention = Attention(config, selection, layer)
        self.norm_after, self.parallel = config.norm_placement == "after", config.residual == "parallel"
        norm = SumNorm if sums_before_ffn_norm(config) else Norm
        self.ffn_norm = norm(config, selection, f"{self.prefix}ffn_norm", config.hidden_size)
        self.ffn = FeedForward(config, selection, layer)
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
            x, read = self.ffn_norm(x, mixed, self.ffn.up_proj.weight.dtype)
        fed = self._branch(self.ffn(read, dropout_keys), self.ffn_norm, dropout_keys, 1)
        if self.parallel:
            return (fed.to(x.dtype) + mixed) + x  # GPT-NeoX's order of the two sums
        return x + fed

    def _branch(self, x: Tensor, norm: nn.Module, dropout_keys: Tensor | None, place: int) -> Tensor:
        """What attention or feed-forward adds to the residual stream, of its output [B, T, C]."""
        x = dropout(norm(x) if self.norm_after else x, dropout_keys, place, self.dropout)
        return x if self.residual_multiplier == 1.0 else x * self.residual_multiplier


class Head(nn.Module):
    """Last segment: final norm, head and objective. `weight`: the embedding's [V, C] where embeddings are tied, else
    None.
    """

    prefix = ""

    def __init__(
        self,
        config: ModelConfig,
        selection: Selection,
        final_norm: Norm,
        head: Linear | None,
        objective: Objective = NEXT_TOKEN,
    ) -> None:
        super().__init__()
        self.final_norm = final_norm
        self.head = head
        self.logits_scale, self.logits_softcap = resolve_scales(config).logits_scale, config.logits_softcap
        self.linear_cross_entropy = selection.function("linear_cross_entropy", "head")
        self.loss = head_loss(objective)

    def forward(self, x: Tensor, labels: Tensor, weight: Tensor | None = None, extras: Extras | None = None) -> Tensor:
        """x [B, T, C], labels int64 [B, T] -> what the objective's HeadLoss returns: of next_token an fp32 scalar, the
        sum of the token losses. A label of -100 bears none.
        """
        weight = self._weight(weight)
        return self.loss(self._token_losses(weight), self.final_norm(x).to(weight.dtype), labels, extras)

    def row_log_probabilities(self, x: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """x [B, T, C], labels int64 [B, T] -> float64 [B]: of each row's bearing tokens, without gradients."""
        weight = self._weight(weight)
        return row_log_probabilities(self._token_losses(weight), self.final_norm(x).to(weight.dtype), labels)

    def _token_losses(self, weight: Tensor) -> _TokenLosses:
        return _TokenLosses(self, weight)

    def logits(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """x [..., C] -> [..., V] in the weight's dtype."""
        weight = self._weight(weight)
        return self.logits_of(self.final_norm(x).to(weight.dtype), weight)

    def logits_of(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden [..., C] after the final norm, weight [V, C] of one dtype -> [..., V]."""
        logits = F.linear(hidden, weight)
        logits = logits if self.logits_scale == 1.0 else logits * self.logits_scale
        cap = self.logits_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _weight(self, weight: Tensor | None) -> Tensor:
        if self.head is not None and weight is None:
            return self.head.weight
        if self.head is None and weight is not None:
            return weight
        raise ValueError("head: pass the embedding's weight where embeddings are tied, and only there")


class _TokenLosses:
    """core/objective_parts.py:TokenLosses of one head and its weight [V, C]."""

    def __init__(self, head: Head, weight: Tensor) -> None:
        self._head, self._weight = head, weight
        self._options = {"logits_scale": head.logits_scale}
        if head.logits_softcap is not None:
            self._options["logits_softcap"] = head.logits_softcap

    @property
    def vocab_size(self) -> int:
        return len(self._weight)

    def __call__(self, hidden: Tensor, labels: Tensor, **terms: Any) -> Tensor:
        return self._head.linear_cross_entropy(hidden, self._weight, labels, **self._options, **terms)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._head.logits_of(hidden, self._weight)


class Decoder(nn.Module):
    """The whole model. Parameter names are the canonical ones of core/parameters.py, in the same order.

    selection: of `kernel_specs(config, ...)`. objective: what `forward` computes. residual_dtype: dtype of the residual
    stream, and so of the norms' inputs; None: that of the embedding weight. With bf16 parameters and
    residual_dtype=torch.float32 the numerics are those of autocast. Built under `torch.device("meta")` it allocates
    nothing; after `to_empty` call
    `place_rotary_tables`.
    """

    prefix = ""

    def __init__(
        self,
        config: ModelConfig,
        selection: Selection,
        residual_dtype: torch.dtype | None = None,
        objective: Objective = NEXT_TOKEN,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config, residual_dtype)
        self.layers = nn.ModuleList(Block(config, selection, layer) for layer in range(config.num_layers))
        self.final_norm = Norm(config, selection, "final_norm", config.hidden_size)
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        # A module in a tuple is not registered: the head segment joins the two modules above, under their own names.
        self._last_segment = (Head(config, selection, self.final_norm, self.head, objective),)
        self.place_rotary_tables(self.embedding.weight.device)

    def forward(
        self,
        ids: Tensor,
        labels: Tensor,
        document_start: Tensor | None = None,
        extras: Extras | None = None,
        rotary: Sequence[Rotary | None] | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """ids, labels int64 [B, T], document_start int32 [B, T] or None -> of next_token an fp32 scalar, the sum of the
        token losses; of an objective with measures a table (core/objective_parts.py:HeadLoss).

        A label of -100 bears none. extras: what the objective is given besides. rotary: of each layer, where ids are
        not a row's first T tokens but a part of it. dropout_keys: int64 [B] of `dropout.row_keys`, or None.
        """
        x = self._residual_stream(ids, document_start, rotary, dropout_keys)
        return self._last_segment[0](x, labels, self.tied_weight(), extras)

    def row_log_probabilities(self, ids: Tensor, labels: Tensor, document_start: Tensor | None = None) -> Tensor:
        """As `forward` is called -> float64 [B]: the log-probability of each row's bearing tokens."""
        x = self._residual_stream(ids, document_start)
        return self._last_segment[0].row_log_probabilities(x, labels, self.tied_weight())

    def logits(self, ids: Tensor, document_start: Tensor | None = None) -> Tensor:
        """ids int64 [B, T], document_start int32 [B, T] or None -> [B, T, V] in the weights' dtype."""
        return self._last_segment[0].logits(self._residual_stream(ids, document_start), self.tied_weight())

    def segments(self) -> tuple[nn.Module, ...]:
        """Embedding, Blocks, Head: `forward` is exactly their composition.

        Each has a `prefix` such that prefix + its own parameter name is the canonical name. A tied weight belongs to
        the Embedding and is handed to the Head at each call (`tied_weight`).
        """
        return (self.embedding, *self.layers, *self._last_segment)

    def rotary(self, positions: int | Tensor) -> list[Rotary | None]:
        """For each layer cos and sin, fp32 [..., rotary_dim / 2], or None where it has no rotary positions.

        positions: a number of tokens, counted from 0, or int64 [...]. Layers of one kind share their tensors.
        """
        at = slice(positions) if isinstance(positions, int) else positions
        found: dict[str, Rotary | None] = {"none": None}
        for kind in rotary_kinds(self.config):
            cos, sin = map(self.get_buffer, _TABLES[kind])
            found[kind] = cos[at], sin[at]
        return [found[rotary_kind(self.config, layer)] for layer in range(self.config.num_layers)]

    def tied_weight(self) -> Tensor | None:
        """What the Head is called with: the embedding's weight where embeddings are tied, else None."""
        return self.embedding.weight if self.head is None else None

    def place_rotary_tables(self, device: torch.device | str) -> None:
        """Compute the rotary tables and put them on a device: needed where the model was built on `meta`."""
        config, device = self.config, torch.device(device)
        if device.type == "meta":
            shape = (config.max_position_embeddings, config.rotary_dim // 2)
            found = {kind: (torch.empty(shape, device=device),) * 2 for kind in rotary_kinds(config)}
        else:
            found = rotary_tables(config)
        for kind, tables in found.items():
            for name, table in zip(_TABLES[kind], tables, strict=True):
                self.register_buffer(name, table.to(device), persistent=False)

    def _residual_stream(
        self,
        ids: Tensor,
        document_start: Tensor | None,
        rotary: Sequence[Rotary | None] | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        rotary = self.rotary(ids.shape[1]) if rotary is None else rotary
        x = self.embedding(ids, at_place(dropout_keys, EMBEDDING_PLACE))
        for layer, block in enumerate(self.layers):
            x = block(x, rotary[layer], document_start, at_place(dropout_keys, block_place(layer)))
        return x


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


def kernel_specs(
    config: ModelConfig,
    device: str,
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None = None,
    documents: bool = False,
    objective: Objective = NEXT_TOKEN,
) -> list[Spec]:
    """Every use of an op by the model, for `select`, in execution order.

    device: torch device type. dtype: of parameters and activations. residual_dtype: as for Decoder. documents: whether
    attention will be given document_start. objective: what it asks of the loss.
    """
    stream = residual_dtype or dtype
    branch = stream if config.norm_placement == "before" else dtype  # what attention_norm and ffn_norm read
    uses: list[Spec] = []

    def norm(name: str, of: torch.dtype, size: int, op: str = config.norm) -> None:
        uses.append(Spec(op, name, device, of, {"hidden_size": size, "eps": config.norm_eps}))

    def use(op: str, name: str, **attributes: Attribute) -> None:
        uses.append(Spec(op, name, device, dtype, attributes))

    for layer in range(config.num_layers):
        name, kind = f"layers.{layer}", config.kind_of(layer)
        norm(f"{name}.attention_norm", branch, config.hidden_size)
        if config.qk_norm != "none":
            for part, heads in (("q_norm", config.num_heads), ("k_norm", config.num_kv_heads)):
                norm(f"{name}.attention.{part}", dtype, config.head_dim * (heads if config.qk_norm == "full" else 1))
        if kind.rotary != "none":
            turned = {"head_dim": config.head_dim, "rotary_dim": config.rotary_dim}
            use("rope", f"{name}.attention", **turned, interleaved=config.rotary_interleaved)
        use(
            "attention",
            f"{name}.attention",
            head_dim=config.head_dim,
            scale=attention_scale(config),
            document_start=documents,
            window=kind.window,
            heads_per_key=config.num_heads // config.num_kv_heads,
        )
        summed = f"add_{config.norm}" if sums_before_ffn_norm(config) else config.norm
        norm(f"{name}.ffn_norm", branch, config.hidden_size, summed)
        if config.feed_forward == "swiglu":
            use("swiglu", f"{name}.ffn", intermediate_size=config.intermediate_size)
    norm("final_norm", stream, config.hidden_size)
    use(
        "linear_cross_entropy",
        "head",
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        logits_scale=resolve_scales(config).logits_scale,
        logits_softcap=config.logits_softcap,
        **{"z_loss": 0.0, **objective.terms},
        **({"token_weights": True} if objective.weighs_tokens else {}),
    )
    return uses
