"""Linear maps of a block that are computed in parts, for `precision.tensor_parts` (docs/same-bits.md).

P parts: attention is P groups of heads, the feed-forward P groups of inner features. A part has its rows of q, k, v,
gate and up, and its columns of o and down; what the P parts give, [B, T, C] each, is added in a balanced binary tree.
The products, the rotation, attention and SwiGLU of a part are so called with tensors of the same shapes, strides and
alignment whichever process computes it, and have the same bits wherever they run. A process that computes some of the
parts, consecutive ones, adds a subtree, and the rest of the tree over what all of them sent.

All sums of parts are made in fp32 and rounded once, to the compute dtype, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ALIGNMENT_BYTES = 64  # of the blocks that torch allocates, and more than what any product's kernel is chosen by


class Parts:
    """How the linear maps of a block are computed in parts by a process that computes all of them. A backend whose
    processes compute some each overrides the three methods below `here`.

    count: P, a power of two.
    """

    def __init__(self, count: int) -> None:
        if count < 1 or count & (count - 1):
            raise ValueError(f"{count} parts cannot be added in pairs: give a power of two")
        self.count = count

    @property
    def here(self) -> int:
        """Number of parts that this process computes."""
        return self.count

    def own(self, parameter: Tensor) -> Tensor:
        """The plain tensor of what this process holds of a parameter, with its gradient."""
        return parameter

    def total(self, of_parts: Iterable[Tensor]) -> Tensor:
        """One tensor of each part that is computed here, in order -> fp32, the sum over all parts."""
        return tree_total(of_parts)

    def spread(self, x: Tensor) -> tuple[Tensor, ...]:
        """What all parts read, once for each of them here; its gradient is the sum over all parts, in its dtype."""
        found: tuple[Tensor, ...] = _Spread.apply(self, x)
        return found

    def columns(self, xs: Sequence[Tensor], linear: nn.Linear) -> tuple[Tensor, ...]:
        """The outputs of each part [.., out / P], of its x [.., in], of which each is the same."""
        bias = None if linear.bias is None else self.own(linear.bias)
        found: tuple[Tensor, ...] = _Columns.apply(self, self.own(linear.weight), bias, *xs)
        return found

    def sum_of_rows(self, inner: Sequence[Tensor], linear: nn.Linear) -> Tensor:
        """The outputs [.., out] of a linear map of features that lie in parts, [.., in / P] each."""
        bias = None if linear.bias is None else self.own(linear.bias)
        found: Tensor = _Rows.apply(self, self.own(linear.weight), bias, *inner)
        return found


def parts_of(count: int) -> Parts | None:
    """None for one part, which is the whole: nothing is cut or added then."""
    return None if count == 1 else Parts(count)


def tree_total(tensors: Iterable[Tensor]) -> Tensor:
    """The sum, in fp32 or wider, of 1, 2, 4, 8 .. tensors of one dtype, in a balanced binary tree over their order. As
    many sums as the tree has levels are in memory at a time.
    """
    sums: list[Tensor] = []
    for number, tensor in enumerate(tensors, 1):
        total = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        while not number & 1:
            total, number = sums.pop() + total, number >> 1
        sums.append(total)
    (total,) = sums
    return total


def _aligned(piece: Tensor) -> Tensor:
    """A contiguous piece, copied unless it begins where an allocated one would: a product's bits may depend on it."""
    return piece if piece.data_ptr() % _ALIGNMENT_BYTES == 0 else piece.clone()


def _row_pieces(tensor: Tensor, parts: int) -> list[Tensor]:
    return [_aligned(piece) for piece in tensor.chunk(parts)]


def _column_pieces(weight: Tensor, parts: int) -> Iterator[Tensor]:
    """One at a time, contiguous: the strides are so the same whichever process has it, and how many it has."""
    for piece in weight.chunk(parts, 1):
        yield _aligned(piece) if parts == 1 else piece.clone(memory_format=torch.contiguous_format)


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, parts: Parts, x: Tensor) -> tuple[Tensor, ...]:
        context.parts, context.dtype = parts, x.dtype
        return tuple(x.view_as(x) for _ in range(parts.here))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, context.parts.total(gradients).to(context.dtype)


class _Columns(torch.autograd.Function):
    """The weight is kept, and not its pieces, of which some may be copies."""

    @staticmethod
    def forward(context: Any, parts: Parts, weight: Tensor, bias: Tensor | None, *xs: Tensor) -> tuple[Tensor, ...]:
        context.save_for_backward(weight, xs[0])
        context.parts = parts.here
        biases = [None] * parts.here if bias is None else _row_pieces(bias, parts.here)
        pieces = zip(xs, _row_pieces(weight, parts.here), biases, strict=True)
        return tuple(F.linear(x, piece, of_bias) for x, piece, of_bias in pieces)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, x = context.saved_tensors
        _, of_weight, of_bias, *of_xs = context.needs_input_grad
        gradients = tuple(gradient.contiguous() for gradient in gradients)
        given = [
            gradient @ piece if wanted else None
            for wanted, gradient, piece in zip(of_xs, gradients, _row_pieces(weight, context.parts), strict=True)
        ]
        flat = [_tokens(gradient) for gradient in gradients]
        weights = torch.cat([gradient.T @ _tokens(x) for gradient in flat]) if of_weight else None
        return None, weights, torch.cat([gradient.sum(0) for gradient in flat]) if of_bias else None, *given


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, parts: Parts, weight: Tensor, bias: Tensor | None, *inner: Tensor) -> Tensor:
        context.save_for_backward(weight, *inner)
        context.parts = parts.here
        pieces = zip(inner, _column_pieces(weight, parts.here), strict=True)
        total = parts.total(F.linear(h, piece) for h, piece in pieces)
        return (total if bias is None else total + bias).to(inner[0].dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inner = context.saved_tensors
        _, of_weight, of_bias, *of_inner = context.needs_input_grad
        gradient = gradient.contiguous()
        flat = _tokens(gradient)
        given = [
            gradient @ piece if wanted else None
            for wanted, piece in zip(of_inner, _column_pieces(weight, context.parts), strict=True)
        ]
        found = torch.empty_like(weight) if of_weight else None
        if found is not None:
            for piece, h in zip(found.chunk(context.parts, 1), inner, strict=True):
                piece.copy_(flat.T @ _tokens(h))
        return None, found, flat.sum(0) if of_bias else None, *given
