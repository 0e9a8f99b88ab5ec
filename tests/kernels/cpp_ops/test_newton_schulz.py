"""C++ products of newton_schulz: the same bits on any number of threads and for each matrix of a stack alone, and by AMX
and without it what float64 says.
"""

from __future__ import annotations

import pytest
import torch

from weftrain.kernels import OPS, Spec
from weftrain.kernels.cpp_ops import newton_schulz as module

QUINTIC = {"a": 3.4445, "b": -4.775, "c": 2.0315, "iterations": 2, "eps": 1e-7}


@pytest.fixture(autouse=True, params=[False, True], ids=["vectors", "tiles"])
def _kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec("newton_schulz", "optimizer", "cpu", torch.bfloat16, OPS["newton_schulz"].attributes)
    if (reason := module.IMPLEMENTATION.unavailable(spec)) is not None:
        pytest.skip(reason)
    if request.param and not module.has_tiles():
        pytest.skip("this CPU has no AMX for bfloat16")
    monkeypatch.setattr(module, "has_tiles", lambda: request.param)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_any_number_of_threads() -> None:
    """Two tasks of columns of each symmetric product, the second of them narrow, and three of the other."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(module.newton_schulz(normal(300, 135), **QUINTIC))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, results[0]) for other in results)


def test_each_matrix_of_a_stack_has_the_bits_it_has_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where not all of them are multiplied together."""
    x = normal(5, 40, 33)
    alone = torch.stack([module.newton_schulz(one, **QUINTIC) for one in x])
    for together in (1, 3, 5):
        monkeypatch.setattr(module, "_ELEMENTS_TOGETHER", together * 40 * 33)
        assert torch.equal(module.newton_schulz(x, **QUINTIC), alone)


@pytest.mark.parametrize("shape", [(1, 2), (31, 33), (135, 300), (70, 70)])
def test_each_product_is_that_of_float64_rounded_once(shape: tuple[int, int]) -> None:
    """Sums of bf16 products that fp32 holds exactly: of -1, 0 and 1, times powers of 2."""
    y = torch.randint(-1, 2, (1, *shape), generator=torch.Generator().manual_seed(0)).bfloat16()
    got = module._steps(y, 2.0, 4.0, 0.0, 1)
    gram = (y.double() @ y.double().mT).bfloat16()
    polynomial = (4 * gram.double()).bfloat16()
    assert torch.equal(got, (polynomial.double() @ y.double() + 2 * y.double()).bfloat16())
    got = module._steps(y, 0.0, 0.5, 0.125, 1)
    polynomial = (gram.double() @ gram.double() / 8 + gram.double() / 2).bfloat16()
    wanted = polynomial.double() @ y.double()
    assert float((got.double() - wanted).norm() / wanted.norm()) < 3e-3
