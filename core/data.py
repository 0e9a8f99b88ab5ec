"""Mixture, order and position: the batch of step s is a pure function of (datasets, weights, seed, s).

Sample number n (step x global_batch_size + row; this one integer is the position) falls into a block of `MIXTURE_BLOCK`. Each block
holds the same count of every source, by largest remainder, in a keyed order; so n gives a source and a running number k within it, and
k gives an epoch and, through a keyed permutation of the source's rows, a row. Nothing is materialised and nothing is remembered: what a
reader would get wrong is to look for a cursor. There is none to lose.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weftrain.core.backend import Batch
from weftrain.core.config import DataConfig, Fim, Source
from weftrain.core.dataset import Dataset, FimEntry, TokenSet, merkle_root
from weftrain.core.errors import DataError
from weftrain.core.feistel import BLOCK, Permutation

MIXTURE_BLOCK = 1 << 16
CACHED_BLOCKS = 8


def largest_remainder(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole counts int64 that sum to `total`, each within 1 of its share (Hamilton's method; ties go to the earlier)."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    counts = np.floor(shares).astype(np.int64)
    order = np.argsort(-(shares - counts), kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts


@dataclass(frozen=True)
class _Component:
    """One source of the mixture: rows first..first+count-1 of a token set."""

    name: str
    rows: TokenSet
    first: int
    count: int


class TokenSource:
    """Implements BatchSource over prepared datasets. Picklable and stateless; the caches hold only what can be computed again."""

    def __init__(self, components: Sequence[_Component], weights: Sequence[float], global_batch_size: int, seed: int) -> None:
        self._components, self._weights, self._seed = tuple(components), tuple(weights), seed
        self.global_batch_size = global_batch_size
        self.sequence_length = components[0].rows.manifest.sequence_length
        self._counts = largest_remainder(weights, MIXTURE_BLOCK)
        self._ends = np.cumsum(self._counts)
        for component, count in zip(components, self._counts, strict=True):
            if count == 0:
                raise DataError(
                    f"source '{component.name}': its share is below 1/{MIXTURE_BLOCK} and would never be read; raise its weight"
                )
        ids = [hashlib.sha256(f"{c.name}/{c.rows.entry.dataset_id}/{c.first}/{c.count}".encode()).hexdigest() for c in components]
        self.dataset_id = components[0].rows.entry.dataset_id if len(components) == 1 else merkle_root(ids)
        self._cache: OrderedDict[tuple[str, int, int], np.ndarray] = OrderedDict()

    def __reduce__(self) -> tuple[type[TokenSource], tuple[object, ...]]:
        return TokenSource, (self._components, self._weights, self.global_batch_size, self._seed)

    def rows(self, step: int, first: int, count: int) -> Batch:
        """See BatchSource.rows."""
        which, row = self.locate(self._numbers(step, first, count))
        ids = np.empty((count, self.sequence_length + 1), dtype=np.int64)
        mask: np.ndarray | None = None
        for index in np.unique(which):
            where = np.nonzero(which == index)[0]
            ids[where], part = self._components[index].rows.rows(row[where])
            if part is not None:
                mask = np.ones((count, self.sequence_length), dtype=bool) if mask is None else mask
                mask[where] = part
        return Batch(ids, mask)

    def sample_names(self, step: int, first: int, count: int) -> list[str]:
        """See BatchSource.sample_names."""
        which, row = self.locate(self._numbers(step, first, count))
        return [self._components[index].rows.row_name(int(number)) for index, number in zip(which, row, strict=True)]

    def counts(self, position: int) -> dict[str, int]:
        """Samples of each source among sample numbers 0..position-1."""
        blocks, rest = divmod(position, MIXTURE_BLOCK)
        which, _ = self._assign(np.arange(position - rest, position))
        partial = np.bincount(which, minlength=len(self._components))
        totals = blocks * self._counts + partial
        return {component.name: int(total) for component, total in zip(self._components, totals, strict=True)}

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers int64 [n] -> source index int64 [n] and row in that source's token set int64 [n]."""
        which, running = self._assign(numbers)
        row = np.empty_like(running)
        for index in np.unique(which):
            where, component = which == index, self._components[index]
            epoch, k = np.divmod(running[where], component.count)
            row[where] = component.first + self._permuted(component, epoch, k)
        return which, row

    def _numbers(self, step: int, first: int, count: int) -> np.ndarray:
        start = step * self.global_batch_size + first
        return np.arange(start, start + count, dtype=np.int64)

    def _assign(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers -> source index, and the sample's running number within that source."""
        if len(self._components) == 1:
            return np.zeros_like(numbers), numbers
        block, place = np.divmod(numbers, MIXTURE_BLOCK)
        slot = np.empty_like(numbers)
        for value in np.unique(block):
            where = block == value
            slot[where] = Permutation(MIXTURE_BLOCK, f"{self._seed}/mixture/{value}")(place[where])
        which = np.searchsorted(self._ends, slot, side="right")
        return which, block * self._counts[which] + slot - (self._ends - self._counts)[which]

    def _permuted(self, component: _Component, epoch: np.ndarray, k: np.ndarray) -> np.ndarray:
        """The k-th row of each epoch. Permutations are computed in blocks, since one index costs as much as some hundred."""
        out = np.empty_like(k)
        blocks = np.stack([epoch, k // BLOCK])
        for value_epoch, value_block in np.unique(blocks, axis=1).T:
            where = (blocks[0] == value_epoch) & (blocks[1] == value_block)
            out[where] = self._block(component, int(value_epoch), int(value_block))[k[where] % BLOCK]
        return out

    def _block(self, component: _Component, epoch: int, block: int) -> np.ndarray:
        key = (component.name, epoch, block)
        if key not in self._cache:
            places = np.arange(block * BLOCK, min((block + 1) * BLOCK, component.count))
            self._cache[key] = Permutation(component.count, f"{self._seed}/{component.name}/{epoch}")(places)
            while len(self._cache) > CACHED_BLOCKS * len(self._components):
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]


class HeldOut:
    """Implements EvaluationSource: the first `num_rows` rows of a held-out set, in the order of the file (documents were shuffled)."""

    def __init__(self, name: str, rows: TokenSet, num_rows: int) -> None:
        self.name, self._rows = name, rows
        self.num_rows = min(num_rows, len(rows))
        self.sequence_length = rows.manifest.sequence_length
        self.dataset_id = rows.entry.dataset_id

    def rows(self, first: int, count: int) -> Batch:
        """See EvaluationSource.rows."""
        return Batch(*self._rows.rows(np.arange(first, min(first + count, self.num_rows), dtype=np.int64)))


def open_training(data: DataConfig, global_batch_size: int, *, vocab_size: int) -> TokenSource:
    """The training rows of a recipe's sources. Raises DataError, before step 0, for whatever does not fit together."""
    components = []
    for source in data.sources:
        rows = _open(data, source, vocab_size).token_set("train")
        if rows is None:
            raise DataError(f"{Path(data.root) / source.path}: the dataset has no training rows; prepare it with more documents")
        first, last = (round(edge * len(rows)) for edge in source.subset)
        if first == last:
            raise DataError(f"source '{source.name}': subset {list(source.subset)} of {len(rows)} rows holds no row; widen it")
        components.append(_Component(source.name, rows, first, last - first))
    return TokenSource(components, [source.weight for source in data.sources], global_batch_size, data.shuffle_seed)


def open_heldout(data: DataConfig, vocab_size: int, num_rows: int) -> list[HeldOut]:
    """The held-out set of each source that has one, at most `num_rows` rows each."""
    opened = [(source.name, _open(data, source, vocab_size).token_set("heldout")) for source in data.sources]
    return [HeldOut(name, rows, num_rows) for name, rows in opened if rows is not None]


def _open(data: DataConfig, source: Source, vocab_size: int) -> Dataset:
    dataset = Dataset(Path(data.root) / source.path)
    manifest, where = dataset.manifest, f"source '{source.name}': {dataset.folder}"
    if manifest.sequence_length != data.sequence_length:
        raise DataError(
            f"{where} has rows of {manifest.sequence_length} tokens and data.sequence_length is {data.sequence_length}: "
            "change the recipe, or prepare the dataset with --sequence-length"
        )
    if manifest.vocab_size > vocab_size:
        raise DataError(
            f"{where} has ids up to {manifest.vocab_size - 1} and model.vocab_size is {vocab_size}: use the model's own tokenizer"
        )
    if _fim_of(source.fim) != manifest.fim:
        made, asked = _describe(manifest.fim), _describe(_fim_of(source.fim))
        raise DataError(f"{where} was prepared {made}, and the recipe asks for rows {asked}: prepare it so, or change the recipe's fim")
    return dataset


def _fim_of(fim: Fim | None) -> FimEntry | None:
    return None if fim is None else FimEntry(rate=fim.rate, spm_share=fim.spm_share)


def _describe(fim: FimEntry | None) -> str:
    return "without FIM" if fim is None else f"with FIM rate {fim.rate}, SPM share {fim.spm_share}"
