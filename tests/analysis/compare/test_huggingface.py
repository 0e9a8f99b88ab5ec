"""Hugging Face folders as series: refused by file, and computed as transformers computes them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_cases import save_gpt2, save_llama, save_neox

from weftrain.analysis.compare import huggingface as compare_huggingface
from weftrain.analysis.compare.huggingface import (
    TransformersModel,
    check_revision,
    load_revision,
    read_huggingface,
    revisions_of,
)
from weftrain.analysis.compare.table import read_series
from weftrain.core.errors import CheckpointError, DataError, NonFiniteError
from weftrain.core.model import Decoder

PYTHIA_TOKENS_PER_STEP = 2_097_152  # 1024 x 2048, arXiv 2304.01373


def test_tokens_of_a_hugging_face_series(neox: Path) -> None:
    found = read_series(neox, "pythia", tokens_per_step=PYTHIA_TOKENS_PER_STEP)
    assert found.kind == "huggingface"
    assert [(point.step, point.tokens, point.checkpoint) for point in found.points] == [
        (1000, 2_097_152_000, "step1000"),
        (2000, 4_194_304_000, "step2000"),
    ]
    assert (found.vocab_size, found.positions, found.tokenizer_sha256) == (64, 32, None)
    with pytest.raises(DataError, match="--tokens-per-step N"):
        read_series(neox, "pythia")
    save_neox(neox / "ckpt_002000", 0)
    with pytest.raises(CheckpointError, match="are both step 2000"):
        read_huggingface(neox, "pythia", 1)
    shutil.rmtree(neox / "ckpt_002000")
    shutil.copytree(neox / "step2000", neox / "step3000")
    with pytest.raises(CheckpointError, match=r"several steps have the same weights: step2000 = step3000 \(sha256 "):
        read_huggingface(neox, "pythia", 1)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_other_architectures_pickles_and_code_are_refused_with_the_file(neox: Path, tmp_path: Path) -> None:
    path = neox / "step2000"
    config = (path / "config.json").read_text()
    for changes, words in (
        (
            {"model_type": "nonesuch"},
            "model_type 'nonesuch' is no causal language model that transformers .* knows: upgrade",
        ),
        ({"model_type": "vit"}, "model_type 'vit' is no causal language model"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.X"}}, "'auto_map' asks for code of the model's own"),
        ({"quantization_config": {}}, "quantized weights"),
    ):
        edit(path / "config.json", **changes)
        with pytest.raises(CheckpointError, match=f"step2000/config.json: .*{words}"):
            read_huggingface(neox, "pythia", 1)
        (path / "config.json").write_text(config)
    edit(path / "config.json", vocab_size=65)
    with pytest.raises(CheckpointError, match="'vocab_size' is 65, the first revision's 64: not one series"):
        read_huggingface(neox, "pythia", 1)
    (path / "config.json").write_text(config)
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        check_revision(path)
    (path / "adapter_config.json").unlink()
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the tensors end at byte"):
        check_revision(path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is missing: download"):
        check_revision(path)
    (path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(
        CheckpointError, match=r"step2000/pytorch_model\.bin: is pickled, which is never loaded here: download"
    ):
        read_huggingface(neox, "pythia", 1)
    (tmp_path / "elsewhere").write_bytes(whole)
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a symbolic link"):
        check_revision(path)


def test_weights_that_are_missing_are_never_drawn_at_random(tmp_path: Path) -> None:
    path = tmp_path / "step1"
    from safetensors.torch import load_file, save_file

    for save, left_out, words in (
        (save_gpt2, "mlp.c_proj.bias", r"1 missing keys, '.*mlp\.c_proj\.bias'"),
        (save_llama, "mlp.down_proj.weight", r"weights do not fit config\.json: .*missing tensors .*mlp\.down_proj"),
    ):
        save(path, 1)
        state = load_file(path / "model.safetensors")
        state = {name: tensor for name, tensor in state.items() if not name.endswith(left_out)}
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=words):
            load_revision(path)


def test_loss_and_greedy_tokens_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_gpt2(tmp_path / "step1", 1)
    ours = load_revision(tmp_path / "step1")
    assert isinstance(ours, TransformersModel)
    ids = torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 1:].clone()
    labels[1, 4:] = -100
    expected = sum(float(model(input_ids=ids[row : row + 1], labels=ids[row : row + 1]).loss) * 9 for row in (0, 2))
    expected += float(model(input_ids=ids[1:2, :5], labels=ids[1:2, :5]).loss) * 4
    assert float(ours(ids[:, :-1], labels, None)) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(compare_huggingface, "_LOGITS_AT_ONCE", 1)  # a row at a time
    assert float(ours(ids[:, :-1], labels, None)) == pytest.approx(expected, rel=1e-6)
    greedy = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )[:, 10:].tolist()
    assert ours.generate(ids.tolist(), 6, batch_size=2) == greedy
    with pytest.raises(DataError, match="within documents"):
        ours(ids[:, :-1], labels, torch.zeros(3, 9, dtype=torch.int32))
    with pytest.raises(DataError, match="vocabulary of 64"):
        ours.generate([[64]], 1)
    ours.model.get_output_embeddings().weight.data.fill_(math.nan)
    with pytest.raises(NonFiniteError):
        ours.generate(ids.tolist(), 1)


def test_half_precision_weights_are_computed_in_fp32(tmp_path: Path) -> None:
    save_gpt2(tmp_path / "step1", 1).half().save_pretrained(tmp_path / "step1")
    ours = load_revision(tmp_path / "step1")
    assert isinstance(ours, TransformersModel)
    assert {parameter.dtype for parameter in ours.model.parameters()} == {torch.float32}


def test_folders_of_one_model_and_of_a_series(neox: Path, tmp_path: Path) -> None:
    assert revisions_of(neox) == {1000: neox / "step1000", 2000: neox / "step2000"}
    assert revisions_of(neox / "step2000") == {2000: neox / "step2000"}
    shutil.copytree(neox / "step1000", tmp_path / "gpt2")
    assert revisions_of(tmp_path / "gpt2") == {0: tmp_path / "gpt2"}, "a number in a model's name is no step"
    (tmp_path / "none").mkdir()
    assert revisions_of(tmp_path / "none") == {}


def test_an_own_family_needs_no_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path / "series" / "step1", 1)

    def missing() -> None:
        raise DataError("transformers is not installed")

    monkeypatch.setattr(compare_huggingface, "_architectures", missing)
    assert [point.step for point in read_huggingface(tmp_path / "series", "llama", 1).points] == [1]
    assert isinstance(load_revision(tmp_path / "series" / "step1"), Decoder)
