"""Fill-in-the-middle, exact: a document's tokens cut at two positions and rearranged, before packing, so that it can be
put back.

The cuts lie between tokens of the document as it was encoded. Nothing is decoded or encoded again, so a transformed
document has exactly its own tokens and three control tokens more, and (mode, a, b) with the tokens give it back. The
draw is a function of (seed, content, epoch) alone: no process, order or earlier draw changes it. By rows instead of
documents: fim_context.py. What the released scripts did: fim_released.py.

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
    """The tokens that --fim-tokens names, else those spelled `<|fim_prefix|>` or `<fim_prefix>`. Raises DataError where
    one is missing.
    """
    if encoder.markers.fim is not None:
        return encoder.markers.fim
    prefix, middle, suffix, pad = (encoder.special_id(f"fim_{name}") for name in FimIds._fields)
    if prefix is None or middle is None or suffix is None:
        raise DataError(
            "the tokenizer has no tokens <|fim_prefix|>, <|fim_middle|> and <|fim_suffix|>, or <fim_prefix> and so on: "
            "name its own with "
            f"--fim-tokens prefix,middle,suffix; {encoder.special_tokens()}"
        )
    return FimIds(prefix, middle, suffix, pad)


def check_markers(markers: Markers, encoder: TextEncoder | None, fim_mode: str | None) -> None:
    """Raises DataError for tokens that a dataset needs and the tokenizer lacks. encoder: None where one is trained
    here.
    """
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
            f"{missing[0]!r} is no token of the tokenizer that is trained here, which has {', '.join(shown)}; name one "
            "of these "
            "with --bos, --eos and --fim-tokens, or a tokenizer.json with --tokenizer"
        )


def pad_id(ids: FimIds) -> int:
    """The token with which fim_released.py fills short rows. Raises DataError where the tokenizer has none."""
    if ids.pad is None:
        raise DataError(
            "--fim-mode released fills rows with a token fim_pad, which the tokenizer lacks: name one as the fourth of "
            "--fim-tokens"
        )
    return ids.pad


def draw(seed: int, content: bytes, epoch: int, rate: float, spm_share: float, num_tokens: int) -> tuple[int, int, int]:
    """(mode, a, b) of a document: prefix [0, a), middle [a, b), suffix [b, num_tokens); (PLAIN, 0, 0) for the share 1 -
    rate.

    content: the document's hash. The digest SHA-256("fim <seed> <epoch> " + content) is four numbers below 2^64:
    whether, SPM or PSM, and two positions of 0..num_tokens, each as likely as another (to num_tokens / 2^64), sorted.
    Any of the three pieces may be empty. A document of no tokens stays plain; there is no other least length.
    """
    mode, first, second = numbers(b"fim %d %d " % (seed, epoch) + content, rate, spm_share)
    return (PLAIN, 0, 0) if not num_tokens else (mode, *cuts(mode, first, second, num_tokens))


def numbers(text: bytes, rate: float, spm_share: float) -> tuple[int, int, int]:
    """The mode, and two numbers below 2^64 for the positions."""
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
    """Tokens [n] of a document without its end token -> [n + 3] in the same dtype; the same array for PLAIN. Raises
    DataError.
    """
    if mode == PLAIN:
        return tokens
    _check(mode, a, b, len(tokens), tokens.dtype, ids)
    prefix, middle, suffix = tokens[:a], tokens[a:b], tokens[b:]
    p, m, s = (np.array([token], tokens.dtype) for token in (ids.prefix, ids.middle, ids.suffix))
    return np.concatenate([p, prefix, s, suffix, m, middle] if mode == PSM else [p, s, suffix, m, prefix, middle])


def restore(tokens: np.ndarray, mode: int, a: int, b: int, ids: FimIds) -> np.ndarray:
    """The document's own tokens [n], of [n + 3] as `transform` left them, its parts joined and the end token taken off.

    Raises DataError where they are not a document that was cut so: too short, or a control token is not where it must
    be.
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
                f"({getattr(ids, name)}): "
                "give the whole document that the record is of, without its end token"
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
            f"{PSM} or {SPM} "
            "and the cuts rise within it; give the whole document that the record is of"
        )
    if (largest := max(ids[:3])) > np.iinfo(dtype).max:
        raise DataError(
            f"FIM token id {largest} does not fit tokens of {dtype}: give tokens of the tokenizer's own dtype"
        )
