"""The rows of one set (`train` or `heldout`) of a prepared dataset, numbered across its shards.

manifest, train = open_set(folder, "train")
ids, loss_mask = train.rows(np.array([0, 7]))
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.formats.dataset import RESTORE, inside_folder, open_sources, read_dataset_manifest
from weftrain.core.formats.dataset_manifest import DatasetManifest, SetName
from weftrain.core.formats.plain_file import real_path
from weftrain.core.formats.shard_format import LOSS_MASK, PLANES, TOKEN_WEIGHTS
from weftrain.core.formats.shard_reader import DocumentSpan, ShardReader, read_document_starts, read_rows

EAGER_SHARDS = 64


def _shard_size(entry: os.DirEntry[str], folder: Path) -> int:
    """Bytes of a shard's file. Raises ValueError for a link that leads out of the dataset, or what is no file."""
    if entry.is_symlink() and not real_path(entry.path).is_relative_to(real_path(folder)):
        raise ValueError(f"{entry.name} leads out of the dataset's folder through a symbolic link")
    status = entry.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{entry.name} is not a regular file")
    return status.st_size


class ShardSet:
    """The rows of one set. Picklable: a copy opens shards again when it needs them.

    Opening checks that every shard's file exists and has its recorded size, and opens the first EAGER_SHARDS of them;
    opening ten thousand would take a minute. Any other shard is opened at its first access, and so is each block of
    tokens verified: no unverified token is ever returned.
    """

    def __init__(self, folder: Path, manifest: DatasetManifest, set_name: SetName) -> None:
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
        """int64 [n] -> ids int64 [n, S + 1], and loss mask bool [n, S], or None if none of these rows has one. Raises
        IndexError, DataError.
        """
        ids, planes = self.labelled_rows(indices, (LOSS_MASK,))
        return ids, planes.get(LOSS_MASK)

    def labelled_rows(
        self, indices: np.ndarray, planes: Sequence[str] = tuple(PLANES)
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """int64 [n] -> ids int64 [n, S + 1], and those of the planes that one of these rows has, [n, S] each, a value
        for each label (PLANES in core/formats/shard_format.py). Raises IndexError, DataError.
        """
        ids = np.empty((len(indices), self.manifest.sequence_length + 1), dtype=np.int64)
        return ids, read_rows(ids, *self.positions(indices), planes)

    def positions(self, indices: np.ndarray) -> tuple[list[ShardReader], list[int]]:
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
        return read_document_starts(self.manifest.sequence_length, *self.positions(indices))

    def document_spans(self, index: int) -> list[DocumentSpan]:
        """The documents of a row. Raises DataError."""
        shard, row = self.places(np.array([index]))
        return self.reader(int(shard[0])).document_spans(int(row[0]))

    def readers(self) -> Iterator[ShardReader]:
        """All shards in order, each opened when the iterator reaches it."""
        return (self.reader(index) for index in range(len(self.entry.shards)))

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Check every block of every shard, and every file's SHA-256. progress(bytes so far, bytes in all). Raises
        DataError for the first damage.
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
        reader = self._open_reader(index)  # not a shared one, since it is closed below
        reader.verify()
        files = int(reader.documents().file.max()) + 1
        reader.close()
        if files > self.manifest.corpus.files:
            raise DataError(
                f"{reader.path}: doc_file: names file {files:,} of {self.manifest.corpus.files:,}; {RESTORE}"
            )
        if reader.source_names is not None and reader.source_names != self._former_names(len(reader.source_names)):
            raise DataError(f"{reader.path}: sources: are not the first that the dataset lists; {RESTORE}")
        if fsops.sha256_file(reader.path) != entry.sha256:
            raise DataError(f"{reader.path}: SHA-256 is not the manifest's, though every token is; {RESTORE}")
        return entry.num_bytes

    def _former_names(self, count: int) -> tuple[str, ...]:
        """The names of the first `count` sources. Shards of format 2 hold the names themselves; in a dataset that has
        grown they are the first shards.
        """
        if len(self._names) != count:
            self._names = tuple(entry.name for entry in islice(open_sources(self.folder, self.manifest), count))
        return self._names

    def _check_files(self, set_name: str) -> None:
        """Check, by one listing of the folder, that every shard exists, is a file and has its recorded size."""
        place = self.folder / set_name
        try:
            inside_folder(self.folder, set_name)
            with os.scandir(place) as found:
                sizes = {entry.name: _shard_size(entry, self.folder) for entry in found if entry.name.endswith(".h5")}
        except FileNotFoundError:
            raise DataError(f"{place}: the folder of shards is missing; {RESTORE}") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{place}: {error}; {RESTORE}") from error
        for entry in self.entry.shards:
            size = sizes.get(entry.file.rpartition("/")[2])
            if size is None:
                raise DataError(f"{self.folder / entry.file}: the shard is missing; {RESTORE}")
            if size != entry.num_bytes:
                raise DataError(
                    f"{self.folder / entry.file}: the shard has {size:,} bytes, the manifest says {entry.num_bytes:,}: "
                    f"it is truncated or was replaced; {RESTORE}"
                )

    def reader(self, index: int) -> ShardReader:
        """The reader of a shard, made once: it remembers which blocks are verified. It takes a few kilobytes, and holds
        no open file if the shard is mapped.
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
                    f"{reader.path}: {field} is {getattr(reader, field)!r}, the manifest says {value!r}: the shard "
                    "belongs to another dataset; put the right one back, or remove the dataset and prepare it again"
                )
        if reader.num_sources > manifest.num_sources:  # fewer is fine: shards from before a dataset grew
            raise DataError(
                f"{reader.path}: num_sources is {reader.num_sources:,}, the dataset has {manifest.num_sources:,}; "
                f"{RESTORE}"
            )
        if TOKEN_WEIGHTS in reader.planes and not manifest.weighted:
            raise DataError(
                f"{reader.path}: {TOKEN_WEIGHTS}: the manifest knows of no weights: the shard belongs to another "
                f"dataset; {RESTORE}"
            )
        return reader

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}


def open_set(folder: Path, set_name: str) -> tuple[DatasetManifest, ShardSet]:
    """A dataset's manifest and one of its sets. Raises DataError."""
    manifest = read_dataset_manifest(folder)
    if set_name not in manifest.sets:
        raise DataError(f"{folder}: has no set '{set_name}'; it has {', '.join(manifest.sets)}")
    name: SetName = "train" if set_name == "train" else "heldout"
    return manifest, ShardSet(folder, manifest, name)
