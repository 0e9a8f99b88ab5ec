"""Changes to text that a preparation may ask for by name. Without it no character is changed.

What a reader would get wrong: a document's hash, and so its side, its place and whether it is a duplicate, is of the text *after* these.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

from weftrain.core.errors import DataError

NORMALISATIONS: dict[str, Callable[[str], str]] = {
    "NFC": lambda text: unicodedata.normalize("NFC", text),
    "NFKC": lambda text: unicodedata.normalize("NFKC", text),
    "newlines": lambda text: text.replace("\r\n", "\n").replace("\r", "\n"),
    "strip_bom": lambda text: text.removeprefix("\ufeff"),
}


def check_normalisations(names: Sequence[str]) -> None:
    """Raises DataError for a name that there is none of."""
    for name in names:
        if name not in NORMALISATIONS:
            raise DataError(f"--normalise {name}: there is {', '.join(NORMALISATIONS)}")


def normalise(text: str, names: Sequence[str]) -> str:
    """The text after each of these, in the order given."""
    for name in names:
        text = NORMALISATIONS[name](text)
    return text
