"""Weights and configs between the canonical names of core/parameters.py and three foreign layouts: names in, names out,
bits unchanged.

Layouts: `llama` (Hugging Face LlamaForCausalLM: Amber), `crystalcoder` (Hugging Face CrystalCoder) and `cerebras`
(Model Zoo 1.9). What a reader would get wrong: Hugging Face CrystalCoder's linear maps are Conv1D, stored [in, out],
with q, k and v side by side in one c_attn, and `c_fc` is *up*, `c_fc2` *gate*; Cerebras rotates interleaved pairs only,
so there the rows of a rotate-half model's q and k stand in another order. Tensors stream one at a time: this module
never holds either side whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weftrain.core.config import ModelConfig
from weftrain.core.errors import CheckpointError
from weftrain.core.parameters import ParameterSpec, Role, parameter_specs

Layout = Literal["llama", "crystalcoder", "cerebras"]

# Canonical module -> foreign module, within a layer and outside of one. A layout without an entry has no such module.
_LAYER: dict[str, dict[str, str]] = {
    "llama": {
        "attention_norm": "input_layernorm",
        "attention.q_proj": "self_attn.q_proj",
        "attention.k_proj": "self_attn.k_proj",
        "attention.v_proj": "self_attn.v_proj",
        "attention.o_proj": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn.gate_proj": "mlp.gate_proj",
        "ffn.up_proj": "mlp.up_proj",
        "ffn.down_proj": "mlp.down_proj",
    },
    "crystalcoder": {
        "attention_norm": "ln_1",
        "attention.q_proj": "attn.c_attn",
        "attention.k_proj": "attn.c_attn",
        "attention.v_proj": "attn.c_attn",
        "attention.o_proj": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn.gate_proj": "mlp.c_fc2",
        "ffn.up_proj": "mlp.c_fc",
        "ffn.down_proj": "mlp.c_proj",
    },
    "cerebras": {
        "attention_norm": "norm1",
        "attention.q_proj": "self_attn.proj_q_dense_layer",
        "attention.k_proj": "self_attn.proj_k_dense_layer",
        "attention.v_proj": "self_attn.proj_v_dense_layer",
        "attention.o_proj": "self_attn.proj_output_dense_layer",
        "ffn_norm": "norm3",
        "ffn.gate_proj": "ffn.ffn.0.linear_layer_for_glu",
        "ffn.up_proj": "ffn.ffn.0.linear_layer",
        "ffn.down_proj": "ffn.ffn.1.linear_layer",
    },
}
_OUTSIDE: dict[str, dict[str, str]] = {
    "llama": {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"},
    "crystalcoder": {"embedding": "transformer.wte", "final_norm": "transformer.ln_f", "head": "lm_head"},
    "cerebras": {
        "embedding": "model.embedding_layer.word_embeddings",
        "final_norm": "model.ln_f",
        "head": "model.lm_head",
    },
}
# The Model Zoo registers its last norm in the decoder as well, so its checkpoints hold it twice.
_ALSO = {"cerebras": {"final_norm": "model.transformer_decoder.norm"}}
_LAYER_PREFIX = {
    "llama": "model.layers",
    "crystalcoder": "transformer.h",
    "cerebras": "model.transformer_decoder.layers",
}
# Buffers, not weights: causal masks of CrystalCoder's attention, rotary frequencies of old Llama files.
_IGNORED = {
    "llama": ("self_attn.rotary_emb.inv_freq",),
    "crystalcoder": ("attn.bias", "attn.masked_bias"),
    "cerebras": (),
}


@dataclass(frozen=True)
class Entry:
    """One foreign tensor and the canonical parameters in it: several stand side by side along the output axis."""

    name: str
    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # canonical, [out, in] or [out]
    transposed: bool  # stored [in, out]
    rotated_heads: int  # number of heads whose rows go from rotate-half to interleaved order; 0: rows as they are
    copies: tuple[str, ...]  # other names under which the same tensor may stand

    @property
    def shape(self) -> tuple[int, ...]:
        outputs = (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])
        return outputs[::-1] if self.transposed else outputs


def entries(config: ModelConfig, layout: Layout) -> tuple[Entry, ...]:
    """Every tensor of a foreign file of this model, in execution order. Raises CheckpointError if the layout cannot
    hold the model.
    """
    check_fit(config, layout)
    parts: dict[str, list[ParameterSpec]] = {}
    for spec in parameter_specs(config):
        module, _, part = spec.name.rpartition(".")
        parts.setdefault(f"{_foreign_module(module, layout)}.{part}", []).append(spec)
    also = dict(_ALSO.get(layout, {}))
    if config.tie_embeddings:
        also["embedding"] = _OUTSIDE[layout]["head"]
    result = []
    for name, specs in parts.items():
        module, _, part = specs[0].name.rpartition(".")
        rotates = module.endswith((".attention.q_proj", ".attention.k_proj"))
        result.append(
            Entry(
                name=name,
                parameters=tuple(spec.name for spec in specs),
                shapes=tuple(spec.shape for spec in specs),
                transposed=layout == "crystalcoder" and specs[0].role in (Role.MATRIX, Role.OUTPUT_MATRIX),
                rotated_heads=config.num_heads
                if layout == "cerebras" and rotates and not config.rotary_interleaved
                else 0,
                copies=(f"{also[module]}.{part}",) if module in also else (),
            )
        )
    return tuple(result)


def import_weights(weights: Mapping[str, Tensor], config: ModelConfig, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Foreign tensors -> (canonical name, tensor), each read once, in execution order.

    weights may be lazy. Buffers (`attn.bias`, `attn.masked_bias`, `rotary_emb.inv_freq`) are passed over; copies of one
    tensor under a second name (a tied head) must be equal. Raises CheckpointError at once for names that are unknown or
    missing, and on the way for a shape that differs or a copy that does.
    """
    return (pair for entry in _wanted(weights, config, layout) for pair in import_entry(entry, weights))


