r"""Where a long text may be cut so that the ids of its pieces, in sequence, are exactly those of the whole.

The reference keeps some 130 bytes for each byte that it encodes at once, and takes a whole text for one word where a
tokenizer has no pre-tokenizer, as LLaMA's. So long texts are cut, only where that is provably without effect:

- Pre-tokenizers that split by character class always split between a letter or digit and the white space or punctuation
  after it (except an apostrophe, which begins `'s`), nothing looks back, and what looks ahead (`\s+(?!\S)`) stands at
  white space. This is proven for each pattern in `_ALTERNATIVES`; a pattern with any other alternative is not cut.
- BPE without a pre-tokenizer may be cut before a space (or newline) that follows something else, if no vocabulary entry
  has one inside: merges only ever make entries.
- Normalizers must do the same to both sides: none admitted here joins a letter to the space or punctuation after it.
- Added tokens that text may become must not touch the cut.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from weftrain.data_prep.tokens.added_tokens import may_hold_added_token, normalizers_of
from weftrain.data_prep.tokens.proven_shapes import SPACE, flat

# Letters of scripts whose characters have been letters since Unicode 3, and compose with nothing that may follow the
# cut.
_LETTERS = (
    "A-Za-z\u00e0-\u00f6\u00f8-\u00ff\u03b1-\u03c9\u0410-\u044f\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
_PUNCTUATION = r"""!"#$%&()*+,\-./:;<=>?@\[\]^`{|}~\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"""
_LETTER_ALTERNATIVES = {
    r" ?\p{L}+",
    r"\s?\p{L}+",
    r"[\p{L}]+",
    r"\p{L}+",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?+\p{L}+",
    r"[^\r\n\p{L}\p{N}]?+\p{L}++",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
}
_NUMBER_ALTERNATIVES = {r" ?\p{N}+", r"\p{N}+", r"\p{N}{1,3}", r"\p{N}{1,3}+", r"\p{N}", r"[\p{N}]", r"\d+", r"\d"}
_ALTERNATIVES = (
    _LETTER_ALTERNATIVES
    | _NUMBER_ALTERNATIVES
    | {
        "'s",
        "'t",
        "'re",
        "'ve",
        "'m",
        "'ll",
        "'d",
        "'(?:[sdmt]|ll|ve|re)",
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        "'(?i:[sdmt]|ll|ve|re)",
    }
    | {
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
        r" ?[^\s\p{L}\p{N}]+",
        r"[^\s\p{L}\p{N}]+",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*+",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        r"\s?\p{P}+",
        r"[\r\n]",
        r"\s*[\r\n]+",
        r"\s*[\r\n]",
        r"\s++$",
        r"\s+(?!\S)",
        r"\s+",
        r"\s",
    }
)
_CLASS_SPLITTERS = ("Whitespace", "BertPreTokenizer")  # split between a letter and both white space and punctuation
_LOCAL_SPLITTERS = ("Digits", "Punctuation")  # split more, and by the class of each character alone
_LOCAL_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Nmt", "Precompiled")


@dataclass(frozen=True)
class Cutting:
    """How a tokenizer's texts are cut. places: each match may begin a piece. continuing: tokenizer.json for later
    pieces. may_cut: whether this text may be cut at all. blocked: whether an added token touches this place.
    """

    places: re.Pattern[str]
    continuing: dict[str, Any]
    may_cut: Callable[[str], bool]
    blocked: Callable[[str, int], bool]

    def pieces(self, text: str, length: int) -> Iterator[str]:
        """The text in pieces of about `length` characters, or more where there is no place to cut."""
        start = 0
        while len(text) - start > length:
            cut = self._next(text, start + length)
            if cut < 0:
                break
            yield text[start:cut]
            start = cut
        yield text[start:]

    def _next(self, text: str, start: int) -> int:
        while (found := self.places.search(text, start)) is not None:
            if not self.blocked(text, found.start()):
                return found.start()
            start = found.start() + 1
        return -1


def cutting_of(tree: dict[str, Any]) -> Cutting | None:
    """How long texts are cut; None where no way is known to be exact. tree: tokenizer.json."""
    places = _places_without_splitter(tree) if tree.get("pre_tokenizer") is None else _places_of_splitter(tree)
    if places is None:
        return None
    kept = [normalizer for normalizer in normalizers_of(tree) if normalizer["type"] != "Prepend"]
    continuing = tree
    if len(kept) < len(normalizers_of(tree)):
        continuing = tree | {"normalizer": {"type": "Sequence", "normalizers": kept} if kept else None}
    holds = may_hold_added_token(tree)
    if holds is None:
        return Cutting(places, continuing, lambda text: True, lambda text, place: False)
    forms = {normalizer["type"] for normalizer in normalizers_of(tree)}
    # from what a token's normalised form may have come is not known, so only texts without one are cut
    if not forms <= {"NFC"}:
        return Cutting(places, continuing, lambda text: not holds(text), lambda text, place: False)
    contents = [token["content"] for token in tree["added_tokens"] if not token["special"]]
    contents += [unicodedata.normalize("NFC", content) for content in contents if forms]
    # NFC makes one character of at most three, and moves none past another letter
    reach = 4 * max(map(len, contents)) + 8

    def blocked(text: str, place: int) -> bool:
        if forms and not (near := text[max(0, place - reach) : place + reach]).isascii():
            return holds(near)
        return any(content in text[max(0, place - len(content)) : place + len(content)] for content in contents)

    return Cutting(places, continuing, lambda text: True, blocked)


