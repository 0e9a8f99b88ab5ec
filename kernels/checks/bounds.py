"""Memory: inputs that end or begin exactly at a page that cannot be touched, outputs too where the implementation
allocates in Python, and elements that lie more than 2^31 elements apart.

An access out of bounds is a *signal*, so each case runs in a process of its own, forked from a server that has imported
everything and computed nothing. Only names cross over: the child finds the function by module and name. On an
accelerator there are no guard pages; there, NaN lies around every tensor instead, in place of the pages, and must be
neither seen nor changed.
"""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weftrain.kernels.checks.evaluation import Results, evaluate, far, map_tensors, tensors_of
from weftrain.kernels.checks.findings import Case, Check, NotHere, Subject, Verdict, name_of
from weftrain.kernels.checks.guard_pages import sparse_memory
from weftrain.kernels.contract import Arguments, Implementation, KernelError, Op
from weftrain.kernels.ops import OPS

_SECONDS = 100  # for one case: a first use may compile
_MARGIN = 4096  # elements of NaN on either side, on an accelerator


def _judge(subject: Subject, case: Case) -> Verdict | NotHere:
    if subject.device != "cpu":
        return _judge_margins(subject, case)
    return in_a_process_of_its_own(subject, case, "guard pages", "every access is inside a tensor")


def in_a_process_of_its_own(subject: Subject, case: Case, question: str, good: str) -> Verdict | NotHere:
    """The answer of `faults_of` there; `good` says that there are none."""
    address = _address(subject.implementation)
    if address is None:
        return NotHere(
            "its function is neither at module level nor in the catalog: a process of its own cannot find it"
        )
    if not sys.platform.startswith("linux"):
        return NotHere("guard pages and large strides are made by mmap and mprotect as Linux has them")
    job = {
        **address,
        "question": question,
        "op": subject.op.name,
        "example": case.example,
        "dtype": name_of(case.dtype),
        "seconds": _SECONDS,
    }
    answer = _server().ask(job)
    if "ended_by" in answer:
        return Verdict(False, f"an access outside a tensor: the process ended by {answer['ended_by']}")
    return Verdict(not answer["faults"], "; ".join(answer["faults"][:3]) or good)


class _Server:
    """guarded_process.py in a process of its own: one line of JSON out, one back. It ends with this process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "weftrain.kernels.checks.guarded_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise KernelError(
                f"the process that guard pages are checked in ended with exit code {self._process.wait()}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


@functools.cache
def _server() -> _Server:
    """One a process; it has imported Triton and the catalog, so that a case costs a fork."""
    return _Server()


# ---- finding the function again


def _address(implementation: Implementation) -> dict[str, Any] | None:
    """Where a fresh process finds the function: its module (and file) and name, or its place in the catalog."""
    function = implementation.function
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    loaded = sys.modules.get(module or "")
    file = getattr(loaded, "__file__", None)
    if module and file and name.isidentifier() and getattr(loaded, name, None) is function:
        return {"module": module, "file": file, "name": name}
    from weftrain.kernels.registry import load_catalog

    variants = load_catalog().get(implementation.op, {}).get(implementation.source, [])
    for index, variant in enumerate(variants):
        if variant.function is function or getattr(variant.function, "__qualname__", "") == name:
            return {"source": implementation.source, "variant": index}
    return None


def _function(job: dict[str, Any]) -> Callable[..., Any]:
    """The other way round, in the child."""
    if "module" not in job:
        from weftrain.kernels.registry import load_catalog

        return load_catalog()[job["op"]][job["source"]][job["variant"]].function
    file = Path(job["file"])
    depth = job["module"].count(".") + (file.name == "__init__.py")
    # of a module that was loaded from a file, or from a path that only the parent knows
    sys.path.append(str(file.parents[depth]))
    function: Callable[..., Any] = getattr(importlib.import_module(job["module"]), job["name"])
    return function


def faults_of(job: dict[str, Any]) -> list[str]:
    """In the child: the answer to the job's question."""
    return _faults_at_guard_pages(job) if job["question"] == "guard pages" else _faults_of_offsets(job)


