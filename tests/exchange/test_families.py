"""Each family of Hugging Face in both directions: bits, names and functions against `transformers`, every wrong choice
seen, and what no family can say refused by the field's name.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES as CASES
from families import their_model
from model_cases import amber, crystal, large_weights, tokens
from torch import Tensor

from weftrain.core.errors import CheckpointError, RecipeError
from weftrain.core.model_config import ModelConfig
from weftrain.exchange import families
from weftrain.exchange.families import FAMILIES
from weftrain.exchange.family import Family, config_differences
from weftrain.exchange.huggingface.config import config_from_huggingface, config_to_huggingface, layout_of
from weftrain.exchange.huggingface.folder import HuggingFaceWeights, read_config, state_tensors, write_huggingface
from weftrain.exchange.layouts import export_weights, import_weights

transformers = pytest.importorskip("transformers")
EACH = pytest.mark.parametrize("name", CASES)
# The family that a case is exported as, where transformers' class of the case says more than the model needs.
WRITTEN = {"llama31": "llama", "llama_multi_query": "llama", "llama_linear": "llama", "llama_yarn": "llama"} | {
    "pythia": "gpt_neox",
    "neox_sequential": "gpt_neox",
}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def imported(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    tensors = state_tensors(HuggingFaceWeights(folder), config)
    return {name.removeprefix("weights/"): tensor for name, tensor in tensors.items()}


def loaded(folder: Path, architecture: str) -> Any:
    found = getattr(transformers, architecture).from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    model, report = found
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    model.config._experts_implementation = "eager"  # the default adds a token's experts in another order
    return model.eval()


@EACH
def test_a_folder_of_transformers_comes_back_to_it_with_the_same_bits(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    weights, ids = large_weights(case.ours), tokens(case.ours, 2, 33)
    theirs = their_model(case, weights)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB" if name == "qwen3" else "5GB")
    config = read_config(tmp_path / "theirs")
    assert config_differences(case.ours, config) == []
    assert config == ModelConfig.model_validate(case.ours.model_dump())
    ours = imported(tmp_path / "theirs", config)
    assert same(ours, weights)
    write_huggingface(tmp_path / "ours", ours, config, torch.float32, max_shard_bytes=60_000)
    again = read_config(tmp_path / "ours")
    assert again == config
    assert same(imported(tmp_path / "ours", again), weights)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["model_type"] == WRITTEN.get(name, name)
    with torch.no_grad():
        expected = theirs(ids).logits
        found = loaded(tmp_path / "ours", written["architectures"][0])(ids).logits
    assert torch.equal(found, expected)


@EACH
def test_config_round_trip(name: str) -> None:
    config = CASES[name].ours
    written = json.loads(json.dumps(config_to_huggingface(config)))
    assert config_from_huggingface(written) == config


# Configs of transformers 4: the released ones, in their keys that count, with small sizes
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 96, "vocab_size": 97}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
FORM_4: list[dict[str, Any]] = [
    {
        "model_type": "llama",
        "num_key_value_heads": 2,
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
    },
    {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}, "pretraining_tp": 1},
    {"model_type": "llama", "rope_scaling": None, "head_dim": 32, "attention_bias": True, "mlp_bias": True},
    {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 512}},
    {"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}},
    {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None, "rope_theta": 1e6},
    {"model_type": "mistral", "num_key_value_heads": 2},
    {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "use_sliding_window": False,
        "sliding_window": 32,
        "rope_theta": 1e6,
    },
    {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 32,
        "max_window_layers": 2,
    },
    {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32, "rope_scaling": None, "max_window_layers": 4},
    {
        "model_type": "qwen3",
        "num_key_value_heads": 4,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 0,
    },
    {"model_type": "olmo2", "rope_theta": 5e5, "rms_norm_eps": 1e-6},
    {"model_type": "olmo3", "rope_theta": 5e5, "sliding_window": 16},
    {
        "model_type": "olmo3",
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 8192,
        },
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
    {"model_type": "smollm3", "num_key_value_heads": 2, "rope_theta": 5e6, "no_rope_layers": [1, 1, 1, 0]},
    {"model_type": "smollm3", "num_key_value_heads": 2, "no_rope_layer_interval": 2, "mlp_bias": False},
    {"model_type": "smollm3", "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 16},
    {"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 1000, "use_parallel_residual": False},
    {"model_type": "gpt_neox"},
]


@pytest.mark.parametrize("given", FORM_4, ids=lambda given: "-".join(map(str, given)))
def test_configs_of_transformers_4_mean_what_transformers_reads(given: dict[str, Any]) -> None:
    """Held against the same config as the installed transformers writes it again, in its own form."""
    given = {**SMALL, **given}
    found = config_from_huggingface(given)
    settings = transformers.AutoConfig.for_model(**json.loads(json.dumps(given)))
    assert config_from_huggingface(settings.to_dict()) == found
    written = config_to_huggingface(found, given["model_type"])
    assert config_from_huggingface(written) == found
    again = transformers.AutoConfig.for_model(**json.loads(json.dumps(written)))
    assert config_from_huggingface(again.to_dict()) == found


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES.values() if family.defaults], ids=lambda f: f.model_type
)
def test_defaults_are_those_of_the_config_classes(family: Family) -> None:
    settings = transformers.AutoConfig.for_model(family.model_type).to_dict()
    computed = {"num_key_value_heads", "head_dim", "sliding_window"}  # null, filled in or cleared when it is made
    fields = {
        field.name: field.default
        for field in dataclasses.fields(type(transformers.AutoConfig.for_model(family.model_type)))
    }
    for key, value in family.defaults.items():
        assert (fields[key] if key in computed else settings[key]) == value, key
    assert config_from_huggingface({"model_type": family.model_type}) == config_from_huggingface(settings)


# Wrong choices: each must be seen by what the tests above compare


def _swapped(inner: Mapping[str, str], one: str, other: str) -> dict[str, str]:
    return {**inner, one: inner[other], other: inner[one]}


NAMES_WRONG: list[tuple[str, str, str]] = [
    ("llama31", "attention.q_proj", "attention.o_proj"),
    ("llama31", "attention.k_proj", "attention.v_proj"),
    ("llama31", "ffn.gate_proj", "ffn.up_proj"),
    ("llama31", "attention_norm", "ffn_norm"),
    ("mistral", "ffn.gate_proj", "ffn.up_proj"),
    ("qwen2", "attention.k_proj", "attention.v_proj"),
    ("qwen3", "attention.q_norm", "attention.k_norm"),
    ("olmo2", "attention_norm", "ffn_norm"),
    ("olmo3", "attention.q_norm", "attention.k_norm"),
    ("pythia", "attention_norm", "ffn_norm"),
]


@pytest.mark.parametrize(("name", "one", "other"), NAMES_WRONG)
def test_a_wrong_name_is_seen(name: str, one: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    weights = large_weights(case.ours)
    layout = layout_of(case.ours)
    right = families.NAMES[layout]
    exported = dict(export_weights(weights, case.ours, layout))
    hand_written = case.foreign(weights, case.ours)
    if "embed_out.weight" in exported:  # files keep the older name of GPT-NeoX's head
        exported["lm_head.weight"] = exported.pop("embed_out.weight")
    assert same(exported, hand_written)
    wrong = dataclasses.replace(right, inner=_swapped(right.inner, one, other))
    monkeypatch.setitem(families.NAMES, layout, wrong)
    assert not same(dict(export_weights(weights, case.ours, layout)), hand_written)


@pytest.mark.parametrize("name", ["qwen3", "olmo2"])
def test_a_norm_of_q_of_another_size_is_refused_with_both_shapes(name: str) -> None:
    config = CASES[name].ours
    exported = dict(export_weights(large_weights(config), config, layout_of(config)))
    wrong = f"model.layers.1.self_attn.{'q' if name == 'qwen3' else 'k'}_norm.weight"
    right = list(exported[wrong].shape)
    exported[wrong] = torch.ones(48)
    with pytest.raises(CheckpointError, match=re.escape(f"'{wrong}' has shape [48], the config makes it {right}")):
        dict(import_weights(exported, config, layout_of(config)))


def test_rows_side_by_side_are_not_rows_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CASES["pythia"].ours
    weights = large_weights(config)
    exported = dict(export_weights(weights, config, "gpt_neox"))
    monkeypatch.setitem(families.NAMES, "gpt_neox", dataclasses.replace(families.NAMES["gpt_neox"], by_head=False))
    assert not same(dict(import_weights(exported, config, "gpt_neox")), weights)


KEYS_WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("llama31", {"rope_scaling": None, "rope_parameters": None}, "rotary_scaling"),
    ("llama31", {"num_key_value_heads": 4}, "num_kv_heads"),
    ("llama31", {"rms_norm_eps": 1e-5}, "norm_eps"),
    ("llama31", {"tie_word_embeddings": True}, "tie_embeddings"),
    ("llama31", {"rope_theta": 1e4, "rope_parameters": None}, "rope_theta"),
    ("mistral", {"sliding_window": 6}, "layer_pattern"),
    ("mistral", {"sliding_window": None}, "layer_pattern"),
    ("qwen3", {"head_dim": 16}, "head_dim"),
    ("qwen3", {"model_type": "qwen2", "attention_bias": ...}, "qk_norm"),
    ("qwen2", {"model_type": "llama", "layer_types": ...}, "qkv_bias"),
    ("olmo2", {"model_type": "llama"}, "norm_placement"),
    ("olmo3", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_pattern"),
    ("olmo3", {"sliding_window": 8}, "layer_pattern"),
    ("smollm3", {"no_rope_layers": [0, 1, 0, 1]}, "layer_pattern"),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}, "layer_pattern"),
    ("pythia", {"use_parallel_residual": False}, "residual"),
    ("pythia", {"rotary_pct": 0.5, "rope_parameters": None}, "rotary_dim"),
    ("pythia", {"layer_norm_eps": 1e-6}, "norm_eps"),
]


@pytest.mark.parametrize(("name", "change", "field"), KEYS_WRONG)
def test_a_wrong_key_is_seen(name: str, change: dict[str, Any], field: str) -> None:
    config = CASES[name].ours
    given = {**config_to_huggingface(config), **change}
    found = config_from_huggingface({key: value for key, value in given.items() if value is not ...})
    assert field in {line.partition(":")[0] for line in config_differences(config, found)}


# Refusals


def changed(name: str, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(CASES[name].ours.model_dump() | changes)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (changed("llama31", logits_softcap=5.0), "logits_softcap: null"),
        (changed("llama31", norm_weight_offset=1), "norm_weight_offset: 0"),
        (changed("llama31", rotary_interleaved=True), "rotary_interleaved: false"),
        (changed("qwen3", norm_placement="after"), "norm_placement: before"),
        (changed("qwen3", rotary_dim=16), "rotary_dim: 32"),
        (changed("olmo2", qk_norm="per_head"), "'qwen3' comes nearest, which needs norm_placement: before"),
        (changed("pythia", num_kv_heads=2), "num_kv_heads: 4"),
        (changed("mistral", layer_pattern=[{"window": 7}, {"window": 5}, {"window": 3}]), "layer_pattern: window"),
        (changed("olmoe", experts={"count": 6, "top_k": 2, "intermediate_size": 32, "shared": 1}), "experts: "),
        (amber(embedding_scale=2.0), r"embedding_scale: 1\.0 \(see weftrain"),
    ],
)
def test_what_no_family_can_say_is_refused_by_field(config: ModelConfig, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"no family of Hugging Face can hold this model; .*{reason}"):
        layout_of(config)


def test_a_family_can_be_named() -> None:
    assert config_to_huggingface(amber(), "mistral")["architectures"] == ["MistralForCausalLM"]
    with pytest.raises(CheckpointError, match="layout qwen3 cannot hold this model: it needs qk_norm: per_head"):
        config_to_huggingface(amber(), "qwen3")
    with pytest.raises(CheckpointError, match="unknown layout 'gguf'; there is llama, crystalcoder, mistral"):
        config_to_huggingface(amber(), "gguf")
    scaling = CASES["olmo3"].ours.rotary_scaling
    assert scaling is not None
    with pytest.raises(CheckpointError, match=r"olmo3 cannot hold this model: it needs .*truncate is false"):
        config_to_huggingface(changed("olmo3", rotary_scaling={**scaling.model_dump(), "truncate": False}), "olmo3")


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("llama31", {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' is not known for model_type 'llama'"),
        ("llama31", {"num_local_experts": 8}, "'num_local_experts' is not known"),
        ("llama31", {"auto_map": {"AutoModel": "other.Model"}}, "auto_map is"),
        ("llama31", {"use_mrope": True}, "use_mrope is True; this decoder does False only"),
        ("llama31", {"sliding_window": 8}, "sliding_window is 8; this decoder does None only"),
        ("llama31", {"head_dim": 0}, "head_dim is 0"),
        ("llama31", {"hidden_size": 66, "head_dim": 16}, "hidden_size 66 is not a multiple"),
        (
            "llama31",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "differ in rope_type: 'llama3' and 'dynamic'",
        ),
        ("llama31", {"rope_parameters": {"rope_type": "longrope"}, "rope_scaling": None}, "rope_type is 'longrope'"),
        ("llama31", {"rope_parameters": {"rope_type": "linear"}, "rope_scaling": None}, "'linear' needs 'factor'"),
        ("llama31", {"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": None}, "rope_theta is 500 and rope_theta"),
        ("llama31", {"rope_parameters": {"full_attention": {}}, "rope_scaling": None}, "'full_attention' is not known"),
        ("llama31", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
        (
            "llama_yarn",
            {"rope_scaling": None, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}},
            "'mscale'",
        ),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "'layer_types' is not known"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3", {"layer_types": ["full_attention"]}, "not a list of num_hidden_layers 3 entries"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "layer_types names 'chunked_attention'"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "there is no window"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is"),
        ("olmo3", {"rope_theta": 7.0}, "rope_theta is 7.0 and 500"),
        (
            "olmo3",
            {"rope_parameters": {"rope_type": "default"}},
            "not an object of sliding_attention and full_attention",
        ),
        ("olmo3", {"rope_parameters": None}, "which releases of transformers read differently"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\]; this decoder has its layers without"),
        ("qwen3_moe", {"num_local_experts": 9}, "num_experts is 5 and num_local_experts 9: one number has both names"),
        ("qwen3_moe", {"num_experts_per_tok": 6}, "top_k 6 is above count 5"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; this decoder does 1 only"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0; this decoder does None only"),
        ("mixtral", {"router_aux_loss_coef": -1}, "router_aux_loss_coef is -1, not a number of 0 or more"),
        ("pythia", {"hidden_act": "gelu_fast"}, "hidden_act is 'gelu_fast'; this decoder does 'gelu' only"),
        ("pythia", {"attention_bias": False}, "attention_bias is False"),
        ("pythia", {"rotary_pct": 0.5}, r"partial_rotary_factor is 0\.25"),
    ],
)
def test_what_is_not_known_is_refused_by_key(name: str, change: dict[str, Any], reason: str) -> None:
    given = {**config_to_huggingface(CASES[name].ours), **change}
    with pytest.raises(RecipeError, match=reason) as caught:
        config_from_huggingface(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gemma2", "phi3", "mamba", None])
def test_unknown_architectures_are_refused_by_name(model_type: str | None) -> None:
    with pytest.raises(RecipeError, match=f"model_type {model_type!r} is not one that converts; there is llama, "):
        config_from_huggingface({"model_type": model_type})


@pytest.mark.parametrize("config", [amber(), crystal(), *(case.ours for case in CASES.values())])
def test_families_that_say_one_model_call_its_tensors_alike(config: ModelConfig) -> None:
    """So that the family of a folder need not be carried along with its config."""
    able = [family.names for family in FAMILIES.values() if not family.unmet(config)]
    assert able
    assert all(names == able[0] for names in able)
