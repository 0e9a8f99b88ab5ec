"""Load any tokenizer.json, and encode text so that no text ever becomes a control token.

Two engines give the same ids: Hugging Face `tokenizers`, the reference, and `gigatoken`, about ten times faster and
compared with the reference in every run. A document that contains the characters `</s>` must not end there: control
tokens in text are spelled out, and one of their ids in the result is an error. Document ends come from `doc_end`, never
from an id.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from weftrain.core.errors import DataError, file_problem, one_line
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.formats.shard_format import token_dtype
from weftrain.core.formats.tokenizer_file import is_panic, library_stopped, tokenizer_from
from weftrain.data_prep.heldout import ASCII_SPACE
from weftrain.data_prep.tokens.compact_text import CompactTable, compact_table
from weftrain.data_prep.tokens.control_tokens import CONTROL_NAMES, leaves_out, misread_as_control, unknown_id
from weftrain.data_prep.tokens.engines import Gigatoken, Reference, TextTooLongError, open_gigatoken
from weftrain.data_prep.tokens.markers import MarkerIds, Markers, marker_ids, token_names
from weftrain.data_prep.tokens.packing import split
from weftrain.data_prep.tokens.sentencepiece_model import is_sentencepiece, tokenizer_json

DIFFERED = "gigatoken and the reference differed on a document of the sample"
_CHECKED = 2  # of 256: documents whose hash begins with a smaller byte are encoded by both engines
_LARGE_CHARACTERS = 1 << 16  # of a text that is compared; of a longer one only so much is
_BLOCK_TOKENS = 1 << 20
_UNSPELLED = "\ue000unspelled"  # stands for what a BPE without an unknown token would leave out
_KEEP = "use a tokenizer with an unknown token or with bytes"
_SPELL = "use a tokenizer that can spell its special tokens out"
DEFAULT_MARKERS = Markers()


@dataclass
class Counts:
    """Numbers of documents encoded by the reference, by the fast engine, and by both to compare; `encode` adds to them.
    unknown: tokens for text that the vocabulary cannot spell. cut, divided: conversations that were longer than a row.
    cut_prompts, cut_answers: pairs of which such a part was cut. no_preference: records that were left out.
    weighted: documents whose loss has a weight other than 0 and 1.
    """

    reference: int = 0
    fast: int = 0
    checked: int = 0
    unknown: int = 0
    cut: int = 0
    divided: int = 0
    cut_prompts: int = 0
    cut_answers: int = 0
    no_preference: int = 0
    weighted: int = 0


class EnginesDifferError(DataError):
    """The fast engine gave other ids, or none. Under --engine auto the reference then encodes everything anew."""


class TextEncoder:
    """A tokenizer as the pipeline uses it. data: tokenizer.json. vocab_size: one more than the largest id.

    engine_reason: why not gigatoken, or None. control_ids: sorted ids that no text may become. unknown_id: for text
    that the vocabulary cannot spell; None where it can spell all text, or the id has another meaning. tree: the
    tokenizer.json by which text is encoded; in it the id vocab_size stands for what would be left out.
    """

    def __init__(self, data: bytes, tokenizer: Tokenizer, markers: MarkerIds, engine: str, where: str) -> None:
        self.data, self.markers = data, markers
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype = token_dtype(self.vocab_size)
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        control = {
            index for index, token in added.items() if token.special or token.content in CONTROL_NAMES
        } | markers.all
        control |= {index for name in CONTROL_NAMES if (index := tokenizer.token_to_id(name)) is not None}
        tree = json.loads(data) | {"truncation": None, "padding": None}
        self.unknown_id = unknown_id(tree, tokenizer)
        if self.unknown_id in markers.all:
            self.unknown_id = None
        self.control_ids = np.array(sorted(control - {self.unknown_id}))
        self._is_control = np.zeros(self.vocab_size + 1, np.bool_)  # the last: for _UNSPELLED
        self._is_control[[*self.control_ids, self.vocab_size]] = True
        self._misread = misread_as_control(tree)
        listed = tree.get("added_tokens") or []
        as_called = all(token["special"] == (token["id"] in control) for token in listed)
        for token in listed:
            token["special"] = token["id"] in control  # so that it is spelled out, whatever the file calls it
        opened: Gigatoken | str | None
        if leaves_out(tree):
            spelling = tree["model"] | {
                "vocab": tree["model"]["vocab"] | {_UNSPELLED: self.vocab_size},
                "unk_token": _UNSPELLED,
            }
            tree = tree | {"model": spelling}
            self._reference = Reference(tree)
            opened = None if engine == "tokenizers" else "its model leaves out what its vocabulary cannot spell"
        else:
            self._reference = Reference(tree, self.dtype, tokenizer if as_called else None)
            opened = None if engine == "tokenizers" else open_gigatoken(tree, self.dtype)
        self.tree = tree
        self._fast = None if isinstance(opened, str) else opened
        self.engine_reason = opened if isinstance(opened, str) else None
        if engine == "gigatoken" and self.engine_reason is not None:
            raise DataError(f"{where}: gigatoken cannot encode with it: {self.engine_reason}; use --engine tokenizers")
        self.engine = "tokenizers" if self._fast is None else "gigatoken"
        self.engine_version = importlib.metadata.version(self.engine)

    @property
    def eos_id(self) -> int | None:
        """The end token, None where documents have none."""
        return self.markers.eos

    def encode(
        self,
        texts: Sequence[str],
        names: Sequence[str],
        hashes: Sequence[bytes] | None = None,
        counts: Counts | None = None,
    ) -> list[np.ndarray]:
        """encode_each, where every text must have ids. Raises DataError naming the first that has none."""
        encoded = self.encode_each(texts, names, hashes, counts)
        for ids, name in zip(encoded, names, strict=True):
            if isinstance(ids, str):
                raise DataError(f"{name}: {ids}")
        return [ids for ids in encoded if not isinstance(ids, str)]

    def encode_each(
        self,
        texts: Sequence[str],
        names: Sequence[str],
        hashes: Sequence[bytes] | None = None,
        counts: Counts | None = None,
    ) -> list[np.ndarray | str]:
        """Ids of each text, without eos, in the shards' dtype; or why it has none, with the remedy. hashes: of the
        texts, which decide what is compared. Raises EnginesDifferError with one of `names`.
        """
        counts = Counts() if counts is None else counts
        if self._fast is None:
            encoded = self._by_reference(texts)
            counts.reference += len(texts)
        else:
            encoded = self._encode_fast(self._fast, texts, names, hashes, counts)
        places = [place for place, ids in enumerate(encoded) if not isinstance(ids, str)]
        arrays = [ids for ids in encoded if not isinstance(ids, str)]
        if not arrays:
            return encoded
        ends = np.cumsum([len(ids) for ids in arrays])
        joined = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        result: list[np.ndarray | str] = list(encoded)
        for place, ids in zip(places, split(joined.astype(self.dtype, copy=False), ends), strict=True):
            result[place] = ids
        if self._misread is not None:
            for place in places:
                if any(map(self._misread, _slices(texts[place]))):
                    result[place] = (
                        "spells the name of an unknown or byte token, which this Unigram tokenizer takes for that "
                        "token; " + _SPELL
                    )
        for hit in self._control_hits(joined, ends, counts):
            document = int(np.searchsorted(ends, hit, side="right"))
            place = hit - int(ends[document]) + len(arrays[document])
            result[places[document]] = (
                "has text that the vocabulary cannot spell, and that the tokenizer would leave out after token "
                f"{place}; {_KEEP}"
                if joined[hit] == self.vocab_size
                else f"the tokenizer turns ordinary text into control id {joined[hit]} at token {place}; {_SPELL}"
            )
        return result

    def _control_hits(self, ids: np.ndarray, ends: np.ndarray, counts: Counts) -> list[int]:
        """Where the first control id of each affected text is. ends: of the texts. Also counts unknown tokens."""
        hits = []
        for start in range(0, len(ids), _BLOCK_TOKENS):
            block = ids[start : start + _BLOCK_TOKENS]
            if self.unknown_id is not None:
                counts.unknown += int(np.count_nonzero(block == self.unknown_id))
            hits.append(np.flatnonzero(self._is_control[block]) + start)
        found = np.concatenate(hits) if hits else np.empty(0, np.int64)
        _, first = np.unique(np.searchsorted(ends, found, side="right"), return_index=True)
        return [int(hit) for hit in found[first]]

    def _by_reference(self, texts: Sequence[str]) -> list[np.ndarray | str]:
        """For each text its ids, or why the library gives none."""
        try:
            return [*self._reference.encode(texts)]
        except BaseException as error:
            if isinstance(error, MemoryError) or not (isinstance(error, Exception) or is_panic(error)):
                raise
            if len(texts) > 1:
                return [ids for text in texts for ids in self._by_reference([text])]
            return [str(error) if isinstance(error, TextTooLongError) else library_stopped(error)]

    def _encode_fast(
        self,
        fast: Gigatoken,
        texts: Sequence[str],
        names: Sequence[str],
        hashes: Sequence[bytes] | None,
        counts: Counts,
    ) -> list[np.ndarray | str]:
        """Texts on which the engines may disagree go to the reference, others to the fast engine, a sample to both."""
        apart = [index for index, text in enumerate(texts) if fast.needs_reference(text)]
        together = sorted(set(range(len(texts))) - set(apart)) if apart else range(len(texts))
        encoded: list[np.ndarray | str] = [""] * len(texts)
        try:
            by_fast = fast.encode([texts[index] for index in together])
        except BaseException as error:  # the library raises several kinds, and panics
            if isinstance(error, MemoryError) or not (isinstance(error, Exception) or is_panic(error)):
                raise
            raise EnginesDifferError(
                f"in the texts from {names[together[0]]} on: gigatoken {self.engine_version} stopped "
                f"({one_line(error, 120)}); use --engine tokenizers"
            ) from error
        for index, fast_ids in zip(together, by_fast, strict=True):
            encoded[index] = fast_ids
        for index, result in zip(apart, self._by_reference([texts[index] for index in apart]), strict=True):
            encoded[index] = result
        checked = _sample(texts, together, hashes)
        heads = [texts[index][:_LARGE_CHARACTERS] for index in checked]
        for index, head, ids in zip(checked, heads, self._by_reference(heads), strict=True):
            # the beginning as a text of its own
            of_fast = encoded[index] if len(head) == len(texts[index]) else fast.encode([head])[0]
            if (place := _first_difference(ids, of_fast)) is not None:
                raise EnginesDifferError(
                    f"{names[index]}: gigatoken {self.engine_version} and the reference differ from token {place}; use "
                    "--engine tokenizers"
                )
        counts.reference += len(apart)
        counts.fast += len(together)
        counts.checked += len(checked)
        return encoded

    def around(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens before and after a document: [0 or 1] each, in the shards' dtype."""
        bos, eos = ([] if index is None else [index] for index in (self.markers.bos, self.markers.eos))
        return np.array(bos, self.dtype), np.array(eos, self.dtype)

    def special_id(self, name: str) -> int | None:
        """The id of a special token such as 'fim_prefix', in either spelling, or None."""
        found = (self._tokenizer.token_to_id(spelling) for spelling in (f"<|{name}|>", f"<{name}>"))
        return next((int(index) for index in found if index is not None), None)

    def special_tokens(self) -> str:
        return token_names(self._tokenizer)

    def names_of(self, ids: Iterable[int]) -> tuple[str, ...]:
        return tuple(str(self._tokenizer.id_to_token(index)) for index in ids)

    def decode(self, ids: np.ndarray) -> str:
        """Text of ids, control tokens spelled out."""
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def compact_utf8(self, ids: np.ndarray) -> bytes:
        """Text of ids as UTF-8 without control ids and ASCII white space. Raises IndexError for an unknown id."""
        if self._compact is not None:
            data = self._compact.utf8(ids)
            if data.isascii():
                return data
            with suppress(UnicodeDecodeError):  # ids that begin or end within a character: as the tokenizer has it
                data.decode()
                return data
        return self.decode(ids[~self._is_control[ids]]).encode().translate(None, ASCII_SPACE)

    @functools.cached_property
    def _compact(self) -> CompactTable | None:
        names = self._tokenizer.get_vocab(with_added_tokens=True)
        tokens = {index: token for token, index in names.items() if not self._is_control[index]}
        return compact_table(json.loads(self.data).get("decoder"), tokens, self.vocab_size)


