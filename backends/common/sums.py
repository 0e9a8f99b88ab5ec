"""How the gradients of micro-batches are added, by parameter name and in fp32: one after another, or in a fixed binary
tree whose result is bitwise the same on any number of processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from weftrain.core.config import Recipe


class OrderedSum:
    """Contributions are added in the order they come. One sum for each name is kept."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, part: torch.Tensor) -> None:
        """The next contribution to `name`; an fp32 one is kept, and changed by the next."""
        if name in self._sums:
            self._sums[name] += part
        else:
            self._sums[name] = part.float()

    def totals(self) -> dict[str, torch.Tensor]:
        """Name -> sum; empty if nothing was added."""
        return self._sums

    def clear(self) -> None:
        self._sums = {}


class Block(NamedTuple):
    """The sum of contributions first .. stop - 1, where the tree adds these before it adds any other to them."""

    first: int
    stop: int
    total: torch.Tensor

    @property
    def length(self) -> int:
        return self.stop - self.first


class TreeSum:
    """`count` contributions for each name are added in a tree that depends on `count` alone.

    count = m 2^k with m odd: runs of m are added one after another, and these sums in a balanced binary tree. A process
    that has only some contributions, first, first + 1 .., adds of them what the tree adds without others. What is left
    are blocks: of an equal part of 2, 4, .. processes one, of other parts a few more. Another process goes on with them
    (`extend`). At most k + 1 blocks are kept for each name by a process that begins at 0.
    """

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first, self._run = count, first, count // (count & -count)
        self._blocks: dict[str, list[Block]] = {}

    def add(self, name: str, part: torch.Tensor) -> None:
        """The next contribution to `name`; an fp32 one is kept, and changed by the next."""
        blocks = self._blocks.setdefault(name, [])
        at = blocks[-1].stop if blocks else self.first
        self._append(blocks, Block(at, at + 1, part))

    def _append(self, blocks: list[Block], new: Block) -> None:
        run = self._run
        if blocks and new.first % run and not blocks[-1].first % run:  # the first ones of its run are a block
            blocks[-1] = _added(blocks[-1], new)
        else:
            blocks.append(new._replace(total=new.total.float()))
        while (
            len(blocks) > 1
            and run <= blocks[-1].length == blocks[-2].length
            and not (blocks[-2].first % (2 * blocks[-1].length))
        ):
            right = blocks.pop()
            blocks[-1] = _added(blocks[-1], right)

    def extend(self, stop: int, totals: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Add what the tree of another process has, with the contributions from the end of this one's to `stop`: what
        `partial_sums` gave there. The tensors are kept and changed, as by `add`.
        """
        places = None
        for name in totals[0] if totals else ():
            blocks = self._blocks.setdefault(name, [])
            if places is None:
                places = blocks_of(self.count, blocks[-1].stop if blocks else self.first, stop)
            for (first, end), sums in zip(places, totals, strict=True):
                self._append(blocks, Block(first, end, sums[name]))

    def totals(self) -> dict[str, torch.Tensor]:
        """Name -> sum, after the last contribution; empty if nothing was added."""
        assert all(len(blocks) == 1 for blocks in self._blocks.values())
        return {name: blocks[0].total for name, blocks in self._blocks.items()}

    def partial_sums(self) -> list[dict[str, torch.Tensor]]:
        """What has been added so far, as the fewest sums that the tree allows, of earlier contributions first: name ->
        sum each.
        """
        depth = max((len(blocks) for blocks in self._blocks.values()), default=0)
        return [{name: blocks[level].total for name, blocks in self._blocks.items()} for level in range(depth)]

    def clear(self) -> None:
        self._blocks = {}


def _added(left: Block, right: Block) -> Block:
    return Block(left.first, right.stop, left.total.add_(right.total))


@functools.lru_cache(maxsize=1024)
def blocks_of(count: int, first: int, stop: int) -> tuple[tuple[int, int], ...]:
    """(first, stop) of each block that contributions first .. stop - 1 leave in the tree over `count`."""
    tree = TreeSum(count, first)
    for _ in range(first, stop):
        tree.add("", torch.zeros(()))
    return tuple((block.first, block.stop) for block in tree._blocks.get("", ()))


def gradient_sum(recipe: Recipe, rank: int = 0) -> OrderedSum | TreeSum:
    """Adds the gradients of one process's micro-batches as precision.numerics asks. rank: which of batch.replicas."""
    each = recipe.batch.accumulation_steps
    return (
        TreeSum(recipe.batch.replicas * each, rank * each)
        if recipe.precision.numerics == "replayable"
        else OrderedSum()
    )


def reduction_words(recipe: Recipe) -> str:
    """How one process adds, as a fingerprint records it."""
    order = "a fixed tree" if recipe.precision.numerics == "replayable" else "order"
    return f"micro-batches added in {order}, fp32{parts_words(recipe)}"


def parts_words(recipe: Recipe) -> str:
    """Of what is added besides: the parts of linear maps."""
    parts = recipe.precision.tensor_parts
    return f"; linear maps of {parts} parts, added in pairs" if parts > 1 else ""


def take_at_once(
    leaves: Mapping[str, torch.Tensor],
    take: Callable[[str, torch.Tensor], None],
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """From now on backward gives a leaf's gradient to `take` as soon as it is there, and forgets it: where it is added
    to a sum, a whole set of gradients never is in memory beside the sums.

    wanted: whether that holds for the backward pass that runs.
    """
    for name, leaf in leaves.items():
        leaf.register_post_accumulate_grad_hook(partial(_take_gradient, name, take, wanted))


def _take_gradient(
    name: str, take: Callable[[str, torch.Tensor], None], wanted: Callable[[], bool], leaf: torch.Tensor
) -> None:
    if leaf.grad is not None and wanted():
        take(name, leaf.grad)
        leaf.grad = None


def tree_sum(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of values as `TreeSum` adds them; they are not changed."""
    tree = TreeSum(len(values))
    for value in values:
        tree.add("", value.clone())
    return tree.totals()[""]
