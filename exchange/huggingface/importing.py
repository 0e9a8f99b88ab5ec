"""What a stranger's folder is asked before its weights are used: whole numbers, a tokenizer that fits, as many rows.

`open_start` is what `start_from: {huggingface: FOLDER}` reads; `weftrain convert from-huggingface` uses the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weftrain.core.errors import CheckpointError, DataError, os_errors_as
from weftrain.core.formats.lazy_tensors import LazyTensors, meta, meta_of
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.formats.tokenizer_file import tokenizer_from
from weftrain.core.model_config import ModelConfig
from weftrain.core.run.starting_checkpoint import ForeignWeights
from weftrain.exchange.families import NAMES
from weftrain.exchange.huggingface.config import layout_of
from weftrain.exchange.huggingface.folder import (
    CONFIG,
    HuggingFaceWeights,
    files_sha256,
    read_config,
    read_json,
    state_tensors,
)

TOKENIZER = "tokenizer.json"
# What is carried from a folder into a run's folder and out again, where it is there.
CARRIED = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ROWS = ("embedding.weight", "head.weight")


def finite(tensors: Mapping[str, Tensor], where: str) -> LazyTensors:
    """The same tensors; reading one that holds a NaN or an infinity raises CheckpointError."""

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        if not torch.isfinite(tensor.sum(dtype=torch.float64)) and (bad := int((~tensor.isfinite()).sum())):
            raise CheckpointError(
                f"{where}: tensor '{name}' holds {bad} values that are NaN or infinite, of {tensor.numel()}: take "
                "another copy, or convert it with --allow-nonfinite"
            )
        return tensor

    return LazyTensors({name: meta_of(tensors, name) for name in tensors}, read)


def rows_in(weights: Mapping[str, Tensor], config: ModelConfig) -> int:
    """The rows of the vocabulary that the folder's files hold, which may be padded beyond config.json's."""
    name = f"{NAMES[layout_of(config)].outer['embedding']}.weight"
    return int(meta_of(weights, name).shape[0]) if name in weights else config.vocab_size


def with_vocabulary(tensors: Mapping[str, Tensor], rows: int) -> tuple[LazyTensors, list[str]]:
    """Canonical weights, with or without 'weights/' before the name, with the vocabulary cut or padded with zeros to
    `rows`; and what was done, in lines for the user.
    """
    metas = {name: meta_of(tensors, name) for name in tensors}
    changed = {
        name: one for name, one in metas.items() if name.removeprefix("weights/") in _ROWS and one.shape[0] != rows
    }

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        if name not in changed:
            return tensor
        kept = tensor[:rows]
        return torch.cat([kept, kept.new_zeros(rows - kept.shape[0], *kept.shape[1:])]) if len(kept) < rows else kept

    said = [
        f"{name.removeprefix('weights/')}: {one.shape[0]:,} rows "
        + (f"cut to the first {rows:,}" if one.shape[0] > rows else f"padded with zeros to {rows:,}")
        for name, one in changed.items()
    ]
    return LazyTensors(
        {name: meta((rows, *one.shape[1:]), one.dtype) if name in changed else one for name, one in metas.items()}, read
    ), said


def carried_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files of a folder, by name. Raises CheckpointError."""
    with os_errors_as(CheckpointError, f"{folder}: a tokenizer file cannot be read", "take another copy of the folder"):
        return {name: read_plain(folder / name, "tokenizer") for name in CARRIED if (folder / name).exists()}


def check_tokenizer(files: Mapping[str, bytes], vocab_size: int, where: Path) -> None:
    """Refuse a tokenizer that makes ids for which the model has no row. Raises DataError."""
    if TOKENIZER not in files:
        return
    name = f"{where / TOKENIZER}"
    vocabulary = tokenizer_from(files[TOKENIZER], name).get_vocab(with_added_tokens=True)
    if (largest := max(vocabulary.values(), default=-1)) >= vocab_size:
        raise DataError(
            f"{name}: has ids up to {largest}, the model's vocab_size is {vocab_size}: give the model at least "
            f"{largest + 1} rows, or take its own tokenizer"
        )


def open_start(folder: Path, say: Callable[[int], None] = lambda num_bytes: None) -> ForeignWeights:
    """The weights of a folder for a run that starts from it, checked as far as that goes without reading them.

    say: gets the bytes of each block that is hashed. Raises CheckpointError, RecipeError, DataError.
    """
    config = read_config(folder)
    weights = HuggingFaceWeights(folder)
    check_tokenizer(carried_files(folder), config.vocab_size, folder)
    tensors = finite(state_tensors(weights, config), str(folder))
    return ForeignWeights(tensors, config, files_sha256(folder, sorted([CONFIG, *weights.files]), say))


def token_ids(folder: Path) -> dict[str, Any]:
    """The ids of special tokens that a folder's config.json names. Raises CheckpointError."""
    config = read_json(folder)
    return {key: config[key] for key in TOKEN_IDS if key in config}
