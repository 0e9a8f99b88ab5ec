"""One decoder: the model families differ by config only, and every op comes through a kernel selection.

What a reader would get wrong: a Decoder's weights are undefined until `initialize` or a checkpoint fills them, and it
sets no precision: it computes in the dtype of its parameters; `residual_dtype` alone may differ. There is no `.item()`,
no condition on a tensor and no recomputation in here, so a backend can trace, compile, checkpoint or stream it segment
by segment.

Letters for shapes: B sequences, T tokens, C hidden size, H heads, H_kv key and value heads, D head dimension,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weftrain.core.blocks import Block, Embedding, Linear, Norm, attention_scale, sums_before_ffn_norm
from weftrain.core.dropout import EMBEDDING_PLACE, at_place, block_place
from weftrain.core.model_config import ModelConfig
from weftrain.core.mup import resolve_scales
from weftrain.core.objective_parts import StateLoss
from weftrain.core.objectives import NEXT_TOKEN, Extras, head_loss, row_log_probabilities
from weftrain.core.objectives_section import Objective
from weftrain.core.parts import parts_of
from weftrain.core.rotary import Rotary, rotary_kind, rotary_kinds, rotary_tables
from weftrain.core.state_losses import StateLosses
from weftrain.kernels import Attribute, Selection, Spec

_TABLES = {"unscaled": ("cos", "sin"), "scaled": ("scaled_cos", "scaled_sin")}  # kind -> buffers of a Decoder


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
        self.loss = head_loss(objective, config)

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
    `place_rotary_tables`. positions: of the global batch, by which the losses of routers are divided (core/experts.py).
    parts: into how many the linear maps of a block are computed (core/parts.py), as `kernel_specs` was told.
    """

    prefix = ""

    def __init__(
        self,
        config: ModelConfig,
        selection: Selection,
        residual_dtype: torch.dtype | None = None,
        objective: Objective = NEXT_TOKEN,
        positions: int = 1,
        parts: int = 1,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config, residual_dtype)
        of_parts = parts_of(parts)
        blocks = [Block(config, selection, layer, positions, of_parts) for layer in range(config.num_layers)]
        self.layers = nn.ModuleList(blocks)
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
        states = StateLosses(self.state_loss, ids, labels, extras)
        x = self._residual_stream(ids, document_start, rotary, dropout_keys, states)
        if states.last is not None:
            return states.alone()
        return states.with_head(self._last_segment[0](x, labels, self.tied_weight(), states.extras))

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

    @property
    def state_loss(self) -> StateLoss | None:
        """The part of the objective that is of states between the blocks."""
        return self._last_segment[0].loss.states

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
        states: StateLosses | None = None,
    ) -> Tensor:
        rotary = self.rotary(ids.shape[1]) if rotary is None else rotary
        states = StateLosses(None, ids, ids, None) if states is None else states
        x = states.of(0, self.embedding(ids, at_place(dropout_keys, EMBEDDING_PLACE)))
        for layer, block in enumerate(self.layers):
            if layer == states.last:
                break
            x = block(x, rotary[layer], document_start, at_place(dropout_keys, block_place(layer)))
            x = states.of(layer + 1, x)
        return x


def kernel_specs(
    config: ModelConfig,
    device: str,
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None = None,
    documents: bool = False,
    objective: Objective = NEXT_TOKEN,
    parts: int = 1,
) -> list[Spec]:
    """Every use of an op by the model, for `select`, in execution order.

    device: torch device type. dtype: of parameters and activations. residual_dtype: as for Decoder. documents: whether
    attention will be given document_start. objective: what it asks of the loss. parts: as for Decoder.
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
        if (experts := config.experts_of(layer)) is not None:
            inner = experts.intermediate_size
            use("grouped_gemm", f"{name}.ffn.experts", inner_size=config.hidden_size, experts=experts.count)
            use("swiglu", f"{name}.ffn.experts", intermediate_size=inner)
            if experts.shared:
                use("swiglu", f"{name}.ffn.shared", intermediate_size=experts.shared * inner)
        elif config.feed_forward == "swiglu":
            use("swiglu", f"{name}.ffn", intermediate_size=config.intermediate_size // parts)
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
