"""What only a GPU can show of the Triton kernels but attention: sums in the products of cuBLAS, tables that are sent
without waiting, rows that many programs share. `make test-gpu` runs it; elsewhere it is skipped.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from weftrain.kernels import OPS

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make test-gpu runs it")


def module(op: str) -> Any:
    return importlib.import_module(f"weftrain.kernels.triton_ops.{op}")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@contextmanager
def without_waiting() -> Iterator[None]:
    """Whoever waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _groups() -> list[dict[str, Any]]:
    sizes = [[(4096, 1024), (3, 5), (8193,), (1,)], [(1024,), (7,)]]
    return [
        {
            "parameters": [normal(*size, seed=index) for index, size in enumerate(group)],
            "gradients": [normal(*size, seed=index + 9, dtype=dtype) for index, size in enumerate(group)],
            "exp_avgs": [torch.zeros(size, device=DEVICE) for size in group],
            "exp_avg_sqs": [torch.zeros(size, device=DEVICE) for size in group],
            "copies": None if dtype == torch.float32 else [normal(*size, dtype=dtype) for size in group],
        }
        for group, dtype in zip(sizes, (torch.bfloat16, torch.float32), strict=True)
    ]


def _update(function: Any, groups: list[dict[str, Any]], step: int, scale: Tensor) -> None:
    for group in groups:
        function(
            **group, learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, update_index=step,
            eps_placement="after_bias_correction", gradient_scale=scale,
        )  # fmt: skip


def test_a_step_neither_waits_nor_allocates_once_its_tables_are_there() -> None:
    groups, expected, scale = _groups(), _groups(), torch.full((), 0.5, device=DEVICE)
    adamw, norms = module("adamw").adamw, module("grad_norm").grad_norm_of_each
    gradients = [gradient for group in groups for gradient in group["gradients"]]
    for step in (1, 2, 3):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        with without_waiting():
            _update(adamw, groups, step, scale)
        of_adamw = torch.cuda.memory_stats()["allocation.all.allocated"] - before
        with without_waiting():
            norms(gradients)
        of_norms = torch.cuda.memory_stats()["allocation.all.allocated"] - before - of_adamw
        if step > 1:
            assert (of_adamw, of_norms) == (0, 2)  # partial sums and norms
        _update(OPS["adamw"].function, expected, step, scale)
    for mine, theirs in zip(groups, expected, strict=True):
        for name in ("parameters", "exp_avgs", "exp_avg_sqs"):
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_the_norms_of_each_are_those_of_each_alone() -> None:
    gradients = [normal(3000, 100), normal(7, dtype=torch.bfloat16), torch.empty(0, device=DEVICE), normal(65537)[1:]]
    each = module("grad_norm").grad_norm_of_each(gradients)
    assert torch.equal(each, torch.stack([module("grad_norm").grad_norm([gradient]) for gradient in gradients]))
    exact = torch.stack([gradient.double().norm() for gradient in gradients])
    torch.testing.assert_close(each.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_products_of_chunks_add_up_in_fp32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = normal(1000, 256, dtype=dtype), normal(999, 256, seed=1, dtype=dtype) * 0.05
    labels = (torch.arange(1000) % 999).to(DEVICE)

    def gradients() -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
        loss = module("linear_cross_entropy").linear_cross_entropy(*leaves, labels)
        return list(torch.autograd.grad(loss, leaves, torch.tensor(1e-3, device=DEVICE)))

    wide = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    exact = torch.autograd.grad(
        torch.nn.functional.cross_entropy(wide[0] @ wide[1].t(), labels, reduction="sum") * 1e-3, wide
    )
    errors = []
    for elements in (1 << 28, 999 * 128):  # one chunk, and eight
        monkeypatch.setattr(module("linear_cross_entropy"), "CHUNK_ELEMENTS", elements)
        found = gradients()
        assert all(torch.equal(*pair) for pair in zip(found, gradients(), strict=True))
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)])
    assert all(several < 1.2 * one + 1e-6 for one, several in zip(*errors, strict=True))
    assert max(errors[0]) < (1e-3 if dtype == torch.float32 else 2e-2)  # fp32 products may be in tf32


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"])
@pytest.mark.parametrize(("rows", "n"), [(3000, 1024), (700, 16384), (65, 4173)])
def test_norms_of_more_rows_than_programs_and_of_any_size(op: str, rows: int, n: int) -> None:
    """Against float64; and the same bits twice, of which those of the weight's gradient are sums over programs."""
    names = OPS[op].differentiable
    arguments: dict[str, Any] = {
        name: normal(*((rows, n) if name in ("x", "residual", "branch") else (n,)), seed=index)
        for index, name in enumerate(names)
    }
    added = {"dtype": torch.float32} if "residual" in names else {}

    def run(function: Any, leaves: dict[str, Tensor], more: dict[str, Any]) -> list[Tensor]:
        outputs = function(**leaves, eps=1e-5, **more)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        ends = [output.square() for output in outputs]
        gradients = torch.autograd.grad(ends, list(leaves.values()), [torch.ones_like(end) for end in ends])
        return [output.detach() for output in outputs] + list(gradients)

    leaves = {name: value.requires_grad_() for name, value in arguments.items()}
    found = run(module(op).IMPLEMENTATION.function, leaves, added)
    assert all(
        torch.equal(*pair) for pair in zip(found, run(module(op).IMPLEMENTATION.function, leaves, added), strict=True)
    )
    wide = {name: value.detach().double().requires_grad_() for name, value in arguments.items()}
    exact = run(OPS[op].exact, wide, {"dtype": torch.float64} if added else {})
    for name, a, b in zip((*OPS[op].outputs, *names), found, exact, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 2e-6, name
