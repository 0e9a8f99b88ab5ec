"""A prepared dataset: a folder with `manifest.json`, `tokenizer.json`, `inputs.jsonl` (the files it was made of, a line each) and the
shards of its sets, `train/` and perhaps `heldout/`.

What a reader would get wrong: the dataset id is a Merkle root over the shards' `digest`s, not over their files' SHA-256. A digest commits
to every token, document and mask, and is checked whenever a shard is opened, in milliseconds; so a shard swapped for another valid one is
refused before step 0, which file hashes would need a day for at full scale. The SHA-256 are in the manifest too, for `sha256sum`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from weftrain.core import fsops
from weftrain.core.canonical import canonical_json, parse_json, sha256_json
from weftrain.core.config import Count, PositiveInt, Scalar, Section, Sha256
from weftrain.core.errors import DataError
from weftrain.core.plain_file import read_plain, real_path
from weftrain.core.shards import ShardReader, Stretch

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
INPUTS = "inputs.jsonl"
FAILURES = "failures.jsonl"  # what could not be read, where anything could not
VERSION = 2
EAGER_SHARDS = 64
_RESTORE = "put it back, or remove the dataset and prepare it again"

SetName = Literal["train", "heldout"]


class InputEntry(Section):
    """A line of inputs.jsonl. sha256: of each share that was read, in order; one for most files."""

    name: Annotated[str, Field(min_length=1)]
    num_bytes: Count
    sha256: Annotated[tuple[Sha256, ...], Field(strict=False)]


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
    dropped_tokens: Count  # the tail that fills no row, or no chunk
    padding_tokens: Count  # tokens that only fill a row
    epochs: Annotated[tuple[PositiveInt, ...], Field(min_length=1, strict=False)]  # rows of each prepared epoch, one after the other
    shards: Annotated[tuple[ShardEntry, ...], Field(min_length=1, strict=False)]

    @model_validator(mode="after")
    def _check(self) -> SetEntry:
        if self.n_examples != sum(shard.n_examples for shard in self.shards):
            raise ValueError(f"n_examples {self.n_examples} is not the sum over the shards")
        if self.n_examples != sum(self.epochs):
            raise ValueError(f"n_examples {self.n_examples} is not the sum over the epochs")
        if self.id != merkle_root([shard.digest for shard in self.shards]):
            raise ValueError("the id is not the Merkle root of the shards' digests")
        return self


class Corpus(Section):
    sha256: Sha256  # Merkle root over the hashes of all shares of all files
    description: str
    licence: str
    files: PositiveInt
    num_bytes: Count


class DocumentCounts(Section):
    read: PositiveInt
    failed: Count  # could not be read; failures.jsonl lists them
    duplicates: Count  # equal in every byte to an earlier one, left out
    train: PositiveInt
    heldout: Count


class SourceEntry(Section):
    """What of the training set one source is, in one epoch. tokens: with end tokens."""

    name: str
    documents: Count
    num_bytes: Count
    tokens: Count


class FimPrepared(Section):
    """Fill-in-the-middle as it was applied. mode: 'exact' cuts between tokens, 'released' as CrystalCoder's scripts did."""

    rate: Annotated[float, Field(gt=0, le=1)]
    spm_share: Annotated[float, Field(ge=0, le=1)]
    mode: Literal["exact", "released"]
    seed: Count


class Tokenization(Section):
    """Who encoded. The ids are the same whoever does. checked_documents: encoded twice and compared with the reference's."""

    engine: Literal["tokenizers", "gigatoken"]
    engine_version: str
    reference_documents: Count
    checked_documents: Count


class Chunks(Section):
    """Chunk c is rows [c * rows, (c + 1) * rows) of the training set and, where the batch size is known, whole steps."""

    count: PositiveInt
    rows: PositiveInt
    global_batch_size: PositiveInt | None

    def steps(self, chunk: int) -> tuple[int, int] | None:
        """First step of a chunk and first step after it, for a run that reads this set alone."""
        if self.global_batch_size is None:
            return None
        each = self.rows // self.global_batch_size
        return chunk * each, (chunk + 1) * each