def _first_difference(ids: np.ndarray | str, others: np.ndarray | str) -> int | None:
    """The first token in which two encodings differ; 0 where one of them failed."""
    if isinstance(ids, str) or isinstance(others, str):
        return 0
    if np.array_equal(ids, others):
        return None
    length = min(len(ids), len(others))
    return int(np.argmax(np.append(ids[:length] != others[:length], True)))


def _slices(text: str) -> Iterator[str]:
    """A text in bounded slices that overlap by more than a token's name."""
    for start in range(0, max(1, len(text)), _BLOCK_TOKENS):
        yield text[start : start + _BLOCK_TOKENS + 64]


def _sample(texts: Sequence[str], fast: Sequence[int], hashes: Sequence[bytes] | None) -> list[int]:
    """Which documents of the fast engine are compared: chosen by hash, so always the same; at least one."""
    if not fast:
        return []
    if hashes is None:
        hashes = [hashlib.sha256(text.encode()).digest() for text in texts]
    chosen = [index for index in fast if hashes[index][0] < _CHECKED]
    if chosen:
        return chosen
    small = [index for index in fast if len(texts[index]) <= _LARGE_CHARACTERS]
    return [min(small or fast, key=lambda index: hashes[index])]


def make_encoder(data: bytes, where: str, markers: Markers = DEFAULT_MARKERS, *, engine: str = "auto") -> TextEncoder:
    """The tokenizer of a tokenizer.json. markers: the tokens around documents. Raises DataError. engine: 'tokenizers'
    (the reference), 'gigatoken', or 'auto': gigatoken where it is installed and applicable.
    """
    tokenizer = tokenizer_from(data, where)
    return TextEncoder(data, tokenizer, marker_ids(tokenizer, markers, where), engine, where)


@functools.lru_cache(maxsize=2)
def encoder_for(data: bytes, markers: Markers, engine: str) -> TextEncoder:
    """make_encoder, cached: a worker process makes it once."""
    return make_encoder(data, "the tokenizer", markers, engine=engine)


def load_encoder(path: Path, markers: Markers = DEFAULT_MARKERS, *, engine: str = "auto") -> TextEncoder:
    """The tokenizer of a file. Raises DataError."""
    try:
        data = read_plain(path, "tokenizer")
    except OSError as error:
        raise DataError(
            f"{path}: the tokenizer cannot be read: {file_problem(error)}; name a tokenizer.json"
        ) from error
    try:
        if is_sentencepiece(path, data):
            data = tokenizer_json(data, "the tokenizer")
        return encoder_for(data, markers, engine)  # the one that the tasks of this process use
    except DataError as error:
        raise DataError(str(error).replace("the tokenizer", str(path), 1)) from error
