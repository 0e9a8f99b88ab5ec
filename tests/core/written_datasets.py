"""Small datasets whose tokens count up, so that a row says where it is from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weftrain.core.formats.canonical import canonical_json, sha256_json
from weftrain.core.formats.dataset import (
    MANIFEST,
    TOKENIZER,
    VERSION,
    VERSION_4,
    write_dataset_manifest,
    write_inputs,
    write_sources,
)
from weftrain.core.formats.dataset_manifest import DatasetManifest, InputEntry, SourceEntry, merkle_root, shard_file
from weftrain.core.formats.shard_format import Documents, num_tokens, write_shard
from weftrain.core.order.batch import Batch
from weftrain.core.order.data_section import DataConfig

S = 8


VOCAB = 60_000


def write_set(
    folder: Path,
    set_name: str,
    rows: list[int],
    first_id: int,
    tokenizer_sha256: str,
    masked: bool,
    weighted: Sequence[int] = (),
) -> dict[str, Any]:
    """Shards whose tokens count up from first_id, so that a row says where it is from. weighted: numbers of those whose
    tokens have weights, `weight_of`.
    """
    (folder / set_name).mkdir(parents=True)
    shards, position = [], first_id
    for index, count in enumerate(rows):
        tokens = np.arange(position, position + num_tokens(count, S, S))
        position += count * S
        zero = np.array([0])
        table = Documents(np.array([len(tokens)]), np.full((1, 16), index, np.uint8), zero, 1, zero, zero)
        file = shard_file(set_name, index)
        mask = tokens % 3 > 0 if masked else None
        info = write_shard(
            folder / file,
            tokens,
            table,
            sequence_length=S,
            row_stride=S,
            vocab_size=VOCAB,
            tokenizer_sha256=tokenizer_sha256,
            loss_mask=mask,
            token_weights=weight_of(tokens) if index in weighted else None,
        )
        shards.append(
            {
                "file": file,
                "num_bytes": info.num_bytes,
                "sha256": info.sha256,
                "digest": info.digest,
                "n_examples": count,
            }
        )
    return {
        "id": merkle_root([shard["digest"] for shard in shards]),
        "n_examples": sum(rows),
        "tokens": sum(rows) * S,
        "documents": len(rows),
        "dropped_tokens": 0,
        "padding_tokens": 0,
        "epochs": [sum(rows)],
        "shards": shards,
    }


def weight_of(tokens: np.ndarray) -> np.ndarray:
    return (0.5 + tokens % 7 / 4).astype(np.float32)


def make_dataset(
    folder: Path,
    rows: list[int],
    heldout: list[int] | None = None,
    first_id: int = 0,
    masked: bool = False,
    weighted: Sequence[int] = (),
    **changes: Any,
) -> None:
    folder.mkdir(parents=True)
    (folder / TOKENIZER).write_bytes(b"{}")
    tokenizer_sha256 = hashlib.sha256(b"{}").hexdigest()
    value: dict[str, Any] = {
        "format": "weftrain-dataset",
        "version": VERSION_4 if weighted else VERSION,
        "name": folder.name,
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": VOCAB,
        "eos_id": 0,
        "sequence_length": S,
        "row_stride": S,
        "packing": "concatenate",
        "fim": None,
        "corpus": {"sha256": "0" * 64, "description": "counting", "licence": "none", "files": 1, "num_bytes": 9},
        "inputs_sha256": write_inputs(folder, [InputEntry(name="counting", num_bytes=9, sha256=("0" * 64,))]).sha256,
        "tokenization": {
            "engine": "tokenizers",
            "engine_version": "0",
            "reference_documents": 9,
            "checked_documents": 0,
            "weighted_documents": len(weighted),
        },
        "preparation": {"seed": 0, "eos": None},
        "documents": {"read": 9, "failed": 0, "duplicates": 0, "train": 9, "heldout": 0},
        "num_sources": 1,
        "sources_sha256": write_sources(
            folder, [SourceEntry(name="counting", documents=9, num_bytes=9, tokens=9)]
        ).sha256,
        "chunks": None,
        "train": write_set(folder, "train", rows, first_id, tokenizer_sha256, masked, weighted),
        "heldout": write_set(folder, "heldout", heldout, 50_000, tokenizer_sha256, masked, weighted)
        if heldout
        else None,
    }
    write_dataset_manifest(folder, DatasetManifest.model_validate(value | changes))


def store_rows(folder: Path, batch: Batch, vocab_size: int) -> None:
    """A dataset whose training set is one shard of the rows of a batch, with its loss mask and weights."""
    make_dataset(folder, [1], weighted=[0])
    rows, width = batch.ids.shape
    zero, file = np.zeros(rows, np.int64), shard_file("train", 0)
    ends, identities = np.arange(1, rows + 1) * width, np.arange(rows * 16, dtype=np.uint8).reshape(rows, 16)

    def of_labels(plane: np.ndarray | None) -> np.ndarray | None:
        """A plane of the tokens: a row's first is no label."""
        return None if plane is None else np.column_stack([np.zeros(rows, plane.dtype), plane]).reshape(-1)

    mask = np.ones((rows, width - 1), bool) if batch.loss_mask is None else batch.loss_mask
    info = write_shard(
        folder / file,
        batch.ids.reshape(-1),
        Documents(ends, identities, zero, 1, zero, zero),
        sequence_length=width - 1,
        row_stride=width,
        vocab_size=vocab_size,
        tokenizer_sha256=hashlib.sha256(b"{}").hexdigest(),
        loss_mask=of_labels(mask),
        token_weights=of_labels(batch.token_weights),
    )

    def change(value: dict[str, Any]) -> None:
        value |= {"vocab_size": vocab_size, "sequence_length": width - 1, "row_stride": width, "packing": "separate"}
        shard = {"num_bytes": info.num_bytes, "sha256": info.sha256, "digest": info.digest, "n_examples": rows}
        value["train"] |= {"id": merkle_root([info.digest]), "n_examples": rows, "tokens": rows * (width - 1)}
        value["train"] |= {"epochs": [rows], "shards": [{"file": file, **shard}]}

    change_manifest(folder, change)


def config(root: Path, *sources: dict[str, Any], seed: int = 1, sequence_length: int = S) -> DataConfig:
    total = sum(source.get("weight", 1.0) for source in sources)
    full = [{"path": source["name"]} | source for source in sources]
    for source in full:
        if not {"tokens", "epochs"} & source.keys():
            source["weight"] = source.get("weight", 1.0) / total
    return DataConfig.model_validate(
        {"root": str(root), "sequence_length": sequence_length, "shuffle_seed": seed, "sources": full}
    )


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads((folder / MANIFEST).read_bytes())
    del value["root"]
    change(value)
    (folder / MANIFEST).write_bytes(canonical_json(value | {"root": sha256_json(value)}) + b"\n")
