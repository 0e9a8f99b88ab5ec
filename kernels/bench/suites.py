"""Which calls are measured: examples of kernels/ops/, or the calls that a real run made.

A recorded suite is a JSON file of shapes, dtypes and static arguments, without a value of the run's: its tensors are
drawn anew. `weftrain bench train RECIPE --record-shapes FILE` writes one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weftrain.kernels.contract import Arguments, KernelError, Op, Spec
from weftrain.kernels.ops import OPS
from weftrain.kernels.registry import observed_by

SUITES: Mapping[str, tuple[str, ...]] = {  # suite -> how the names of its examples in kernels/ops/ begin
    "small": (),  # the one called "odd": a try, not a measurement
    "70m": ("bench_70m",),
    "7b": ("amber_7b", "crystalcoder_7b", "olmoe_1b_7b"),
    "7b_16k": ("amber_7b", "crystalcoder_7b", "olmoe_1b_7b"),  # of 16,384 tokens, what a GPU computes at a time
}
_LONG = "_16k"  # how the names of examples of 16,384 tokens end
RECORD_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class BenchCase:
    """One call that is measured. count: how often the recorded run made it in a step."""

    op: Op
    example: str
    dtype: torch.dtype  # of the Spec that implementations are asked with
    build: Callable[[str], Arguments]  # device -> fresh arguments
    count: int | None = None


def examples_of(op: Op, suite: str) -> list[str]:
    """The names of the examples of one op that a suite measures."""
    if suite == "small":
        return ["odd"]
    found = [name for name in op.examples if name.startswith(SUITES[suite])]
    long = [name for name in found if name.endswith(_LONG)]
    # what has no tokens, the optimizer's, is the same in both
    return long or found if suite.endswith(_LONG) else [name for name in found if name not in long]


def cases_of(ops: Sequence[str], suite: str, dtype: torch.dtype) -> list[BenchCase]:
    """The cases of a suite of kernels/ops/."""
    return [
        BenchCase(OPS[op], name, dtype, lambda device, op=op, name=name: OPS[op].examples[name](device, dtype))  # type: ignore[misc]
        for op in ops
        for name in examples_of(OPS[op], suite)
    ]


# Recording


@dataclass
class Recording:
    """The calls of one step, each kind once."""

    calls: dict[str, dict[str, Any]] = field(default_factory=dict)  # its form as JSON -> the call

    def add(self, spec: Spec, arguments: Arguments) -> None:
        call = {
            "op": spec.op,
            "dtype": _name(spec.dtype),
            "arguments": {name: _described(name, value) for name, value in arguments.items()},
        }
        key = json.dumps({**call, "arguments": _form(call["arguments"])}, sort_keys=True)
        known = self.calls.setdefault(key, {**call, "module": spec.module, "count": 0})
        known["count"] += 1

    def to_json(self, about: Mapping[str, Any]) -> str:
        """about: where the calls are from (recipe, backend, device)."""
        document = {"schema_version": RECORD_SCHEMA_VERSION, **about, "calls": list(self.calls.values())}
        return json.dumps(document, indent=1) + "\n"


@contextmanager
def recording() -> Iterator[Recording]:
    """Records every call of a kernel that is selected within."""
    found = Recording()
    with observed_by(found.add):
        yield found


def _described(name: str, value: Any) -> Any:
    """What a file keeps of an argument."""
    if isinstance(value, Tensor):
        about: dict[str, Any] = {"shape": list(value.shape), "dtype": _name(value.dtype)}
        if not value.is_contiguous():
            about["stride"] = list(value.stride())
        if name == "document_start":  # its form decides how much is computed
            about["starts"] = [sorted(set(row)) for row in value.detach().cpu().tolist()]
        elif name == "ends":  # of groups of rows: they rise to the number of rows
            about["values"] = value.detach().cpu().tolist()
        elif not value.is_floating_point():
            about["high"] = int(value.detach().max()) + 1 if value.numel() else 1
        elif value.numel():
            about["std"] = float(f"{float(value.detach().float().square().mean().sqrt()):.3g}")
            about["negative"] = bool((value.detach() < 0).any())
        return about
    if isinstance(value, (list, tuple)):
        return [_described(name, item) for item in value]
    return {"torch.dtype": _name(value)} if isinstance(value, torch.dtype) else value


def _form(value: Any) -> Any:
    """A description without what differs from layer to layer."""
    if isinstance(value, dict):
        return {
            name: _form(item)
            for name, item in value.items()
            if name not in ("std", "negative", "high", "starts", "values")
        }
    return [_form(item) for item in value] if isinstance(value, list) else value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Reading


def recorded_cases(text: str, where: str) -> list[BenchCase]:
    """The cases of a recorded suite, in the dtypes that they were recorded in. Raises KernelError for another file."""
    try:
        document = json.loads(text)
        version = document["schema_version"]
        if version != RECORD_SCHEMA_VERSION:
            raise KernelError(f"{where}: schema_version {version}, and this program reads {RECORD_SCHEMA_VERSION}")
        return [_case(number, call) for number, call in enumerate(document["calls"], 1)]
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if isinstance(error, KernelError):
            raise
        raise KernelError(
            f"{where} is not a suite that `weftrain bench train --record-shapes` wrote: {type(error).__name__}: {error}"
        ) from None


def _case(number: int, call: Mapping[str, Any]) -> BenchCase:
    if call["op"] not in OPS:
        raise KernelError(f"call {number} is of the op '{call['op']}', and there is: {', '.join(OPS)}")
    arguments = call["arguments"]
    for value in arguments.values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict) and "shape" in item:
                _check_tensor(item)

    def build(device: str) -> Arguments:
        generator = torch.Generator().manual_seed(0)
        return {name: _drawn(name, value, generator, device) for name, value in arguments.items()}

    name = f"recorded_{number}_{call['module']}"
    return BenchCase(OPS[call["op"]], name, _dtype(call["dtype"]), build, int(call["count"]))


def _check_tensor(about: Mapping[str, Any]) -> None:
    _dtype(about["dtype"])
    shape, stride = about["shape"], about.get("stride")
    if not all(type(size) is int and 0 <= size < 2**40 for size in [*shape, *(stride or [])]):
        raise ValueError(f"a tensor has the shape {shape} and the stride {stride}")
    if math.prod(shape) > 2**40 or (stride is not None and len(stride) != len(shape)):
        raise ValueError(f"a tensor has the shape {shape} and the stride {stride}")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name) if name in _DTYPES else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"there is no dtype '{name}' here")
    return found


_DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "bool")


def _drawn(name: str, about: Any, generator: torch.Generator, device: str) -> Any:
    """An argument like the recorded one."""
    if isinstance(about, list):
        return [_drawn(name, item, generator, device) for item in about]
    if isinstance(about, dict) and "torch.dtype" in about:
        return _dtype(about["torch.dtype"])
    if not (isinstance(about, dict) and "shape" in about):
        return about
    shape, dtype = tuple(about["shape"]), _dtype(about["dtype"])
    if "starts" in about:
        found = torch.zeros(shape, dtype=dtype)
        for row, starts in enumerate(about["starts"]):
            for start in starts:
                found[row, start:] = start
    elif "values" in about:
        found = torch.tensor(about["values"], dtype=dtype).reshape(shape)
    elif name in ("cos", "sin"):  # a pair's two must belong together
        angle = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 * math.pi
        found = (angle.cos() if name == "cos" else angle.sin()).to(dtype)
    elif not dtype.is_floating_point:
        found = torch.randint(max(about["high"], 1), shape, generator=generator).to(dtype)
        if name == "labels":
            found[::7] = -100
    else:
        found = _tiled(shape, generator) * about.get("std", 1.0)
        found = (found if about.get("negative", True) else found.abs()).to(dtype)
    if "stride" in about:
        laid = torch.empty_strided(shape, about["stride"], dtype=dtype)
        found = laid.copy_(found)
    return found.to(device)


def _tiled(shape: tuple[int, ...], generator: torch.Generator, most: int = 2**22) -> Tensor:
    """Normal numbers; those of a large tensor repeat, since drawing them would take longer than measuring."""
    count = math.prod(shape)
    some = torch.randn(min(count, most), generator=generator)
    return some.repeat(-(-count // most))[:count].reshape(shape) if count > most else some.reshape(shape)
