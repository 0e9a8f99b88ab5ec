"""Running one implementation: its results by name ("output" or the op's own names, "grad_x", or for an in-place op
"parameters", "exp_avgs", ...).

`evaluate` keeps the strides and the storage of the arguments it is given (guard pages and strided views depend on it);
only what an op updates in place is copied first, unless `in_place` says that the arguments themselves are to change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weftrain.kernels.contract import Arguments, Op

Results = dict[str, Tensor]


def incoming(outputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Of each output a fixed random gradient, no two the same, whose values are exact in fp32, bf16 and fp16."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(output.shape, generator=generator).bfloat16().to(output.dtype).to(output.device)
        for output in outputs.values()
    ]


def outputs_of(op: Op, returned: Any) -> dict[str, Tensor]:
    """By name, what a function of the op returned."""
    return dict(zip(op.outputs, (returned,) if isinstance(returned, Tensor) else returned, strict=True))


def map_tensors(change: Callable[[Tensor], Tensor], arguments: Arguments) -> Arguments:
    """The arguments with `change` applied to each tensor, in lists too."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        return [convert(item) for item in value] if isinstance(value, (list, tuple)) else value

    return {name: convert(value) for name, value in arguments.items()}


def tensors_of(arguments: Arguments) -> dict[str, Tensor]:
    """Every tensor of the arguments by name: "x", "parameters[2]"."""
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, (list, tuple)):
            found |= {f"{name}[{index}]": item for index, item in enumerate(value)}
    return found


def exact_arguments(arguments: Arguments) -> Arguments:
    """On a CPU, floats in float64."""
    return map_tensors(
        lambda tensor: tensor.detach().cpu().double() if tensor.is_floating_point() else tensor.cpu(), arguments
    )


def evaluate(
    op: Op,
    function: Callable[..., Any],
    arguments: Arguments,
    *,
    arrange: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    wanted: tuple[str, ...] | None = None,
    in_place: bool = False,
) -> Results:
    """Forward and, for the `wanted` of the differentiable arguments (None: all), backward with what `arrange` makes of
    each `incoming` gradient.

    -> "output" and "grad_<name>", in memory of their own (a kernel may use its buffers again), or the planes of an
    in-place op, each flattened and joined.
    """
    if op.in_place:
        return _update(op, function, arguments, in_place)
    names = op.differentiable if wanted is None else wanted
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    outputs = outputs_of(op, function(**{**arguments, **leaves}))
    results = {name: output.detach().clone() for name, output in outputs.items()}
    if leaves:
        gradients = gradients_of(leaves, outputs, [arrange(gradient) for gradient in incoming(outputs)])
        results |= {name: gradient.clone() for name, gradient in gradients.items()}
    return results


def gradients_of(leaves: Mapping[str, Tensor], outputs: Mapping[str, Tensor], incoming: Sequence[Tensor]) -> Results:
    """ "grad_<name>" of each leaf. What a leaf does not reach has no gradient: where q alone is wanted, k turned."""
    reached = [pair for pair in zip(outputs.values(), incoming, strict=True) if pair[0].requires_grad]
    gradients = torch.autograd.grad([output for output, _ in reached], list(leaves.values()), [g for _, g in reached])
    return {f"grad_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def _update(op: Op, function: Callable[..., Any], arguments: Arguments, in_place: bool) -> Results:
    changed = {name: arguments[name] for name in op.in_place if arguments[name] is not None}
    if not in_place:
        changed = map_tensors(torch.clone, changed)
    function(**{**arguments, **changed})
    return {name: torch.cat([tensor.flatten() for tensor in tensors]) for name, tensors in changed.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtypes, shapes and values, NaN equal to NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def differing(got: Results, expected: Results) -> list[str]:
    """The names of results whose bits differ."""
    return [name for name in expected if not same_bits(got[name], expected[name])]


def distance(got: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error against a float64 result on the CPU; the divisor is at least 1e-6."""
    got = got.detach().cpu().double()
    if got.shape != exact.shape:
        return float("inf")
    if torch.equal(got, exact):
        return 0.0
    found = float((got - exact).norm() / exact.norm().clamp(min=1e-6))
    return found if found == found else float("inf")


# How far the same formula may come from itself where sums are taken in another order, element by element: (relative,
# absolute).
_CLOSE = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (2e-2, 1e-2), torch.float16: (2.5e-3, 1.25e-3)}


def far(got: Results, expected: Results, dtype: torch.dtype) -> list[str]:
    """The names of results that have another dtype or shape, or are not close element by element for `dtype`."""
    relative, absolute = _CLOSE[dtype]
    wrong = []
    for name, tensor in expected.items():
        if got[name].shape != tensor.shape or got[name].dtype != tensor.dtype:
            wrong.append(f"{name} ({got[name].dtype} {list(got[name].shape)})")
            continue
        difference = (got[name].double() - tensor.double()).abs()
        if not bool((difference <= absolute + relative * tensor.double().abs()).all()):
            wrong.append(f"{name} (by up to {float(difference.max()):.2e})")
    return wrong
