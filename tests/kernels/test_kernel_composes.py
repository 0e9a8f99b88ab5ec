"""Implementations inside a real model: compiled as one graph, under activation checkpointing, on strided inputs, twice the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from weftrain.kernels import OPS, Implementation, Spec, load_catalog

DIFFERENTIABLE = [name for name, op in OPS.items() if op.differentiable]
CATALOG = load_catalog()


def usable(op: str) -> list[Implementation]:
    spec = Spec(op, "example", "cpu", torch.float32, OPS[op].attributes)
    return [variant for variants in CATALOG[op].values() for variant in variants if variant.unavailable(spec) is None]


def implementations() -> list[Any]:
    return [pytest.param(item, id=f"{item.op}-{item.source}") for op in DIFFERENTIABLE for item in usable(op)]


def run(function: Any, arguments: dict[str, Any], differentiable: tuple[str, ...]) -> list[Tensor]:
    """The output and every gradient, for an incoming gradient of ones; `differentiable` arguments keep their strides."""
    leaves = [arguments[name].detach().requires_grad_() for name in differentiable]
    output = function(**{**arguments, **dict(zip(differentiable, leaves, strict=True))})
    return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]


@pytest.mark.parametrize("implementation", implementations())
def test_compiles_as_one_graph(implementation: Implementation) -> None:
    """aot_eager traces forward and backward and runs torch's own kernels: no difference is allowed beyond the order of a sum."""
    torch._dynamo.reset()
    op = OPS[implementation.op]
    arguments = op.examples["odd_chunks" if implementation.op == "linear_cross_entropy" else "odd"]("cpu", torch.float32)
    compiled = torch.compile(implementation.function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        run(compiled, arguments, op.differentiable), run(implementation.function, arguments, op.differentiable), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", implementations())
def test_checkpointed_gives_the_same_bits(implementation: Implementation) -> None:
    op = OPS[implementation.op]
    arguments = op.examples["odd"]("cpu", torch.float32)

    def checkpointed(**kwargs: Any) -> Tensor:
        return checkpoint(implementation.function, use_reentrant=False, **kwargs)

    plain = run(implementation.function, arguments, op.differentiable)
    assert all(torch.equal(a, b) for a, b in zip(run(checkpointed, arguments, op.differentiable), plain, strict=True))


@pytest.mark.parametrize("implementation", implementations())
def test_strided_inputs_and_repetition(implementation: Implementation) -> None:
    """Inputs as views into something wider (q, k and v of one product), and again the same bits on two threads."""
    op = OPS[implementation.op]
    arguments = op.examples["odd"]("cpu", torch.float32)
    strided = dict(arguments)
    for name in op.differentiable:
        strided[name] = torch.stack((arguments[name], arguments[name] + 1), -1)[..., 0]
        assert not strided[name].is_contiguous()
    dense = run(implementation.function, arguments, op.differentiable)
    for got, expected in zip(run(implementation.function, strided, op.differentiable), dense, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(run(implementation.function, arguments, op.differentiable), dense, strict=True))


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


def test_linear_cross_entropy_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    import weftrain.kernels.torch_ops.linear_cross_entropy as module

    monkeypatch.setattr(module, "_CPU_CHUNK_ELEMENTS", 101 * 64)
    arguments = OPS["linear_cross_entropy"].examples["odd_chunks"]("cpu", torch.float32)
    assert arguments["hidden"].shape[0] == 601
    with _LargestTensor() as largest:
        run(module.linear_cross_entropy, arguments, ("hidden", "weight"))
    assert largest.elements <= max(101 * 64, 601 * 24)
    with _LargestTensor() as reference:
        run(OPS["linear_cross_entropy"].function, arguments, ("hidden", "weight"))
    assert reference.elements == 101 * 601


def test_linear_cross_entropy_computes_only_the_gradients_that_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    import weftrain.kernels.torch_ops.linear_cross_entropy as module

    arguments = OPS["linear_cross_entropy"].examples["odd"]("cpu", torch.float32)
    hidden, weight = arguments["hidden"].requires_grad_(), arguments["weight"]
    products = []

    class _Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                products.append(func)
            return func(*args, **(kwargs or {}))

    with _Products(), torch.no_grad():
        module.linear_cross_entropy(**arguments)
    assert len(products) == 1
    with _Products():
        module.linear_cross_entropy(**arguments).backward()
    assert len(products) == 1 + 2  # logits and dhidden; the weight is frozen
    assert weight.grad is None
    assert hidden.grad is not None
