"""Exports of a dataset: Cerebras' (N, 3, S) HDF5, and Megatron's .bin and .idx. The importers are in readers/.

Rows and documents keep their order. A Cerebras file holds the rows of a set, a Megatron pair its documents, rejoined
where a shard cut them. Cerebras "corpus" readers need no export: `data` of our shards has that form.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.formats.dataset_manifest import DatasetManifest
from weftrain.core.formats.shard_format import token_dtype
from weftrain.core.formats.shard_set import ShardSet, open_set
from weftrain.data_prep.stages.plan import Progress, no_progress

_ROWS_AT_ONCE = 512
_MEGATRON_CODES = {"<u2": 8, "<i4": 4}


def export_cerebras(
    folder: Path, set_name: str, to: Path, rows_per_file: int = 65_536, progress: Progress = no_progress
) -> list[Path]:
    """Write a set as `data` (N, 3, S) int32, gzip: input ids, loss mask, labels; with the attribute `n_examples`.
    Returns the files, NNNNN.h5 in `to`, which must hold none yet. Raises DataError, OSError.
    """
    manifest, shards = open_set(folder, set_name)
    _check_unweighted(folder, manifest)
    _check_empty(to)
    length = manifest.sequence_length
    files: list[Path] = []
    for first in range(0, shards.num_rows, rows_per_file):
        count = min(rows_per_file, shards.num_rows - first)
        path = to / f"{len(files):05d}.h5"
        temporary = fsops.temporary_beside(path)
        with h5py.File(temporary, "w", libver="latest") as file:
            data = file.create_dataset(
                "data", (count, 3, length), "<i4", chunks=(1, 3, length), compression="gzip", track_times=False
            )
            file.attrs["n_examples"] = np.int64(count)
            for start in range(0, count, _ROWS_AT_ONCE):
                numbers = np.arange(first + start, first + min(start + _ROWS_AT_ONCE, count))
                ids, mask = shards.rows(numbers)
                rows = np.ones((len(numbers), 3, length), np.int32)
                rows[:, 0], rows[:, 2] = ids[:, :-1], ids[:, 1:]
                if mask is not None:
                    rows[:, 1] = mask
                data[start : start + len(numbers)] = rows
                progress("export", first + start + len(numbers), shards.num_rows, "rows")
        fsops.sync_file(temporary)
        fsops.rename(temporary, path)
        files.append(path)
    return files


def export_megatron(folder: Path, set_name: str, to: Path, progress: Progress = no_progress) -> tuple[Path, Path]:
    """Write a set as to.bin and to.idx (version 1), one sequence per document with its start and end token. What the
    dataset dropped at its end is missing from the last document, and padding is left out. Raises DataError, OSError.
    """
    manifest, shards = open_set(folder, set_name)
    _check_unweighted(folder, manifest)
    paths = (to.with_name(f"{to.name}.bin"), to.with_name(f"{to.name}.idx"))
    for path in paths:
        if path.exists():
            raise DataError(f"{path}: exists already; name another prefix, or remove it")
    fsops.make_dirs(to.parent)
    dtype = token_dtype(manifest.vocab_size)
    sizes: list[int] = []
    temporary = fsops.temporary_beside(paths[0])
    with fsops.FileWriter(temporary) as file:
        for tokens in whole_documents(manifest, shards, progress):
            file.write(np.ascontiguousarray(tokens, dtype).data)
            sizes.append(len(tokens))
        file.sync()
    lengths = np.array(sizes, "<i4")
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
    documents = np.arange(len(sizes) + 1, dtype="<i8")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, _MEGATRON_CODES[dtype.str], len(sizes), len(documents))
    fsops.write_bytes(paths[1], header + lengths.tobytes() + pointers.astype("<i8").tobytes() + documents.tobytes())
    fsops.rename(temporary, paths[0])
    return paths


def whole_documents(
    manifest: DatasetManifest, shards: ShardSet, progress: Progress = no_progress
) -> Iterator[np.ndarray]:
    """The tokens of each document of a set, in order, rejoined where shards or concatenated rows cut them. In rows that
    stand alone (best fit, FIM by context) each piece of a long document counts as a document.
    """
    shared = manifest.row_stride == manifest.sequence_length
    held: list[np.ndarray] = []
    held_id = b""
    done, sections = 0, set(np.cumsum(shards.entry.epochs).tolist())
    for reader in shards.readers():
        table = reader.documents()
        starts = np.append(0, table.end[:-1])
        for index, (start, end) in enumerate(zip(starts.tolist(), table.end.tolist(), strict=True)):
            identity = table.id[index].tobytes()
            continues = shared and start == 0 and bool(held) and identity == held_id
            if continues:
                start = 1
            tokens = reader.tokens(start, end)
            if not continues and held:
                yield np.concatenate(held)
                held = []
            if shared and start == 0 and index == 0 and done and done not in sections and not continues:
                tokens = tokens[1:]  # the end of the document before, which the shard before holds
            held_id = identity
            if identity != bytes(len(identity)) and len(tokens):
                held.append(tokens)
            if end != table.end[-1] and held:
                yield np.concatenate(held)
                held = []
        done += reader.num_rows
        if done in sections and held:
            yield np.concatenate(held)
            held = []
        progress("export", done, shards.num_rows, "rows")
    if held:
        yield np.concatenate(held)


def _check_unweighted(folder: Path, manifest: DatasetManifest) -> None:
    if manifest.weighted:
        raise DataError(
            f"{folder}: holds weights of tokens, for which neither format has a place: prepare it without them"
        )


def _check_empty(folder: Path) -> None:
    if folder.is_dir() and any(folder.glob("*.h5")):
        raise DataError(f"{folder}: holds .h5 files already; name an empty folder")
    fsops.make_dirs(folder)
