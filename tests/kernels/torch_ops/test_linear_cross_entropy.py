"""What linear_cross_entropy of source torch holds in memory and computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from weftrain.kernels import OPS
from weftrain.kernels.checks.evaluation import evaluate


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
    assert arguments["hidden"].shape[0] == 201
    op = OPS["linear_cross_entropy"]
    with _LargestTensor() as largest:
        evaluate(op, module.linear_cross_entropy, arguments)
    assert largest.elements <= max(101 * 64, 201 * 24)
    with _LargestTensor() as reference:
        evaluate(op, op.function, arguments)
    assert reference.elements == 101 * 201


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
