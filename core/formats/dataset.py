"""A prepared dataset: a folder with `manifest.json`, `tokenizer.json`, `inputs.jsonl` (the files it was made of, a line
each), `sources.jsonl` (what its documents are counted as, a line each) and the shards of its sets, `train/` and perhaps
`heldout/`.

The dataset id is a Merkle root over the shards' `digest`s, not over their files' SHA-256. A digest commits to every
token, document and mask, and is checked whenever a shard is opened, in milliseconds; so a shard swapped for another
valid one is refused before step 0, which file hashes would need a day for at full scale. The SHA-256 are in the
manifest too, for `sha256sum`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json, sha256_json
from weftrain.core.formats.dataset_manifest import (
    Ancestor,
    AncestorSet,
    Chunks,
    Corpus,
    DocumentCounts,
    FimPrepared,
    InputEntry,
    Manifest,
    SetEntry,
    SetName,
    ShardEntry,
    SourceEntry,
    Tokenization,
    merkle_root,
    shard_file,
)
from weftrain.core.formats.line_table import Lines, LineTable, WrittenLines, write_lines
from weftrain.core.formats.plain_file import read_plain, real_path
from weftrain.core.formats.shard_format import PADDING
from weftrain.core.formats.shard_reader import ShardReader, Stretch, read_document_starts, read_rows

__all__ = [
    "Ancestor",
    "AncestorSet",
    "Chunks",
    "Corpus",
    "DocumentCounts",
    "FimPrepared",
    "InputEntry",
    "Manifest",
    "SetEntry",
    "SetName",
    "ShardEntry",
    "ShardSet",
    "SourceEntry",
    "Tokenization",
    "merkle_root",
    "shard_file",
]

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
INPUTS = "inputs.jsonl"
SOURCES = "sources.jsonl"
FAILURES = "failures.jsonl"  # what could not be read, where anything could not
VERSION: Literal[3] = 3
EAGER_SHARDS = 64
_RESTORE = "put it back, or remove the dataset and prepare it again"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, as canonical JSON with its own hash, `root`. Raises OSError."""
    assert manifest.version == VERSION, "a manifest of an older version stays as it is"
    value = manifest.model_dump(mode="json")
    fsops.write_bytes(folder / MANIFEST, canonical_json(value | {"root": sha256_json(value)}) + b"\n")


def read_manifest(folder: Path) -> Manifest:
    """The folder's manifest, checked in itself and against tokenizer.json. Raises DataError."""
    path = folder / MANIFEST
    try:
        value = _manifest_value(folder)
        manifest = Manifest.model_validate(_with_counted_sources(value) if value.get("version") == 2 else value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))[:80]
        raise DataError(f"{path}: key '{key}': {first['msg']}; remove the dataset and prepare it again") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}; remove the dataset and prepare it again") from error
    tokenizer_sha256 = hashlib.sha256(read_tokenizer(folder)).hexdigest()
    if tokenizer_sha256 != manifest.tokenizer_sha256:
        raise DataError(
            f"{folder / TOKENIZER}: SHA-256 {tokenizer_sha256[:12]}… is not the manifest's "
            f"{manifest.tokenizer_sha256[:12]}…: the shards "
            "were made with another tokenizer; put that file back, or remove the dataset and prepare it again"
        )
    return manifest


def manifest_root(folder: Path) -> str:
    """The SHA-256 that manifest.json holds of itself, checked: it commits to all that the dataset is. Raises
    DataError.
    """
    try:
        return sha256_json(_manifest_value(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST}: {error}; remove the dataset and prepare it again") from error


def _manifest_value(folder: Path) -> dict[str, Any]:
    """What manifest.json holds, without its root, which it must hash to. Raises ValueError, OSError."""
    data = _read_regular(folder, MANIFEST)
    value = parse_json(data)
    if (
        isinstance(value, dict)
        and value.get("format") == "weftrain-dataset"
        and value.get("version") not in (2, VERSION)
    ):
        raise ValueError(f"version {value.get('version')!r} is not one that this program reads (2, {VERSION})")
    if canonical_json(value) + b"\n" != data:
        raise ValueError("is not in canonical form, so it was altered")
    if not isinstance(value, dict) or value.pop("root", None) != sha256_json(value):
        raise ValueError("does not hash to its root, so it was altered")
    return value


def _with_counted_sources(value: dict[str, Any]) -> dict[str, Any]:
    """A manifest of version 2, which lists the sources, as one that counts them. Raises ValueError."""
    if {"num_sources", "sources_sha256"} & value.keys() or not isinstance(value.get("sources"), list):
        raise ValueError("key 'sources': is missing or no list")
    entries = [SourceEntry.model_validate(entry).model_dump(mode="json") for entry in value["sources"]]
    digest = hashlib.sha256(b"".join(canonical_json(entry) + b"\n" for entry in entries)).hexdigest()
    rest = {key: item for key, item in value.items() if key != "sources"}
    return rest | {"num_sources": len(entries), "sources_sha256": digest}


def _sources_of_version_2(folder: Path) -> list[SourceEntry]:
    try:
        return [SourceEntry.model_validate(entry) for entry in _manifest_value(folder)["sources"]]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder / MANIFEST}: changed since it was read: {error}; {_RESTORE}") from error


