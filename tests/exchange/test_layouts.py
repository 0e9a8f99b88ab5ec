"""Names and layouts in and out: bits unchanged, nothing lost in silence, and the converted weights mean the same
elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import amber, crystal, decoder, large_weights, tokens
from torch import Tensor

from weftrain.core.errors import CheckpointError
from weftrain.core.model_config import ModelConfig
from weftrain.core.mup import resolve_scales
from weftrain.core.parameters import parameter_specs
from weftrain.exchange.fold_mup import fold
from weftrain.exchange.huggingface.config import config_to_huggingface
from weftrain.exchange.layouts import (
    export_weights,
    foreign_tensors,
    import_weights,
)

FITTING = [
    (amber, "llama"),
    (lambda: amber(tie_embeddings=True, linear_bias=True), "llama"),
    (crystal, "crystalcoder"),
    (crystal, "cerebras"),
    (lambda: crystal(tie_embeddings=False, linear_bias=False), "cerebras"),
    (amber, "cerebras"),
]
EACH_FITTING = pytest.mark.parametrize(("build", "layout"), FITTING)
Build = Callable[[], ModelConfig]


@EACH_FITTING
@settings(max_examples=5, deadline=None)
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 2**31))
def test_round_trip_is_bit_exact(build: Build, layout: str, dtype: torch.dtype, seed: int) -> None:
    config = build()
    weights = {name: tensor.to(dtype) for name, tensor in large_weights(config, seed=seed).items()}
    exported = dict(export_weights(weights, config, layout))
    back = dict(import_weights(exported, config, layout))
    # c_attn holds q, k, v at once
    assert list(back) == [spec.name for spec in parameter_specs(config)] or layout == "crystalcoder"
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        assert back[name].dtype is dtype
        assert back[name].is_contiguous()
        assert torch.equal(back[name], tensor), name


@EACH_FITTING
def test_tensors_stream_one_at_a_time(build: Build, layout: str) -> None:
    """A lazy mapping is asked for each tensor when its turn comes, and for none before."""
    config = build()
    weights = large_weights(config)

    class Lazy(Mapping[str, Tensor]):
        read: list[str] = []  # noqa: RUF012

        def __getitem__(self, name: str) -> Tensor:
            self.read.append(name)
            return weights[name]

        def __iter__(self) -> Iterator[str]:
            return iter(weights)

        def __len__(self) -> int:
            return len(weights)

    lazy = Lazy()
    stream = export_weights(lazy, config, layout)
    assert lazy.read == []
    next(stream)
    assert lazy.read == ["embedding.weight"]
    list(stream)
    assert sorted(lazy.read) == sorted(weights)


def test_released_names_and_shapes_of_crystalcoder() -> None:
    config = crystal(num_layers=1)
    exported = dict(export_weights(large_weights(config), config, "crystalcoder"))
    assert {name: tuple(tensor.shape) for name, tensor in exported.items()} == {
        "transformer.wte.weight": (97, 64),
        "transformer.h.0.ln_1.weight": (64,),
        "transformer.h.0.ln_1.bias": (64,),
        "transformer.h.0.attn.c_attn.weight": (64, 192),
        "transformer.h.0.attn.c_attn.bias": (192,),
        "transformer.h.0.attn.c_proj.weight": (64, 64),
        "transformer.h.0.attn.c_proj.bias": (64,),
        "transformer.h.0.ln_2.weight": (64,),
        "transformer.h.0.ln_2.bias": (64,),
        "transformer.h.0.mlp.c_fc2.weight": (64, 170),
        "transformer.h.0.mlp.c_fc2.bias": (170,),
        "transformer.h.0.mlp.c_fc.weight": (64, 170),
        "transformer.h.0.mlp.c_fc.bias": (170,),
        "transformer.h.0.mlp.c_proj.weight": (170, 64),
        "transformer.h.0.mlp.c_proj.bias": (64,),
        "transformer.ln_f.weight": (64,),
        "transformer.ln_f.bias": (64,),
    }


def test_cerebras_names_of_crystalcoder() -> None:
    config = crystal(num_layers=1)
    weights = large_weights(config)
    exported = dict(export_weights(weights, config, "cerebras"))
    layer = "model.transformer_decoder.layers.0"
    expected = {
        "model.embedding_layer.word_embeddings.weight": "embedding.weight",
        "model.lm_head.weight": "embedding.weight",
        f"{layer}.norm1.weight": "layers.0.attention_norm.weight",
        f"{layer}.self_attn.proj_q_dense_layer.weight": "layers.0.attention.q_proj.weight",
        f"{layer}.self_attn.proj_output_dense_layer.bias": "layers.0.attention.o_proj.bias",
        f"{layer}.norm3.bias": "layers.0.ffn_norm.bias",
        f"{layer}.ffn.ffn.0.linear_layer.weight": "layers.0.ffn.up_proj.weight",
        f"{layer}.ffn.ffn.0.linear_layer_for_glu.weight": "layers.0.ffn.gate_proj.weight",
        f"{layer}.ffn.ffn.1.linear_layer.weight": "layers.0.ffn.down_proj.weight",
        "model.ln_f.weight": "final_norm.weight",
    }
    for foreign, canonical in expected.items():
        assert torch.equal(exported[foreign], weights[canonical]), foreign


@pytest.mark.parametrize("key_heads", [1, 4])
def test_amber_in_cerebras_row_order_rotates_interleaved_pairs(key_heads: int) -> None:
    """The same rows under the other rotary style are the same model: what makes the permutation right."""
    config = amber(num_kv_heads=key_heads)
    weights, ids = large_weights(config), tokens(config, 2, 33)
    exported = dict(export_weights(weights, config, "cerebras"))
    reordered = dict(weights)
    for layer in range(config.num_layers):
        for which in "qk":
            foreign = f"model.transformer_decoder.layers.{layer}.self_attn.proj_{which}_dense_layer.weight"
            reordered[f"layers.{layer}.attention.{which}_proj.weight"] = exported[foreign]
    with torch.no_grad():
        expected = decoder(config, weights).logits(ids)
        found = decoder(amber(num_kv_heads=key_heads, rotary_interleaved=True), reordered).logits(ids)
    assert (found - expected).norm() / expected.norm() < 1e-5


@EACH_FITTING
def test_buffers_and_equal_copies_are_passed_over(build: Build, layout: str) -> None:
    config = build()
    weights = large_weights(config)
    exported = dict(export_weights(weights, config, layout))
    exported |= {copy: exported[entry.name] for entry in foreign_tensors(config, layout) for copy in entry.copies}
    ignored = {
        "llama": ["model.layers.2.self_attn.rotary_emb.inv_freq"],
        "crystalcoder": ["transformer.h.0.attn.bias", "transformer.h.2.attn.masked_bias"],
        "cerebras": [],
    }
    exported |= {name: torch.zeros(3) for name in ignored[layout]}
    assert dict(import_weights(exported, config, layout)).keys() == weights.keys()


def test_a_tied_head_that_differs_is_refused() -> None:
    config = crystal()
    exported = dict(export_weights(large_weights(config), config, "crystalcoder"))
    exported["lm_head.weight"] = exported["transformer.wte.weight"] + 1
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' differs from 'transformer\.wte\.weight'"):
        list(import_weights(exported, config, "crystalcoder"))


@EACH_FITTING
def test_missing_unknown_and_misshapen_tensors_are_named(build: Build, layout: str) -> None:
    config = build()
    weights = large_weights(config)
    exported = dict(export_weights(weights, config, layout))
    for entry in foreign_tensors(config, layout):
        with pytest.raises(CheckpointError, match=rf"missing tensors {entry.name};"):
            import_weights({name: tensor for name, tensor in exported.items() if name != entry.name}, config, layout)
    with pytest.raises(CheckpointError, match=r"unknown tensors surprise\.weight"):
        import_weights({**exported, "surprise.weight": torch.zeros(1)}, config, layout)
    name = foreign_tensors(config, layout)[-1].name
    with pytest.raises(CheckpointError, match=rf"'{name}' has shape \[3\]"):
        list(import_weights({**exported, name: torch.zeros(3)}, config, layout))
    with pytest.raises(CheckpointError, match=r"unknown tensors layers\.9\.ffn"):
        export_weights({**weights, "layers.9.ffn": torch.zeros(1)}, config, layout)
    with pytest.raises(CheckpointError, match=r"'embedding\.weight' has shape \[3\]"):
        list(export_weights({**weights, "embedding.weight": torch.zeros(3)}, config, layout))


@pytest.mark.parametrize(
    ("config", "layout", "reason"),
    [
        (crystal(), "llama", "norm: rms_norm"),
        (amber(rotary_dim=8), "llama", "rotary_dim: 16"),
        (amber(logits_scale=0.5), "llama", "fold"),
        (amber(), "crystalcoder", "norm: layer_norm"),
        (crystal(tie_embeddings=False), "crystalcoder", "tie_embeddings: true"),
        (amber(rotary_dim=8), "cerebras", "rotary_interleaved: true"),
        (amber(num_kv_heads=2), "cerebras", "num_kv_heads: 1 or num_heads"),
        (amber(qk_norm="full"), "cerebras", "the default of qk_norm"),
        (amber(), "gguf", "unknown layout"),
    ],
)
def test_a_layout_refuses_a_model_that_it_would_compute_differently(
    config: ModelConfig, layout: str, reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        export_weights(large_weights(config), config, layout)  # type: ignore[arg-type]


def test_converted_amber_loads_in_transformers(tmp_path: Path) -> None:
    """Through files, as a user would: config.json and model.safetensors, then from_pretrained."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    config = amber()
    weights, ids = large_weights(config), tokens(config, 2, 21)
    (tmp_path / "config.json").write_text(json.dumps(config_to_huggingface(config)))
    save_file(dict(export_weights(weights, config, "llama")), tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, decoder(config, weights).logits(ids))


def test_a_folded_crystalcoder_keeps_its_scales_in_the_weights() -> None:
    """Folded, it needs no muP keys: the Cerebras layout takes it as a plain model."""
    config = crystal()
    plain, folded = fold(config, large_weights(config))
    exported = dict(export_weights(folded, plain, "cerebras"))
    scaled = large_weights(config)["embedding.weight"] * resolve_scales(config).logits_scale
    assert torch.equal(exported["model.lm_head.weight"], scaled)