class Manifest(Section):
    """manifest.json, consistent in itself. `preparation` holds the settings that, with the corpus, determine every byte."""

    format: Literal["weftrain-dataset"]
    version: Literal[2]
    name: Annotated[str, Field(min_length=1)]
    tokenizer_sha256: Sha256  # of tokenizer.json
    vocab_size: PositiveInt
    eos_id: Count
    sequence_length: PositiveInt
    row_stride: PositiveInt
    packing: Literal["concatenate", "best_fit", "rows"]
    fim: FimPrepared | None
    corpus: Corpus
    inputs_sha256: Sha256  # of inputs.jsonl
    tokenization: Tokenization
    preparation: dict[str, Scalar | None]
    documents: DocumentCounts
    sources: Annotated[tuple[SourceEntry, ...], Field(min_length=1, strict=False)]
    chunks: Chunks | None
    train: SetEntry
    heldout: SetEntry | None

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        for set_name, entry in self.sets.items():
            if [shard.file for shard in entry.shards] != [shard_file(set_name, index) for index in range(len(entry.shards))]:
                raise ValueError(f"{set_name}: the shards' files do not count up from {shard_file(set_name, 0)}")
        if self.chunks is not None:
            chunks = self.chunks
            if chunks.count * chunks.rows != self.train.n_examples or len(self.train.epochs) > 1:
                raise ValueError(f"chunks: {chunks.count} x {chunks.rows} rows are not the {self.train.n_examples} of one epoch")
            if chunks.global_batch_size is not None and chunks.rows % chunks.global_batch_size:
                raise ValueError(f"chunks: {chunks.rows} rows are no whole steps of {chunks.global_batch_size}")
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
    """Write manifest.json, as canonical JSON with its own hash, `root`. Raises OSError."""
    value = manifest.model_dump(mode="json")
    fsops.write_bytes(folder / MANIFEST, canonical_json(value | {"root": sha256_json(value)}) + b"\n")


def read_manifest(folder: Path) -> Manifest:
    """The folder's manifest, checked in itself and against tokenizer.json. Raises DataError."""
    path = folder / MANIFEST
    try:
        data = _read_regular(folder, MANIFEST)
        value = parse_json(data)
        if isinstance(value, dict) and value.get("format") == "weftrain-dataset" and value.get("version") != VERSION:
            raise ValueError(f"version {value.get('version')!r} is not the one this program reads ({VERSION})")
        if canonical_json(value) + b"\n" != data:
            raise ValueError("is not in canonical form, so it was altered")
        if not isinstance(value, dict) or value.pop("root", None) != sha256_json(value):
            raise ValueError("does not hash to its root, so it was altered")
        manifest = Manifest.model_validate(value)
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


def write_inputs(folder: Path, entries: Sequence[InputEntry]) -> str:
    """Write inputs.jsonl; returns its SHA-256, which the manifest holds. Raises OSError."""
    data = b"".join(canonical_json(entry.model_dump(mode="json")) + b"\n" for entry in entries)
    fsops.write_bytes(folder / INPUTS, data)
    return hashlib.sha256(data).hexdigest()


def read_inputs(folder: Path, manifest: Manifest) -> list[InputEntry]:
    """The files that a dataset was made of; `doc_file` counts them from 0. Raises DataError."""
    path = folder / INPUTS
    try:
        data = _read_regular(folder, INPUTS)
        if hashlib.sha256(data).hexdigest() != manifest.inputs_sha256:
            raise ValueError("does not hash to the manifest's inputs_sha256, so it was altered")
        return [InputEntry.model_validate(parse_json(line)) for line in data.splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {' '.join(str(error).split())}; put the file back, or remove the dataset and prepare it again") from error


def read_tokenizer(folder: Path) -> bytes:
    """The bytes of tokenizer.json. Raises DataError."""
    try:
        return _read_regular(folder, TOKENIZER)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / TOKENIZER}: {error}; remove the dataset and prepare it again") from error


def _read_regular(folder: Path, name: str) -> bytes:
    path = _within(folder, name)
    try:
        return read_plain(path, "tokenizer" if name == TOKENIZER else "dataset manifest")
    except FileNotFoundError:
        raise ValueError("is missing") from None


def _shard_size(entry: os.DirEntry[str], folder: Path) -> int:
    """Bytes of a shard's file. Raises ValueError for a link that leads out of the dataset, or what is no file."""
    if entry.is_symlink() and not real_path(entry.path).is_relative_to(real_path(folder)):
        raise ValueError(f"{entry.name} leads out of the dataset's folder through a symbolic link")
    status = entry.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{entry.name} is not a regular file")
    return status.st_size


def _within(folder: Path, name: str) -> Path:
    """folder/name, which no symbolic link may lead out of the folder."""
    path = folder / name
    if not real_path(path).is_relative_to(real_path(folder)):
        raise ValueError("leads out of the dataset's folder through a symbolic link")
    return path