def write_inputs(folder: Path, entries: Iterable[InputEntry]) -> WrittenLines:
    """Write inputs.jsonl, whose SHA-256 the manifest holds. Raises OSError."""
    return write_lines(folder / INPUTS, (entry.model_dump(mode="json", exclude_defaults=True) for entry in entries))


def open_inputs(folder: Path, manifest: Manifest) -> LineTable[InputEntry]:
    """The files that a dataset was made of, then those that were skipped; `doc_file` counts them from 0. Raises
    DataError.
    """
    table = LineTable(
        _table_path(folder, INPUTS), InputEntry.model_validate, sha256=manifest.inputs_sha256, remedy=_RESTORE
    )
    expected = manifest.corpus.files + sum(manifest.inputs_skipped.values())
    if len(table) != expected:
        raise DataError(f"{table.path}: has {len(table):,} lines, the manifest counts {expected:,} files; {_RESTORE}")
    return table


def write_sources(folder: Path, entries: Iterable[SourceEntry]) -> WrittenLines:
    """Write sources.jsonl, whose SHA-256 and number of lines the manifest holds. Raises OSError, ValueError."""
    return write_lines(folder / SOURCES, (entry.model_dump(mode="json") for entry in entries))


def open_sources(folder: Path, manifest: Manifest) -> Lines[SourceEntry]:
    """The sources of a dataset's documents; `doc_source` counts them from 0. Raises DataError."""
    if manifest.version == 2:
        return _sources_of_version_2(folder)
    table = LineTable(
        _table_path(folder, SOURCES), SourceEntry.model_validate, sha256=manifest.sources_sha256, remedy=_RESTORE
    )
    if len(table) != manifest.num_sources:
        raise DataError(
            f"{table.path}: has {len(table):,} lines, the manifest counts {manifest.num_sources:,} sources; {_RESTORE}"
        )
    return table


def source_name(sources: Lines[SourceEntry], index: int) -> str:
    """The name that a `doc_source` stands for, that of padding too. Raises DataError."""
    return PADDING if index < 0 else sources[index].name


def described_by(manifest: Manifest) -> list[str]:
    """The files of a dataset that say what its shards are, beside the manifest."""
    return [TOKENIZER, INPUTS] if manifest.version == 2 else [TOKENIZER, INPUTS, SOURCES]


def verify_tables(folder: Path, manifest: Manifest) -> None:
    """Check the hashes and every line of inputs.jsonl and sources.jsonl, and the corpus' root over the inputs. Raises
    DataError.
    """
    with open_inputs(folder, manifest) as inputs:
        files = islice(inputs, manifest.corpus.files)
        if merkle_root(sha256 for entry in files for sha256 in entry.sha256) != manifest.corpus.sha256:
            raise DataError(
                f"{inputs.path}: the files' hashes do not lead to the corpus' {manifest.corpus.sha256[:12]}…; "
                f"{_RESTORE}"
            )
    for _ in open_sources(folder, manifest):
        pass


