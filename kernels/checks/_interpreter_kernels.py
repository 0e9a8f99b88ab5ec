"""The kernels of interpreter.py's self-test, and the same arithmetic by torch: in fp32, rounded once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_N = 16


@triton.jit
def _elementwise(x, y, out, KIND: tl.constexpr, N: tl.constexpr):
    """One of the operations on bf16 blocks of N elements."""
    at = tl.arange(0, N)
    a = tl.load(x + at)
    b = tl.load(y + at)
    if KIND == "add":
        c = a + b
    elif KIND == "subtract":
        c = a - b
    elif KIND == "multiply":
        c = a * b
    elif KIND == "divide":
        c = (a / b).to(tl.bfloat16)
    elif KIND == "negate and abs":
        c = tl.abs(-a) + b
    elif KIND == "minimum":
        c = tl.minimum(a, b)
    elif KIND == "maximum":
        c = tl.maximum(a, b)
    elif KIND == "where":
        c = tl.where(a > b, a, b * 2.0)
    elif KIND == "compare":
        c = (
            (a < b).to(tl.int32) + 2 * (a >= b).to(tl.int32) + 4 * (a == b).to(tl.int32) + 8 * (a != b).to(tl.int32)
        ).to(tl.bfloat16)
    elif KIND == "exp":
        c = tl.exp(a.to(tl.float32)).to(tl.bfloat16)
    elif KIND == "fma":
        c = tl.fma(a, b, a)
    elif KIND == "fill":
        c = tl.full([N], 1.0 / 3.0, tl.bfloat16) + tl.zeros([N], tl.bfloat16)
    elif KIND == "to integer":
        c = (a * 8.0).to(tl.int32).to(tl.bfloat16)
    elif KIND == "through float16":
        c = a.to(tl.float16).to(tl.bfloat16)
    tl.store(out + at, c)


@triton.jit
def _reduce(x, out, KIND: tl.constexpr, N: tl.constexpr):
    """[N, N] -> [N] along the last axis."""
    row = tl.arange(0, N)
    a = tl.load(x + row[:, None] * N + row[None, :])
    if KIND == "sum":
        c = tl.sum(a, 1)
    elif KIND == "max":
        c = tl.max(a, 1).to(tl.bfloat16)
    elif KIND == "min":
        c = tl.min(a, 1).to(tl.bfloat16)
    elif KIND == "sum of all":
        c = tl.zeros([N], tl.bfloat16) + tl.sum(a)
    tl.store(out + row, c)


@triton.jit
def _cumulate(x, out, N: tl.constexpr):
    """[N] -> [N] running sums."""
    at = tl.arange(0, N)
    tl.store(out + at, tl.cumsum(tl.load(x + at), 0))


@triton.jit
def _dot(x, y, out, N: tl.constexpr):
    """[N, N] @ [N, N], accumulated in fp32."""
    row = tl.arange(0, N)
    at = row[:, None] * N + row[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.trans(tl.load(y + at))))


@triton.jit
def _round_to_bf16(x, out, N: tl.constexpr, MODE: tl.constexpr):
    """fp32 -> bf16 by one of the rounding modes."""
    at = tl.arange(0, N)
    c = tl.load(x + at).to(tl.bfloat16, fp_downcast_rounding=MODE)
    tl.store(out + at, c)


@triton.jit
def _masked(x, out, n, N: tl.constexpr):
    """A masked load of bf16 with `other`, and a masked store."""
    at = tl.arange(0, N)
    c = tl.load(x + at, mask=at < n, other=1.5)
    tl.store(out + at, c * 3.0, mask=at < N - 1)


def _elementwise_truths(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    x, y = a.float(), b.float()
    compared = (x < y).float() + 2 * (x >= y).float() + 4 * (x == y).float() + 8 * (x != y).float()
    return {
        "add": x + y, "subtract": x - y, "multiply": x * y, "divide": x / y, "negate and abs": x.abs() + y,
        "minimum": torch.minimum(x, y), "maximum": torch.maximum(x, y), "where": torch.where(x > y, x, y * 2),
        "compare": compared, "exp": x.exp(), "fma": x * y + x, "fill": torch.full_like(x, 1 / 3).bfloat16().float(),
        "to integer": (a * 8).float().trunc(), "through float16": x.half().float(),
    }  # fmt: skip


def wrong_results() -> list[str]:
    """The names of the operations whose bits are not those of wide arithmetic rounded once, or that raise."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(_N, generator=generator).bfloat16() for _ in range(2))
    b[3] = a[3]
    square, other = (torch.randn(_N, _N, generator=generator).bfloat16() for _ in range(2))
    square[:, 0] = 100.0  # a sum of bit patterns is far off
    wide = torch.randn(_N, generator=generator)
    # two ties, what is not finite, and a subnormal number
    wide[:5] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("nan"), float("-inf"), -1e-41])
    cases: list[tuple[str, Any, tuple[Any, ...], dict[str, Any], Tensor]] = [
        (name, _elementwise, (a, b), {"KIND": name}, truth) for name, truth in _elementwise_truths(a, b).items()
    ]
    double = square.double()
    for name, truth in {
        "sum": double.sum(1),
        "max": double.amax(1),
        "min": double.amin(1),
        "sum of all": double.sum().expand(_N),
    }.items():
        cases.append((name, _reduce, (square,), {"KIND": name}, truth))
    cases.append(("cumulative sum", _cumulate, (a,), {}, a.double().cumsum(0)))
    cases.append(("dot", _dot, (square, other), {}, double @ other.double().mT))
    cases.append(("rounding to nearest even", _round_to_bf16, (wide,), {"MODE": "rtne"}, wide.bfloat16()))
    truncated = (wide.view(torch.int32) & -65536).view(torch.float32).bfloat16()
    cases.append(("rounding towards zero", _round_to_bf16, (wide,), {"MODE": "rtz"}, truncated))
    masked = torch.where(torch.arange(_N) < 5, a, torch.tensor(1.5)) * 3
    masked[-1] = 0
    cases.append(("masked load and store", _masked, (a,), {"n": 5}, masked))
    return [name for name, kernel, inputs, statics, truth in cases if not _right(kernel, inputs, statics, truth)]


def _right(kernel: Any, inputs: tuple[Any, ...], statics: dict[str, Any], truth: Tensor) -> bool:
    """Bits of bf16 results (NaN equal to NaN); fp32 results (dot, in another order) to 1e-6 of the largest."""
    out = torch.zeros(truth.shape, dtype=torch.float32 if kernel is _dot else torch.bfloat16)
    try:
        kernel[(1,)](*inputs, out, **statics, N=_N)
    except triton.runtime.errors.InterpreterError:
        return False
    if out.dtype == torch.float32:
        return bool((out.double() - truth).abs().max() <= 1e-6 * truth.abs().max())
    return torch.equal(out.nan_to_num(nan=12345.0), truth.bfloat16().nan_to_num(nan=12345.0))
