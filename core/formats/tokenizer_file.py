"""A tokenizer.json from anyone, opened so that equal texts get equal and complete ids.

A file may request random segmentation (a regularisation during training), truncation or padding. Shards and scores
store ids permanently, so the first is refused and the others are switched off.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

from weftrain.core.errors import DataError, one_line
from weftrain.core.formats.canonical import parse_json

# settings that make encoding random: BPE's dropout, Unigram's sampling of segmentations
_DRAWN = ("dropout", "alpha", "nbest_size")


def is_panic(error: BaseException) -> bool:
    """Whether an error is the panic of a Rust library: `except Exception` does not catch it."""
    return type(error).__module__ == "pyo3_runtime"


def library_stopped(error: BaseException) -> str:
    """An error or panic of the tokenizer library as one line with the remedy."""
    why = one_line(error, 120)
    if is_panic(error):
        return f"the tokenizer's library stopped ({why}): a pattern in it takes too long; use another tokenizer"
    return f"the tokenizer's library refuses the text ({why}); use a tokenizer that can encode it"


@contextlib.contextmanager
def panics_refused(where: str) -> Iterator[None]:
    """Around encoding: a panic, as of a pattern that takes too many steps, becomes a DataError that begins with
    `where`.
    """
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise DataError(f"{where}: {library_stopped(error)}") from error


def tokenizer_from(data: bytes, where: str, remedy: str = "name a Hugging Face tokenizers file") -> Tokenizer:
    """The tokenizer of a tokenizer.json's bytes. Raises DataError, which begins with `where` and ends with `remedy`."""
    try:
        tree: Any = parse_json(data)
        check_patterns(tree)
        tokenizer = Tokenizer.from_str(data.decode())
        model = tree["model"]
    except BaseException as error:  # the library raises nothing narrower than Exception, and panics
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise DataError(f"{where}: not a tokenizer.json: {one_line(error, 120)}; {remedy}") from error
    for key in _DRAWN:
        if model.get(key):
            raise DataError(
                f"{where}: model.{key} is {model[key]!r:.40}: the same text would become other ids each time; "
                f"set it to null: a tokenizer without it has the same vocabulary"
            )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


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
