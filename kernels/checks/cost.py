"""What a call costs: memory kept for the backward, memory at the peak, and time against the reference.

On a CPU the profiler's allocation events are counted, so that what an implementation keeps counts wherever it puts it;
memory that C++ takes from the system itself does not show. Time is asked for coarsely: `kernels bench` measures it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from weftrain.kernels.checks.evaluation import evaluate, incoming, outputs_of
from weftrain.kernels.checks.findings import Case, Check, NotHere, Subject, Verdict
from weftrain.kernels.contract import Cost

_SLACK_BYTES = 1 << 16
_TIMES_THE_REFERENCE = 10
_LEAST_S = 0.25  # below it, another process on the machine decides
_FORWARD_IS_DONE = "weftrain::forward is done"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """torch's profiler writes lines of its own to the process's standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _measured(subject: Subject, case: Case) -> dict[str, int]:
    """Bytes beyond arguments and results: kept after the forward, at the peak, and left when all of it is gone."""
    op, function = subject.op, subject.implementation.function
    evaluate(op, function, case.build())  # what a first call makes for all later ones
    arguments = case.build()
    leaves = {name: arguments[name].requires_grad_() for name in op.differentiable}
    sizes = {"results": 0, "gradients": 0}

    def call() -> Iterator[str]:
        returned = function(**arguments)
        outputs = {} if op.in_place else outputs_of(op, returned)
        sizes["results"] = _bytes(outputs.values())
        yield "forward"
        if leaves:
            given = incoming(outputs)
            sizes["gradients"] = _bytes(given)
            results = torch.autograd.grad(list(outputs.values()), list(leaves.values()), given)
            sizes["results"] += _bytes(results)
            yield "backward"
            del results, given
        del outputs, returned

    return _on_a_device(call, sizes) if subject.device == "cuda" else _on_a_cpu(call, sizes)


def _on_a_device(call: Any, sizes: dict[str, int]) -> dict[str, int]:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = 0
    for stage in call():
        if stage == "forward":
            kept = torch.cuda.memory_allocated() - before - sizes["results"]
    peak = torch.cuda.max_memory_allocated() - before - sizes["results"] - sizes["gradients"]
    return {"kept": kept, "peak": peak, "left": torch.cuda.memory_allocated() - before}


def _on_a_cpu(call: Any, sizes: dict[str, int]) -> dict[str, int]:
    with contextlib.ExitStack() as stack:
        with _silent():
            trace = stack.enter_context(profile(activities=[ProfilerActivity.CPU], profile_memory=True))
        forward_results = 0
        for stage in call():
            if stage == "forward":
                forward_results = sizes["results"]
                with record_function(_FORWARD_IS_DONE):
                    pass
        gc.collect()  # what a cycle holds is not left behind
        with _silent():
            stack.close()
    events = trace.profiler.kineto_results.events()  # type: ignore[union-attr]
    end_of_forward = next(event.start_ns() for event in events if event.name() == _FORWARD_IS_DONE)
    held = peak = kept = 0
    for when, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += size
        peak = max(peak, held)
        kept = held if when <= end_of_forward else kept
    return {
        "kept": kept - forward_results,
        "peak": peak - sizes["results"] - sizes["gradients"],
        "left": held,
    }


def _judge_memory(subject: Subject, case: Case) -> Verdict | NotHere:
    """Against the op's limits, and nothing left behind by a call."""
    if subject.interpreted:
        return NotHere("Triton interprets in this process, whose memory is numpy's")
    cost = subject.op.cost
    assert cost is not None
    arguments = case.build()
    found = _measured(subject, case)
    limits = {"kept": cost.kept_bytes(arguments), "peak": cost.peak_bytes(arguments), "left": 0}
    words = {"kept": "keeps for the backward", "peak": "takes at its peak", "left": "leaves behind"}
    faults = [
        f"{words[name]} {found[name]:,} bytes; the contract allows {limit:,}"
        for name, limit in limits.items()
        if found[name] > limit + _SLACK_BYTES
    ]
    figures = {f"{name}_bytes": float(value) for name, value in found.items()}
    detail = f"keeps {found['kept']:,} of {limits['kept']:,} bytes, {found['peak']:,} of {limits['peak']:,} at its peak"
    return Verdict(not faults, "; ".join(faults) or detail, figures)


def _seconds(subject: Subject, function: Any, case: Case, most: float) -> float:
    """The best of five, or the first that is below `most`."""
    found = []
    for _ in range(5):
        arguments = case.build()
        start = time.perf_counter()
        results = evaluate(subject.op, function, arguments)
        if subject.device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
        del results
        if found[-1] < most:
            break
    return min(found)


def _judge_time(subject: Subject, case: Case) -> Verdict | NotHere:
    """At most ten times the reference's time: another order of growth, a loop over elements, a wait."""
    if subject.interpreted:
        return NotHere("Triton interprets in this process: times mean nothing")
    evaluate(subject.op, subject.implementation.function, case.build())
    reference = _seconds(subject, subject.op.function, case, 0.0)
    limit = max(_TIMES_THE_REFERENCE * reference, _LEAST_S)
    found = _seconds(subject, subject.implementation.function, case, limit)
    detail = f"{found * 1e3:.3g} ms, the reference's {reference * 1e3:.3g} ms; at most {limit * 1e3:.3g} ms"
    return Verdict(found <= limit, detail, {"seconds": found, "reference_seconds": reference})


def _cases(subject: Subject) -> list[Case]:
    cost = subject.op.cost
    if cost is None or subject.implementation.source == "reference":
        return []
    return subject.taken([Case("cost", dtype, _build(subject, cost, dtype)) for dtype in subject.dtypes[:1]])


def _build(subject: Subject, cost: Cost, dtype: torch.dtype) -> Any:
    return lambda: cost.example(subject.device, dtype)


CHECKS = (
    Check("memory", "keeps and takes no more memory than the op allows", _cases, _judge_memory),
    Check("time", "takes no other order of time than the reference", lambda _: [], _judge_time, thorough=_cases),
)
