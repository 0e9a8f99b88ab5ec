"""Which tokenizers gigatoken encodes exactly as the reference does, judged by their settings.

gigatoken ignores settings that it does not know instead of refusing them, and texts on which they matter may be too
rare for a sample. So it is used only for settings that were compared with the reference one by one. (Which split
patterns it knows, it says itself.)
"""

from __future__ import annotations

from typing import Any

from tokenizers import pre_tokenizers

from weftrain.data_prep.tokens.added_tokens import normalizers_of

SPACE = "\u2581"  # what LLaMA-like normalizers write for a space
_TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
# Gemma's
_AFTER_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_BYTE_CHARACTERS = frozenset(pre_tokenizers.ByteLevel.alphabet())


def not_proven(tree: dict[str, Any]) -> str | None:
    """A setting of tokenizer.json that was not compared; None if all were."""
    model, steps = tree["model"], flat(tree.get("pre_tokenizer"))
    for setting in ("end_of_word_suffix", "continuing_subword_prefix"):
        if model.get(setting):
            return f"model.{setting} is {model[setting]!r}"
    merges = model.get("merges") or []
    if len({merge if isinstance(merge, str) else tuple(merge) for merge in merges}) < len(merges):
        return "a merge is listed twice"
    if steps and steps[-1]["type"] == "ByteLevel":
        return _byte_level(steps, model.get("vocab") or {})
    if model.get("ignore_merges"):
        return "model.ignore_merges, and its entries are not spelled in bytes"
    if not steps:
        return None if _TO_SPACE in normalizers_of(tree) else "no pre-tokenizer, and no normalizer that marks spaces"
    if steps != [_AFTER_SPACES] and [step["type"] for step in steps] != ["Metaspace"]:
        return f"pre-tokenizer {'+'.join(step['type'] for step in steps)}"
    return None


def _byte_level(steps: list[dict[str, Any]], vocab: dict[str, int]) -> str | None:
    *splits, last = steps
    isolated = all(
        (step["type"], step.get("behavior"), step.get("invert")) == ("Split", "Isolated", False) for step in splits
    )
    if not isolated:
        return "a step before ByteLevel that is not Split, Isolated and not inverted"
    if bool(splits) == last.get("use_regex", True) or (splits and last.get("add_prefix_space", True)):
        return (
            "ByteLevel splits too or puts a space first, after other splits; or does not split, and nothing else does"
        )
    foreign = next((token for token in vocab if not _BYTE_CHARACTERS.issuperset(token)), None)
    return (
        None
        if foreign is None
        else f"entry {foreign[:40]!r} of the vocabulary is not spelled in ByteLevel's characters"
    )


def flat(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, in order."""
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for one in pre_tokenizer["pretokenizers"] for step in flat(one)]
    return [pre_tokenizer]
