"""Gradient norms whose bits depend on nothing but the gradients: not on which rank has which rows, nor on threads,
instruction set or device.

A square of an fp32 number is exact in float64, and the squares are added by elementwise additions alone, in a tree over
the columns of each row and then in one over the rows. A rank can so compute the rows that it has, and the sums of rows
are small enough to be gathered. Where a recipe's linear maps are computed in parts (`precision.tensor_parts`), each row
is taken as so many shorter ones, `width` elements each: a rank may have the columns of some parts alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from weftrain.core.config import Recipe

_AT_ONCE = 1 << 16  # elements of which the squares exist at one time: they stay in a core's cache


def row_width(shape: Sequence[int], parts: int) -> int:
    """Elements of a row that are added together, of a whole parameter of this shape."""
    length = math.prod(shape[1:])
    return length if length % parts else length // parts


def row_widths(recipe: Recipe) -> dict[str, int] | None:
    """Of each parameter, where the recipe asks for bits that depend on no layout; else None."""
    if recipe.precision.numerics != "replayable":
        return None
    return {spec.name: row_width(spec.shape, recipe.precision.tensor_parts) for spec in recipe.parameters}


def row_squares(gradient: Tensor, width: int) -> Tensor:
    """[rows, ..] of n x width elements a row -> float64 [rows, n]: the sum of the squares of each `width` of them."""
    rows = gradient.reshape(-1, width)
    step = max(1, _AT_ONCE // max(1, width)) if gradient.device.type == "cpu" else max(1, rows.shape[0])
    found = [_fold(part.to(torch.float64, copy=True).square_()) for part in rows.split(step)] if rows.numel() else []
    squares = torch.cat(found) if found else gradient.new_zeros(0, dtype=torch.float64)
    return squares.view(gradient.shape[0], math.prod(gradient.shape[1:]) // width)


def norms_of_rows(squares: Sequence[Tensor]) -> Tensor:
    """For each parameter the `row_squares` of all its rows -> the parameters' norms, fp32 [n]."""
    return torch.stack([_fold(of_rows.reshape(1, -1).clone())[0] for of_rows in squares]).sqrt().float()


def tree_norms(gradients: Sequence[Tensor], parts: int = 1) -> Tensor:
    """The norm of each whole gradient, fp32 [n]; in place of the kernels' norms. parts: precision.tensor_parts."""
    return norms_of_rows([row_squares(one, row_width(one.shape, parts)) for one in gradients])


def tree_global_norm(norms: Tensor | Sequence[Tensor]) -> Tensor:
    """The norm of the parameters' norms, in parameter order, 0-dim fp32: `step.global_norm`, added in a tree."""
    stacked = norms if isinstance(norms, Tensor) else torch.stack(list(norms))
    return _fold(stacked.double().square()[None])[0].sqrt().float()


def _fold(x: Tensor) -> Tensor:
    """[n, m] -> [n], m >= 1: the upper half of the columns is added to the lower one until one column is left. x is
    overwritten.
    """
    count = x.shape[1]
    while count > 1:
        half = 1 << ((count - 1).bit_length() - 1)
        x[:, : count - half] += x[:, half:count]
        count = half
    return x[:, 0].clone()
