"""Which documents may contain an added token as text: an engine that ignores added tokens leaves them to the reference.

`tokenizers` matches an added token in the raw text or, if the token is `normalized`, in the normalised text: `cafe` +
U+0301 holds the token `café` after NFC. So both forms are searched, which may find too much but never too little.
Normalising is skipped where it cannot matter, and uses an exact Python equivalent where one exists, because the library
takes a second for every 7 MB.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any, Literal

from tokenizers import Tokenizer

Test = Callable[[str], bool]
Step = Callable[[str], str]
_MOST_HEADS = 16  # substrings that every text is searched for; more of them are searched for by what they begin with
_FORMS: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")


def may_hold_added_token(tree: dict[str, Any]) -> Test | None:
    """A test for texts in which a non-special added token could match, or None. tree: tokenizer.json."""
    added = [token for token in tree.get("added_tokens") or [] if not token["special"]]
    if not added:
        return None
    contents = {token["content"] for token in added}
    in_raw = _contains_any(contents)
    steps = [_step(normalizer) for normalizer in normalizers_of(tree)]
    if not steps or not any(token["normalized"] for token in added):
        return in_raw
    # The library looks for the normalised content of a token. (Its own releases differ in whether, so both are searched
    # for.)
    in_normalised = _contains_any(contents | {_through(steps, content) for content in contents})
    return lambda text: in_raw(text) or in_normalised(_through(steps, text))


def normalizers_of(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The normalizers that a text passes through, in order."""
    waiting, found = [tree.get("normalizer")], []
    while waiting:
        normalizer = waiting.pop(0)
        if normalizer is None:
            continue
        if normalizer["type"] == "Sequence":
            waiting = [*normalizer["normalizers"], *waiting]
        else:
            found.append(normalizer)
    return found


def _through(steps: Iterable[Step], text: str) -> str:
    for step in steps:
        text = step(text)
    return text


def _step(normalizer: dict[str, Any]) -> Step:
    """What one normalizer does to a text, exactly."""
    kind = normalizer["type"]
    by_library = _library_step(normalizer)
    if kind in _FORMS:
        form = _FORMS[_FORMS.index(kind)]
        # Text that is normalised stays as it is in every later version of Unicode; the library's tables are older than
        # Python's.
        return lambda text: text if text.isascii() or unicodedata.is_normalized(form, text) else by_library(text)
    if kind == "StripAccents":
        return lambda text: text if text.isascii() else by_library(text)
    if kind == "Lowercase":
        return lambda text: text.lower() if text.isascii() else by_library(text)
    if kind == "Prepend":
        prefix: str = normalizer["prepend"]
        return lambda text: prefix + text if text else text
    if kind == "Replace" and normalizer["pattern"].get("String"):
        old, new = normalizer["pattern"]["String"], normalizer["content"]
        return lambda text: text.replace(old, new)
    return by_library


def _library_step(normalizer: dict[str, Any]) -> Step:
    model = {"type": "BPE", "vocab": {}, "merges": []}
    alone = Tokenizer.from_str(
        json.dumps({"version": "1.0", "added_tokens": [], "normalizer": normalizer, "model": model})
    )
    return lambda text: str(alone.normalizer.normalize_str(text))


def _contains_any(contents: Iterable[str]) -> Test:
    """A test for texts that contain one of `contents`; many with a common beginning are searched by that first."""
    needles: list[str] = []
    for content in sorted(set(contents), key=len):
        if not any(needle in content for needle in needles):  # what holds a shorter one is found with it
            needles.append(content)
    by_head: dict[str, list[str]] = {}
    for length in (64, 16, 8, 6, 4, 3, 2, 1):
        by_head = {}
        for needle in needles:
            by_head.setdefault(needle[:length], []).append(needle)
        if len(by_head) <= _MOST_HEADS:
            break
    return lambda text: any(head in text and any(needle in text for needle in group) for head, group in by_head.items())
