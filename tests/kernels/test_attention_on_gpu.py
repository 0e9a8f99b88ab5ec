"""What only a GPU can show of Triton attention: programs that wait for their turn, tiles by descriptors, and how both
forms of the backward compare. `make test-gpu` runs it; elsewhere it is skipped.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from weftrain.kernels.contract import Spec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make test-gpu runs it")

SHAPES = [  # T, H, H_kv, D, documents, window: more tiles than a GPU holds at once, and lengths of no whole tile
    (4096, 32, 32, 128, False, None),
    (4001, 16, 16, 64, True, None),
    (4001, 16, 4, 64, True, 500),
    (2048, 32, 8, 128, True, None),
    (300, 2, 2, 64, False, 7),
]


def module() -> Any:
    attention = importlib.import_module("weftrain.kernels.triton_ops.attention")
    attributes = {"head_dim": 64, "scale": 0.125, "document_start": False, "window": None, "heads_per_key": 1}
    reason = attention.IMPLEMENTATION.unavailable(Spec("attention", "test", "cuda", torch.bfloat16, attributes))
    if reason is not None:
        pytest.skip(reason)
    return attention


def arguments(T: int, H: int, kv_heads: int, D: int, documents: bool, window: int | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, T, heads, D, generator=generator).cuda().bfloat16() for heads in (H, kv_heads, kv_heads))
    start = None
    if documents:
        begins = torch.rand(2, T, generator=generator) < 1 / 300
        start = torch.where(begins, torch.arange(T), 0).cummax(1).values.cuda().int()
    return {"q": q, "k": k, "v": v, "scale": D**-0.5, "document_start": start, "window": window}


def results(function: Any, given: dict[str, Any]) -> list[Tensor]:
    leaves = {name: given[name].detach().requires_grad_() for name in ("q", "k", "v")}
    output = function(**given | leaves)
    incoming = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output)
    return [output.detach(), *torch.autograd.grad(output, list(leaves.values()), incoming)]


@pytest.mark.parametrize("shape", SHAPES)
def test_one_kernel_gives_the_same_bits_each_time_and_the_gradients_of_two(
    shape: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = module()
    given = arguments(*shape)
    first = results(attention.attention, given)
    for _ in range(10):
        assert all(torch.equal(*pair) for pair in zip(first, results(attention.attention, given), strict=True))
    monkeypatch.setattr(attention, "one_kernel_backward", lambda *_: None)
    for name, one, two in zip("oqkv", first, results(attention.attention, given), strict=True):
        assert float((one.float() - two.float()).norm() / two.float().norm()) < 2e-3, name  # bf16 rounds to 2^-9


@pytest.mark.parametrize("shape", SHAPES)
def test_descriptors_give_the_output_of_pointers(shape: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    attention = module()
    given = arguments(*shape)
    by_descriptors = attention.attention(**given)
    monkeypatch.setattr(attention, "DESCRIBED_FORWARD", {})
    by_pointers = attention.attention(**given)
    assert float((by_descriptors.float() - by_pointers.float()).norm() / by_pointers.float().norm()) < 2e-3


def test_starts_that_nobody_looked_at_hang_nothing() -> None:
    attention = module()
    given = arguments(1500, 4, 4, 64, False, None)
    start = torch.randint(-20, 1600, (2, 1500), generator=torch.Generator().manual_seed(7), dtype=torch.int32).cuda()
    results(attention.attention, given | {"document_start": start})
    torch.cuda.synchronize()
