"""The tokenizer of an evaluation: checked against the model and its training data; texts begin as documents did."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tokenizers import Tokenizer, processors

from weftrain.core.errors import DataError, file_problem
from weftrain.core.formats.dataset_manifest import DatasetManifest
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.formats.tokenizer_file import tokenizer_from

EOS_CANDIDATES = ("</s>", "<|endoftext|>")


def open_tokenizer(
    path: Path, vocab_size: int, dataset: tuple[Path, DatasetManifest] | None = None
) -> tuple[Tokenizer, str]:
    """A tokenizer.json that fits a model of `vocab_size` ids and the dataset it was trained on; and its SHA-256.

    Raises DataError naming the file and the remedy.
    """
    try:
        data = read_plain(path, "tokenizer")
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the tokenizer: {file_problem(error)}: name the model's own with --tokenizer"
        ) from error
    tokenizer = tokenizer_from(data, str(path), "name the right file with --tokenizer")
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise DataError(
            f"{path}: its largest id {largest} is outside the model's vocabulary of {vocab_size}: it is another "
            "model's; "
            "name this model's with --tokenizer"
        )
    sha256 = hashlib.sha256(data).hexdigest()
    if dataset is not None and sha256 != dataset[1].tokenizer_sha256:
        raise DataError(
            f"{path}: SHA-256 {sha256[:12]}… is not the {dataset[1].tokenizer_sha256[:12]}… that {dataset[0]} was "
            "prepared with: "
            f"use {dataset[0] / 'tokenizer.json'}, or leave --tokenizer out"
        )
    if dataset is not None and dataset[1].bos_id is not None:
        _begin_texts(tokenizer, dataset[1].bos_id)
    return tokenizer, sha256


def _begin_texts(tokenizer: Tokenizer, bos_id: int) -> None:
    """Make the tokenizer put the start token, with which training documents began, before each text, and nothing else.

    It does so where special tokens are requested; many tokenizers do it by themselves.
    """
    token = tokenizer.id_to_token(bos_id)
    begin = {"id": "BEGIN", "ids": [bos_id], "tokens": [token]}
    tokenizer.post_processor = processors.TemplateProcessing(["BEGIN", "$A"], ["BEGIN", "$A", "$B"], [begin])


def end_of_text_id(tokenizer: Tokenizer, path: Path, dataset: DatasetManifest | None = None) -> int:
    """The id that ends a document: the dataset's, else that of </s> or <|endoftext|>. Raises DataError for none."""
    if dataset is not None:
        return dataset.separator_id
    for token in EOS_CANDIDATES:
        if (found := tokenizer.token_to_id(token)) is not None:
            return int(found)
    raise DataError(
        f"{path}: has no token {' or '.join(EOS_CANDIDATES)} to end a text with; use the model's own tokenizer.json"
    )
