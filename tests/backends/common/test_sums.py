"""Sums of micro-batches: in order as a large batch has them, and in a tree that does not depend on the processes."""

from __future__ import annotations

import itertools

import pytest
import torch

from weftrain.backends.common.sums import OrderedSum, TreeSum, blocks_of, tree_sum


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
        tree.add("a", value.clone())
        plain = plain + value
        assert len(tree.partial_sums()) <= 7
    assert not torch.equal(tree.totals()["a"], plain)


def left_by(values: torch.Tensor, count: int, first: int, stop: int) -> list[dict[str, torch.Tensor]]:
    """The partial sums of a process that has these contributions."""
    tree = TreeSum(count, first)
    for value in values[first:stop]:
        tree.add("a", value.clone())
    return tree.partial_sums()


@pytest.mark.parametrize("count", [1, 2, 5, 6, 8, 12, 14])
def test_another_process_goes_on_with_the_partial_sums(count: int) -> None:
    """From after any contribution, in the same tree."""
    values = torch.randn(count, 500, generator=torch.Generator().manual_seed(3))
    whole = tree_sum(list(values))
    for before in range(count + 1):
        tree = TreeSum(count)
        tree.extend(before, left_by(values, count, 0, before))
        for value in values[before:]:
            tree.add("a", value.clone())
        assert torch.equal(tree.totals()["a"], whole)


@pytest.mark.parametrize("count", [1, 2, 6, 7, 8, 12, 30, 36])
def test_any_parts_are_added_in_the_tree_over_all(count: int) -> None:
    """Three processes with any numbers of contributions, each of which adds its own first."""
    values = torch.randn(count, 100, generator=torch.Generator().manual_seed(4))
    whole, plain = tree_sum(list(values)), values.sum(0)
    generator = torch.Generator().manual_seed(5)
    for _ in range(12):
        cuts = [0, *torch.randint(0, count + 1, (2,), generator=generator).sort().values.tolist(), count]
        tree = TreeSum(count)
        for first, stop in itertools.pairwise(cuts):
            found = left_by(values, count, first, stop)
            assert len(found) == len(blocks_of(count, first, stop))
            tree.extend(stop, found)
        assert torch.equal(tree.totals()["a"], whole)
    assert count <= 2 or not torch.equal(whole, plain), "the plain sum has the tree's bits: the test shows nothing"


def test_equal_parts_of_a_power_of_two_leave_one_sum() -> None:
    for count, parts in ((8, 4), (12, 2), (12, 4), (48, 16)):
        each = count // parts
        assert all(len(blocks_of(count, part * each, (part + 1) * each)) == 1 for part in range(parts))
    assert [len(blocks_of(6, first, first + 2)) for first in (0, 2, 4)] == [1, 2, 2]  # runs of three


def test_the_ordered_sum_adds_bf16_in_fp32_and_forgets() -> None:
    total = OrderedSum()
    for value in (256.0, 1.0, 1.0):  # in bf16 256 + 1 is 256
        total.add("a", torch.tensor([value], dtype=torch.bfloat16))
    (found,) = total.totals().values()
    assert (found.dtype, found.item()) == (torch.float32, 258.0)
    total.clear()
    assert total.totals() == {}
