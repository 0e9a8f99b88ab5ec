"""Does it compose: opcheck, one graph under torch.compile, checkpointing, strides, unwanted gradients, and twenty times
the same bits.

The custom operators are not declared by anybody. They are *seen*, by running the implementation under a dispatch mode
that notes each operator outside torch's own namespaces with its arguments; a third party's are found the same way.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from weftrain.kernels.checks.evaluation import (
    Results,
    differing,
    evaluate,
    far,
    gradients_of,
    incoming,
    map_tensors,
    outputs_of,
    same_bits,
    tensors_of,
)
from weftrain.kernels.checks.findings import Case, Check, NotHere, Subject, Verdict
from weftrain.kernels.contract import Arguments, KernelError, Op
from weftrain.kernels.triton_version import interpreting

_OWN_NAMESPACES = (
    "aten",
    "prims",
    "prim",
    "inductor",
    "quantized",
    "mkldnn",
    "mkl",
    "profiler",
    "_c10d_functional",
    "higher_order",
)
RUNS = 20
INTERPRETED_RUNS = 3  # numpy, one program after the other: nothing there could differ


# ---- opcheck


class _Operators(TorchDispatchMode):
    """Every operator outside torch's own namespaces, with a copy of the arguments of its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in _OWN_NAMESPACES and func not in self.seen:
            copies = map_tensors(_copied, {"args": list(args), **kwargs})
            self.seen[func] = (tuple(copies.pop("args")), copies)
        return func(*args, **kwargs)


def _copied(tensor: Tensor) -> Tensor:
    """Same values and strides on storage of its own."""
    fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return fresh.copy_(tensor.detach())


def _judge_opcheck(subject: Subject, case: Case) -> Verdict:
    # A function that is compiled by itself cannot be compiled under a dispatch mode: its operators are the same
    # eagerly.
    with torch.compiler.set_stance("force_eager"), _Operators() as operators:
        evaluate(subject.op, subject.implementation.function, case.build())
    faults = []
    for operator, (args, kwargs) in operators.seen.items():
        outcome = torch.library.opcheck(operator, args, kwargs, raise_exception=False)
        faults += [
            f"{operator} {test}: {' '.join(str(result).split())[:200]}"
            for test, result in outcome.items()
            if result != "SUCCESS"
        ]
    names = ", ".join(str(operator) for operator in operators.seen) or "no operators of its own"
    return Verdict(
        not faults, "; ".join(faults) or f"opcheck passes: {names}", {"operators": float(len(operators.seen))}
    )


# ---- torch.compile and checkpointing


def _judge_compile(backend: str) -> Callable[[Subject, Case], Verdict | NotHere]:
    def judge(subject: Subject, case: Case) -> Verdict | NotHere:
        if backend == "inductor":
            missing = _no_code_generator(subject.device)
            if missing is not None:
                return NotHere(missing)
        torch._dynamo.reset()
        function = subject.implementation.function
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        wrong = far(
            evaluate(subject.op, compiled, case.build()), evaluate(subject.op, function, case.build()), case.dtype
        )
        torch._dynamo.reset()
        return Verdict(
            not wrong,
            "; ".join(f"{name} differs from the eager result" for name in wrong) or "one graph, the eager result",
        )

    return judge


def _no_code_generator(device: str) -> str | None:
    if interpreting():
        return "Triton interprets in this process: generated code is not run"
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and shutil.which(compiler) is None:
        return f"torch.compile needs the C++ compiler '{compiler}', which is not on PATH"
    return None


def _judge_checkpoint(subject: Subject, case: Case) -> Verdict:
    def checkpointed(**arguments: Any) -> Tensor:
        return checkpoint(subject.implementation.function, use_reentrant=False, **arguments)

    plain = evaluate(subject.op, subject.implementation.function, case.build())
    wrong = differing(evaluate(subject.op, checkpointed, case.build()), plain)
    return Verdict(not wrong, f"bits differ: {', '.join(wrong)}" if wrong else "the same bits")


# ---- strides

_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second element": lambda tensor: torch.stack((tensor, tensor + 1), -1)[..., 0],
    "part of a wider row": lambda tensor: torch.cat((tensor, tensor + 1), -1)[..., : tensor.shape[-1]],
    "transposed": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
    "one element into its storage": lambda tensor: torch.cat((tensor.flatten()[:1] + 1, tensor.flatten()))[1:].view(
        tensor.shape
    ),
}


