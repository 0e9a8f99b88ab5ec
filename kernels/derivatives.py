"""What hand-written backward passes share: they give first derivatives, refuse second ones, and ignore autocast.

class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up): ...

    @staticmethod
    @first_derivatives_only("swiglu", "triton")
    def backward(ctx, dy): ...
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weftrain.kernels.contract import KernelError


def first_derivatives_only(op: str, source: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For a backward whose result autograd could not differentiate correctly: raises KernelError under
    create_graph=True.

    Autograd enables gradients inside a backward exactly when create_graph is set. Without this check it would treat
    tensors that the forward computed and saved as constants, and a gradient penalty would be wrong without an error;
    torch's once_differentiable does not notice where the incoming gradient needs none itself, as for
    `loss.backward(create_graph=True)`.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def refusing(ctx: Any, *gradients: Tensor) -> Any:
            if torch.is_grad_enabled():
                raise KernelError(_refusal(op, source))
            return backward(ctx, *gradients)

        return refusing

    return decorate


def _refusal(op: str, source: str) -> str:
    return (
        f"{op} of source '{source}' has no second derivative (create_graph=True asks for one): set "
        f"kernels.pins.{op}=reference"
    )


class _FirstDerivativesOnly(torch.autograd.Function):
    """The identity, whose backward refuses as `first_derivatives_only` does."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, op: str, source: str) -> Tensor:
        ctx.names = op, source
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        op, source = ctx.names
        if torch.is_grad_enabled():
            raise KernelError(_refusal(op, source))
        return gradient, None, None


def without_second_derivatives(output: Tensor, op: str, source: str) -> Tensor:
    """The output of another package's function; create_graph=True through it raises KernelError."""
    return _FirstDerivativesOnly.apply(output, op, source)  # type: ignore[no-any-return]


def outside_autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For an op of matrix products: they are in the arguments' dtype under autocast too, as the contract of every op
    says.

    Autocast would run the forward's products in another dtype and leave the backward, which runs outside of it, with
    tensors of both.
    """

    @functools.wraps(function)
    def plain(*arguments: Any, **named: Any) -> Tensor:
        device = next(value.device.type for value in (*arguments, *named.values()) if isinstance(value, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*arguments, **named)

    return plain
