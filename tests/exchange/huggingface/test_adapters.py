"""Adapters in peft's format, against the real peft on transformers' own Llama."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from float64_reference import initial, state_with

from weftrain.analysis.evaluation.generation import load_model
from weftrain.backends.common.registry import get_backend
from weftrain.cli.main import main
from weftrain.core import checkpoint
from weftrain.core.backend import Job, Plan
from weftrain.core.checkpoint import Weights
from weftrain.core.config import Recipe
from weftrain.core.errors import CheckpointError
from weftrain.exchange.huggingface.adapters import CONFIG, TENSORS, read_adapter, write_adapter
from weftrain.exchange.huggingface.folder import write_huggingface

Tiny = Callable[..., Recipe]
LORA = "tuning.lora={rank: 3, alpha: 6, dropout: 0.25, targets: [layers.*.attention.*_proj, layers.1.ffn.*]}"


@pytest.fixture
def adapted(tiny_recipe: Tiny) -> tuple[Recipe, dict[str, torch.Tensor]]:
    """A recipe with adapters, and weights whose B is not zero."""
    recipe = tiny_recipe("llama", LORA)
    weights, generator = initial(recipe, 2.0), torch.Generator().manual_seed(0)
    for key in weights:
        if key.endswith("lora_b"):
            weights[key] = torch.randn(weights[key].shape, generator=generator) / 4
    return recipe, weights


def base_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in weights.items() if ".lora_" not in key}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_peft_computes_our_logits_and_gives_our_adapter_back_bit_for_bit(
    adapted: tuple[Recipe, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    recipe, weights = adapted
    write_huggingface(tmp_path / "base", base_of(weights), recipe.model, torch.float32)
    write_adapter(tmp_path / "adapter", weights, recipe, str(tmp_path / "base"))
    local = get_backend("local")
    run: Any = local.prepare(Job(recipe, Plan(0, 1), local.options.model_validate({"threads": 1})))
    run.import_state(state_with(weights, recipe=recipe))
    ids = torch.arange(13)[None] * 7
    model = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    merged = load_model(Weights(state_with(weights, recipe=recipe).tensors, recipe.tuning.lora), recipe.model)
    with torch.no_grad():
        ours, theirs, plain = run.model.logits(ids), model(ids).logits, model.base_model.model
        assert relative(ours, theirs) < 1e-5
        assert relative(merged.logits(ids), theirs) < 1e-5
        with model.disable_adapter():
            assert relative(plain(ids).logits, theirs) > 0.01
    model.save_pretrained(tmp_path / "again")
    back = read_adapter(tmp_path / "again", recipe)
    adapters = weights.keys() - base_of(weights).keys()
    assert set(back) == adapters
    assert all(torch.equal(back[name], weights[name]) for name in adapters)
    with torch.no_grad():
        theirs_merged = model.merge_and_unload()(ids).logits
    assert relative(merged.logits(ids), theirs_merged) < 1e-5


def test_verbs_bring_an_adapter_in_and_out(adapted: tuple[Recipe, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    recipe, weights = adapted
    write_huggingface(tmp_path / "base", base_of(weights), recipe.model, torch.float32)
    write_adapter(tmp_path / "adapter", weights, recipe, None)
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    words = ["from-peft", "adapter", "base", "tiny.yaml", "--runs", "runs", "--run", "tuned"]
    runner = CliRunner()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        done = runner.invoke(main, ["convert", *words])
        assert done.exit_code == 0, done.output
        state, _ = checkpoint.load(tmp_path / "runs" / "tuned" / "checkpoints" / "step_00000000")
        found = Weights(state.tensors)
        assert set(found) == set(weights)
        assert all(torch.equal(found[name], weights[name]) for name in weights)
        out = runner.invoke(main, ["convert", "to-peft", "runs/tuned", "out"])
        assert out.exit_code == 0, out.output
        assert (tmp_path / "out" / TENSORS).read_bytes() == (tmp_path / "adapter" / TENSORS).read_bytes()
        whole = runner.invoke(main, ["convert", "to-huggingface", "runs/tuned", "merged", "--dtype", "float32"])
        assert whole.exit_code == 0, whole.output
        again = runner.invoke(main, ["convert", *words[:-1], "other", "model.intermediate_size=96"])
        assert again.exit_code
        assert "model.intermediate_size" in again.output or "intermediate_size" in again.output


@pytest.mark.parametrize(
    ("changes", "override", "said"),
    [
        ({"r": 4}, LORA, r"r is 4, the recipe's tuning\.lora\.rank is 3"),
        ({"lora_alpha": 3}, LORA, r"lora_alpha is 3, the recipe's tuning\.lora\.alpha is 6"),
        ({"peft_type": "IA3"}, LORA, "peft_type is 'IA3': only LORA"),
        ({"use_dora": True}, LORA, "use_dora is True, which is not read"),
        ({"bias": "all"}, LORA, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 8}}, LORA, "rank_pattern is"),
        ({}, LORA.replace("layers.1.ffn.*", "layers.*.ffn.*"), r"layers\.0\.mlp.*missing by the recipe's"),
        ({}, LORA.replace("layers.1.ffn.*", "layers.1.ffn.up_proj"), r"unknown by the recipe's"),
        ({}, "tuning={}", "the recipe has no adapters"),
    ],
)
def test_another_adapter_is_refused_in_one_line(
    changes: dict[str, Any],
    override: str,
    said: str,
    adapted: tuple[Recipe, dict[str, torch.Tensor]],
    tiny_recipe: Tiny,
    tmp_path: Path,
) -> None:
    recipe, weights = adapted
    write_adapter(tmp_path / "adapter", weights, recipe, None)
    path = tmp_path / "adapter" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=said) as error:
        read_adapter(tmp_path / "adapter", tiny_recipe("llama", override))
    assert "\n" not in str(error.value)


def test_other_shapes_and_a_cut_file_are_refused(
    adapted: tuple[Recipe, dict[str, torch.Tensor]], tiny_recipe: Tiny, tmp_path: Path
) -> None:
    recipe, weights = adapted
    write_adapter(tmp_path / "adapter", weights, recipe, None)
    wider = tiny_recipe("llama", LORA, "model.intermediate_size=112")
    with pytest.raises(CheckpointError, match=r"mlp\..*the adapter is of another model"):
        read_adapter(tmp_path / "adapter", wider)
    path = tmp_path / "adapter" / TENSORS
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: .*take another copy"):
        read_adapter(tmp_path / "adapter", recipe)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_adapter(tmp_path, recipe)


def test_a_family_without_such_modules_is_refused(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = tiny_recipe("crystal", LORA)
    with pytest.raises(CheckpointError, match="export merged weights with to-huggingface"):
        write_adapter(tmp_path / "adapter", initial(recipe), recipe, None)