def _judge_strides(subject: Subject, case: Case) -> Verdict:
    """Inputs in every layout, then incoming gradients in every layout and expanded from one element (stride 0)."""
    op, function = subject.op, subject.implementation.function
    dense = evaluate(op, function, case.build())
    faults = []
    for layout, arrange in _LAYOUTS.items():
        faults += [
            f"{layout}: {name}"
            for name in far(evaluate(op, function, _arranged(op, case.build(), arrange)), dense, case.dtype)
        ]
        if op.differentiable:
            got = evaluate(op, function, case.build(), arrange=functools.partial(_arrange, arrange))
            faults += [f"incoming gradient, {layout}: {name}" for name in far(got, dense, case.dtype)]
    if op.differentiable:
        ones, expanded = (
            evaluate(op, function, case.build(), arrange=arrange)
            for arrange in (
                torch.ones_like,
                lambda gradient: torch.ones((), dtype=gradient.dtype, device=gradient.device).expand(gradient.shape),
            )
        )
        faults += [f"incoming gradient, expanded: {name}" for name in far(expanded, ones, case.dtype)]
    return Verdict(
        not faults, "; ".join(faults[:4]) or "the dense result for every layout", {"faults": float(len(faults))}
    )


def _arrange(arrange: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    return arrange(tensor) if tensor.dim() else tensor


def _arranged(op: Op, arguments: Arguments, arrange: Callable[[Tensor], Tensor]) -> Arguments:
    """The arguments that may be strided by contract (what is updated in place may not) in another layout."""
    return {
        **arguments,
        **map_tensors(lambda tensor: _arrange(arrange, tensor), {name: arguments[name] for name in op.data}),
    }


# ---- gradients that nobody wants


class _NoGradient(torch.autograd.Function):
    """What is downstream of an output that nobody uses: its backward gives None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def _judge_unwanted(subject: Subject, case: Case) -> Verdict:
    """Each argument alone, each left out, none at all, each of several outputs alone, and outputs whose gradients
    never come.
    """
    op, function = subject.op, subject.implementation.function
    every = evaluate(op, function, case.build())
    faults = []
    subsets = {(name,) for name in op.differentiable} | {
        tuple(n for n in op.differentiable if n != name) for name in op.differentiable
    }
    for wanted in sorted(subsets | {()}):
        got = evaluate(op, function, case.build(), wanted=wanted)
        faults += [
            f"with gradients to {', '.join(wanted) or 'nothing'}: {name}"
            for name in far(got, {n: every[n] for n in got}, case.dtype)
        ]
    with torch.no_grad():
        leaves = {name: case.build()[name].requires_grad_() for name in op.differentiable}
        if any(output.requires_grad for output in outputs_of(op, function(**{**case.build(), **leaves})).values()):
            faults.append("under no_grad the output requires a gradient")
    if len(op.outputs) > 1:
        for name in op.outputs:
            expected = _gradients_by_outputs(op, op.function, case.build(), (name,))
            got = _gradients_by_outputs(op, function, case.build(), (name,))
            faults += [f"of {name} alone: {wrong}" for wrong in far(got, expected, case.dtype)]
    moved = [name for name, gradient in _gradients_by_outputs(op, function, case.build(), ()).items() if gradient.any()]
    faults += [f"an output without a gradient: {name}" for name in moved]
    return Verdict(
        not faults, "; ".join(faults[:4]) or "the gradients that are wanted, and none of an output without one"
    )


def _gradients_by_outputs(op: Op, function: Callable[..., Any], arguments: Arguments, used: tuple[str, ...]) -> Results:
    """The gradients where the `used` outputs alone get one."""
    leaves = {name: arguments[name].requires_grad_() for name in op.differentiable}
    outputs = outputs_of(op, function(**{**arguments, **leaves}))
    ends = [output if name in used else _NoGradient.apply(output) for name, output in outputs.items()]
    gradients = torch.autograd.grad(ends, list(leaves.values()), incoming(outputs), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }


# ---- determinism


def _judge_determinism(subject: Subject, case: Case) -> Verdict:
    """The same bits every time (on a CPU on two threads), with the inputs left as they were."""
    op, function = subject.op, subject.implementation.function
    runs = INTERPRETED_RUNS if subject.interpreted else RUNS
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        arguments, before = case.build(), tensors_of(case.build())
        first = evaluate(op, function, arguments)
        wrong: list[str] = []
        for _ in range(runs - 1):
            wrong += [name for name in differing(_fresh(op, function, arguments), first) if name not in wrong]
    finally:
        torch.set_num_threads(threads)
    changed = [name for name, tensor in tensors_of(arguments).items() if not same_bits(tensor, before[name])]
    faults = [f"bits of {name} differ within {runs} runs" for name in wrong] + [
        f"input {name} was changed" for name in changed
    ]
    return Verdict(
        not faults, "; ".join(faults) or f"the same bits {runs} times, inputs untouched", {"runs": float(runs)}
    )


def _fresh(op: Op, function: Callable[..., Any], arguments: Arguments) -> Results:
    """Again, on other memory: results must not depend on where the allocator puts things."""
    return evaluate(op, function, map_tensors(_copied, arguments))


# ---- second derivatives and autocast

# Relative Frobenius error of a gradient penalty's gradient against the reference in fp32: of second derivatives as
# such, and rounded.
_SECOND_DERIVATIVE_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def _penalty_gradients(op: Op, function: Callable[..., Any], arguments: Arguments, constant: bool) -> Results:
    """By argument: what the penalty |d loss / d argument|^2, summed over the arguments, adds to the gradient of each.

    constant: the loss is the sum of the outputs, whose gradient is 1 and needs none itself; else the sum of their
    squares.
    """
    leaves = {name: arguments[name].detach().requires_grad_() for name in op.differentiable}
    outputs = [output.float() for output in outputs_of(op, function(**{**arguments, **leaves})).values()]
    loss = torch.stack([output.sum() if constant else output.square().sum() for output in outputs]).sum()
    first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    (loss + sum(gradient.float().square().sum() for gradient in first)).backward()
    return {
        name: leaf.grad.float() - gradient.detach().float()
        for (name, leaf), gradient in zip(leaves.items(), first, strict=True)
    }  # type: ignore[union-attr]


def _gradients_of_incoming(op: Op, function: Callable[..., Any], arguments: Arguments) -> Results:
    """By output: the gradient of |d loss / d argument|^2 with respect to the output's incoming gradient."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in op.differentiable}
    outputs = outputs_of(op, function(**{**arguments, **leaves}))
    given = [gradient.requires_grad_() for gradient in incoming(outputs)]
    first = torch.autograd.grad(list(outputs.values()), list(leaves.values()), given, create_graph=True)
    penalty = torch.stack([gradient.float().square().sum() for gradient in first]).sum()
    found = torch.autograd.grad(penalty, given, allow_unused=True)
    return {
        f"the incoming gradient of {name}": torch.zeros_like(g).float() if slope is None else slope.float()
        for name, g, slope in zip(outputs, given, found, strict=True)
    }


def _judge_second_derivatives(subject: Subject, case: Case) -> Verdict:
    """Right, or refused with a KernelError that names op and source; a penalty that is silently taken for a constant is
    neither.
    """
    op, refusals, faults = subject.op, 0, []
    questions: tuple[Callable[[Callable[..., Any], Arguments], Results], ...] = (
        lambda function, arguments: _penalty_gradients(op, function, arguments, True),
        lambda function, arguments: _penalty_gradients(op, function, arguments, False),
        lambda function, arguments: _gradients_of_incoming(op, function, arguments),
    )
    for question in questions:
        exact = question(op.function, map_tensors(_as_float32, case.build()))
        try:
            got = question(subject.implementation.function, case.build())
        except KernelError as error:
            refusals += 1
            if op.name not in str(error) or subject.implementation.source not in str(error):
                faults.append(f"refused without the names of op and source: {error}")
            continue
        for name, wanted in exact.items():
            off = float((got[name] - wanted).norm() / wanted.norm().clamp(min=1e-3))
            if not off <= _SECOND_DERIVATIVE_ERROR[case.dtype]:
                faults.append(f"the gradient of a penalty on the gradients is off by {off:.0%} in {name}")
    return Verdict(not faults, "; ".join(faults[:3]) or ("refused" if refusals else "right"))


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _judge_autocast(subject: Subject, case: Case) -> Verdict:
    """Under autocast the arguments still decide the dtypes, and forward and backward agree about them."""
    op, function = subject.op, subject.implementation.function
    plain = evaluate(op, function, case.build())
    leaves = {
        name: tensor.detach().requires_grad_() for name, tensor in case.build().items() if name in op.differentiable
    }
    with torch.autocast(subject.device, torch.bfloat16):
        outputs = outputs_of(op, function(**{**case.build(), **leaves}))
    got = {name: output.detach() for name, output in outputs.items()}
    wrong = far({**got, **gradients_of(leaves, outputs, incoming(outputs))}, plain, case.dtype)
    return Verdict(
        not wrong, "; ".join(f"{name} differs from the result without autocast" for name in wrong) or "the same result"
    )


def _graph_cases(subject: Subject) -> list[Case]:
    return subject.quick(1) if subject.op.differentiable else []


def _inductor_cases(subject: Subject) -> list[Case]:
    return _not_reference(subject)  # the reference is there to be eager


def _not_reference(subject: Subject) -> list[Case]:
    # plain torch: autocast governs it
    return [] if subject.implementation.source == "reference" else _graph_cases(subject)


CHECKS = (
    Check("opcheck", "its operators pass torch.library.opcheck", lambda s: s.quick(1), _judge_opcheck),
    Check("compile", "one whole graph under torch.compile (aot_eager)", _graph_cases, _judge_compile("aot_eager")),
    Check(
        "inductor",
        "one whole graph under torch.compile with generated code",
        _inductor_cases,
        _judge_compile("inductor"),
    ),
    Check("checkpoint", "activation checkpointing gives the same bits", _graph_cases, _judge_checkpoint),
    Check("strides", "strided inputs and incoming gradients", lambda s: s.quick(1), _judge_strides),
    Check("unwanted", "gradients that nobody wants, or that never come", _graph_cases, _judge_unwanted),
    Check("second_derivatives", "second derivatives are right, or refused", _graph_cases, _judge_second_derivatives),
    Check("autocast", "autocast changes nothing", _not_reference, _judge_autocast),
    Check("determinism", "the same bits again and again", lambda s: s.quick(2), _judge_determinism),
)