def _places_without_splitter(tree: dict[str, Any]) -> re.Pattern[str] | None:
    model = tree["model"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    kinds = [normalizer if normalizer["type"] != "Prepend" else "Prepend" for normalizer in normalizers_of(tree)]
    if model.get("type") != "BPE" or model.get("ignore_merges") or kinds not in (["Prepend", replace], [replace]):
        return None
    if not _never_inside(model, SPACE):
        return None
    newline = r"|(?<=[^\n])\n" if _never_inside(model, "\n") else ""
    return re.compile(rf"(?<=[^ {SPACE}]) {newline}")


def _never_inside(model: dict[str, Any], character: str) -> bool:
    """Whether no vocabulary entry has the character after another one, and it can be spelled at all."""
    vocab = model["vocab"]
    spelled = [f"<0x{byte:02X}>" for byte in character.encode()]
    inside = re.compile(f"[^{character}]{character}")
    if any(inside.search(token) for token in vocab):
        return False
    if character in vocab:
        return True
    by_bytes = bool(model.get("byte_fallback")) and all(token in vocab for token in spelled)
    return by_bytes and not any(token != entry and token in entry for token in spelled for entry in vocab)


def _places_of_splitter(tree: dict[str, Any]) -> re.Pattern[str] | None:
    """Before a space after a letter or digit; by character class also before newlines and punctuation."""
    steps = flat(tree["pre_tokenizer"])
    if not all(map(_is_local, steps)) or not all(map(_keeps_letters_apart, normalizers_of(tree))):
        return None
    kinds = {step["type"] for step in steps}
    if "Metaspace" in kinds:
        splits = "WhitespaceSplit" in kinds or all(step.get("split", True) for step in steps)
        return re.compile(f"(?<=[0-9{_LETTERS}]) ") if splits and kinds <= {"Metaspace", "WhitespaceSplit"} else None
    letters = any(_splits_at(step, _LETTER_ALTERNATIVES) for step in steps)
    numbers = any(_splits_at(step, _NUMBER_ALTERNATIVES) or step["type"] == "Digits" for step in steps)
    if not letters:
        return re.compile(f"(?<=[0-9{_LETTERS}]) ") if "WhitespaceSplit" in kinds else None
    before = f"(?<=[{'0-9' if numbers else ''}{_LETTERS}])"
    spaced = any(step["type"] == "ByteLevel" and step["add_prefix_space"] for step in steps)
    only_forms = all(
        normalizer["type"] in ("NFC", "NFD", "Lowercase", "StripAccents") for normalizer in normalizers_of(tree)
    )
    return re.compile(rf"{before} " if spaced or not only_forms else rf"{before}[ \n{_PUNCTUATION}]")


def _is_local(step: dict[str, Any]) -> bool:
    if step["type"] == "Split":
        whole = (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))
        return whole and set(alternatives(step["pattern"].get("Regex") or "")) <= _ALTERNATIVES
    return step["type"] in ("ByteLevel", "Metaspace", "WhitespaceSplit", *_CLASS_SPLITTERS, *_LOCAL_SPLITTERS)


def _splits_at(step: dict[str, Any], kinds: set[str]) -> bool:
    """Whether a step splits after every run of letters (or numbers)."""
    if step["type"] == "Split":
        return bool(set(alternatives(step["pattern"]["Regex"])) & kinds)
    return step["type"] in _CLASS_SPLITTERS or (step["type"] == "ByteLevel" and step.get("use_regex", True))


def _keeps_letters_apart(normalizer: dict[str, Any]) -> bool:
    if normalizer["type"] == "Strip":
        return not normalizer["strip_left"]  # a piece begins with a space, and never ends with one
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"]
        return pattern.get("Regex") == " {2,}" or (
            bool(pattern.get("String")) and not re.search(r"[\w\s]", pattern["String"])
        )
    return normalizer["type"] in _LOCAL_NORMALIZERS


def alternatives(pattern: str) -> list[str]:
    """A pattern's top-level alternatives."""
    found, depth, in_class, start, place = [], 0, False, 0, 0
    while place < len(pattern):
        sign = pattern[place]
        if sign == "\\":
            place += 1
        elif in_class:
            in_class = sign != "]"
        elif sign == "[":
            in_class = True
        elif sign in "()":
            depth += 1 if sign == "(" else -1
        elif sign == "|" and not depth:
            found.append(pattern[start:place])
            start = place + 1
        place += 1
    return [*found, pattern[start:]]
