"""What is read when: the mixture of sources, the order within each, and position, which is one integer.

Sample number n = step * global_batch_size + row. The mixture says of which source it is and the how-maniest of that source, k; the row is a
keyed permutation, one an epoch, of the source's rows at k. All of it is a pure function of (datasets, weights, seed, n): nothing is
materialised, nothing is lost or repeated on a restart, and any number of readers share the work.

What a reader would get wrong: weights are honoured by count and not by chance. After each block of samples every source has its share of
all samples so far, rounded up or down to a whole number by largest remainder; only the order inside a block is random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np

from weftrain.core import feistel
from weftrain.core.backend import Batch, BatchSource
from weftrain.core.config import DataConfig, Recipe, Source
from weftrain.core.dataset import SetName, ShardSet, merkle_root, read_manifest
from weftrain.core.errors import DataError
from weftrain.core.synthetic import synthetic_source

MIXTURE_BLOCK = 4096
MAX_MIXTURE_BLOCK = 1 << 20


@dataclass(frozen=True)
class Mixture:
    """Which source each sample is of. shares: positive integers, in the proportions of the weights. block: samples that share a table."""

    shares: tuple[int, ...]
    block: int
    key: bytes

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n] sample numbers -> source index [n], and k [n]: it is that source's k-th sample, from 0, in the order of n."""
        if len(self.shares) == 1:
            return np.zeros(len(samples), dtype=np.int64), samples
        source, k = np.empty(len(samples), dtype=np.int64), np.empty(len(samples), dtype=np.int64)
        blocks = samples // self.block
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            sources, ks = _mixture_table(self, block)
            at = samples[chosen] - block * self.block
            source[chosen], k[chosen] = sources[at], ks[at]
        return source, k

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` are of each source."""
        if len(self.shares) == 1:
            return [samples]
        block, rest = divmod(samples, self.block)
        within = np.bincount(_mixture_table(self, block)[0][:rest], minlength=len(self.shares))
        return [quota + int(more) for quota, more in zip(largest_remainder(self.shares, block * self.block), within, strict=True)]


def largest_remainder(shares: tuple[int, ...], total: int) -> list[int]:
    """`total` split in the proportions of `shares`, each part its exact quota rounded down or up (Hamilton's method), exact at any size."""
    whole = sum(shares)
    quotas = [divmod(total * share, whole) for share in shares]
    parts = [quotient for quotient, _ in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda index: (-quotas[index][1], index))
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts


@lru_cache(maxsize=8)
def _mixture_table(mixture: Mixture, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Source int32 [block] and k int64 [block] of a block's samples: its counts laid out, then permuted."""
    before = largest_remainder(mixture.shares, block * mixture.block)
    after = largest_remainder(mixture.shares, (block + 1) * mixture.block)
    counts = [high - low for low, high in zip(before, after, strict=True)]
    laid_out = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    key = feistel.derive_key(mixture.key.hex(), block)
    source = laid_out[feistel.permute(np.arange(mixture.block), mixture.block, key)]
    k = np.empty(mixture.block, dtype=np.int64)
    k[np.argsort(source, kind="stable")] = np.concatenate([np.arange(low, high) for low, high in zip(before, after, strict=True)])
    return source, k


def make_mixture(sources: tuple[Source, ...], seed: int) -> Mixture:
    """The mixture of a recipe's sources, by their weights as written in decimal. Raises DataError for a share below 2^-20.

    A block holds at least one sample of each source: then no source's count ever falls from one block's end to the next.
    """
    weights = [Fraction(repr(source.weight)) for source in sources]
    unit = Fraction(math.gcd(*(weight.numerator for weight in weights)), math.lcm(*(weight.denominator for weight in weights)))
    shares = tuple(int(weight / unit) for weight in weights)
    smallest = min(shares)
    block = max(MIXTURE_BLOCK, 1 << (-(-sum(shares) // smallest) - 1).bit_length())
    if block > MAX_MIXTURE_BLOCK:
        name = sources[shares.index(smallest)].name
        raise DataError(f"data.sources: the weight of '{name}' is below 1/{MAX_MIXTURE_BLOCK:,} of all: raise it, or leave the source out")
    return Mixture(shares, block, feistel.derive_key("mixture", seed, *(source.name for source in sources)))


@dataclass(frozen=True)
class Component:
    """One source: rows first_row..first_row+num_rows-1 of a set, in an order of its own each epoch."""

    name: str
    shards: ShardSet
    first_row: int
    num_rows: int
    seed: int

    def row_numbers(self, k: np.ndarray) -> np.ndarray:
        """int64 [n], the source's k-th samples -> row numbers of the set. Every row comes once in each num_rows samples."""
        epochs = k // self.num_rows
        rows = np.empty(k.shape, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            key = feistel.derive_key("rows", self.seed, self.name, epoch)
            rows[chosen] = feistel.lookup(k[chosen] - epoch * self.num_rows, self.num_rows, key)
        return rows + self.first_row


@dataclass(frozen=True)
class TokenSource:
    """Implements BatchSource. Picklable and stateless; `dataset_id` is the one source's id, or the Merkle root of all sources' ids."""

    sequence_length: int
    global_batch_size: int
    dataset_id: str
    components: tuple[Component, ...]
    mixture: Mixture

    def rows(self, step: int, first: int, count: int) -> Batch:
        """Rows first..first+count-1 of the batch of `step`. Raises DataError for a damaged shard, ValueError outside the batch."""
        source, k = self.mixture.locate(self._samples(step, first, count))
        ids, mask = np.empty((count, self.sequence_length + 1), dtype=np.int64), None
        for index in np.unique(source).tolist():
            chosen, component = np.flatnonzero(source == index), self.components[index]
            ids[chosen], part = component.shards.rows(component.row_numbers(k[chosen]))
            if part is not None:
                mask = np.ones((count, self.sequence_length), dtype=np.bool_) if mask is None else mask
                mask[chosen] = part
        return Batch(ids, mask)

    def sample_names(self, step: int, first: int, count: int) -> list[str]:
        """'source/train/00003.h5:17' for each row."""
        source, k = self.mixture.locate(self._samples(step, first, count))
        names = []
        for index, number in zip(source.tolist(), k.tolist(), strict=True):
            component = self.components[index]
            file, row = component.shards.locate(int(component.row_numbers(np.array([number]))[0]))
            names.append(f"{component.name}/{file}:{row}")
        return names

    def counts(self, step: int) -> dict[str, int]:
        """Samples of each source in the first `step` steps."""
        counts = self.mixture.counts(step * self.global_batch_size)
        return {component.name: count for component, count in zip(self.components, counts, strict=True)}

    def _samples(self, step: int, first: int, count: int) -> np.ndarray:
        if step < 0 or first < 0 or count < 0 or first + count > self.global_batch_size:
            raise ValueError(f"step {step}: rows {first}..{first + count - 1} of a batch of {self.global_batch_size}")
        start = step * self.global_batch_size + first
        return np.arange(start, start + count, dtype=np.int64)


@dataclass(frozen=True)
class HeldOut:
    """Implements EvaluationSource: the first num_rows rows of a source's held-out set, in the order they lie."""

    name: str
    shards: ShardSet
    num_rows: int

    @property
    def sequence_length(self) -> int:
        return self.shards.manifest.sequence_length

    @property
    def dataset_id(self) -> str:
        return self.shards.entry.id

    def rows(self, first: int, count: int) -> Batch:
        """Rows first..first+count-1. Raises DataError for a damaged shard, ValueError outside the set."""
        if first < 0 or count < 0 or first + count > self.num_rows:
            raise ValueError(f"held-out set {self.name}: rows {first}..{first + count - 1} of {self.num_rows}")
        return Batch(*self.shards.rows(np.arange(first, first + count, dtype=np.int64)))


def open_training(data: DataConfig, global_batch_size: int, root: Path | None = None, *, vocab_size: int) -> TokenSource:
    """The training rows of a recipe that names `sources`, everything checked that can be before step 0. Raises DataError.

    root: instead of data.root. vocab_size: the model's, which may exceed the datasets'.
    """
    components = []
    for source in data.sources:
        shards = _open_set(data, source, "train", root, vocab_size)
        assert shards is not None
        low, high = (math.floor(Fraction(repr(bound)) * shards.num_rows) for bound in source.subset)
        if high == low:
            raise DataError(
                f"{shards.folder}: subset {list(source.subset)} of source '{source.name}' holds no row of {shards.num_rows}: widen it"
            )
        components.append(Component(source.name, shards, low, high - low, data.shuffle_seed))
    ids = [component.shards.entry.id for component in components]
    return TokenSource(
        data.sequence_length,
        global_batch_size,
        ids[0] if len(ids) == 1 else merkle_root(ids),
        tuple(components),
        make_mixture(data.sources, data.shuffle_seed),
    )


def training_source(recipe: Recipe) -> BatchSource:
    """The training rows of a recipe, prepared or synthetic, wherever it is read. Raises DataError."""
    data, batch_size = recipe.data, recipe.batch.global_batch_size
    if data.synthetic_rows is not None:
        return synthetic_source(recipe.model.vocab_size, data.sequence_length, data.synthetic_rows, batch_size, data.shuffle_seed)
    return open_training(data, batch_size, vocab_size=recipe.model.vocab_size)


def open_heldout(data: DataConfig, vocab_size: int, rows: int, root: Path | None = None) -> list[HeldOut]:
    """The held-out set of each source that has one, cut to `rows` rows. Raises DataError."""
    opened = [(source.name, _open_set(data, source, "heldout", root, vocab_size)) for source in data.sources]
    return [HeldOut(name, shards, min(rows, shards.num_rows)) for name, shards in opened if shards is not None]


def _open_set(data: DataConfig, source: Source, set_name: SetName, root: Path | None, vocab_size: int) -> ShardSet | None:
    """A source's set, fit for the recipe; None where it has no such set."""
    parent = Path(data.root) if root is None else root
    folder = parent / source.path
    if not folder.is_dir():
        options = f"--name {source.path} --sequence-length {data.sequence_length} --output {parent}"
        raise DataError(
            f"{folder}: no dataset for source '{source.name}'; make it with `weftrain prep INPUTS {options}` (no INPUTS: embedded corpus)"
        )
    manifest = read_manifest(folder)
    if manifest.sequence_length != data.sequence_length:
        raise DataError(
            f"{folder}: prepared with sequence_length {manifest.sequence_length}, the recipe says {data.sequence_length}: "
            f"set data.sequence_length={manifest.sequence_length}, or prepare the dataset again"
        )
    if manifest.vocab_size > vocab_size:
        raise DataError(
            f"{folder}: prepared with a vocabulary of {manifest.vocab_size}, the model has {vocab_size}: "
            f"set model.vocab_size to at least {manifest.vocab_size}, or use the model's tokenizer"
        )
    recorded = None if manifest.fim is None else manifest.fim.model_dump(exclude={"seed"})
    wanted = None if source.fim is None else source.fim.model_dump()
    if recorded != wanted:
        raise DataError(f"{folder}: prepared with fim {recorded}, the recipe's source '{source.name}' says {wanted}: make them equal")
    return ShardSet(folder, manifest, set_name) if set_name in manifest.sets else None
