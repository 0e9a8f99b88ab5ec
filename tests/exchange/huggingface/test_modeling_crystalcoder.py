"""The code that goes with a CrystalCoder to the Hugging Face hub, as a stranger runs it: from the folder, by
transformers.
"""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_cases import amber, crystal, decoder, large_weights, tokens
from places import ROOT

from weftrain.core.errors import CheckpointError
from weftrain.core.model_config import ModelConfig
from weftrain.exchange.huggingface.files import KNOWN_MODELING, MODELING, check_no_other_code, modeling_files
from weftrain.exchange.huggingface.folder import read_config, write_huggingface

SOURCE = ROOT / "exchange" / "huggingface" / MODELING


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies a folder's code to a cache before it imports it."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def opened(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def written(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    weights = large_weights(config)
    write_huggingface(folder, weights, config, dtype)
    return weights


@torch.no_grad()
def test_logits_and_generation_are_the_trainers_own(tmp_path: Path) -> None:
    """Bit for bit in fp32 on one machine: the same products in the same order. With a cache, and with padding on the
    left, to rounding.
    """
    config = crystal()
    ours, ids = decoder(config, written(tmp_path / "model", config)), tokens(config, 3, 20)
    theirs = opened(tmp_path / "model")
    wanted = ours.logits(ids)
    # of logits up to 6; 0 where BLAS sees the same shapes
    torch.testing.assert_close(theirs(ids).logits, wanted, rtol=0, atol=1e-5)
    cached = theirs(ids[:, :12])
    parts = [cached.logits]
    for place in range(12, 20):
        cached = theirs(ids[:, place : place + 1], past_key_values=cached.past_key_values)
        parts.append(cached.logits)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=0, atol=2e-5)
    greedy = ids[:, :6]
    for _ in range(8):
        greedy = torch.cat([greedy, ours.logits(greedy)[:, -1:].argmax(-1)], 1)
    attended = torch.ones(3, 6, dtype=torch.long)
    assert (
        theirs.generate(ids[:, :6], attention_mask=attended, max_new_tokens=8, do_sample=False).tolist()
        == greedy.tolist()
    )
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), ids[:, :6]], 1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.long), attended], 1)
    told = theirs.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert told[:, 4:].tolist() == greedy.tolist()
    labels = ids.clone()
    loss = theirs(ids, labels=labels).loss
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(wanted[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    )


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"attention_scale": "inverse_sqrt_head_dim", "rotary_dim": 16}])
def test_bfloat16_and_other_scales(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = crystal(**changes)
    weights = {
        name: tensor.bfloat16().float() for name, tensor in written(tmp_path / "model", config, torch.bfloat16).items()
    }
    ids = tokens(config, 2, 20)
    wanted = decoder(config, weights).logits(ids)
    torch.testing.assert_close(opened(tmp_path / "model", dtype=torch.float32)(ids).logits, wanted, rtol=0, atol=1e-5)
    half = opened(tmp_path / "model", dtype=torch.bfloat16)(ids).logits.float()
    assert (half - wanted).abs().mean() < 0.02 * wanted.abs().mean()  # 8 bits of mantissa, three layers


def test_a_folder_that_transformers_wrote_is_read_back(tmp_path: Path) -> None:
    config = crystal()
    written(tmp_path / "model", config)
    opened(tmp_path / "model").save_pretrained(tmp_path / "again")
    again = read_config(tmp_path / "again")
    assert again.model_dump(exclude={"mup"}) == config.model_dump(exclude={"mup"})
    assert torch.equal(
        opened(tmp_path / "again").transformer.wte.weight, opened(tmp_path / "model").transformer.wte.weight
    )


def test_the_code_stands_alone_and_every_version_is_known() -> None:
    tree = ast.parse(SOURCE.read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in found} <= {"__future__", "typing", "torch", "transformers"}
    assert hashlib.sha256(SOURCE.read_bytes()).hexdigest() in KNOWN_MODELING, (
        "add its SHA-256 to KNOWN_MODELING, and keep the others"
    )


def test_only_a_crystalcoder_brings_code_and_no_folder_may_bring_any_other(tmp_path: Path) -> None:
    assert modeling_files(amber()) == ({}, {})
    written(tmp_path / "amber", amber())
    assert sorted(path.name for path in (tmp_path / "amber").iterdir()) == ["config.json", "model.safetensors"]
    told = json.loads((tmp_path / "amber" / "config.json").read_text())
    assert (told["eos_token_id"], told["bos_token_id"], "auto_map" in told) == (None, None, False)
    folder, config = tmp_path / "model", crystal()
    written(folder, config)

    def check() -> None:
        check_no_other_code(folder, {path.name for path in folder.iterdir()}, config)

    check()
    for name, text in (
        (MODELING, SOURCE.read_text() + "import os\n"),
        ("configuration_x.py", ""),
        ("config.json", json.dumps({"auto_map": {"AutoModelForCausalLM": "someone/else--modeling.X"}})),
        ("tokenizer_config.json", json.dumps({"auto_map": {"AutoTokenizer": ["t.T", None]}})),
    ):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_text(text)
        with pytest.raises(CheckpointError, match="do not load this folder"):
            check()
        (folder / name).unlink() if before is None else (folder / name).write_bytes(before)
    check()
