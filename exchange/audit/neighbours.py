"""What tensors show that hashes of files do not: revisions that share most of their tensors, weights that do not
continue those of their neighbours, and neighbours in the wrong order.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from weftrain.core.formats.tensor_file import tensor_bytes
from weftrain.exchange.audit.findings import Finding, equal, named
from weftrain.exchange.audit.headers import Shapes
from weftrain.exchange.audit.jumps import is_jump, jumps, outliers
from weftrain.exchange.audit.reading import Read
from weftrain.exchange.audit.samples import Sample

NORM_FLOOR = 0.03  # of the logarithm of a norm: 3 %
MOVEMENT_FLOOR, MOVEMENT_RATIO = 0.1, 6.0  # a share of the weights' norm
LOSS_FLOOR = 0.05  # nats, or whatever the loss is in
NEAR = 0.5  # of the bytes of two revisions, from which on they are near duplicates
_SWAPPED = 0.9
_LARGEST = 4  # tensors by which candidates are found

Confirm = Callable[[Read, Read, list[str]], list[str]]  # which of these tensors are equal in every byte


def shared_tensors(
    reads: Sequence[Read], shapes_of: Callable[[str], Shapes | None], confirm: Confirm
) -> Iterator[Finding]:
    """Pairs of revisions of which at least half of the bytes are the same tensors, without those that all share."""
    by_layout: dict[str, list[Read]] = defaultdict(list)
    for read in reads:
        if read.keys is not None and read.layout:
            by_layout[read.layout].append(read)
    for digest, some in by_layout.items():
        shapes = shapes_of(digest)
        if shapes is None or len(some) < 2 or not shapes:
            continue
        names = sorted(shapes)
        sizes = np.array([tensor_bytes(*shapes[name]) for name in names], np.float64)
        keys = np.stack([read.keys for read in some if read.keys is not None])
        moving = (keys != keys[0]).any(axis=0) & (keys != 0).all(axis=0)  # the others are buffers, or frozen
        moving = moving if moving.any() else (keys != 0).all(axis=0)  # all revisions are equal
        for one, other in sorted(_candidates(keys, np.where(moving, sizes, 0))):
            same = (keys[one] == keys[other]) & moving
            if some[one].revision.identity == some[other].revision.identity:
                continue
            if sizes[same].sum() < NEAR * sizes[moving].sum():
                continue
            sure = confirm(some[one], some[other], [names[index] for index in np.flatnonzero(same)])
            share = sum(tensor_bytes(*shapes[name]) for name in sure) / sizes[moving].sum()
            pair = some[one].revision.name, some[other].revision.name
            if len(sure) == moving.sum():
                yield Finding("duplicate", pair, f"{equal(pair)}: all tensors are the same, in other files", "tensor")
            elif share >= NEAR:
                words = f"{equal(pair)}: {len(sure):,} of {len(names):,} tensors are the same, {share:.0%} of the bytes"
                yield Finding("near duplicate", pair, words, "tensor")


def _candidates(keys: np.ndarray[tuple[int, int], np.dtype[np.uint64]], sizes: np.ndarray) -> set[tuple[int, int]]:
    """Pairs of rows in which one of the largest tensors is equal, each row with the next one that has it."""
    found = set()
    for column in np.argsort(-sizes, kind="stable")[:_LARGEST]:
        rows: dict[int, list[int]] = defaultdict(list)
        for row, key in enumerate(keys[:, column].tolist()):
            rows[key].append(row)
        for some in rows.values():
            found |= set(pairwise(some))
    return found


@dataclass
class Track:
    """The samples of one part of the training, taken in the order of steps and forgotten but for the last three."""

    names: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    norms: list[Mapping[str, float]] = field(default_factory=list)
    moves: list[float] = field(default_factory=list)
    losses: list[Mapping[str, float]] = field(default_factory=list)
    swapped: list[tuple[str, str]] = field(default_factory=list)
    identities: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    _last: list[Sample] = field(default_factory=list)

    def add(self, name: str, step: int, sample: Sample, losses: Mapping[str, float]) -> None:
        self.identities[sample.identity].append(name)
        self.names.append(name)
        self.steps.append(step)
        self.norms.append(sample.norms())
        self.losses.append(losses)
        if self._last:
            self.moves.append(self._last[-1].distance(sample))
        if len(self._last) == 3:
            first, second, third = self._last
            nearer = first.distance(third) < _SWAPPED * first.distance(second)
            if nearer and second.distance(sample) < _SWAPPED * third.distance(sample):
                self.swapped.append((self.names[-3], self.names[-2]))
        self._last = [*self._last[-2:], sample]

    def findings(self) -> Iterator[Finding]:
        for same in self.identities.values():
            if len(same) > 1:
                words = f"{equal(same)}: the same values in every piece of the sample, in other files"
                yield Finding("near duplicate", tuple(same), words, "tensor")
        yield from self._norm_jumps()
        yield from self._movement_jumps()
        yield from self._loss_jumps()
        for pair in self.swapped:
            words = f"the weights of {pair[1]} come before those of {pair[0]} on the path of their neighbours"
            yield Finding("out of order", pair, words, "tensor")

    def _norm_jumps(self) -> Iterator[Finding]:
        tensors = sorted(set().union(*self.norms))
        found: dict[int, list[tuple[float, str]]] = defaultdict(list)
        for tensor in tensors:
            values = [_log(norms.get(tensor, 0.0)) for norms in self.norms]
            sizes = self._a_spacing([abs(after - before) for before, after in pairwise(values)])
            for index in range(len(sizes)):
                if is_jump(sizes, index, NORM_FLOOR):
                    found[index].append((sizes[index], tensor))
        for first, last in outliers(sorted(found)):
            index = first if last > first else first - 1
            _, tensor = max(found[index])
            before, after = self.norms[index][tensor], self.norms[index + 1][tensor]
            words = (
                f"{self._between(first, last)}: the root mean square of {tensor[:120]} goes from {before:.4g} to "
                f"{after:.4g}, in {len(found[index])} of {len(tensors)} tensors of the sample"
            )
            yield Finding("norm jump", self._revisions(first, last), words, "tensor")

    def _movement_jumps(self) -> Iterator[Finding]:
        moves = self._a_spacing(self.moves)
        found = [index for index in range(len(moves)) if is_jump(moves, index, MOVEMENT_FLOOR, MOVEMENT_RATIO)]
        for first, last in outliers(found):
            index = first if last > first else first - 1
            words = (
                f"{self._between(first, last)}: the weights move by {self.moves[index]:.2f} of their norm, and by "
                f"{statistics.median(self.moves):.2g} between most neighbours"
            )
            yield Finding("movement jump", self._revisions(first, last), words, "tensor")

    def _a_spacing(self, changes: Sequence[float]) -> list[float]:
        """Changes between neighbours as they would be at the spacing that is usual around them: a gap is no jump."""
        steps = [after - before for before, after in pairwise(self.steps)]
        usual = [statistics.median(steps[max(0, index - 5) : index + 6]) for index in range(len(steps))]
        return [
            change / max(1.0, step / one) if one > 0 else change
            for change, step, one in zip(changes, steps, usual, strict=True)
        ]

    def _loss_jumps(self) -> Iterator[Finding]:
        for task in sorted(set().union(*self.losses)):
            there = [index for index, losses in enumerate(self.losses) if task in losses]
            values = [self.losses[index][task] for index in there]
            for first, last in outliers(jumps(values, LOSS_FLOOR)):
                low, high = there[first], there[last]
                index = first if last > first else first - 1
                words = (
                    f"{self._between(low, high)}: the loss on {task[:80]} goes from {values[index]:.4g} to "
                    f"{values[index + 1]:.4g}"
                )
                yield Finding("loss jump", self._revisions(low, high), words, "record")

    def _between(self, first: int, last: int) -> str:
        return named([self.names[first]]) if first == last else f"from {self.names[first]} to {self.names[last]}"

    def _revisions(self, first: int, last: int) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.names[first], self.names[last])))


def _log(norm: float) -> float:
    return math.log(norm) if norm > 0 and math.isfinite(norm) else math.nan
