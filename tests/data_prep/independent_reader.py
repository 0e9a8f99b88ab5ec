"""A dataset read with h5py, numpy and json alone: none of weftrain's code, so that the two can be held against each
other.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class ReadDocument:
    """A document put together from a set's shards. tokens: with what the preparation put around it; mask: 1 where a
    token bears loss; weights: by what it is multiplied.
    """

    set_name: str
    file: str
    record: int
    identity: bytes
    source: str
    tokens: np.ndarray
    mask: np.ndarray
    weights: np.ndarray


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def manifest_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    return value


def documents(folder: Path, set_name: str) -> list[ReadDocument]:
    """The documents of a set in order, joined where shards or rows cut them, padding left out. Checks every block's
    digest on the way.
    """
    manifest = manifest_of(folder)
    inputs = [entry["name"] for entry in json_lines(folder / "inputs.jsonl")]
    sources = [entry["name"] for entry in json_lines(folder / "sources.jsonl")]
    shared = manifest["row_stride"] == manifest["sequence_length"]
    pieces: dict[tuple[int, int, int], list[tuple[np.ndarray, ...]]] = {}
    about: dict[tuple[int, int, int], tuple[bytes, int]] = {}
    seen: Counter[tuple[int, int]] = Counter()  # how often a document came that is not cut here
    previous: tuple[int, int] | None = None
    sections = {0, *np.cumsum(manifest[set_name]["epochs"]).tolist()}  # rows before each prepared epoch
    rows_before = 0
    for entry in manifest[set_name]["shards"]:
        with h5py.File(folder / entry["file"]) as shard:
            data, end = shard["data"][:], shard["doc_end"][:]
            mask = shard["loss_mask"][:] if "loss_mask" in shard else np.ones(len(data), np.uint8)
            weights = shard["token_weights"][:] if "token_weights" in shard else np.ones(len(data), np.float32)
            planes = [shard[name][:] for name in ("loss_mask", "token_weights") if name in shard]
            check_digests(data, planes, shard["block_digest"][:])
            columns = {name: shard[f"doc_{name}"][:] for name in ("id", "source", "file", "record")}
            rows = 1 + (len(data) - manifest["sequence_length"] - 1) // manifest["row_stride"]
            assert rows == shard.attrs["n_examples"] == entry["n_examples"]
        starts = np.append(0, end[:-1])
        for index, (start, stop) in enumerate(zip(starts.tolist(), end.tolist(), strict=True)):
            place = (int(columns["file"][index]), int(columns["record"][index]))
            if place[0] < 0:
                assert not mask[start:stop].any(), "padding bears loss"
                previous = None
                continue
            if shared and index == 0 and rows_before not in sections:
                start = 1  # the shard before ends with this token; prepared epochs share none
            if shared and place != previous:
                seen[place] += 1
            key = (*place, seen[place] if shared else 1)
            pieces.setdefault(key, []).append((data[start:stop], mask[start:stop], weights[start:stop]))
            about[key] = (columns["id"][index].tobytes(), int(columns["source"][index]))
            previous = place
        rows_before += rows
    return [
        ReadDocument(
            set_name,
            inputs[file],
            record,
            about[file, record, turn][0],
            sources[about[file, record, turn][1]],
            *(np.concatenate(plane) for plane in zip(*found, strict=True)),
        )
        for (file, record, turn), found in pieces.items()
    ]


def check_digests(data: np.ndarray, planes: list[np.ndarray], digests: np.ndarray) -> None:
    step = BLOCK_BYTES // data.itemsize
    for block, start in enumerate(range(0, len(data), step)):
        digest = hashlib.sha256(data[start : start + step].tobytes())
        for plane in planes:
            digest.update(plane[start : start + step].tobytes())
        assert digest.digest() == digests[block].tobytes()


def order_key(seed: int, content: bytes) -> bytes:
    """Where docs/prepare-data.md puts a document in the shuffle."""
    return hashlib.sha256(b"order %d " % seed + content).digest()


def tree_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
