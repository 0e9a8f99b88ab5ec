"""What a stranger's folder is asked before its weights are used: finite numbers, a tokenizer that fits, its rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_cases import amber, large_weights
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from weftrain.core.config import Recipe
from weftrain.core.errors import CheckpointError, DataError, RecipeError
from weftrain.core.run.starting_checkpoint import other_checkpoint
from weftrain.exchange.huggingface.folder import SINGLE, HuggingFaceWeights, state_tensors, write_huggingface
from weftrain.exchange.huggingface.importing import (
    check_tokenizer,
    finite,
    open_start,
    rows_in,
    token_ids,
    with_vocabulary,
)

Tiny = Callable[..., Recipe]


def tokenizer(size: int) -> bytes:
    words = {f"w{index}": index for index in range(size)}
    return Tokenizer(WordLevel(words, unk_token="w0")).to_str().encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_refused_by_name(value: float) -> None:
    weights = large_weights(amber())
    weights["layers.1.ffn.up_proj.weight"][3, 5] = value
    tensors = finite(weights, "here")
    assert torch.equal(tensors["embedding.weight"], weights["embedding.weight"])
    with pytest.raises(
        CheckpointError, match=r"here: tensor 'layers\.1\.ffn\.up_proj\.weight' holds 1 values that are"
    ):
        tensors["layers.1.ffn.up_proj.weight"]


def test_large_numbers_are_numbers() -> None:
    """Their sum in fp64 is finite; and values whose sum is not are looked at one by one."""
    huge = torch.full((4,), 3e38)
    assert torch.equal(finite({"x": huge}, "here")["x"], huge)


@pytest.mark.parametrize(
    ("rows", "said"), [(90, "97 rows cut to the first 90"), (128, "97 rows padded with zeros to 128")]
)
def test_the_vocabulary_is_cut_or_padded_and_says_so(rows: int, said: str) -> None:
    weights = large_weights(amber())
    tensors, lines = with_vocabulary(weights, rows)
    assert lines == [f"{name}: {said}" for name in ("embedding.weight", "head.weight")]
    for name, tensor in weights.items():
        if name not in ("embedding.weight", "head.weight"):
            assert torch.equal(tensors[name], tensor)
            continue
        found = tensors[name]
        assert tuple(found.shape) == tuple(tensors.meta(name).shape) == (rows, 64)
        assert torch.equal(found[:90], tensor[:90])
        assert not found[97:].any()
    assert with_vocabulary(weights, 97)[1] == []


def test_padded_files_are_counted_in_the_files(tmp_path: Path) -> None:
    """Files with more rows than config.json says: the names of the layout tell which tensor has them."""
    config = amber(vocab_size=128)
    write_huggingface(tmp_path / "model", large_weights(config), config, torch.float32)
    told = json.loads((tmp_path / "model" / "config.json").read_text()) | {"vocab_size": 97}
    (tmp_path / "model" / "config.json").write_text(json.dumps(told))
    weights = HuggingFaceWeights(tmp_path / "model")
    assert rows_in(weights, amber()) == 128
    with pytest.raises(CheckpointError, match=r"has shape \[128, 64\], the config makes it \[97, 64\]"):
        state_tensors(weights, amber())


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    check_tokenizer({"tokenizer.json": tokenizer(97)}, 97, tmp_path)
    check_tokenizer({}, 97, tmp_path)
    with pytest.raises(
        DataError, match=r"tokenizer\.json: has ids up to 97, the model's vocab_size is 97: give the model"
    ):
        check_tokenizer({"tokenizer.json": tokenizer(98)}, 97, tmp_path)


def test_a_start_takes_a_folder_and_the_line_names_its_hash(tmp_path: Path, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber", f"start_from={{huggingface: {tmp_path / 'model'}, state: weights}}")
    weights = large_weights(recipe.model)
    write_huggingface(tmp_path / "model", weights, recipe.model, torch.float32, extra_config={"pad_token_id": 3})
    assert token_ids(tmp_path / "model") == {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 3}
    start = other_checkpoint(recipe, tmp_path, print, open_start)
    assert start.root == open_start(tmp_path / "model").sha256
    assert start.check_model(recipe, print) == {}
    found = start.weights(recipe, {})
    assert found is not None
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    other = recipe.model_copy(update={"model": recipe.model.model_copy(update={"rope_theta": 5.0})})
    with pytest.raises(CheckpointError, match=r"start_from: folder .*another function .*rope_theta: 10000\.0 -> 5\.0"):
        start.check_model(other, print)
    larger = tiny_recipe(
        "amber",
        f"start_from={{huggingface: {tmp_path / 'model'}, state: weights, grow: [vocab_size]}}",
        f"model.vocab_size={recipe.model.vocab_size + 3}",
    )
    assert set(start.check_model(larger, print)) == {"embedding.weight", "head.weight"}
    stored = load_file(tmp_path / "model" / SINGLE)
    stored["model.norm.weight"][0] = float("nan")
    save_file(stored, tmp_path / "model" / SINGLE)
    again = other_checkpoint(recipe, tmp_path, print, open_start)
    assert again.root != start.root
    spoilt = again.weights(recipe, {})
    assert spoilt is not None
    with pytest.raises(CheckpointError, match=r"final_norm\.weight' holds 1 values"):
        spoilt["final_norm.weight"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("{state: weights}", "exactly one of 'run', 'folder' and 'huggingface'"),
        ("{run: a, huggingface: b, state: weights}", "exactly one of 'run', 'folder' and 'huggingface'"),
        ("{huggingface: b, state: all}", "holds weights alone"),
        ("{huggingface: b, state: weights, data: continue}", "holds weights alone"),
    ],
)
def test_a_start_that_names_no_one_source_is_refused(given: str, reason: str, tiny_recipe: Tiny) -> None:
    with pytest.raises(RecipeError, match=reason):
        tiny_recipe("amber", f"start_from={given}")


def test_a_start_from_a_run_is_recorded_as_before(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber", "start_from={run: other, state: weights}")
    assert recipe.start_from is not None
    assert recipe.start_from.model_dump(mode="json") == {
        "run": "other",
        "state": "weights",
        "data": "from_start",
        "grow": [],
        "change": [],
    }
