"""What a call leaves behind, and what one call does to another: inputs, autograd's versions, the process, the threads.

A kernel that is right once may still write into what it was given, keep a buffer that the next call overwrites, take an
answer from the call before, or hide from autograd that a tensor has changed.
"""

from __future__ import annotations

import os
import random
from typing import Any

import torch
from torch import Tensor

from weftrain.kernels.checks.evaluation import (
    Results,
    differing,
    evaluate,
    exact_arguments,
    gradients_of,
    incoming,
    map_tensors,
    outputs_of,
    same_bits,
    tensors_of,
)
from weftrain.kernels.checks.findings import Case, Check, NotHere, Subject, Verdict
from weftrain.kernels.checks.sizes import of_size
from weftrain.kernels.checks.truth import compared, truth
from weftrain.kernels.contract import Arguments, Op


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _fresh(case: Case) -> Arguments:
    return map_tensors(_copied, case.build())


def _leaves(op: Op, arguments: Arguments) -> dict[str, Tensor]:
    return {name: arguments[name].requires_grad_() for name in op.differentiable}


# ---- what must stay as it was


def _process_state(device: str) -> dict[str, Any]:
    """What a kernel has no business with."""
    state = {
        "the number of threads": torch.get_num_threads(),
        "whether gradients are wanted": torch.is_grad_enabled(),
        "the default dtype": torch.get_default_dtype(),
        "whether algorithms are deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch's random state": torch.get_rng_state().tolist(),
        "Python's random state": random.getstate(),
        "the precision of fp32 products": torch.get_float32_matmul_precision(),
        "autocast": torch.is_autocast_enabled(device),
        "the working directory": os.getcwd(),
    }
    if device == "cuda":
        state["the device's random state"] = torch.cuda.get_rng_state().tolist()
        state["the current device"] = torch.cuda.current_device()
        state["the current stream"] = torch.cuda.current_stream().cuda_stream
    return state


def _judge_untouched(subject: Subject, case: Case) -> Verdict:
    """Arguments, incoming gradients and outputs keep bits and versions; random numbers, threads and modes stay."""
    op, function = subject.op, subject.implementation.function
    state = _process_state(subject.device)
    evaluate(op, function, case.build())
    environment = dict(os.environ)  # a first use may compile, and says there where
    arguments, before = _fresh(case), tensors_of(case.build())
    kept = {name: tensor for name, tensor in tensors_of(arguments).items() if name.split("[")[0] not in op.in_place}
    leaves = {} if op.in_place else _leaves(op, arguments)
    versions = {name: tensor._version for name, tensor in kept.items()}
    returned = function(**arguments)
    faults: list[str] = []
    if leaves:
        outputs = outputs_of(op, returned)
        results = {name: _copied(output) for name, output in outputs.items()}
        gradients = incoming(outputs)
        given = [_copied(gradient) for gradient in gradients]
        gradients_of(leaves, outputs, gradients)
        faults += [
            f"the incoming gradient of {name} was changed"
            for name, gradient, copy in zip(outputs, gradients, given, strict=True)
            if not same_bits(gradient, copy)
        ]
        faults += [f"the backward changed {name}" for name in differing(outputs, results)]
    faults += [f"input {name} was changed" for name, tensor in kept.items() if not same_bits(tensor, before[name])]
    faults += [
        f"input {name} was written to (its version rose)" for name in kept if kept[name]._version != versions[name]
    ]
    faults += [f"{name} was changed" for name, value in _process_state(subject.device).items() if value != state[name]]
    faults += ["the environment was changed"] if dict(os.environ) != environment else []
    return Verdict(not faults, "; ".join(faults[:4]) or "arguments, gradients and the process are as they were")


# ---- backward twice


