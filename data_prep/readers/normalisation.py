"""Changes to text that a preparation may ask for by name; without them no character changes.

They come before hashing, so they affect a document's side, its place and whether it is a duplicate.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal

from weftrain.core.errors import DataError

_LONG_RUN = re.compile(r"[^\w\x00-\x7f]{257,}")  # no combining mark is a word character


def unicode_form(form: Literal["NFC", "NFKC"], text: str) -> str:
    """unicodedata.normalize without its quadratic time for runs of combining marks, which it sorts by insertion. Long
    runs, which no language has but anybody can write, are first sorted stably by combining class, as the standard does.
    """
    if _LONG_RUN.search(text):
        decomposed: Literal["NFD", "NFKD"] = "NFD" if form == "NFC" else "NFKD"
        text = _LONG_RUN.sub(lambda run: _in_order(run[0], decomposed), text)
    return unicodedata.normalize(form, text)


def _in_order(run: str, form: Literal["NFD", "NFKD"]) -> str:
    marks = [mark for character in run for mark in unicodedata.normalize(form, character)]
    classes = [unicodedata.combining(mark) for mark in marks]
    group, groups = 0, []  # marks are sorted between characters of class 0, which stay where they are
    for combining in classes:
        group += combining == 0
        groups.append(group)
    order = sorted(range(len(marks)), key=lambda place: (groups[place], classes[place]))
    return "".join(marks[place] for place in order)


NORMALISATIONS: dict[str, Callable[[str], str]] = {
    "NFC": lambda text: unicode_form("NFC", text),
    "NFKC": lambda text: unicode_form("NFKC", text),
    "newlines": lambda text: text.replace("\r\n", "\n").replace("\r", "\n"),
    "strip_bom": lambda text: text.removeprefix("\ufeff"),
}


def check_normalisations(names: Sequence[str]) -> None:
    """Raises DataError for an unknown name."""
    for name in names:
        if name not in NORMALISATIONS:
            raise DataError(f"--normalise {name}: there is {', '.join(NORMALISATIONS)}")


def normalise(text: str, names: Sequence[str]) -> str:
    """The text after each of these, in order."""
    for name in names:
        text = NORMALISATIONS[name](text)
    return text
