"""How the gradients of micro-batches are added, by parameter name and in fp32: one after another, or in a fixed binary
tree whose result is bitwise the same on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

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


class TreeSum:
    """`count` contributions for each name are added in a tree that depends on `count` alone.

    count = m 2^k with m odd: runs of m are added one after another, and these sums in a balanced binary tree. So the
    sum in one process is that of 2, 4, .. processes that each have an equal run of contributions and then add in pairs.
    At most k + 1 partial sums are kept for each name.
    """

    def __init__(self, count: int) -> None:
        self.count, self._run = count, count // (count & -count)
        self._sums: dict[str, list[tuple[int, torch.Tensor]]] = {}  # name -> (contributions, their sum), large to small

    def add(self, name: str, part: torch.Tensor) -> None:
        """The next contribution to `name`; it is kept, and must not be changed."""
        stack = self._sums.setdefault(name, [])
        if stack and stack[-1][0] < self._run:
            count, partial = stack.pop()
            stack.append((count + 1, partial + part))
        else:
            stack.append((1, part.float()))
        while len(stack) > 1 and stack[-1][0] == stack[-2][0] >= self._run:
            (count, right), (_, left) = stack.pop(), stack.pop()
            stack.append((2 * count, left + right))

    def totals(self) -> dict[str, torch.Tensor]:
        """Name -> sum, after the last contribution; empty if nothing was added."""
        assert all(len(stack) == 1 for stack in self._sums.values())
        return {name: stack[0][1] for name, stack in self._sums.items()}

    def partial_sums(self) -> list[dict[str, torch.Tensor]]:
        """What has been added so far, as the fewest sums that the tree allows, of earlier contributions first: name ->
        sum each. Another process can go on from them (`resumed`).
        """
        depth = max((len(stack) for stack in self._sums.values()), default=0)
        return [{name: stack[level][1] for name, stack in self._sums.items()} for level in range(depth)]

    def counts_after(self, added: int) -> list[int]:
        """Of how many contributions each of the partial sums is, after so many contributions."""
        counts: list[int] = []
        whole, rest = divmod(added, self._run)
        for bit in reversed(range(whole.bit_length())):
            if whole >> bit & 1:
                counts.append(self._run << bit)
        return [*counts, rest] if rest else counts

    def resumed(self, added: int, partial_sums: Sequence[Mapping[str, torch.Tensor]]) -> TreeSum:
        """A tree of this shape that goes on after `added` contributions with what `partial_sums` gave."""
        tree, counts = TreeSum(self.count), self.counts_after(added)
        for count, sums in zip(counts, partial_sums, strict=True):
            for name, value in sums.items():
                tree._sums.setdefault(name, []).append((count, value))
        return tree

    def clear(self) -> None:
        self._sums = {}


def gradient_sum(recipe: Recipe) -> OrderedSum | TreeSum:
    """Adds the gradients of one process's micro-batches as precision.numerics asks."""
    return TreeSum(recipe.batch.accumulation_steps) if recipe.precision.numerics == "replayable" else OrderedSum()


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
    """The sum of values as `TreeSum` adds them."""
    tree = TreeSum(len(values))
    for value in values:
        tree.add("", value)
    return tree.totals()[""]