def _judge_backward_twice(subject: Subject, case: Case) -> Verdict:
    """With retain_graph: the second backward gives the first one's bits, a third the bits of its own gradient."""
    op, function = subject.op, subject.implementation.function

    def doubled(gradient: Tensor) -> Tensor:
        return gradient * -2

    expected = evaluate(op, function, case.build(), arrange=doubled)
    leaves = _leaves(op, arguments := _fresh(case))
    outputs = outputs_of(op, function(**arguments))
    reached = [output for output in outputs.values() if output.requires_grad]
    first, second, third = (
        [_copied(g) for g in torch.autograd.grad(reached, list(leaves.values()), gradients, retain_graph=True)]
        for gradients in (incoming(outputs), incoming(outputs), [doubled(gradient) for gradient in incoming(outputs)])
    )
    faults = []
    for index, name in enumerate(leaves):
        if not same_bits(first[index], second[index]):
            faults.append(f"the second backward gives another gradient of {name}")
        if not same_bits(third[index], expected[f"grad_{name}"]):
            faults.append(f"after a backward, one of another gradient is wrong in {name}")
    return Verdict(not faults, "; ".join(faults[:3]) or "the same bits, and those of another gradient")


# ---- versions


def _judge_versions(subject: Subject, case: Case) -> Verdict:
    """An argument that changes after the forward: autograd says so, or the gradient is the old argument's.

    Of an op that works in place: autograd is told of everything that was written.
    """
    op, function = subject.op, subject.implementation.function
    if op.in_place:
        arguments = _fresh(case)
        written = {name: tensor for name, tensor in tensors_of(arguments).items() if name.split("[")[0] in op.in_place}
        before = {name: tensor._version for name, tensor in written.items()}
        function(**arguments)
        unseen = [name for name, tensor in written.items() if tensor._version == before[name]]
        return Verdict(
            not unseen,
            f"autograd was not told that {', '.join(unseen[:3])} changed (torch.autograd.graph.increment_version)"
            if unseen
            else "autograd knows of everything that was written",
        )
    expected = evaluate(op, function, case.build())
    faults = []
    for name, value in case.build().items():
        if not isinstance(value, Tensor):
            continue
        leaves = _leaves(op, arguments := _fresh(case))
        inputs = {key: leaf.clone() for key, leaf in leaves.items()}
        called = {**arguments, **inputs}
        outputs = outputs_of(op, function(**called))
        with torch.no_grad():
            called[name].copy_(_other(value))
        try:
            got = gradients_of(leaves, outputs, incoming(outputs))
        except RuntimeError as error:
            if "inplace" not in str(error):  # "has been modified by an inplace operation", in one wording or another
                raise
            continue
        faults += [
            f"{wrong} is silently of another {name}" for wrong in differing(got, {key: expected[key] for key in got})
        ]
    return Verdict(not faults, "; ".join(faults[:3]) or "a change after the forward is noticed, or does not matter")


def _other(tensor: Tensor) -> Tensor:
    """Other values that the argument may have: half of each, other labels, no documents."""
    if tensor.is_floating_point():
        return tensor * 0.5
    return tensor.flip(0) if tensor.dtype == torch.int64 else torch.zeros_like(tensor)


# ---- one call and the next


def _judge_history(subject: Subject, case: Case) -> Verdict:
    """Other values at the same addresses, two calls at once, and results in memory of their own."""
    op, function = subject.op, subject.implementation.function
    others = map_tensors(_other, case.build())
    expected = {"first": evaluate(op, function, case.build()), "second": evaluate(op, function, others)}
    faults = []
    arguments = _fresh(case)
    for word, values in (("first", case.build()), ("second", others), ("first", case.build())):
        for tensor, value in zip(tensors_of(arguments).values(), tensors_of(values).values(), strict=True):
            tensor.copy_(value)
        wrong = differing(evaluate(op, function, arguments), expected[word])
        faults += [f"{name} is not of the values that were given" for name in wrong]
    if not op.in_place:
        faults += _two_at_once(op, function, case, others, expected)
    return Verdict(not faults, "; ".join(dict.fromkeys(faults[:4])) or "each call is of its own arguments")


