"""C++ attention: the same bits on any number of threads, whether a thread takes a key head or a query head at a time."""

from __future__ import annotations

import pytest
import torch

from weftrain.kernels import OPS, Spec
from weftrain.kernels.checks.evaluation import differing, evaluate
from weftrain.kernels.cpp_ops.attention import IMPLEMENTATION
from weftrain.kernels.ops.attention import example


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 1), (6, 3), (4, 4), (8, 2)])
def test_any_number_of_threads(heads: int, kv_heads: int) -> None:
    spec = Spec("attention", "example", "cpu", torch.bfloat16, {"head_dim": 32})
    if (reason := IMPLEMENTATION.unavailable(spec)) is not None:
        pytest.skip(reason)
    arguments = example(1, 150, heads, 32, kv_heads=kv_heads, window=40, documents=True)("cpu", torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(evaluate(OPS["attention"], IMPLEMENTATION.function, arguments))
    finally:
        torch.set_num_threads(threads)
    assert [differing(other, results[0]) for other in results] == [[]] * 4
