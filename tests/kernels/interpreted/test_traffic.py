"""Bytes of global memory that Triton's kernels move, against the least: of each further row, so that what is moved once a
call (parameters, partial sums of a fixed number of programs) does not count, as it hardly does at 16,384 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from weftrain.kernels import OPS, load_catalog  # noqa: E402
from weftrain.kernels.checks.traffic import counting, measure  # noqa: E402
from weftrain.kernels.ops import _parts, adamw, attention, cross_entropy, grad_norm, rope, swiglu  # noqa: E402
from weftrain.kernels.ops import linear_cross_entropy as linear  # noqa: E402

BF16 = torch.bfloat16
Make = Callable[[int], Callable[[str, torch.dtype], Any]]
CASES: dict[str, tuple[Make, int]] = {
    "swiglu": (lambda rows: swiglu.example(rows, 512), 8),
    "rms_norm": (lambda rows: _parts.norm((rows,), 512, bias=False, eps=1e-5), 32),
    "layer_norm": (lambda rows: _parts.norm((rows,), 512, bias=True, eps=1e-5), 32),
    "add_rms_norm": (lambda rows: _parts.add_norm((rows,), 512, bias=False, eps=1e-5), 32),
    "add_layer_norm": (lambda rows: _parts.add_norm((rows,), 512, bias=True, eps=1e-5), 32),
    "rope": (lambda rows: rope.example(1, rows, (4, 4), 64, 64, interleaved=False), 16),
    "cross_entropy": (lambda rows: cross_entropy.example(rows, 4096), 4),
    "adamw": (lambda rows: adamw.example(((rows, 4096),), "after_bias_correction"), 4),
    "grad_norm": (lambda rows: grad_norm.example(((rows, 65536),)), 2),
}


@pytest.mark.parametrize("op", CASES)
def test_no_kernel_moves_more_than_it_must(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weftrain.kernels.triton_ops._norm_rows.INTERPRETED_PROGRAMS", 2)
    make, rows = CASES[op]
    function = load_catalog()[op]["triton"][0].function
    few, many = (measure(OPS[op], function, make(count)("cpu", BF16)) for count in (rows, 2 * rows))
    assert many.forward.bytes - few.forward.bytes <= 1.02 * (many.least_forward - few.least_forward)
    assert many.backward.bytes - few.backward.bytes <= 1.02 * (many.least_backward - few.least_backward)


def test_rows_too_long_for_registers_are_read_again_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weftrain.kernels.triton_ops._norm_rows.INTERPRETED_PROGRAMS", 1)
    function = load_catalog()["rms_norm"]["triton"][0].function
    few, many = (
        measure(OPS["rms_norm"], function, _parts.norm((rows,), 16384, bias=False, eps=1e-5)("cpu", BF16))
        for rows in (2, 4)
    )
    assert many.forward.bytes - few.forward.bytes <= 1.02 * (many.least_forward - few.least_forward)
    assert many.backward.bytes - few.backward.bytes <= 1.02 * (many.least_backward - few.least_backward)


def test_the_loss_reads_its_logits_once_and_writes_their_gradient_once() -> None:
    """Of linear_cross_entropy, whose least has no logits: beside it are the matrix products, which are torch's."""
    arguments = linear.example(16, 64, 4096)("cpu", BF16)
    moved = measure(
        OPS["linear_cross_entropy"], load_catalog()["linear_cross_entropy"]["triton"][0].function, arguments
    )
    (kernel,) = (bytes_ for name, bytes_ in moved.forward.by_kernel.items() if name != "torch")
    assert kernel <= 1.02 * 2 * 16 * 4096 * 2


def test_attention_reads_keys_again_only_where_the_cache_has_them() -> None:
    function = load_catalog()["attention"]["triton"][0].function
    moved = measure(OPS["attention"], function, attention.example(1, 192, 2, 64)("cpu", BF16))
    assert moved.forward.bytes <= 1.05 * moved.least_forward
    # Each kernel of the backward reads what it needs once: out and dout; q, k, v and dout for dk and dv; and for dq.
    x, row = 192 * 2 * 64 * 2, 192 * 2 * 4  # bytes of a tensor, and of a number for each query and head
    least = {"row_sums": 2 * x + row, "backward_keys": 6 * x + 2 * row, "backward_queries": 5 * x + 2 * row}
    for kernel, bytes_ in least.items():
        assert moved.backward.by_kernel[kernel] <= 1.02 * bytes_, kernel
    assert set(least) == {name for name in moved.backward.by_kernel if name != "torch"}
    assert moved.backward.bytes <= 1.65 * moved.least_backward


def test_attention_backward_in_one_kernel_reads_its_inputs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """dq is summed in fp32 in the cache of the device, and rounded once."""
    monkeypatch.setattr("weftrain.kernels.triton_ops.attention.target", lambda _: "sm_90")
    function = load_catalog()["attention"]["triton"][0].function
    moved = measure(OPS["attention"], function, attention.example(1, 128, 2, 64)("cpu", BF16))
    x, row, turns = 128 * 2 * 64 * 2, 128 * 2 * 4, 2 * 2 * 4
    assert moved.backward.by_kernel["backward_keys"] <= 1.05 * (6 * x + 2 * row + 2 * (2 * x) + 2 * turns)


@triton.jit
def _twice(x, y, n, BLOCK: tl.constexpr):
    """Reads all of x, and then again, backwards."""
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)
    for first in range(0, n, BLOCK):
        at = n - first - 1 - tl.arange(0, BLOCK)
        tl.store(y + n + at, tl.load(x + at, mask=at >= 0), mask=at >= 0)


@pytest.mark.parametrize(("elements", "reads"), [(2**12, 1), (2**19, 2)])
def test_what_is_read_again_counts_where_it_does_not_fit_a_cache(elements: int, reads: int) -> None:
    """Of 2 MiB the last 512 KiB are still there."""
    x, y = torch.zeros(elements), torch.zeros(2 * elements)
    with counting() as traffic:
        _twice[(1,)](x, y, elements, BLOCK=2**12)
        y.mul_(x[0])
    least = (2 + reads) * x.nbytes
    assert least - 2**19 <= traffic.by_kernel["_twice"] <= least
    assert traffic.by_kernel["torch"] == 2 * y.nbytes + 4