def _two_at_once(op: Op, function: Any, case: Case, others: Arguments, expected: dict[str, Results]) -> list[str]:
    """Forward, forward, backward, backward: as layers of a model have it."""
    faults = []
    calls = []
    for arguments in (_fresh(case), map_tensors(_copied, others)):
        leaves = _leaves(op, arguments)
        outputs = outputs_of(op, function(**arguments))
        addresses = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors_of(arguments).items()}
        faults += [
            f"{name} lies in the memory of input {addresses[output.untyped_storage().data_ptr()]}"
            for name, output in outputs.items()
            if output.numel() and output.untyped_storage().data_ptr() in addresses
        ]
        calls.append((leaves, outputs))
    for word, (leaves, outputs) in zip(expected, calls, strict=True):
        got = {name: output.detach() for name, output in outputs.items()}
        got |= gradients_of(leaves, outputs, incoming(outputs)) if leaves else {}
        faults += [f"{name} is wrong where two calls are under way" for name in differing(got, expected[word])]
    return faults


# ---- several steps


def _judge_steps(subject: Subject, case: Case) -> Verdict:
    """An op that works in place, over changing steps: against the formula in float64 over the same steps."""
    op = subject.op

    def after(function: Any, arguments: Arguments) -> Results:
        state = map_tensors(_copied, {name: arguments[name] for name in op.in_place if arguments[name] is not None})
        for change in op.steps:
            function(**{**change(arguments), **state})
        return {name: torch.cat([tensor.flatten() for tensor in tensors]) for name, tensors in state.items()}

    exact = after(op.exact, exact_arguments(case.build()))
    reference = after(op.function, case.build())
    got = after(subject.implementation.function, case.build())
    return compared(got, exact, reference, torch.float32)


# ---- threads


def _judge_threads(subject: Subject, case: Case) -> Verdict | NotHere:
    """On 1, 2 and 3 threads: the same bits, or the finding says where they differ; right in any case."""
    if subject.device != "cpu" or subject.interpreted:
        return NotHere("no kernel there is divided among a CPU's threads")
    op, function = subject.op, subject.implementation.function
    threads, results = torch.get_num_threads(), {}
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results[count] = evaluate(op, function, case.build())
    finally:
        torch.set_num_threads(threads)
    other = [name for count in (2, 3) for name in differing(results[count], results[1])]
    if not other:
        return Verdict(True, "the same bits on 1, 2 and 3 threads")
    for count in (1, 2, 3):
        verdict = compared(results[count], *truth(subject, case), case.dtype)
        if not verdict.ok:
            return Verdict(False, f"on {count} threads {verdict.detail}", verdict.figures)
    return Verdict(True, f"bits depend on the number of threads: {', '.join(dict.fromkeys(other))}", {"differ": 1.0})


def _thread_cases(subject: Subject) -> list[Case]:
    """The smallest call, and one that is large enough to be divided."""
    return _every_thread_case(subject)[:2]


def _every_thread_case(subject: Subject) -> list[Case]:
    grown = [
        of_size(subject, name, value, dtype)
        for name, size in subject.op.sizes.items()
        for value in size.grown
        for dtype in subject.dtypes[:1]
    ]
    return subject.quick(1) + subject.taken(grown)


def _versioned(subject: Subject) -> bool:
    return bool(subject.op.in_place or subject.op.differentiable)


def _differentiable(subject: Subject) -> list[Case]:
    return subject.quick(2) if subject.op.differentiable else []


CHECKS = (
    Check(
        "untouched", "arguments, gradients and the process stay as they were", lambda s: s.quick(2), _judge_untouched
    ),
    Check("backward_twice", "a second backward gives the first one's bits", _differentiable, _judge_backward_twice),
    Check("versions", "autograd notices what changes", lambda s: s.quick(1) if _versioned(s) else [], _judge_versions),
    Check("history", "no call depends on another", lambda s: s.quick(2), _judge_history),
    Check("steps", "right over steps whose numbers change", lambda s: s.quick(1) if s.op.steps else [], _judge_steps),
    Check("threads", "right on 1, 2 and 3 threads", _thread_cases, _judge_threads, _every_thread_case),
)
