"""How many bytes an op's implementation moves to and from global memory, counted in Triton's interpreter, against the
least that any implementation must move.

Every access of a Triton kernel is looked at, in sectors of 32 bytes, through a cache that holds what a program and its
neighbours use again soon (an L2 cache shared by all programs that run at once leaves each about as much); a launch
begins with an empty one. Operators of torch between the launches read their inputs and write their outputs once; those
within an operator of torch.library are not seen.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weftrain.kernels.contract import Arguments, KernelError, Op
from weftrain.kernels.triton_version import interpreting

_SECTOR = 32
_CACHE_SECTORS = 512 * 1024 // _SECTOR


@dataclass
class Traffic:
    """Bytes that were read from and written to global memory, by the kernel that did it; "torch": by its operators."""

    by_kernel: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._cache: OrderedDict[int, bool] = OrderedDict()  # sector -> it was written
        self._kernel = ""  # that is running

    @property
    def bytes(self) -> int:
        return self.by_kernel.total()

    @contextmanager
    def launch(self, kernel: str) -> Iterator[None]:
        self._cache.clear()
        self._kernel = kernel
        yield
        self._kernel = ""

    def operator(self, size: int) -> None:
        """One of torch's; those of the interpreter itself do not count."""
        if not self._kernel:
            self.by_kernel["torch"] += size

    def access(self, addresses: np.ndarray, element_bytes: int, *, written: bool) -> None:
        first = addresses // _SECTOR
        sectors = np.unique(np.concatenate((first, (addresses + element_bytes - 1) // _SECTOR)))
        cache = self._cache
        for sector in sectors.tolist():
            was_written = cache.pop(sector, None)
            if was_written is None or (written and not was_written):
                self.by_kernel[self._kernel] += (
                    _SECTOR  # a read of what is not there, or the first write of what will be written back
                )
            cache[sector] = written or bool(was_written)
        while len(cache) > _CACHE_SECTORS:
            cache.popitem(last=False)


@contextmanager
def counting() -> Iterator[Traffic]:
    """What runs within, on a CPU, is counted. Raises KernelError where Triton does not interpret."""
    if not interpreting():
        raise KernelError(
            "traffic is counted in Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported"
        )
    from triton.runtime import interpreter

    traffic = Traffic()
    builder, grid = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, grid.__call__

    def counted(method: Callable[..., Any], written: bool) -> Callable[..., Any]:
        def run(self: Any, pointers: Any, *rest: Any, **named: Any) -> Any:
            mask = rest[1] if written else rest[0]
            here = np.broadcast_to(mask.data, pointers.data.shape)
            addresses = pointers.data[here].astype(np.int64)
            if addresses.size:
                size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
                traffic.access(addresses, size, written=written)
            return method(self, pointers, *rest, **named)

        return run

    def launch(self: Any, *arguments: Any, **named: Any) -> Any:
        with traffic.launch(self.fn.__name__):
            return call(self, *arguments, **named)

    try:
        builder.create_masked_load, builder.create_masked_store = counted(load, False), counted(store, True)
        grid.__call__ = launch
        with _TorchOperators(traffic):
            yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store, grid.__call__ = load, store, call


class _TorchOperators(TorchDispatchMode):
    """Adds the bytes of operators that compute: all inputs and outputs, once. Views and allocations are free."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        if function.namespace == "aten" and not function.is_view and "empty" not in name and "detach" not in name:
            tensors = [leaf for leaf in tree_leaves((args, kwargs or {}, result)) if isinstance(leaf, Tensor)]
            self._traffic.operator(sum(_touched(tensor) for tensor in tensors))
        return result


def _touched(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: an expanded dimension counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


@dataclass(frozen=True)
class Measured:
    """What was moved, and the least, of one call's forward and backward."""

    forward: Traffic
    backward: Traffic
    least_forward: int
    least_backward: int


def measure(op: Op, function: Callable[..., Any], arguments: Arguments) -> Measured:
    """One call, and its backward where the op has one, with gradients of ones for its outputs."""
    taken = {
        name: value.detach().requires_grad_(name in op.differentiable) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    with counting() as forward:
        results = function(**taken)
    backward, least_backward = Traffic(), 0
    if op.differentiable:
        outputs = [out for out in (results if isinstance(results, tuple) else (results,)) if out.requires_grad]
        gradients = [torch.ones_like(out) for out in outputs]
        assert op.backward_cost is not None
        least_backward = op.backward_cost(arguments)[0]
        with counting() as backward:
            torch.autograd.backward(outputs, gradients)
    return Measured(forward, backward, op.bytes_moved(arguments), least_backward)
