"""Settings that gigatoken passes over go to the reference, whatever the texts; published constructions stay with
gigatoken.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from weftrain.data_prep.tokens.proven_shapes import not_proven
from weftrain.data_prep.tokens.tokenization import TextEncoder, make_encoder

PATTERN = (
    # Llama 3's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
AFTER_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


def steps(*found: dict[str, Any]) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(found)}}


def model(tree: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"model": tree["model"] | changes}


@pytest.fixture(scope="module")
def tree(encoder: TextEncoder) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(encoder.data)
    return value


def test_published_constructions_are_proven(tree: dict[str, Any]) -> None:
    for change in (
        {},
        {"pre_tokenizer": BYTES | {"use_regex": True, "add_prefix_space": True}},
        steps(SPLIT, BYTES),
        model(tree, ignore_merges=True),
        model(tree, end_of_word_suffix="", continuing_subword_prefix=None),
        {"pre_tokenizer": METASPACE},
        {"pre_tokenizer": AFTER_SPACES, "normalizer": TO_SPACE},
        {
            "pre_tokenizer": None,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, TO_SPACE]},
        },
    ):
        assert not_proven(tree | change) is None, change


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: steps(SPLIT, BYTES | {"use_regex": True}),
        lambda tree: steps(SPLIT, BYTES | {"add_prefix_space": True}),
        lambda tree: steps(SPLIT | {"behavior": "Removed"}, BYTES),
        lambda tree: steps(SPLIT | {"behavior": "MergedWithNext"}, BYTES),
        lambda tree: {"pre_tokenizer": BYTES},
        lambda tree: {"pre_tokenizer": None},
        lambda tree: model(tree, end_of_word_suffix="e"),
        lambda tree: model(tree, merges=[*tree["model"]["merges"], *tree["model"]["merges"][:20]]),
        lambda tree: model(tree, vocab={**tree["model"]["vocab"], "漢": 351}),
        lambda tree: {"pre_tokenizer": METASPACE} | model(tree, ignore_merges=True),
    ],
)
def test_a_setting_that_was_not_compared_goes_to_the_reference(tree: dict[str, Any], change: Any) -> None:
    changed = copy.deepcopy(tree) | change(tree)
    assert not_proven(changed) is not None
    assert make_encoder(json.dumps(changed).encode(), "t").engine == "tokenizers"
