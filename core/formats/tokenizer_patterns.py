"""Patterns of a tokenizer.json that may be a stranger's: refused where matching could take time without end.

The library matches by backtracking. A pattern that repeats a group which itself repeats, `(a+)+`, takes time
exponential in the text; the library panics at a limit of its own, some tenths of a second into every match. Patterns of
published tokenizers repeat single characters and classes only, so any nested repetition without bound is refused before
a text is encoded. Other ways to write a slow pattern are left to that limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

MAX_PATTERN_CHARACTERS = 8192  # ten times the longest that is published
_TOKEN = re.compile(
    r"\\(?:[pPx]\{[^}]*\}|.)"  # an escape
    r"|\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]"  # a character class
    r"|\(\?#[^)]*\)|\((?:\?(?:<?[=!]|[a-zA-Z-]*:|>|<\w+>))?|\)"  # a group's two ends
    r"|\{\d*,?\d*\}|[*+?]|.",
    re.DOTALL,
)


def check_patterns(tree: Mapping[str, Any]) -> None:
    """tree: a tokenizer.json. Raises ValueError for a pattern in it that is too long or repeats a repetition."""
    for pattern in _patterns([tree.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]):
        if len(pattern) > MAX_PATTERN_CHARACTERS:
            raise ValueError(f"has a pattern of {len(pattern):,} characters, more than {MAX_PATTERN_CHARACTERS:,}")
        if repeats_a_repetition(pattern):
            raise ValueError(f"its pattern {pattern[:40]!r} repeats a repetition, which can take time without end")


def _patterns(tree: Any) -> Iterator[str]:
    found = [tree]
    while found:
        value = found.pop()
        if isinstance(value, dict):
            if isinstance(pattern := value.get("Regex"), str):
                yield pattern
            found += value.values()
        elif isinstance(value, list):
            found += value


def repeats_a_repetition(pattern: str) -> bool:
    """Whether a group that holds a repetition without bound is itself repeated without bound."""
    inside = [False]  # for each open group: whether it holds such a repetition
    closed = False  # whether the token before ended a group that does
    for token in _TOKEN.findall(pattern):
        if token[0] == "(" and not token.startswith("(?#"):
            inside.append(False)
            closed = False
        elif token == ")":
            closed = inside.pop() if len(inside) > 1 else False
            inside[-1] |= closed
        elif token in ("*", "+") or (token[0] == "{" and token.endswith(",}")):
            if closed:
                return True
            inside[-1] = True
        else:
            # (..)?+ and (..)?*, which Oniguruma takes for repetitions of the optional group
            closed = closed and token == "?"
    return False
