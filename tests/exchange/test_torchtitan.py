"""Weights in torchtitan's folder, read back by torch's own loader, as torchtitan does."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from model_cases import amber, crystal
from torch import Tensor

from weftrain.core.errors import CheckpointError
from weftrain.core.formats.lazy_tensors import LazyTensors
from weftrain.core.model_config import ModelConfig
from weftrain.core.parameters import parameter_specs
from weftrain.exchange.torchtitan import export_tensors, write_torchtitan

QWEN3: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 32, "rotary_dim": 32, "qk_norm": "per_head"}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
GROUPED = amber(num_kv_heads=2, rotary_scaling={"kind": "llama3", **LLAMA3})


def weights_of(config: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in parameter_specs(config)}


def loaded(folder: Path, tensors: LazyTensors) -> dict[str, Tensor]:
    """What torch's loader puts into tensors of these names, shapes and dtypes."""
    found = {name: torch.full_like(tensors.meta(name), torch.nan, device="cpu") for name in tensors}
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    return found


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [GROUPED, amber(**QWEN3, tie_embeddings=True)], ids=["llama3", "qwen3"])
def test_torch_loads_what_was_written(config: ModelConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = weights_of(config)
    write_torchtitan(tmp_path / "titan", weights, config, dtype)
    wanted = export_tensors(weights, config, dtype)
    found = loaded(tmp_path / "titan", wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    values = sum(
        tensor.numel() for name, tensor in found.items() if name != "lm_head.weight" or not config.tie_embeddings
    )
    assert values == sum(tensor.numel() for tensor in weights.values())  # nothing of the model is missing
    assert sorted(path.name for path in (tmp_path / "titan").iterdir()) == [".metadata", "__0_0.distcp", "model.json"]


def test_llamas_rows_stand_in_pairs_and_qwens_in_halves() -> None:
    weights = weights_of(GROUPED)
    theirs = export_tensors(weights, GROUPED, torch.float32)
    for ours, name, heads in (("q_proj", "wq", 4), ("k_proj", "wk", 2)):
        row = weights[f"layers.1.attention.{ours}.weight"].view(heads, 2, 8, 64)  # [H, half, pair, C]
        pairs = theirs[f"layers.1.attention.qkv_linear.{name}.weight"].view(heads, 8, 2, 64)
        assert torch.equal(pairs, row.transpose(1, 2))
    assert torch.equal(theirs["layers.1.attention.qkv_linear.wv.weight"], weights["layers.1.attention.v_proj.weight"])
    interleaved = amber(rotary_interleaved=True)
    for config in (amber(**QWEN3), interleaved):
        weights = weights_of(config)
        theirs = export_tensors(weights, config, torch.float32)
        name = "layers.0.attention.qkv_linear.wq.weight"
        assert torch.equal(theirs[name], weights["layers.0.attention.q_proj.weight"])


def test_names_of_both_releases_and_of_a_tied_head() -> None:
    """Read in torchtitan 0.3.0 and 0.2.2: models/llama3 and models/qwen3, state_dict_adapter.py."""
    config = amber(**QWEN3, num_layers=1, tie_embeddings=True)
    layer = ["attention_norm", "attention.wo", "attention.q_norm", "attention.k_norm", "ffn_norm"]
    layer += [f"feed_forward.w{number}" for number in (1, 2, 3)]
    heads = {"0.3": ("lm_head", "attention.qkv_linear."), "0.2": ("output", "attention.")}
    for names, (head, qkv) in heads.items():
        wanted = {f"layers.0.{module}.weight" for module in [*layer, *(f"{qkv}w{letter}" for letter in "qkv")]}
        found = export_tensors(weights_of(config), config, torch.float32, names)  # type: ignore[arg-type]
        assert set(found) == wanted | {"tok_embeddings.weight", "norm.weight", f"{head}.weight"}
        assert torch.equal(found[f"{head}.weight"], found["tok_embeddings.weight"])


def test_feed_forwards_gate_is_w1_and_the_sizes_are_torchtitans(tmp_path: Path) -> None:
    weights = weights_of(GROUPED)
    theirs = export_tensors(weights, GROUPED, torch.float32)
    for ours, name in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        assert torch.equal(theirs[f"layers.2.feed_forward.{name}.weight"], weights[f"layers.2.ffn.{ours}.weight"])
    write_torchtitan(tmp_path / "titan", weights, GROUPED, torch.float32, source={"weftrain_step": 3})
    said = json.loads((tmp_path / "titan" / "model.json").read_text())
    assert (said["model"], said["dim"], said["n_kv_heads"], said["hidden_dim"], said["weftrain_step"]) == (
        "llama3",
        64,
        2,
        172,
        3,
    )
    assert (said["rope"]["scaling"], said["rope"]["scaling_factor"]) == ("llama", 4.0)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (crystal(), "norm: rms_norm"),
        (amber(linear_bias=True), "linear_bias: false"),
        (amber(qkv_bias=True), "the default of qkv_bias"),
        (amber(rotary_dim=8), "rotary_dim: 16"),
        (amber(qk_norm="full"), "qk_norm: none (llama3) or per_head (qwen3)"),
        (amber(norm_placement="after"), "the default of norm_placement"),
        (amber(layer_pattern=({"window": 7},)), "the default of layer_pattern"),
        (amber(**QWEN3, rotary_scaling={"kind": "llama3", **LLAMA3}), "llama3's without qk_norm"),
        (amber(rotary_scaling={"kind": "linear", "factor": 2.0}), "no rotary_scaling"),
        (amber(logits_scale=2.0), "no mup and no scales"),
        (amber(logits_softcap=30.0), "the default of logits_softcap"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_that_torchtitan_does_not_compute_is_refused_by_field(
    config: ModelConfig, named: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(named)):
        write_torchtitan(tmp_path / "titan", weights_of(config), config, torch.float32)
    assert not (tmp_path / "titan").exists()


def test_whole_or_not_at_all_and_the_same_bytes_again(tmp_path: Path) -> None:
    config, weights = amber(), weights_of(amber())
    for name in ("one", "two"):
        write_torchtitan(tmp_path / name, weights, config, torch.float32)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    with pytest.raises(CheckpointError, match="exists: choose another name"):
        write_torchtitan(tmp_path / "one", weights, config, torch.float32)
    wrong = {**weights, "layers.2.ffn.down_proj.weight": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"'layers.2.ffn.down_proj.weight' has shape \[3\]"):
        write_torchtitan(tmp_path / "three", wrong, config, torch.float32)
    del wrong["layers.2.ffn.down_proj.weight"]
    with pytest.raises(CheckpointError, match="is missing"):
        write_torchtitan(tmp_path / "three", wrong, config, torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_tensor_is_read_when_its_turn_comes(tmp_path: Path) -> None:
    """Never the whole model at once: when one is read, torch has let the one before the last go."""
    weights, alive = weights_of(amber()), []
    most = 0

    def read(name: str) -> Tensor:
        nonlocal most
        tensor = weights[name].clone()
        most = max(most, sum(one() is not None for one in alive))
        alive.append(weakref.ref(tensor))
        return tensor

    lazy = LazyTensors({name: tensor.to("meta") for name, tensor in weights.items()}, read)
    write_torchtitan(tmp_path / "titan", lazy, amber(), torch.float32)
    assert len(alive) == len(weights)
    assert most <= 2
