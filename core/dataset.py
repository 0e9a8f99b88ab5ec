"""A prepared dataset's folder: manifest.json, tokenizer.json, and the shards of each set (`train`, `heldout`).

What a reader would get wrong: opening a dataset opens no shard. The manifest names every file with its size and hashes, so a missing or
truncated shard shows at once; a shard is opened when its first row is asked for, and is then held to the manifest's digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from weftrain.core import fsops
from weftrain.core.canonical import canonical_json, parse_json
from weftrain.core.errors import DataError
from weftrain.core.shards import REMEDY, Shard

FORMAT = "weftrain-dataset"
VERSION = 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
SETS = ("train", "heldout")
MAX_MANIFEST_BYTES = 256 << 20

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ShardEntry(_Entry):
    """One shard as the manifest names it; digests_sha256 pins its digest table, and so every token."""

    file: Annotated[str, Field(pattern=r"^(train|heldout)/[0-9]{5,}\.h5$")]
    size: Count
    sha256: Sha256
    digests_sha256: Sha256
    n_examples: Annotated[int, Field(ge=1)]
    documents: Count


class SetEntry(_Entry):
    """One set: its shards in order, and the Merkle root over their hashes, which is the set's dataset id."""

    dataset_id: Sha256
    tokens: Count
    dropped_tail_tokens: Count
    shards: tuple[ShardEntry, ...] = Field(strict=False)


class FimEntry(_Entry):
    """Fill-in-the-middle as applied in preparation."""

    rate: float
    spm_share: float


class Manifest(_Entry):
    """What a dataset is and where it came from."""

    format: Literal["weftrain-dataset"]
    version: Literal[1]
    name: str
    description: str
    licence: str
    corpus_sha256: Sha256  # over the documents' names and contents, before held-out choice, shuffle and tokenisation
    documents: Count
    duplicate_documents: Count  # exact duplicates left out
    settings: dict[str, Any]  # of the preparation: equal inputs and settings give equal bytes
    tokenizer_sha256: Sha256
    vocab_size: Annotated[int, Field(ge=1)]
    sequence_length: Annotated[int, Field(ge=1)]
    row_stride: Annotated[int, Field(ge=1)]
    fim: FimEntry | None
    sets: dict[Literal["train", "heldout"], SetEntry]


def merkle_root(hashes: Sequence[str]) -> str:
    """The Merkle root over hex SHA-256 leaves, pairwise; an odd last node moves up. The root of no leaves is the hash of nothing.

    Leaves and inner nodes are hashed with different prefixes, so that an inner node cannot pass for a leaf (RFC 6962, section 2.1).
    """
    nodes = [hashlib.sha256(b"\x00" + bytes.fromhex(leaf)).digest() for leaf in hashes]
    while len(nodes) > 1:
        pairs = [hashlib.sha256(b"\x01" + b"".join(nodes[i : i + 2])).digest() for i in range(0, len(nodes) - 1, 2)]
        nodes = pairs + nodes[len(pairs) * 2 :]
    return nodes[0].hex() if nodes else hashlib.sha256(b"").hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it in canonical form, atomically."""
    fsops.write_bytes(folder / MANIFEST, canonical_json(manifest.model_dump(mode="json")) + b"\n")


class TokenSet:
    """The rows of one set of one dataset, across its shards. Picklable: shards are opened anew."""

    def __init__(self, folder: Path, name: str, manifest: Manifest) -> None:
        self.folder, self.name, self.manifest = folder, name, manifest
        self.entry = manifest.sets[name]  # type: ignore[index]
        self._first_rows = np.cumsum([0, *(shard.n_examples for shard in self.entry.shards)])
        self._shards: dict[int, Shard] = {}

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def __reduce__(self) -> tuple[type[TokenSet], tuple[Path, str, Manifest]]:
        return TokenSet, (self.folder, self.name, self.manifest)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Row numbers int64 [n] -> ids int64 [n, sequence_length + 1] and the loss mask bool [n, sequence_length] or None."""
        numbers = np.searchsorted(self._first_rows, indices, side="right") - 1
        ids = np.empty((len(indices), self.manifest.sequence_length + 1), dtype=np.int64)
        mask: np.ndarray | None = None
        for number in np.unique(numbers):
            where = np.nonzero(numbers == number)[0]
            local = indices[where] - self._first_rows[number]
            shard = self.shard(int(number))
            ids[where] = shard.rows(local)
            part = shard.loss_mask(local)
            if part is not None:
                mask = np.ones((len(indices), ids.shape[1] - 1), dtype=bool) if mask is None else mask
                mask[where] = part
        return ids, mask

    def row_name(self, index: int) -> str:
        """'heldout/00000.h5:17' below the dataset's folder name, for messages."""
        number = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        return f"{self.folder.name}/{self.entry.shards[number].file}:{index - int(self._first_rows[number])}"

    def shard(self, number: int) -> Shard:
        """The open shard, held to the manifest when it is opened. Raises DataError where they differ."""
        if number not in self._shards:
            entry = self.entry.shards[number]
            shard = Shard(self.folder / entry.file)
            manifest = self.manifest
            claims = {
                "n_examples": (shard.n_examples, entry.n_examples),
                "sequence_length": (shard.sequence_length, manifest.sequence_length),
                "row_stride": (shard.row_stride, manifest.row_stride),
                "vocab_size": (shard.vocab_size, manifest.vocab_size),
                "tokenizer_sha256": (shard.tokenizer_sha256, manifest.tokenizer_sha256),
                "block_digest's SHA-256": (shard.digests_sha256, entry.digests_sha256),
            }
            for name, (found, wanted) in claims.items():
                if found != wanted:
                    raise DataError(f"{shard.path}: {name} is {found}, the manifest of '{manifest.name}' says {wanted}; {REMEDY}")
            self._shards[number] = shard
        return self._shards[number]


