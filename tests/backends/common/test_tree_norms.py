"""Norms in a fixed tree are norms, and have the same bits however rows are spread and whatever computes them."""

from __future__ import annotations

import pytest
import torch

from weftrain.backends.common.tree_norms import norms_of_rows, row_squares, row_width, tree_global_norm, tree_norms

SHAPES = [(7,), (1, 1), (3, 10922), (300, 257), (5, 4, 9), (1, 131072)]


def gradients(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(shape, generator=generator) * 10.0 ** (2 * n - 5)).to(dtype) for n, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_norms(dtype: torch.dtype) -> None:
    found = gradients(dtype)
    wanted = torch.stack([gradient.double().norm() for gradient in found])
    torch.testing.assert_close(tree_norms(found).double(), wanted, rtol=1e-7, atol=0.0)
    torch.testing.assert_close(tree_global_norm(tree_norms(found)).double(), wanted.norm(), rtol=1e-6, atol=0.0)


def test_small_and_large_numbers_neither_vanish_nor_overflow() -> None:
    assert tree_norms([torch.tensor([3e-30, 4e-30]), torch.tensor([3e30, 4e30])]).tolist() == pytest.approx(
        [5e-30, 5e30]
    )
    assert tree_norms([torch.tensor([1.0, float("nan")]), torch.tensor([float("inf"), 1.0])]).isfinite().sum() == 0


def test_rows_on_other_ranks_and_other_threads_have_the_same_bits() -> None:
    """Where one reduction over all elements has others."""
    threads, found = torch.get_num_threads(), gradients()
    whole = tree_norms(found)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for ranks in (2, 3, 4, 8):
                parts = [
                    [row_squares(part, row_width(part.shape, 1)) for part in gradient.chunk(ranks)]
                    for gradient in found
                ]
                assert torch.equal(norms_of_rows([torch.cat(squares) for squares in parts]), whole)
    finally:
        torch.set_num_threads(threads)


def test_what_is_given_is_not_changed_and_empty_parts_are_taken() -> None:
    gradient = torch.randn(4, 3, dtype=torch.float64)
    before = gradient.clone()
    row_squares(gradient, 3)
    assert torch.equal(gradient, before)
    assert row_squares(torch.empty(0, 6), 3).shape == (0, 2)


def test_columns_on_other_ranks_have_the_same_bits() -> None:
    """Four parts of a row's columns, on one, two and four ranks; a row that they do not divide is taken whole."""
    gradient, other = torch.randn(7, 20), torch.randn(5, 6)
    whole = tree_norms([gradient, other], 4)
    for ranks in (2, 4):
        each = [row_squares(part.contiguous(), 5) for part in gradient.chunk(ranks, 1)]
        found = norms_of_rows([torch.cat(each, 1), row_squares(other, 6)])
        assert torch.equal(found, whole)
    torch.testing.assert_close(whole[0], gradient.norm())
