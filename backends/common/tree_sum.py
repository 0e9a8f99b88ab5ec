"""Sums in a fixed binary tree, so that the result is bitwise the same on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class TreeSum:
    """The sum of `count` contributions a name, added in a tree that depends on `count` alone: fp32, in the order they
    come.

    count = m 2^k with m odd: runs of m are added one after another, and these sums in a balanced binary tree. So the
    sum in one process is that of 2, 4, .. processes that each have an equal run of contributions and then add in pairs.
    It keeps at most k + 1 partial sums.
    """

    def __init__(self, count: int) -> None:
        self._run = count // (count & -count)
        self._sums: dict[str, list[tuple[int, torch.Tensor]]] = {}  # name -> (contributions, their sum), large to small

    def add(self, name: str, part: torch.Tensor) -> None:
        """The next contribution of `name`; it is kept, and must not be changed."""
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
        """Name -> sum, after the last contribution. Empty where none came."""
        assert all(len(stack) == 1 for stack in self._sums.values())
        return {name: stack[0][1] for name, stack in self._sums.items()}

    def clear(self) -> None:
        self._sums = {}


def tree_sum(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of values as `TreeSum` adds them."""
    tree = TreeSum(len(values))
    for value in values:
        tree.add("", value)
    return tree.totals()[""]
