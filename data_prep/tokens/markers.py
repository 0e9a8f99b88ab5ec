"""The tokens that a dataset puts around and into documents: start, end, and those of fill-in-the-middle.

`Markers` are names, as options give them; `marker_ids` finds them in a tokenizer. A document in a shard is bos, its own
tokens, eos, where one of bos and eos may be missing. A marker's name in text stays text (tokenization.py).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from weftrain.core.errors import DataError
from weftrain.core.formats.dataset_manifest import DatasetManifest

EOS_CANDIDATES = ("</s>", "<|endoftext|>")
NO_EOS = "none"
_SHOWN_TOKENS = 40


class FimIds(NamedTuple):
    """Ids of the FIM control tokens. pad: written by fim/released.py alone; None if missing."""

    prefix: int
    middle: int
    suffix: int
    pad: int | None


@dataclass(frozen=True)
class Markers:
    """Names of tokens. eos: None for the first of EOS_CANDIDATES, NO_EOS for none. bos: None for none. fim: prefix,
    middle, suffix and perhaps pad; () for `<|fim_prefix|>` or `<fim_prefix>` and so on.
    """

    eos: str | None = None
    bos: str | None = None
    fim: tuple[str, ...] = ()

    @property
    def named(self) -> tuple[str, ...]:
        return tuple(
            name for name in (self.bos, None if self.eos == NO_EOS else self.eos, *self.fim) if name is not None
        )


@dataclass(frozen=True)
class MarkerIds:
    """Ids of Markers; eos or bos None where documents have none, fim None where no names are given."""

    eos: int | None
    bos: int | None = None
    fim: FimIds | None = None

    @property
    def separator(self) -> int:
        """The id that separates documents and fills rows: the end token, else the start token."""
        found = self.bos if self.eos is None else self.eos
        assert found is not None
        return found

    @property
    def all(self) -> set[int]:
        return {index for index in (self.eos, self.bos, *(self.fim or ())) if index is not None}

    def own(self, tokens: np.ndarray) -> slice:
        """Where a whole document's own tokens lie: after one start token, before one end token."""
        start = int(self.bos is not None and len(tokens) > 0 and int(tokens[0]) == self.bos)
        has_end = self.eos is not None and len(tokens) > start and int(tokens[-1]) == self.eos
        return slice(start, len(tokens) - has_end)


def marker_ids(tokenizer: Tokenizer, markers: Markers, where: str) -> MarkerIds:
    """The ids of a tokenizer's tokens of these names. where: begins an error's text. Raises DataError."""
    eos: int | None = None
    if markers.eos is None:
        eos = next((found for token in EOS_CANDIDATES if (found := tokenizer.token_to_id(token)) is not None), None)
        if eos is None:
            raise DataError(
                f"{where}: has no token {' or '.join(EOS_CANDIDATES)} to end a document with; name its end token with "
                f"--eos (--eos {NO_EOS} --bos TOKEN: documents begin with a token and have no other); "
                f"{token_names(tokenizer)}"
            )
    elif markers.eos != NO_EOS:
        eos = _named(tokenizer, markers.eos, "--eos", where)
    elif markers.bos is None:
        raise DataError(
            f"--eos {NO_EOS}: nothing would tell documents apart: name the token that each begins with by --bos"
        )
    bos = None if markers.bos is None else _named(tokenizer, markers.bos, "--bos", where)
    if not markers.fim:
        return MarkerIds(eos, bos)
    check_fim_names(markers.fim)
    names = [_named(tokenizer, name, "--fim-tokens", where) for name in markers.fim]
    ids = MarkerIds(eos, bos, FimIds(names[0], names[1], names[2], names[3] if len(names) > 3 else None))
    if len(ids.all) < len(names) + len({eos, bos} - {None}):
        raise DataError(
            f"{where}: --fim-tokens {','.join(markers.fim)}: names a token twice, or the start or end token"
        )
    return ids


def recorded_markers(manifest: DatasetManifest) -> Markers:
    """The markers that a dataset was prepared with."""
    recorded = manifest.preparation
    eos, bos, fim = (None if recorded.get(key) is None else str(recorded[key]) for key in ("eos", "bos", "fim_tokens"))
    return Markers(eos, bos, fim_names(fim))


def fim_names(text: str | None) -> tuple[str, ...]:
    """From prefix,middle,suffix[,pad] as --fim-tokens and the manifest have it."""
    return () if text is None else tuple(text.split(","))


def check_fim_names(names: tuple[str, ...]) -> None:
    """Raises DataError unless there are three or four names."""
    if len(names) not in (3, 4) or not all(names):
        raise DataError(
            f"--fim-tokens {','.join(names)}: give three or four names with commas between: prefix,middle,suffix[,pad]"
        )


def _named(tokenizer: Tokenizer, name: str, option: str, where: str) -> int:
    index = tokenizer.token_to_id(name)
    if index is None:
        raise DataError(f"{where}: has no token {name!r} for {option}; {token_names(tokenizer, name)}")
    return int(index)


def token_names(tokenizer: Tokenizer, near: str | None = None) -> str:
    """A tokenizer's special tokens, those spelled like `near` first, for an error's text."""
    has = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values())
    alike = [] if near is None else difflib.get_close_matches(near, has, 3)
    shown = [*alike, *(token for token in has if token not in alike)][:_SHOWN_TOKENS]
    return f"its special tokens are {', '.join(shown)}" if shown else "it has no special tokens"
