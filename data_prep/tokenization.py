"""Tokenizers: train a byte-level BPE or load any tokenizer.json, and encode text so that no text ever becomes a control token.

What a reader would get wrong: a document that holds the characters `</s>` must not end there. Special tokens are not matched in text, and
should a tokenizer produce one of their ids all the same, that is an error. Document ends come from `doc_end`, never from an id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from weftrain.core.errors import DataError
from weftrain.core.shards import token_dtype

CONTROL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2, as LLaMA's and so Amber's and CrystalCoder's
EOS_CANDIDATES = ("</s>", "<|endoftext|>")
# CrystalCoder's ids 32000.. in their order, spelled as in its released tokenizer; the ten last are unused there too.
CRYSTALCODER_TOKENS = (
    *(f"<|fim_{name}|>" for name in ("prefix", "middle", "suffix", "pad")),
    *("<|filename|>", "<|gh_stars|>"),
    *(f"<|issue_{name}|>" for name in ("start", "comment", "closed")),
    *(f"<|jupyter_{name}|>" for name in ("start", "text", "code", "output")),
    "<|empty_output|>",
    *(f"<|commit_{name}|>" for name in ("before", "msg", "after")),
    *("<|reponame|>", "<|im_start|>", "<|im_end|>", "<|sys_start|>", "<|sys_end|>"),
    *(f"<|unused_{index}|>" for index in range(22, 32)),
)
MIN_VOCAB_SIZE = 256 + len(CONTROL_TOKENS)


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer as the pipeline uses it. data: the bytes of tokenizer.json. vocab_size: one more than the largest id."""

    data: bytes
    eos_id: int
    vocab_size: int
    control_ids: np.ndarray  # sorted ids that no text may become
    _tokenizer: Tokenizer = field(repr=False, compare=False)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def encode(self, texts: Sequence[str], names: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, without eos, in the shards' dtype; on all cores. Raises DataError, by `names`, where a control id comes out."""
        dtype = token_dtype(self.vocab_size)
        encoded = [np.array(one.ids, dtype=dtype) for one in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        for ids, name in zip(encoded, names, strict=True):
            if (hits := np.flatnonzero(np.isin(ids, self.control_ids))).size:
                raise DataError(
                    f"{name}: the tokenizer turns ordinary text into control id {ids[hits[0]]} at token {hits[0]}; "
                    "use a tokenizer that can spell its special tokens out"
                )
        return encoded

    def decode(self, ids: np.ndarray) -> str:
        """Text of ids, control tokens spelled out."""
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=False))


def make_encoder(data: bytes, where: str, eos: str | None = None) -> TextEncoder:
    """The tokenizer of a tokenizer.json's bytes. eos: the token that ends a document. Raises DataError."""
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{where}: not a tokenizer.json: {' '.join(str(error).split())}; name a Hugging Face tokenizers file") from error
    tokenizer.encode_special_tokens = True  # spell special tokens in text out
    tokenizer.no_padding()
    tokenizer.no_truncation()
    candidates = EOS_CANDIDATES if eos is None else (eos,)
    eos_id = next((found for token in candidates if (found := tokenizer.token_to_id(token)) is not None), None)
    if eos_id is None:
        raise DataError(f"{where}: has no token {' or '.join(candidates)} to end a document with; name its end token with --eos")
    control = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special} | {eos_id}
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return TextEncoder(data, eos_id, vocab_size, np.array(sorted(control)), tokenizer)


def load_encoder(path: Path, eos: str | None = None) -> TextEncoder:
    """The tokenizer of a file. Raises DataError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the tokenizer cannot be read: {error.strerror}; name a tokenizer.json") from error
    return make_encoder(data, str(path), eos)


def train_encoder(texts: Iterable[str], vocab_size: int) -> TextEncoder:
    """Train a byte-level BPE of `vocab_size` ids (control tokens, 256 bytes, merges); CrystalCoder's 32 special ids follow them.

    The same texts give the same bytes. Raises DataError where the texts are too few for that many merges.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"vocab_size {vocab_size} has no room for 256 bytes and {len(CONTROL_TOKENS)} control tokens: give {MIN_VOCAB_SIZE} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"the text yields {tokenizer.get_vocab_size()} tokens, not {vocab_size}: give more text, a smaller --vocab-size, or a tokenizer"
        )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CRYSTALCODER_TOKENS])
    return make_encoder(tokenizer.to_str().encode(), "the trained tokenizer")