class Dataset:
    """An opened dataset folder. Raises DataError for a manifest, tokenizer or shard that is missing, altered or of the wrong size."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        tokenizer = self.folder / TOKENIZER
        if _sha256(tokenizer) != self.manifest.tokenizer_sha256:
            raise DataError(f"{tokenizer}: is not the tokenizer that made the shards (manifest.json: tokenizer_sha256); {REMEDY}")
        for name, entry in self.manifest.sets.items():
            if merkle_root([shard.sha256 for shard in entry.shards]) != entry.dataset_id:
                raise DataError(f"{self.folder / MANIFEST}: sets.{name}.dataset_id is not the Merkle root of its shards; {REMEDY}")
            for shard in entry.shards:
                self._check_shard(shard)

    def token_set(self, name: str) -> TokenSet | None:
        """The set of that name, or None where the dataset has none (or an empty one)."""
        entry = self.manifest.sets.get(name)  # type: ignore[call-overload]
        return TokenSet(self.folder, name, self.manifest) if entry is not None and entry.shards else None

    @cached_property
    def tokenizer_path(self) -> Path:
        return self.folder / TOKENIZER

    def _check_shard(self, entry: ShardEntry) -> None:
        path = self.folder / entry.file
        if path.is_symlink() or path.parent.is_symlink():
            raise DataError(f"{path}: is a symbolic link, and shards are read from their own folder only; copy the file here")
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: shard is missing or unreadable: {error.strerror}; {REMEDY}") from None
        if size != entry.size:
            raise DataError(f"{path}: shard has {size:,} bytes, the manifest says {entry.size:,}; {REMEDY}")


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
        if len(data) > MAX_MANIFEST_BYTES:
            raise ValueError(f"is larger than {MAX_MANIFEST_BYTES:,} bytes")
        manifest = Manifest.model_validate(parse_json(data))
        if canonical_json(manifest.model_dump(mode="json")) + b"\n" != data:
            raise ValueError("is not in canonical form, so it was altered")
        return manifest
    except OSError as error:
        raise DataError(
            f"{path}: no dataset here: {error.strerror}; make it: weftrain prep --output {folder.parent} --name {folder.name} …"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:80]
        raise DataError(f"{path}: key '{where}': {first['msg']}; {REMEDY}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}; {REMEDY}") from None


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: tokenizer is missing or unreadable: {error.strerror}; {REMEDY}") from None