def _faults_at_guard_pages(job: dict[str, Any]) -> list[str]:
    """In the child: once with every tensor before a guard page, once after one, and what differs between the two."""
    from weftrain.kernels.checks.guard_pages import GuardedMemory

    op, function = OPS[job["op"]], _function(job)
    dtype = getattr(torch, job["dtype"])
    faults, results = [], []
    for memory in (GuardedMemory("end"), GuardedMemory("start")):
        with memory.allocating():
            arguments = memory.place_all(op.examples[job["example"]]("cpu", dtype))
            results.append(evaluate(op, function, arguments, arrange=memory.place, in_place=True))
        faults += memory.written_outside()
    return faults + [
        f"the result depends on what lies around a tensor: {name}" for name in far(results[0], results[1], dtype)
    ]


# ---- elements that lie far apart

_FAR = 2**31  # elements: an offset of 32 bits does not reach it


def _faults_of_offsets(job: dict[str, Any]) -> list[str]:
    op, function = OPS[job["op"]], _function(job)
    dtype = getattr(torch, job["dtype"])
    dense = evaluate(op, function, op.examples[job["example"]]("cpu", dtype))
    faults = []
    for axis, word in ((0, "rows"), (-1, "columns")):
        arguments = strided_arguments(op, op.examples[job["example"]]("cpu", dtype), axis)
        got = evaluate(op, function, arguments, arrange=lambda gradient, axis=axis: far_apart(gradient, axis))  # type: ignore[misc]
        faults += [f"{word} more than 2^31 elements apart: {name}" for name in far(got, dense, dtype)]
    return faults


def strided_arguments(op: Op, arguments: Arguments, axis: int) -> Arguments:
    """The arguments that may be strided by contract, with the last element along `axis` beyond 2^31 elements."""
    return {
        **arguments,
        **map_tensors(lambda tensor: far_apart(tensor, axis), {name: arguments[name] for name in op.data}),
    }


def far_apart(tensor: Tensor, axis: int) -> Tensor:
    """The same values; on a CPU only the pages that they lie in take memory."""
    if not tensor.dim() or tensor.shape[axis] < 2:
        return tensor
    axis %= tensor.dim()
    strides = list(tensor.contiguous().stride())
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True)) + 1
    strides[axis] = _FAR // (tensor.shape[axis] - 1) + extent
    elements = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True)) + 1
    if tensor.device.type == "cpu":
        storage = sparse_memory(elements, tensor.dtype)
    else:
        storage = torch.empty(elements, dtype=tensor.dtype, device=tensor.device)
    return storage.as_strided(tensor.shape, strides).copy_(tensor)


# ---- accelerators: NaN around every tensor


def _judge_margins(subject: Subject, case: Case) -> Verdict:
    """Runs on any device. A read outside shows as NaN in the result, a write as a margin that is no longer NaN."""
    op, function = subject.op, subject.implementation.function
    surrounded: list[Tensor] = []

    def surround(tensor: Tensor) -> Tensor:
        wide = torch.full(
            (tensor.numel() + 2 * _MARGIN,), float("nan") if tensor.is_floating_point() else -7, device=tensor.device
        )
        wide = wide.to(tensor.dtype)
        inner = wide[_MARGIN : _MARGIN + tensor.numel()].view(tensor.shape)
        inner.copy_(tensor)
        surrounded.append(wide)
        return inner

    plain = evaluate(op, function, case.build())
    arguments = map_tensors(surround, case.build())
    results: Results = evaluate(op, function, arguments, arrange=surround, in_place=True)
    faults = [f"reads what lies around a tensor: {name}" for name in far(results, plain, case.dtype)]
    for name, wide in zip(
        [*tensors_of(arguments), *("incoming gradient",) * len(op.outputs)], surrounded, strict=False
    ):
        margin = torch.cat((wide[:_MARGIN], wide[-_MARGIN:]))
        if not bool((margin.isnan() if wide.is_floating_point() else margin == -7).all()):
            faults.append(f"writes around {name}")
    return Verdict(not faults, "; ".join(faults[:3]) or "NaN around every tensor is neither read nor written")


def _cases(subject: Subject) -> list[Case]:
    """Every small example in one dtype; one in the others, whose vector widths differ."""
    return subject.cases(*subject.op.small, dtypes=subject.dtypes[:1]) + subject.quick()[1:]


CHECKS = (Check("bounds", "no access outside a tensor: guard pages, or NaN margins on an accelerator", _cases, _judge),)
