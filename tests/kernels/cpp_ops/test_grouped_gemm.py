"""C++ products of groups: the same bits on any number of threads, and by AMX and without it what float64 says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weftrain.kernels import OPS, Spec
from weftrain.kernels.checks.evaluation import differing, evaluate
from weftrain.kernels.cpp_ops import grouped_gemm as module
from weftrain.kernels.ops.grouped_gemm import example

# Groups of more rows than a task has, of one row and of none; two blocks of columns, the second of them narrow.
SIZES = [1030, 0, 1, 33]


@pytest.fixture(params=[False, True], ids=["vectors", "tiles"])
def _kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec("grouped_gemm", "example", "cpu", torch.bfloat16, OPS["grouped_gemm"].attributes)
    if (reason := module.IMPLEMENTATION.unavailable(spec)) is not None:
        pytest.skip(reason)
    if request.param and not module.has_tiles():
        pytest.skip("this CPU has no AMX for bfloat16")
    monkeypatch.setattr(module, "has_tiles", lambda: request.param)


@pytest.mark.usefixtures("_kind")
def test_any_number_of_threads() -> None:
    arguments = example(SIZES, 131, 35)("cpu", torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(evaluate(OPS["grouped_gemm"], module.IMPLEMENTATION.function, arguments))
    finally:
        torch.set_num_threads(threads)
    assert [differing(other, results[0]) for other in results] == [[]] * 3


@pytest.mark.usefixtures("_kind")
def test_every_result_is_that_of_float64_rounded_once() -> None:
    """Sums of bf16 products that fp32 holds exactly: small integers."""
    draw = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=draw).bfloat16()

    x, weight, dy = integers(sum(SIZES), 35), integers(len(SIZES), 131, 35), integers(sum(SIZES), 131)
    last = torch.tensor(SIZES).cumsum(0)
    leaves = [one.double().requires_grad_() for one in (x, weight)]
    rows = leaves[0].tensor_split(last)[:-1]
    exact = torch.cat([part @ matrix.t() for part, matrix in zip(rows, leaves[1], strict=True)])
    expected = [exact, *torch.autograd.grad(exact, leaves, dy.double())]
    ends = last.int()
    got = [
        module._products(x, weight, ends, True),
        module._products(dy, weight, ends, False),
        module._outer_products(dy, x, ends),
    ]
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other.bfloat16())