def imported(weights: Mapping[str, Tensor], config: ModelConfig, layout: Layout) -> Mapping[str, Tensor]:
    """The same as a mapping canonical name -> tensor, which reads a foreign tensor when one in it is asked for.

    weights may offer meta(name): then every shape is checked now, before anything is read. Raises CheckpointError as
    `import_weights` does.
    """
    return _Imported(weights, _wanted(weights, config, layout))


def is_buffer(name: str) -> bool:
    """Whether a foreign tensor is one that no layout counts as a weight, whatever its dtype."""
    return any(name.endswith(f".{buffer}") for buffers in _IGNORED.values() for buffer in buffers)


def export_weights(weights: Mapping[str, Tensor], config: ModelConfig, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Canonical tensors -> (foreign name, tensor), in execution order; only the Cerebras layout repeats a tensor under
    its second name.

    weights may be lazy. Raises CheckpointError as `import_weights` does.
    """
    wanted = entries(config, layout)
    _check_names(set(weights), {name for entry in wanted for name in entry.parameters}, "canonical weights")
    return (pair for entry in wanted for pair in _export(entry, weights, repeat=layout == "cerebras"))


class _Imported(Mapping[str, Tensor]):
    def __init__(self, weights: Mapping[str, Tensor], wanted: tuple[Entry, ...]) -> None:
        self._weights = weights
        self._places = {name: (entry, index) for entry in wanted for index, name in enumerate(entry.parameters)}
        meta = getattr(weights, "meta", None)
        if meta is not None:
            for entry in wanted:
                for name in (entry.name, *(copy for copy in entry.copies if copy in weights)):
                    _check_shape(name, meta(name), entry.shape)

    def __getitem__(self, name: str) -> Tensor:
        entry, index = self._places[name]
        return _part(entry, index, _outputs(entry, self._weights))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _wanted(weights: Mapping[str, Tensor], config: ModelConfig, layout: Layout) -> tuple[Entry, ...]:
    """The entries of this model, after every name was found in its place."""
    wanted = entries(config, layout)
    optional = {copy for entry in wanted for copy in entry.copies}
    _check_names(
        set(weights) - _ignored(config, layout) - optional, {entry.name for entry in wanted}, f"{layout} weights"
    )
    return wanted


def import_entry(entry: Entry, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    outputs = _outputs(entry, weights)
    for index, name in enumerate(entry.parameters):
        yield name, _part(entry, index, outputs)


def _outputs(entry: Entry, weights: Mapping[str, Tensor]) -> Tensor:
    """A foreign tensor as [out, in], equal to its copies."""
    tensor = weights[entry.name]
    _check_shape(entry.name, tensor, entry.shape)
    for copy in entry.copies:
        if copy in weights and not torch.equal(weights[copy], tensor):
            raise CheckpointError(
                f"tensor '{copy}' differs from '{entry.name}', which it should repeat; is the file of an untied model?"
            )
    return tensor.t() if entry.transposed else tensor


def _part(entry: Entry, index: int, outputs: Tensor) -> Tensor:
    part = outputs.split([shape[0] for shape in entry.shapes])[index]
    return _swap_pairs(part, entry.rotated_heads, to_interleaved=False).contiguous()


def _export(entry: Entry, weights: Mapping[str, Tensor], repeat: bool) -> Iterator[tuple[str, Tensor]]:
    parts = []
    for name, shape in zip(entry.parameters, entry.shapes, strict=True):
        part = weights[name]
        _check_shape(name, part, shape)
        parts.append(_swap_pairs(part, entry.rotated_heads, to_interleaved=True))
    outputs = torch.cat(parts) if len(parts) > 1 else parts[0]
    tensor = (outputs.t() if entry.transposed else outputs).contiguous()
    yield entry.name, tensor
    if repeat:
        for copy in entry.copies:
            yield copy, tensor


def _swap_pairs(rows: Tensor, heads: int, to_interleaved: bool) -> Tensor:
    """Rows [H D, ...] of q or k: rotate-half's order (first halves, then second halves) to interleaved pairs, or
    back.
    """
    if not heads:
        return rows
    pair_first = (heads, 2, -1) if to_interleaved else (heads, -1, 2)
    return rows.unflatten(0, pair_first).transpose(1, 2).flatten(0, 2)


def _foreign_module(module: str, layout: Layout) -> str:
    if module.startswith("layers."):
        _, layer, inner = module.split(".", 2)
        return f"{_LAYER_PREFIX[layout]}.{layer}.{_LAYER[layout][inner]}"
    return _OUTSIDE[layout][module]


def _ignored(config: ModelConfig, layout: Layout) -> set[str]:
    return {
        f"{_LAYER_PREFIX[layout]}.{layer}.{name}" for layer in range(config.num_layers) for name in _IGNORED[layout]
    }


def check_fit(config: ModelConfig, layout: Layout) -> None:
    """Refuse a model that the foreign code would compute differently."""
    if layout not in _LAYER:
        raise CheckpointError(f"unknown layout '{layout}'; there is {', '.join(_LAYER)}")
    scales = (config.mup, config.embedding_scale, config.logits_scale)
    needs: dict[str, dict[str, bool]] = {
        "llama": {
            "norm: rms_norm": config.norm == "rms_norm",
            f"rotary_dim: {config.head_dim}": config.rotary_dim == config.head_dim,
            "rotary_interleaved: false": not config.rotary_interleaved,
            "attention_scale: inverse_sqrt_head_dim (see weftrain.core.mup.fold)": config.attention_scale
            == "inverse_sqrt_head_dim",
            "no mup and no scales (see weftrain.core.mup.fold)": all(scale is None for scale in scales),
        },
        "crystalcoder": {
            "norm: layer_norm": config.norm == "layer_norm",
            "linear_bias: true": config.linear_bias,
            "rotary_interleaved: true": config.rotary_interleaved,
            "rope_theta: 10000": config.rope_theta == 10000,
            "tie_embeddings: true": config.tie_embeddings,
        },
        "cerebras": {
            f"rotary_interleaved: true or rotary_dim: {config.head_dim}": config.rotary_interleaved
            or config.rotary_dim == config.head_dim,
            "rope_theta: 10000": config.rope_theta == 10000,
        },
    }
    unmet = [need for need, met in needs[layout].items() if not met]
    if unmet:
        raise CheckpointError(f"layout {layout} cannot hold this model: it needs {'; '.join(unmet)}")


def _check_names(given: set[str], wanted: set[str], what: str) -> None:
    for problem, names in (("unknown", sorted(given - wanted)), ("missing", sorted(wanted - given))):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise CheckpointError(
                f"{what}: {problem} tensors {', '.join(names[:4])}{more}; is this the right model and layout?"
            )


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"tensor '{name}' has shape {list(tensor.shape)}, the config makes it {list(shape)}; is this the right "
            "model?"
        )


class _InFloat32(Mapping[str, Tensor]):
    def __init__(self, tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
        self._tensors = tensors
        self._shapes = {spec.name: spec.shape for spec in parameter_specs(config)}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].to(torch.float32)

    def meta(self, name: str) -> Tensor:
        """A meta tensor, to tell dtype and shape without reading."""
        return torch.empty(self._shapes[name.partition("/")[2]], device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def in_float32(tensors: Mapping[str, Tensor], config: ModelConfig) -> Mapping[str, Tensor]:
    """'<plane>/<canonical name>' -> tensor, each read and made fp32 when it is asked for: exact for bf16 and fp32."""
    return _InFloat32(tensors, config)
