"""A tokenizer.json from outside, opened so that the same text gives the same ids, and all of them.

A file may ask for merges that are left out at random (a regularisation for training on the fly) and for sequences that
are cut or padded. Shards and scores hold ids for good: the first is refused, the second switched off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

from weftrain.core.errors import DataError, one_line
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.tokenizer_patterns import check_patterns

# Settings of a model's section by which encoding draws: BPE's dropout, Unigram's sampling of segmentations.
_DRAWN = ("dropout", "alpha", "nbest_size")


def is_panic(error: BaseException) -> bool:
    """Whether an error is the panic of a library written in Rust, which is no Exception: `except Exception` lets it
    pass.
    """
    return type(error).__module__ == "pyo3_runtime"


def library_stopped(error: BaseException) -> str:
    """What an error or a panic of the library means, and the remedy, in one line."""
    why = one_line(error, 120)
    if is_panic(error):
        return f"the tokenizer's library stopped ({why}): a pattern in it takes too long; use another tokenizer"
    return f"the tokenizer's library refuses the text ({why}); use a tokenizer that can encode it"


@contextlib.contextmanager
def panics_refused(where: str) -> Iterator[None]:
    """While a tokenizer encodes: a pattern that takes more steps than its library allows is a DataError, which begins
    with `where`.
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
