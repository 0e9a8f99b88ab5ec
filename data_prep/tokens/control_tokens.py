"""Control tokens: their names, and what a tokenizer.json does with text that spells one or that it cannot spell."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from weftrain.data_prep.tokens.added_tokens import Test, may_hold_added_token
from weftrain.data_prep.tokens.markers import EOS_CANDIDATES

CONTROL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2, as LLaMA's and so Amber's and CrystalCoder's
# CrystalCoder's ids 32000.. in their order, spelled as in its released tokenizer; the ten last are unused there too.
CRYSTALCODER_TOKENS = (
    *(f"<|fim_{name}|>" for name in ("prefix", "middle", "suffix", "pad")),
    *("<|filename|>", "<|gh_stars|>"),
    *(f"<|issue_{name}|>" for name in ("start", "comment", "closed")),
    *(f"<|jupyter_{name}|>" for name in ("start", "text", "code", "output")),
    "<|empty_output|>",
    *(f"<|commit_{name}|>" for name in ("before", "msg", "after")),
    *("<|reponame|>", "<|im_start|>", "<|im_end|>", "<|sys_start|>", "<|sys_end|>"),
    *(f"<|unused_{index}|>" for index in range(22, 32)),
)
# No text becomes one of these, whether the tokenizer calls them special or not; each in both of its spellings.
CONTROL_NAMES = frozenset(
    [
        *CONTROL_TOKENS,
        *EOS_CANDIDATES,
        "<pad>",
        "<|pad|>",
        *CRYSTALCODER_TOKENS,
        *(f"<{name[2:-2]}>" for name in CRYSTALCODER_TOKENS),
    ]
)


def misread_as_control(tree: dict[str, Any]) -> Test | None:
    """A test for texts that spell `<unk>` or `<0x41>`, which a Unigram model takes for that token; None: no text can.
    The library matches every entry of a Unigram vocabulary in text; BPE and WordPiece only produce merges and words.
    """
    model = tree["model"]
    if model.get("type") != "Unigram":
        return None
    names = [piece for piece, _ in model["vocab"]]
    unknown = [] if model.get("unk_id") is None else [names[model["unk_id"]]]
    spelled = unknown + [name for name in names if model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", name)]
    return may_hold_added_token(
        {
            "normalizer": tree.get("normalizer"),
            "added_tokens": [{"content": name, "special": False, "normalized": True} for name in spelled],
        }
    )


def leaves_out(tree: dict[str, Any]) -> bool:
    """Whether a tokenizer drops text that it cannot spell: a BPE with neither an unknown token nor all bytes."""
    model = tree["model"]
    if model.get("type") != "BPE" or model.get("unk_token") is not None or _has_all_bytes(model):
        return False
    steps = json.dumps([tree.get("normalizer"), tree.get("pre_tokenizer")])
    return '"type": "ByteLevel"' not in steps or not set(pre_tokenizers.ByteLevel.alphabet()) <= model["vocab"].keys()


def unknown_id(tree: dict[str, Any], tokenizer: Tokenizer) -> int | None:
    """The id for text that the vocabulary cannot spell. None where there is none, where every byte is in the
    vocabulary, or where the id has another meaning too, such as the end of a text in GPT-2.
    """
    model = tree["model"]
    if _has_all_bytes(model):
        return None
    token = model.get("unk_token")
    index = model.get("unk_id") if token is None else tokenizer.token_to_id(token)
    if index is None or tokenizer.id_to_token(index) in CONTROL_NAMES - {"<unk>"}:
        return None
    return int(index)


def _has_all_bytes(model: dict[str, Any]) -> bool:
    """Whether byte fallback spells any text."""
    vocab = model.get("vocab") or {}
    return bool(
        model.get("byte_fallback")
        and isinstance(vocab, dict)
        and all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    )
