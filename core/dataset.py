"""A prepared dataset: a folder with `manifest.json`, `tokenizer.json` and the shards of its sets, `train/` and perhaps `heldout/`.

What a reader would get wrong: the dataset id is a Merkle root over the shards' `digest`s, not over their files' SHA-256. A digest commits
to every token, document and mask, and is checked whenever a shard is opened, in milliseconds; so a shard swapped for another valid one is
refused before step 0, which file hashes would need a day for at full scale. The SHA-256 are in the manifest too, for `sha256sum`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from weftrain.core import fsops
from weftrain.core.canonical import canonical_json, parse_json
from weftrain.core.config import Count, Fim, PositiveInt, Scalar, Section
from weftrain.core.errors import DataError
from weftrain.core.shards import ShardReader

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
VERSION = 1
_MAX_MANIFEST_BYTES = 256 << 20

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SetName = Literal["train", "heldout"]


class ShardEntry(Section):
    file: Annotated[str, Field(pattern=r"^(train|heldout)/[0-9]{5,9}\.h5$")]
    num_bytes: PositiveInt
    sha256: Sha256  # of the file, as `sha256sum` prints it
    digest: Sha256  # the shard's own, which the dataset id is made of
    n_examples: PositiveInt


class SetEntry(Section):
    id: Sha256
    n_examples: PositiveInt
    tokens: PositiveInt  # n_examples x sequence_length: labels, each once
    documents: PositiveInt
    dropped_tokens: Count  # the tail that fills no row
    shards: Annotated[tuple[ShardEntry, ...], Field(min_length=1, strict=False)]

    @model_validator(mode="after")
    def _check(self) -> SetEntry:
        if self.n_examples != sum(shard.n_examples for shard in self.shards):
            raise ValueError(f"n_examples {self.n_examples} is not the sum over the shards")
        if self.id != merkle_root([shard.digest for shard in self.shards]):
            raise ValueError("the id is not the Merkle root of the shards' digests")
        return self


class Corpus(Section):
    sha256: Sha256  # over (name, content hash) of every document read
    description: str
    licence: str


class DocumentCounts(Section):
    read: PositiveInt
    duplicates: Count  # equal in every byte to an earlier one, left out
    train: PositiveInt
    heldout: Count


class Manifest(Section):
    """manifest.json, consistent in itself. `preparation` holds the settings that, with the corpus, determine every byte."""

    format: Literal["weftrain-dataset"]
    version: Literal[1]
    name: Annotated[str, Field(min_length=1)]
    tokenizer_sha256: Sha256  # of tokenizer.json
    vocab_size: PositiveInt
    eos_id: Count
    sequence_length: PositiveInt
    row_stride: PositiveInt
    fim: Fim | None
    corpus: Corpus
    preparation: dict[str, Scalar | None]
    documents: DocumentCounts
    train: SetEntry
    heldout: SetEntry | None

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        for set_name, entry in self.sets.items():
            if [shard.file for shard in entry.shards] != [shard_file(set_name, index) for index in range(len(entry.shards))]:
                raise ValueError(f"{set_name}: the shards' files do not count up from {shard_file(set_name, 0)}")
        return self

    @property
    def sets(self) -> dict[SetName, SetEntry]:
        """'train', and 'heldout' where documents were held out."""
        sets: dict[SetName, SetEntry] = {"train": self.train}
        if self.heldout is not None:
            sets["heldout"] = self.heldout
        return sets


def shard_file(set_name: str, index: int) -> str:
    """A shard's place in the folder."""
    return f"{set_name}/{index:05d}.h5"


def merkle_root(leaves: Sequence[str]) -> str:
    """Root, in hexadecimal, over hexadecimal leaves, by RFC 6962 section 2.1: leaf = H(0 || x), node = H(1 || left || right).

    The left half of a split is the largest power of two below the number of leaves.
    """

    def root(low: int, high: int) -> bytes:
        if high - low == 1:
            return hashlib.sha256(b"\x00" + bytes.fromhex(leaves[low])).digest()
        split = low + (1 << ((high - low - 1).bit_length() - 1))
        return hashlib.sha256(b"\x01" + root(low, split) + root(split, high)).digest()

    return root(0, len(leaves)).hex() if leaves else hashlib.sha256(b"").hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, as canonical JSON. Raises OSError."""
    fsops.write_bytes(folder / MANIFEST, canonical_json(manifest.model_dump(mode="json")) + b"\n")


def read_manifest(folder: Path) -> Manifest:
    """The folder's manifest, checked in itself and against tokenizer.json. Raises DataError."""
    path = folder / MANIFEST
    try:
        data = _read_regular(folder, MANIFEST)
        value = parse_json(data)
        if isinstance(value, dict) and value.get("format") == "weftrain-dataset" and value.get("version") != VERSION:
            raise ValueError(f"version {value.get('version')!r} is not the one this program reads ({VERSION})")
        manifest = Manifest.model_validate(value)
        if canonical_json(value) + b"\n" != data:
            raise ValueError("is not in canonical form, so it was altered")
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))[:80]
        raise DataError(f"{path}: key '{key}': {first['msg']}; remove the dataset and prepare it again") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}; remove the dataset and prepare it again") from error
    tokenizer_sha256 = hashlib.sha256(read_tokenizer(folder)).hexdigest()
    if tokenizer_sha256 != manifest.tokenizer_sha256:
        raise DataError(
            f"{folder / TOKENIZER}: SHA-256 {tokenizer_sha256[:12]}… is not the manifest's {manifest.tokenizer_sha256[:12]}…: the shards "
            "were made with another tokenizer; put that file back, or remove the dataset and prepare it again"
        )
    return manifest


