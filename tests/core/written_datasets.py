"""Small datasets whose tokens count up, so that a row says where it is from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from weftrain.core.formats.canonical import canonical_json, sha256_json
from weftrain.core.formats.dataset import (
    MANIFEST,
    TOKENIZER,
    VERSION,
    write_dataset_manifest,
    write_inputs,
    write_sources,
)
from weftrain.core.formats.dataset_manifest import DatasetManifest, InputEntry, SourceEntry, merkle_root, shard_file
from weftrain.core.formats.shard_format import Documents, num_tokens, write_shard
from weftrain.core.order.data_section import DataConfig

S = 8


VOCAB = 60_000


def write_set(
    folder: Path, set_name: str, rows: list[int], first_id: int, tokenizer_sha256: str, masked: bool
) -> dict[str, Any]:
    """Shards whose tokens count up from first_id, so that a row says where it is from."""
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


def make_dataset(
    folder: Path,
    rows: list[int],
    heldout: list[int] | None = None,
    first_id: int = 0,
    masked: bool = False,
    **changes: Any,
) -> None:
    folder.mkdir(parents=True)
    (folder / TOKENIZER).write_bytes(b"{}")
    tokenizer_sha256 = hashlib.sha256(b"{}").hexdigest()
    value: dict[str, Any] = {
        "format": "weftrain-dataset",
        "version": VERSION,
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
        },
        "preparation": {"seed": 0, "eos": None},
        "documents": {"read": 9, "failed": 0, "duplicates": 0, "train": 9, "heldout": 0},
        "num_sources": 1,
        "sources_sha256": write_sources(
            folder, [SourceEntry(name="counting", documents=9, num_bytes=9, tokens=9)]
        ).sha256,
        "chunks": None,
        "train": write_set(folder, "train", rows, first_id, tokenizer_sha256, masked),
        "heldout": write_set(folder, "heldout", heldout, 50_000, tokenizer_sha256, masked) if heldout else None,
    }
    write_dataset_manifest(folder, DatasetManifest.model_validate(value | changes))


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
