"""Sums of micro-batches: in order as a large batch has them, and in a tree that does not depend on the processes."""

from __future__ import annotations

import pytest
import torch

from weftrain.backends.common.sums import OrderedSum, TreeSum, tree_sum


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 12, 24])
def test_the_tree_over_all_is_the_tree_over_the_trees_of_equal_parts(count: int) -> None:
    values = torch.randn(count, 1000, generator=torch.Generator().manual_seed(1))
    whole = tree_sum(list(values))
    torch.testing.assert_close(whole, values.sum(0), rtol=1e-5, atol=1e-5)
    parts = 2
    while count % parts == 0:
        sums = [tree_sum(list(part)) for part in values.chunk(parts)]
        while len(sums) > 1:
            sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=True)]
        assert torch.equal(sums[0], whole)
        parts *= 2


def test_the_tree_keeps_few_sums_and_is_not_the_plain_sum() -> None:
    tree = TreeSum(64)
    values = torch.randn(64, 4096, generator=torch.Generator().manual_seed(2))
    plain = torch.zeros(4096)
    for value in values:
        tree.add("a", value)
        plain = plain + value
        assert len(tree._sums["a"]) <= 7
    assert not torch.equal(tree.totals()["a"], plain)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 8, 12, 14])
def test_another_process_goes_on_with_the_partial_sums(count: int) -> None:
    """From after any contribution, in the same tree."""
    values = torch.randn(count, 500, generator=torch.Generator().manual_seed(3))
    whole = tree_sum(list(values))
    for before in range(count + 1):
        first = TreeSum(count)
        for value in values[:before]:
            first.add("a", value)
        handed = first.partial_sums()
        assert len(handed) == len(first.counts_after(before))
        second = TreeSum(count).resumed(before, handed)
        for value in values[before:]:
            second.add("a", value)
        assert torch.equal(second.totals()["a"], whole)


def test_the_ordered_sum_adds_bf16_in_fp32_and_forgets() -> None:
    total = OrderedSum()
    for value in (256.0, 1.0, 1.0):  # in bf16 256 + 1 is 256
        total.add("a", torch.tensor([value], dtype=torch.bfloat16))
    (found,) = total.totals().values()
    assert (found.dtype, found.item()) == (torch.float32, 258.0)
    total.clear()
    assert total.totals() == {}
