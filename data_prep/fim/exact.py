"""Exact fill-in-the-middle: a document's tokens are cut at two positions and rearranged, before packing, reversibly.

Cuts lie between tokens as encoded. Nothing is decoded or encoded again, so a transformed document has its own tokens
and three control tokens, and (mode, a, b) restores it. The draw is a function of (seed, content, epoch) alone. By rows:
context.py; as the released scripts did: released.py.

| mode  | tokens, with P, S, M the control tokens fim_prefix, fim_suffix, fim_middle |
|-------|----------------------------------------------------------------------------|
| PLAIN | the document                                                               |
| PSM   | P prefix S suffix M middle                                                 |
| SPM   | P S suffix M prefix middle                                                 |

Source: Bavarian et al., "Efficient Training of Language Models to Fill in the Middle" (2022); SPM is its second
variant, as in StarCoder and CrystalCoder. There the cuts are between characters.
"""

from __future__ import annotations

import hashlib

import numpy as np

from weftrain.core.errors import DataError
from weftrain.data_prep.tokens.control_tokens import CONTROL_TOKENS, CRYSTALCODER_TOKENS
from weftrain.data_prep.tokens.markers import FimIds, Markers
from weftrain.data_prep.tokens.tokenization import TextEncoder

PLAIN, PSM, SPM = 0, 1, 2
MODES = ("plain", "psm", "spm")
NUM_SENTINELS = 3  # tokens that a transformed document has more


def fim_ids(encoder: TextEncoder) -> FimIds:
    """The tokens named by --fim-tokens, else `<|fim_prefix|>` or `<fim_prefix>` and so on. Raises DataError."""
    if encoder.markers.fim is not None:
        return encoder.markers.fim
    prefix, middle, suffix, pad = (encoder.special_id(f"fim_{name}") for name in FimIds._fields)
    if prefix is None or middle is None or suffix is None:
        raise DataError(
            "the tokenizer has no tokens <|fim_prefix|>, <|fim_middle|> and <|fim_suffix|>, or <fim_prefix> and so "
            f"on: name its own with --fim-tokens prefix,middle,suffix; {encoder.special_tokens()}"
        )
    return FimIds(prefix, middle, suffix, pad)


def check_markers(markers: Markers, encoder: TextEncoder | None, fim_mode: str | None) -> None:
    """Raises DataError for tokens that the tokenizer lacks. encoder: None where one will be trained."""
    if encoder is not None:
        if fim_mode is not None:
            ids = fim_ids(encoder)
            if fim_mode == "released":
                pad_id(ids)
        return
    known = (*CONTROL_TOKENS, *CRYSTALCODER_TOKENS)
    missing = [name for name in markers.named if name not in known]
    if missing:
        shown = [name for name in known if "unused" not in name]
        raise DataError(
            f"{missing[0]!r} is no token of the tokenizer that is trained here, which has {', '.join(shown)}; name "
            "one of these with --bos, --eos and --fim-tokens, or a tokenizer.json with --tokenizer"
        )


def pad_id(ids: FimIds) -> int:
    """The token that fills short rows in released.py. Raises DataError where there is none."""
    if ids.pad is None:
        raise DataError(
            "--fim-mode released fills rows with a token fim_pad, which the tokenizer lacks: name one as the fourth of "
            "--fim-tokens"
        )
    return ids.pad


def draw(seed: int, content: bytes, epoch: int, rate: float, spm_share: float, num_tokens: int) -> tuple[int, int, int]:
    """(mode, a, b) of a document: prefix [0, a), middle [a, b), suffix [b, num_tokens). (PLAIN, 0, 0) for 1 - rate.

    content: the document's hash. SHA-256("fim <seed> <epoch> " + content) gives four numbers below 2^64: whether, SPM
    or PSM, and two positions of 0..num_tokens, uniform to num_tokens / 2^64, sorted. Parts may be empty. A document of
    no tokens stays plain; there is no other minimum length.
    """
    mode, first, second = numbers(b"fim %d %d " % (seed, epoch) + content, rate, spm_share)
    return (PLAIN, 0, 0) if not num_tokens else (mode, *cuts(mode, first, second, num_tokens))


def numbers(text: bytes, rate: float, spm_share: float) -> tuple[int, int, int]:
    """The mode, and two numbers below 2^64 from which positions follow."""
    digest = hashlib.sha256(text).digest()
    whether, which, first, second = (int.from_bytes(digest[start : start + 8]) for start in range(0, 32, 8))
    if whether >= rate * 2.0**64:
        return PLAIN, 0, 0
    return SPM if which < spm_share * 2.0**64 else PSM, first, second


def cuts(mode: int, first: int, second: int, num_tokens: int) -> tuple[int, int]:
    if mode == PLAIN:
        return 0, 0
    a, b = sorted((number * (num_tokens + 1)) >> 64 for number in (first, second))
    return a, b


def transform(tokens: np.ndarray, mode: int, a: int, b: int, ids: FimIds) -> np.ndarray:
    """Tokens [n] without the end token -> [n + 3] in the same dtype; unchanged for PLAIN. Raises DataError."""
    if mode == PLAIN:
        return tokens
    _check(mode, a, b, len(tokens), tokens.dtype, ids)
    prefix, middle, suffix = tokens[:a], tokens[a:b], tokens[b:]
    p, m, s = (np.array([token], tokens.dtype) for token in (ids.prefix, ids.middle, ids.suffix))
    return np.concatenate([p, prefix, s, suffix, m, middle] if mode == PSM else [p, s, suffix, m, prefix, middle])


def restore(tokens: np.ndarray, mode: int, a: int, b: int, ids: FimIds) -> np.ndarray:
    """The document's own tokens [n], from the [n + 3] that `transform` made. Raises DataError where they are too short,
    or a control token is not in its place.
    """
    if mode == PLAIN:
        return tokens
    length = len(tokens) - NUM_SENTINELS
    _check(mode, a, b, length, tokens.dtype, ids)
    after_suffix = length - b
    places = (0, a + 1, a + after_suffix + 2) if mode == PSM else (0, 1, after_suffix + 2)
    for place, name in zip(places, ("prefix", "suffix", "middle"), strict=True):
        if tokens[place] != getattr(ids, name):
            raise DataError(
                f"FIM record ({MODES[mode]}, {a}, {b}): token {place} is {tokens[place]}, not fim_{name} "
                f"({getattr(ids, name)}): give the whole document that the record is of, without its end token"
            )
    _, s, m = places
    if mode == PSM:
        return np.concatenate([tokens[1:s], tokens[m + 1 :], tokens[s + 1 : m]])
    return np.concatenate([tokens[m + 1 :], tokens[s + 1 : m]])


def _check(mode: int, a: int, b: int, num_tokens: int, dtype: np.dtype, ids: FimIds) -> None:
    """Raises DataError."""
    if mode not in (PSM, SPM) or not 0 <= a <= b <= num_tokens:
        raise DataError(
            f"FIM record ({mode}, {a}, {b}): is not of a document of {num_tokens} tokens: the mode must be {PLAIN}, "
            f"{PSM} or {SPM} and the cuts rise within it; give the whole document that the record is of"
        )
    if (largest := max(ids[:3])) > np.iinfo(dtype).max:
        raise DataError(
            f"FIM token id {largest} does not fit tokens of {dtype}: give tokens of the tokenizer's own dtype"
        )
