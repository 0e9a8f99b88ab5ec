"""Time to read batches: through the data path of a run, and the same number of rows through h5py, row by row.

The two are interleaved and read different steps, so neither finds rows that the other has just cached.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from weftrain.core.data import TokenSource
from weftrain.core.formats.units import gb
from weftrain.core.order.batch import BatchSource


class WhatIsRead(NamedTuple):
    """The rows of some batches: in words, and their bytes where they lie."""

    words: str
    num_bytes: int


def what_is_read(source: BatchSource, steps: Iterable[int]) -> WhatIsRead:
    """What the batches of `steps` take from the shards' files, or from memory."""
    steps, rows = list(steps), source.global_batch_size
    shape = f"{len(steps) * rows:,} rows of {source.sequence_length + 1:,} tokens"
    if not isinstance(source, TokenSource):
        num_bytes = len(steps) * rows * (source.sequence_length + 1) * 8
        return WhatIsRead(f"{shape} of synthetic rows in memory, {gb(num_bytes)} of int64: no file is read", num_bytes)
    count = Counter(reader for step in steps for reader in source.places(step, 0, rows)[0])
    num_bytes = sum(
        times * (source.sequence_length * sum(reader.itemsizes.values()) + reader.itemsizes["data"])
        for reader, times in count.items()
    )
    there = sum(len(one.shards.entry.shards) for one in source.sources)
    words = f"{shape} from {len(count):,} of {there:,} shard files, {gb(num_bytes)} as stored"
    return WhatIsRead(words, num_bytes)


def batch_times_ms(source: BatchSource, steps: int) -> list[float]:
    """Milliseconds of each of the first `steps` batches. Raises DataError."""
    return [_elapsed_ms(lambda step=step: source.rows(step, 0, source.global_batch_size)) for step in range(steps)]  # type: ignore[misc]


def beside_h5py_ms(source: TokenSource, steps: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each batch: through the data path, and by `dataset[start:stop]` of open HDF5 files into int64.

    Every shard is verified first, so both start warm. Raises DataError, and OSError where h5py cannot open a shard.
    """
    ours, theirs = [], []
    for component in source.sources:
        for reader in component.shards.readers():
            reader.verify()
    rows = source.global_batch_size
    with ExitStack() as stack:

        @cache
        def opened(path: Path) -> h5py.Dataset:
            return stack.enter_context(h5py.File(path, "r", locking=False))["data"]

        for step in range(0, 2 * steps, 2):
            ours.append(_elapsed_ms(lambda step=step: source.rows(step, 0, rows)))  # type: ignore[misc]
            places = row_places(source, step + 1, opened)
            theirs.append(_elapsed_ms(lambda places=places: rows_by_h5py(places, source.sequence_length + 1)))  # type: ignore[misc]
    return ours, theirs


def row_places(
    source: TokenSource, step: int, opened: Callable[[Path], h5py.Dataset]
) -> list[tuple[h5py.Dataset, int]]:
    """The dataset and position where each row of a step begins."""
    strides = {component.name: component.shards.manifest.row_stride for component in source.sources}
    found = [source.locate(step, row) for row in range(source.global_batch_size)]
    return [(opened(row.folder / row.file), row.row_in_shard * strides[row.source]) for row in found]


def rows_by_h5py(places: list[tuple[h5py.Dataset, int]], width: int) -> np.ndarray:
    """int64 [n, width], read as a program without weftrain would."""
    ids = np.empty((len(places), width), dtype=np.int64)
    for row, (dataset, start) in enumerate(places):
        ids[row] = dataset[start : start + width]
    return ids


def _elapsed_ms(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3