def read_tokenizer(folder: Path) -> bytes:
    """The bytes of tokenizer.json. Raises DataError."""
    try:
        return _read_regular(folder, TOKENIZER)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / TOKENIZER}: {error}; remove the dataset and prepare it again") from error


def _read_regular(folder: Path, name: str) -> bytes:
    path = _within(folder, name)
    if not path.is_file():
        raise ValueError("is missing" if not path.exists() else "is not a regular file")
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise ValueError(f"is larger than {_MAX_MANIFEST_BYTES:,} bytes")
    return path.read_bytes()


def _within(folder: Path, name: str) -> Path:
    """folder/name, which no symbolic link may lead out of the folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError("leads out of the dataset's folder through a symbolic link")
    return path


class ShardSet:
    """The rows of one set, numbered through its shards. Picklable: a copy opens the shards it needs, when it needs them."""

    def __init__(self, folder: Path, manifest: Manifest, set_name: SetName) -> None:
        """Open and check every shard of a set that is there, so that what can be known before step 0 is. Raises DataError."""
        entry = manifest.sets[set_name]
        self.folder, self.manifest, self.entry = folder, manifest, entry
        self.num_rows: int = entry.n_examples
        self._ends = np.cumsum([shard.n_examples for shard in entry.shards])
        self._readers: dict[int, ShardReader] = {}
        for index in range(len(entry.shards)):  # sizes first: it takes a moment, and a missing file is the likeliest fault
            self._check_file(index)
        for index in range(len(entry.shards)):
            self._reader(index)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """int64 [n] -> ids int64 [n, S + 1], and loss mask bool [n, S], or None where none of these rows has one. Raises DataError."""
        length = self.manifest.sequence_length
        ids, mask = np.empty((len(indices), length + 1), dtype=np.int64), None
        shards = np.searchsorted(self._ends, indices, side="right")
        for shard in np.unique(shards).tolist():
            chosen = np.flatnonzero(shards == shard)
            reader, local = self._reader(shard), indices[chosen] - (self._ends[shard] - self.entry.shards[shard].n_examples)
            ids[chosen] = reader.rows(local)
            if (part := reader.loss_mask(local)) is not None:
                mask = np.ones((len(indices), length), dtype=np.bool_) if mask is None else mask
                mask[chosen] = part
        return ids, mask

    def locate(self, index: int) -> tuple[str, int]:
        """The shard's file, relative to the folder, and the row within it."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self.entry.shards[shard].file, int(index - (self._ends[shard] - self.entry.shards[shard].n_examples))

    def readers(self) -> list[ShardReader]:
        """All shards, in order."""
        return [self._reader(index) for index in range(len(self.entry.shards))]

    def _check_file(self, index: int) -> None:
        entry = self.entry.shards[index]
        path = self.folder / entry.file
        try:
            size = os.stat(_within(self.folder, entry.file)).st_size
        except FileNotFoundError:
            raise DataError(f"{path}: the shard is missing; put it back, or remove the dataset and prepare it again") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: {error}; put the shard back, or remove the dataset and prepare it again") from error
        if size != entry.num_bytes:
            raise DataError(
                f"{path}: the shard has {size:,} bytes, the manifest says {entry.num_bytes:,}: it is truncated or was replaced; "
                "put it back, or remove the dataset and prepare it again"
            )

    def _reader(self, index: int) -> ShardReader:
        if index not in self._readers:
            entry, manifest = self.entry.shards[index], self.manifest
            reader = ShardReader(self.folder / entry.file)
            expected: dict[str, Any] = {
                "num_rows": entry.n_examples,
                "sequence_length": manifest.sequence_length,
                "row_stride": manifest.row_stride,
                "vocab_size": manifest.vocab_size,
                "tokenizer_sha256": manifest.tokenizer_sha256,
                "digest": entry.digest,
            }
            for field, value in expected.items():
                if getattr(reader, field) != value:
                    raise DataError(
                        f"{reader.path}: {field} is {getattr(reader, field)!r}, the manifest says {value!r}: the shard is of another "
                        "dataset; put its own back, or remove the dataset and prepare it again"
                    )
            self._readers[index] = reader
        return self._readers[index]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}
