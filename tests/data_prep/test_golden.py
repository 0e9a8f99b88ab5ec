"""The datasets that earlier versions made from the same inputs, by their ids: a change of a byte or of the order shows here.

The ids were computed by the version before the packages were laid out anew. The tokenizer is a byte a token, written
here, so that they depend on no library's version. If an id must change, that is a new dataset format.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from made_texts import sentences

from weftrain.cli.main import main

SETTINGS: dict[str, list[str]] = {
    "concatenate": [],
    "best_fit": ["--packing", "best_fit"],
    "fim": ["--fim-rate", "0.5", "--epochs", "2", "--fim-tokens", "<a>,<b>,<c>,<d>"],
    "chunks": ["--order", "as_read", "--chunks", "3", "--rows-per-shard", "20"],
}
# (training set, held-out set)
IDS = {
    "concatenate": (
        "e42a634df662791ce86ed80955ac947061d34e3fdc4ca035118076d0b1d01e36",
        "39c45707eafdeb5d631c350f6002b9048a5c3f9f06b95812103d97fdc777c1fd",
    ),
    "best_fit": (
        "480b0142f6073dd6ef9eac1a8cf30944779dab52f96c2287d90bba54fd9aa82b",
        "e1776a0bca2ab640d53f8d0f8f449bb49fba9d303eb60790bf55538cd92d5d94",
    ),
    "fim": (
        "61ccf3b3372a40fee7ec2af99187de9882f63ab9a50ae381bf6fba830edccc42",
        "d76890febc7c151011946ca05b8e759b23960e33b4cdb9f674d0aaa8e8432905",
    ),
    "chunks": (
        "d212958eb4d8f267c948c472e7495fc1ab254e8f6f08a4ee5d3a55a326fca159",
        "7b131c1ac5142641048f9ed903ee34d46b33790a484789636c944197fc9452eb",
    ),
}


def byte_tokenizer() -> str:
    """A tokenizer.json with a token for each byte, an end-of-text token and four for fill-in-the-middle."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]
    special = ["<|endoftext|>", "<a>", "<b>", "<c>", "<d>"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": 256 + n, "content": name, **flags} for n, name in enumerate(special)],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {character: number for number, character in enumerate(characters)},
                "merges": [],
            },
        }
    )


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_same_inputs_make_the_dataset_of_earlier_versions(settings: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer())
    with (tmp_path / "texts.jsonl").open("w") as file:
        for text in sentences(60):
            file.write(json.dumps({"text": text}) + "\n")
    options = ["--tokenizer", tmp_path / "tokenizer.json", "--sequence-length", "32", "--heldout-fraction", "0.2"]
    words = ["prep", tmp_path / "texts.jsonl", "--name", "d", "--output", tmp_path, "--workers", "1", *options]
    result = CliRunner().invoke(main, [*map(str, words), *SETTINGS[settings]])
    assert result.exit_code == 0, result.output
    sets = json.loads((tmp_path / "d" / "manifest.json").read_text())
    found = tuple(sets[name]["id"] for name in ("train", "heldout"))
    assert found == IDS[settings]