class ShardSet:
    """The rows of one set, numbered through its shards. Picklable: a copy opens the shards it needs, when it needs them.

    Opening checks that every shard's file is there, in its size, and opens the first EAGER_SHARDS of them, so that ten thousand take no
    minute. Any other is opened, and each block of it verified, when it is first touched: no unverified token is ever handed out.
    """

    def __init__(self, folder: Path, manifest: Manifest, set_name: SetName) -> None:
        """Raises DataError."""
        entry = manifest.sets[set_name]
        self.folder, self.manifest, self.entry = folder, manifest, entry
        self.num_rows: int = entry.n_examples
        self._ends = np.cumsum([shard.n_examples for shard in entry.shards])
        self._readers: dict[int, ShardReader] = {}
        self._check_files(set_name)
        for index in range(min(EAGER_SHARDS, len(entry.shards))):
            self._reader(index)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """int64 [n] -> ids int64 [n, S + 1], and loss mask bool [n, S], or None where none of these rows has one. Raises DataError."""
        ids = np.empty((len(indices), self.manifest.sequence_length + 1), dtype=np.int64)
        return ids, self.read_into(ids, np.arange(len(indices)), indices)

    def read_into(self, ids: np.ndarray, places: np.ndarray, indices: np.ndarray) -> np.ndarray | None:
        """ids[places] = the rows: int64 [m, S + 1], int64 [n], int64 [n]. Returns their loss mask, [n, S], or None; raises DataError."""
        mask = None
        for chosen, reader, local in self._by_shard(indices):
            reader.read_into(ids, places[chosen], local)
            if (part := reader.loss_mask(local)) is not None:
                mask = np.ones((len(indices), self.manifest.sequence_length), dtype=np.bool_) if mask is None else mask
                mask[chosen] = part
        return mask

    def locate(self, index: int) -> tuple[str, int]:
        """The shard's file, relative to the folder, and the row within it."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self.entry.shards[shard].file, int(index - (self._ends[shard] - self.entry.shards[shard].n_examples))

    def document_starts(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n] -> int32 [n, S]: see ShardReader.document_starts."""
        starts = np.empty((len(indices), self.manifest.sequence_length), dtype=np.int32)
        for chosen, reader, local in self._by_shard(indices):
            starts[chosen] = reader.document_starts(local)
        return starts

    def stretches(self, index: int) -> list[Stretch]:
        """The documents of a row. Raises DataError."""
        ((_, reader, local),) = self._by_shard(np.array([index]))
        return reader.stretches(int(local[0]))

    def readers(self) -> Iterator[ShardReader]:
        """All shards, in order, each opened when it is its turn."""
        return (self._reader(index) for index in range(len(self.entry.shards)))

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Check every block of every shard, and every file's SHA-256. progress(bytes so far, bytes). Raises DataError for the first damage.

        Two threads: hashing leaves the interpreter to others.
        """
        total = sum(shard.num_bytes for shard in self.entry.shards)
        done = 0
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            for num_bytes in pool.map(self._verify_shard, range(len(self.entry.shards))):
                done += num_bytes
                if progress is not None:
                    progress(done, total)

    def _verify_shard(self, index: int) -> int:
        entry = self.entry.shards[index]
        reader = self._open_reader(index)  # of its own: a thread must not push another's reader out
        reader.verify()
        reader.close()
        if fsops.sha256_file(reader.path) != entry.sha256:
            raise DataError(f"{reader.path}: SHA-256 is not the manifest's, though every token is; {_RESTORE}")
        return entry.num_bytes

    def _by_shard(self, indices: np.ndarray) -> Iterator[tuple[list[int] | slice, ShardReader, np.ndarray]]:
        """(which of the indices, their shard, their rows in it) for each shard that is touched."""
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.num_rows:
            raise IndexError(f"{self.folder}: rows {indices.min()}..{indices.max()} of {self.num_rows}")
        if len(self._ends) == 1:
            yield slice(None), self._reader(0), indices
            return
        of_shard: dict[int, list[int]] = {}
        for place, shard in enumerate(np.searchsorted(self._ends, indices, side="right").tolist()):
            of_shard.setdefault(shard, []).append(place)
        for shard, chosen in of_shard.items():
            first = int(self._ends[shard]) - self.entry.shards[shard].n_examples
            yield chosen, self._reader(shard), indices[chosen] - first

    def _check_files(self, set_name: str) -> None:
        """Every shard's file, by one reading of their folder: there, a file, and as large as the manifest says."""
        place = self.folder / set_name
        try:
            _within(self.folder, set_name)
            with os.scandir(place) as found:
                sizes = {entry.name: _shard_size(entry, self.folder) for entry in found if entry.name.endswith(".h5")}
        except FileNotFoundError:
            raise DataError(f"{place}: the folder of shards is missing; {_RESTORE}") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{place}: {error}; {_RESTORE}") from error
        for entry in self.entry.shards:
            size = sizes.get(entry.file.rpartition("/")[2])
            if size is None:
                raise DataError(f"{self.folder / entry.file}: the shard is missing; {_RESTORE}")
            if size != entry.num_bytes:
                raise DataError(
                    f"{self.folder / entry.file}: the shard has {size:,} bytes, the manifest says {entry.num_bytes:,}: it is truncated or "
                    f"was replaced; {_RESTORE}"
                )

    def _reader(self, index: int) -> ShardReader:
        """A shard's reader, kept, for it knows which blocks are verified: a few kilobytes, and no open file where the shard is mapped."""
        if index not in self._readers:
            self._readers[index] = self._open_reader(index)
        return self._readers[index]

    def _open_reader(self, index: int) -> ShardReader:
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
        return reader

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}


def open_set(folder: Path, set_name: str) -> tuple[Manifest, ShardSet]:
    """A dataset's manifest and one of its sets. Raises DataError."""
    manifest = read_manifest(folder)
    if set_name not in manifest.sets:
        raise DataError(f"{folder}: has no set '{set_name}'; it has {', '.join(manifest.sets)}")
    name: SetName = "train" if set_name == "train" else "heldout"
    return manifest, ShardSet(folder, manifest, name)
