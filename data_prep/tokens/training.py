"""Training a byte-level BPE tokenizer on the text that a dataset is made of."""

from __future__ import annotations

import signal
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from weftrain.core.errors import DataError
from weftrain.core.formats.child_process import on_interrupt
from weftrain.data_prep.tokens.control_tokens import CONTROL_TOKENS, CRYSTALCODER_TOKENS
from weftrain.data_prep.tokens.tokenization import TextEncoder, make_encoder

MIN_VOCAB_SIZE = 256 + len(CONTROL_TOKENS)


def train_encoder(texts: Iterable[str], vocab_size: int) -> TextEncoder:
    """Train a BPE of `vocab_size` ids (control tokens, 256 bytes, merges); CrystalCoder's 32 special ids follow them.
    The same texts give the same bytes. Raises DataError where the texts are too few for that many merges.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"vocab_size {vocab_size} has no room for 256 bytes and {len(CONTROL_TOKENS)} control tokens: give "
            f"{MIN_VOCAB_SIZE} or more"
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
    with on_interrupt(signal.SIG_DFL):  # no Python handler runs in there, for minutes on a large sample
        tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"the text yields {tokenizer.get_vocab_size()} tokens, not {vocab_size}: give more text, a smaller "
            "--vocab-size, or a tokenizer"
        )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CRYSTALCODER_TOKENS])
    return make_encoder(tokenizer.to_str().encode(), "the trained tokenizer")