def _table_path(folder: Path, name: str) -> Path:
    try:
        return _within(folder, name)
    except ValueError as error:
        raise DataError(f"{folder / name}: {error}; {_RESTORE}") from error


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
    """The rows of one set, numbered through its shards. Picklable: a copy opens the shards it needs, when it needs
    them.

    Opening checks that every shard's file is there, in its size, and opens the first EAGER_SHARDS of them, so that ten
    thousand take no minute. Any other is opened, and each block of it verified, when it is first touched: no unverified
    token is ever handed out.
    """

    def __init__(self, folder: Path, manifest: Manifest, set_name: SetName) -> None:
        """Raises DataError."""
        entry = manifest.sets[set_name]
        self.folder, self.manifest, self.entry = folder, manifest, entry
        self.num_rows: int = entry.n_examples
        rows = np.array([shard.n_examples for shard in entry.shards], dtype=np.int64)
        self._ends = np.cumsum(rows)
        self._starts = self._ends - rows
        self._readers: dict[int, ShardReader] = {}
        self._names: tuple[str, ...] = ()
        self._check_files(set_name)
        for index in range(min(EAGER_SHARDS, len(entry.shards))):
            self.reader(index)

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """int64 [n] -> ids int64 [n, S + 1], and loss mask bool [n, S], or None where none of these rows has one.
        Raises DataError.
        """
        ids = np.empty((len(indices), self.manifest.sequence_length + 1), dtype=np.int64)
        return ids, read_rows(ids, *self._found(indices))

    def _found(self, indices: np.ndarray) -> tuple[list[ShardReader], list[int]]:
        """Rows as `read_rows` takes them: readers, and positions in their `data`. Raises IndexError, DataError."""
        shard, row = self.places(indices)
        return [self.reader(index) for index in shard.tolist()], (row * self.manifest.row_stride).tolist()

    def places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n] -> which shard, from 0, and which row of it, int64 [n] each. Raises IndexError."""
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.num_rows:
            raise IndexError(f"{self.folder}: rows {indices.min()}..{indices.max()} of {self.num_rows}")
        shard = np.searchsorted(self._ends, indices, side="right")
        return shard, indices - self._starts[shard]

    def locate(self, index: int) -> tuple[str, int]:
        """The shard's file, relative to the folder, and the row within it."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self.entry.shards[shard].file, int(index - self._starts[shard])

    def document_starts(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n] -> int32 [n, S]: see ShardReader.document_starts."""
        return read_document_starts(self.manifest.sequence_length, *self._found(indices))

    def stretches(self, index: int) -> list[Stretch]:
        """The documents of a row. Raises DataError."""
        shard, row = self.places(np.array([index]))
        return self.reader(int(shard[0])).stretches(int(row[0]))

    def readers(self) -> Iterator[ShardReader]:
        """All shards, in order, each opened when it is its turn."""
        return (self.reader(index) for index in range(len(self.entry.shards)))

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Check every block of every shard, and every file's SHA-256. progress(bytes so far, bytes). Raises DataError
        for the first damage.

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
        files = int(reader.documents().file.max()) + 1
        reader.close()
        if files > self.manifest.corpus.files:
            raise DataError(
                f"{reader.path}: doc_file: names file {files:,} of {self.manifest.corpus.files:,}; {_RESTORE}"
            )
        if reader.source_names is not None and reader.source_names != self._former_names(len(reader.source_names)):
            raise DataError(f"{reader.path}: sources: are not the first that the dataset lists; {_RESTORE}")
        if fsops.sha256_file(reader.path) != entry.sha256:
            raise DataError(f"{reader.path}: SHA-256 is not the manifest's, though every token is; {_RESTORE}")
        return entry.num_bytes

    def _former_names(self, count: int) -> tuple[str, ...]:
        """The names of the first sources, for shards of format 2, which hold them and are then of the dataset's
        beginning.
        """
        if len(self._names) != count:
            self._names = tuple(entry.name for entry in islice(open_sources(self.folder, self.manifest), count))
        return self._names

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
                    f"{self.folder / entry.file}: the shard has {size:,} bytes, the manifest says {entry.num_bytes:,}: "
                    "it is truncated or "
                    f"was replaced; {_RESTORE}"
                )

    def reader(self, index: int) -> ShardReader:
        """A shard's reader, kept, for it knows which blocks are verified: a few kilobytes, and no open file where the
        shard is mapped.
        """
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
                    f"{reader.path}: {field} is {getattr(reader, field)!r}, the manifest says {value!r}: the shard is "
                    "of another "
                    "dataset; put its own back, or remove the dataset and prepare it again"
                )
        if reader.num_sources > manifest.num_sources:  # of a dataset that grew, the older shards know fewer
            raise DataError(
                f"{reader.path}: num_sources is {reader.num_sources:,}, the dataset has {manifest.num_sources:,}; "
                f"{_RESTORE}"
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
