"""Errors against float64, of the forward and of every gradient; results rounded once where the op says so; NaN and Inf
that stay visible.

The bound is not a tolerance somebody chose. An implementation may err 2x (forward) or 3x (gradients) as much as the
reference does in that dtype, and the reference itself must stay below a cap. Errors are relative Frobenius norms, so
one wrong element of a small tensor shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from weftrain.kernels.checks.evaluation import (
    Results,
    distance,
    evaluate,
    exact_arguments,
    same_bits,
    tensors_of,
)
from weftrain.kernels.checks.findings import Case, Check, Subject, Verdict, name_of
from weftrain.kernels.contract import Arguments, Op
from weftrain.kernels.ops import OPS

# What the reference itself may err. fp32: 8 roundings of 2^-23. bf16: 2.5 roundings of 2^-8; fp16: the same of 2^-11,
# since the chains of roundings are the same and no example comes near fp16's range.
CAP = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1.25e-3}
# A quarter of one rounding's typical error. Below it a ratio of errors is luck.
FLOOR = {torch.float32: 1e-8, torch.bfloat16: 5e-4, torch.float16: 6.25e-5}
FORWARD, GRADIENT = 2.0, 3.0  # times the reference's error
# Ops whose contract is fp32 throughout and one rounding at the end, in forward and backward.
ROUNDED_ONCE = ("rms_norm", "layer_norm", "cross_entropy")
_SIGNIFICANT_BITS = {torch.bfloat16: 8, torch.float16: 11}
_SMALLEST_EXPONENT = {torch.bfloat16: -126, torch.float16: -14}


@functools.cache
def _exact(op_name: str, example: str, dtype: torch.dtype) -> Results:
    """In float64 on the CPU; examples draw the same numbers for every device."""
    op = OPS[op_name]
    return evaluate(op, OPS[op_name].exact, exact_arguments(op.examples[example]("cpu", dtype)))


@functools.cache
def _reference(op_name: str, example: str, dtype: torch.dtype, device: str) -> Results:
    op = OPS[op_name]
    return evaluate(op, op.function, op.examples[example](device, dtype))


@functools.lru_cache(maxsize=64)
def _got(function: Callable[..., Any], op_name: str, example: str, dtype: torch.dtype, device: str) -> Results:
    """The implementation's: two checks look at the same."""
    op = OPS[op_name]
    return evaluate(op, function, op.examples[example](device, dtype))


def _coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return a if CAP[a] >= CAP[b] else b


def bound(op: Op, name: str, result: Tensor, reference_error: float, dtype: torch.dtype) -> tuple[float, float]:
    """(what may be erred, what the reference may err) of one result.

    The floor is that of the result's own dtype: an fp32 loss of bf16 logits is exact to fp32. A sum over tokens of what
    was rounded to the activations' dtype is not. Where the result is one number, the reference is within its typical
    error by luck, so its error says nothing below two worst roundings of that number, 2^-23 in fp32.
    """
    coarse = dtype if op.name == "linear_cross_entropy" else result.dtype
    cap = op.caps.get(result.dtype) or CAP[result.dtype if op.in_place else _coarser(dtype, result.dtype)]
    floor = FLOOR[_coarser(coarse, result.dtype)]
    if result.numel() == 1:
        floor = max(floor, torch.finfo(result.dtype).eps)
    return (GRADIENT if name.startswith("grad_") else FORWARD) * max(reference_error, floor), cap


def _judge_numerics(subject: Subject, case: Case) -> Verdict:
    op = subject.op
    exact = _exact(op.name, case.example, case.dtype)
    reference = _reference(op.name, case.example, case.dtype, subject.device)
    got = _got(subject.implementation.function, op.name, case.example, case.dtype, subject.device)
    figures: dict[str, float] = {}
    faults = [_unlike(name, got.get(name), tensor) for name, tensor in reference.items()]
    for name, truth in exact.items():
        if name == "copies":
            continue  # rounded parameters, compared with those below
        figures[name] = distance(got[name], truth)
        figures[f"{name}_reference"] = distance(reference[name], truth)
        allowed, cap = bound(op, name, reference[name], figures[f"{name}_reference"], case.dtype)
        figures[f"{name}_allowed"] = min(allowed, cap)
        if not figures[name] <= figures[f"{name}_allowed"]:
            faults.append(
                f"{name}: error {figures[name]:.2e}, allowed {figures[f'{name}_allowed']:.2e} "
                f"(the reference's {figures[f'{name}_reference']:.2e}, cap {cap:.0e})"
            )
    if "copies" in got and not torch.equal(got["copies"], got["parameters"].to(got["copies"].dtype)):
        faults.append("copies are not the new parameters rounded to nearest")
    faults = [fault for fault in faults if fault]
    worst = max((figures[name] / figures[f"{name}_allowed"], name) for name in exact if name in figures)
    return Verdict(
        not faults,
        "; ".join(faults) or f"{worst[1]}: error {figures[worst[1]]:.2e}, {worst[0]:.0%} of what is allowed",
        figures,
    )


def _unlike(name: str, got: Tensor | None, expected: Tensor) -> str:
    if got is None or got.dtype != expected.dtype or got.shape != expected.shape:
        found = "missing" if got is None else f"{name_of(got.dtype)} {list(got.shape)}"
        return f"{name} is {found}, the reference's {name_of(expected.dtype)} {list(expected.shape)}"
    return ""


# ---- rounded once


def _half_ulp(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Half of the distance between neighbouring numbers of dtype at each value."""
    exponent = truth.abs().clamp(min=2.0 ** _SMALLEST_EXPONENT[dtype]).log2().floor()
    return torch.exp2(exponent - _SIGNIFICANT_BITS[dtype])


def _judge_rounded_once(subject: Subject, case: Case) -> Verdict:
    """Finds a statistic kept in bf16, or a product of two rounded factors, which hides inside any tolerance."""
    op = subject.op
    exact = _exact(op.name, case.example, case.dtype)
    got = _got(subject.implementation.function, op.name, case.example, case.dtype, subject.device)
    figures: dict[str, float] = {}
    faults = []
    for name, truth in exact.items():
        if got[name].dtype not in _SIGNIFICANT_BITS:
            continue
        figures[name] = _rounded_again(got[name], truth)
        if figures[name]:
            faults.append(
                f"{name}: {figures[name]:.1%} of the elements are not an fp32 result rounded once to "
                f"{name_of(got[name].dtype)}"
            )
    return Verdict(not faults, "; ".join(faults) or "every element is an fp32 result rounded once", figures)


def _rounded_again(got: Tensor, truth: Tensor) -> float:
    """The share of elements that are further from the truth than an fp32 result, rounded once to got.dtype, can be."""
    half_ulp = _half_ulp(truth, got.dtype) if got.dtype in _SIGNIFICANT_BITS else 0.0
    beyond = (got.detach().cpu().double() - truth).abs() - half_ulp
    return float((~(beyond <= 2e-6 * truth.abs().max())).double().mean())  # fp32's own error before the rounding


def _rounded_once_cases(subject: Subject) -> list[Case]:
    if subject.op.name not in ROUNDED_ONCE:
        return []
    return subject.cases(*subject.op.small, dtypes=(torch.bfloat16, torch.float16))


def _sum_cases(subject: Subject) -> list[Case]:
    return subject.cases(*subject.op.small) if "branch" in subject.op.differentiable else []


def _judge_norm_of_sum(subject: Subject, case: Case) -> Verdict:
    """The sum has the bits of residual + branch, and the norm is that of those bits, in fp32, rounded once."""
    op, arguments = subject.op, case.build()
    got = evaluate(op, subject.implementation.function, arguments, wanted=())
    if not same_bits(got["sum"], arguments["residual"] + arguments["branch"]):
        return Verdict(False, "the sum has not the bits of residual + branch")
    summed = {"residual": got["sum"], "branch": torch.zeros_like(got["sum"])}
    truth = evaluate(op, op.exact, exact_arguments({**arguments, **summed}), wanted=())
    again = _rounded_again(got["normed"], truth["normed"])
    detail = f"{again:.1%} of the elements are not the norm of the sum, rounded once to {name_of(got['normed'].dtype)}"
    return Verdict(not again, detail, {"normed": again})


# ---- the loss of exact logits

_EXACT_LOSS_BOUND = 2e-6  # relative: sixteen roundings of fp32; a logsumexp kept in bf16 errs by 1e-3


def _exact_logits_cases(subject: Subject) -> list[Case]:
    if "labels" not in subject.op.examples[subject.op.smallest]("cpu", torch.float32):
        return []
    return [
        case
        for name in ("odd", "odd_scaled", "odd_capped")
        for case in subject.cases(name, dtypes=(torch.bfloat16, torch.float16))
    ]


def _judge_exact_logits(subject: Subject, case: Case) -> Verdict:
    """Logits that no product rounds (each hidden row picks one column of the weight): then the loss is an fp32 result
    in every dtype.
    """
    arguments = case.build()
    if "hidden" in arguments:
        rows, width = arguments["hidden"].shape
        arguments["hidden"] = torch.eye(width, dtype=case.dtype, device=subject.device)[
            torch.arange(rows, device=subject.device) % width
        ]
    truth = subject.op.exact(**exact_arguments(arguments))
    with torch.no_grad():
        loss = subject.implementation.function(**arguments).cpu().double()
    found = float((loss - truth).norm() / truth.norm())
    detail = (
        f"the loss of logits that nothing rounds errs by {found:.1e}; fp32 statistics allow {_EXACT_LOSS_BOUND:.0e}"
    )
    return Verdict(found <= _EXACT_LOSS_BOUND, detail, {"loss": found})


# ---- logits with a common offset

_OFFSET = 29952.0  # 117 x 256: exact in fp32, bf16 and fp16; one fp32 rounding of it is 1e-3
_OFFSET_BOUND = 1e-5  # relative; loss and gradient of a logsumexp that holds the offset err by 5e-5 to 3e-4


def _offset_cases(subject: Subject) -> list[Case]:
    has_labels = "labels" in subject.op.examples[subject.op.smallest]("cpu", torch.float32)
    return subject.cases("odd") if has_labels else []


def _judge_offset(subject: Subject, case: Case) -> Verdict:
    """Softmax does not see what is added to all logits, so neither loss nor gradient may lose digits to it.

    fp32: logits in steps of 1/64; bf16 and fp16, too coarse for both: all logits equal, and the loss alone.
    """
    op, arguments = subject.op, case.build()
    name = "weight" if "hidden" in arguments else "logits"
    if name == "weight":  # each hidden row picks one column, so that the product rounds nothing
        rows, width = arguments["hidden"].shape
        arguments["hidden"] = torch.eye(width, dtype=case.dtype, device=subject.device)[
            torch.arange(rows, device=subject.device) % width
        ]
    steps = (
        (arguments[name].float() * 64).round() / 64
        if case.dtype == torch.float32
        else torch.zeros_like(arguments[name].float())
    )
    truth = evaluate(op, op.exact, exact_arguments({**arguments, name: steps}))
    got = evaluate(op, subject.implementation.function, {**arguments, name: (steps + _OFFSET).to(case.dtype)})
    # Not grad_hidden: it is a product with the weight, in which the offset stands itself.
    keys = [key for key in truth if key != "grad_hidden"] if case.dtype == torch.float32 else ["output"]
    figures = {key: distance(got[key], truth[key]) for key in keys}
    faults = [
        f"{key}: error {found:.1e} under an offset of all logits"
        for key, found in figures.items()
        if not found <= _OFFSET_BOUND
    ]
    return Verdict(not faults, "; ".join(faults) or "an offset of all logits costs no digits", figures)


# ---- not finite


def _place(op: Op, arguments: Arguments, tensor: Tensor) -> int:
    """The flat index of one element near the end that matters: with labels, in a row that is not ignored."""
    labels = arguments.get("labels")
    if labels is None or tensor.shape[0] != labels.shape[0]:
        return tensor.numel() * 4 // 5
    rows = (labels != arguments.get("ignore_index", -100)).nonzero().flatten().tolist()
    width = tensor.numel() // tensor.shape[0]
    return rows[len(rows) // 2] * width + width * 4 // 5


def _spoiled(op: Op, arguments: Arguments, name: str, value: float) -> Arguments:
    """The arguments with one element of tensor `name` replaced."""
    tensor = tensors_of(arguments)[name]
    tensor.view(-1)[_place(op, arguments, tensor)] = value
    return arguments


def _non_finite_inputs(op: Op, arguments: Arguments) -> list[str]:
    if op.differentiable:
        return list(op.differentiable)
    names = [name for name in tensors_of(arguments) if name.partition("[")[0] in op.inputs]  # of a list, two
    return [*names[:1], *names[2:3], *(["gradient_scale"] if "gradient_scale" in arguments else [])]


_VALUES = {"NaN": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


@functools.lru_cache(maxsize=64)
def _with_one_spoiled(
    op_name: str, example: str, dtype: torch.dtype, device: str, name: str, word: str
) -> tuple[Results, Results]:
    """(exactly, the reference's) of an example with one element of tensor `name` replaced: the same for all sources."""
    op, value = OPS[op_name], _VALUES[word]

    def spoiled() -> Arguments:
        return _spoiled(op, op.examples[example](device, dtype), name, value)

    return evaluate(op, op.exact, exact_arguments(spoiled())), evaluate(op, op.function, spoiled())


def _judge_non_finite(subject: Subject, case: Case) -> Verdict:
    """Each input in turn: what the formula over visible inputs makes non-finite must be, and no more than it and the
    reference do.
    """
    op = subject.op
    values = _VALUES if case.dtype == subject.dtypes[0] else {"NaN": _VALUES["NaN"]}
    faults = []
    for name in _non_finite_inputs(op, case.build()):
        for word, value in values.items():
            exact, reference = _with_one_spoiled(op.name, case.example, case.dtype, subject.device, name, word)
            got = evaluate(op, subject.implementation.function, _spoiled(op, case.build(), name, value))
            kept = _promised(op, exact)
            faults += [f"{word} in {name}: {fault}" for fault in _visible(got, kept, reference)]
    if op.differentiable:
        faults += [f"NaN in the incoming gradient: {fault}" for fault in _incoming_nan(subject, case)]
    return Verdict(
        not faults,
        "; ".join(faults[:3]) or "what is not finite shows, where it must and nowhere else",
        {"faults": len(faults)},
    )


def _promised(op: Op, exact: Results) -> Results:
    """The results that must show what is not finite. Of attention's backward none but v's gradient is held to it.

    A query that sees one key has no gradient whatever its score, and products multiply a NaN by the zeros of what is
    hidden.
    """
    if op.name != "attention":
        return exact
    return {name: tensor for name, tensor in exact.items() if name in ("output", "grad_v")}


def _visible(got: Results, exact: Results, reference: Results) -> list[str]:
    faults = []
    for name, truth in exact.items():
        must = ~truth.isfinite()
        may = must | ~reference[name].cpu().isfinite()
        found = ~got[name].cpu().isfinite()
        if bool((must & ~found).any()):
            faults.append(
                f"{name} is finite in {int((must & ~found).sum())} of {int(must.sum())} elements that depend on it"
            )
        if bool((found & ~may).any()):
            faults.append(f"{name} is not finite in {int((found & ~may).sum())} elements that do not depend on it")
    return faults


def _incoming_nan(subject: Subject, case: Case) -> list[str]:
    """A NaN in the gradient that comes in must reach what depends on it; a scalar's may reach everything."""
    op = subject.op

    def spoiled(gradient: Tensor) -> Tensor:
        gradient.view(-1)[_place(op, case.build(), gradient) if gradient.dim() else 0] = float("nan")
        return gradient

    exact = evaluate(op, op.exact, exact_arguments(case.build()), arrange=spoiled)
    got = evaluate(op, subject.implementation.function, case.build(), arrange=spoiled)
    everywhere: Mapping[str, Tensor] = {name: torch.full_like(tensor, float("nan")) for name, tensor in exact.items()}
    finite = {name: exact[name].to(got[name].dtype) for name in op.outputs}
    return _visible({**got, **finite}, _promised(op, exact), dict(everywhere))


CHECKS = (
    Check(
        "numerics", "error against float64: forward and every gradient", lambda s: s.cases(*s.op.small), _judge_numerics
    ),
    Check("rounded_once", "fp32 results rounded once, no rounded statistics", _rounded_once_cases, _judge_rounded_once),
    Check("norm_of_sum", "a sum's norm is that of the rounded sum", _sum_cases, _judge_norm_of_sum),
    Check(
        "exact_logits",
        "the loss is an fp32 result where no product rounds a logit",
        _exact_logits_cases,
        _judge_exact_logits,
    ),
    Check("offset_logits", "a common offset of all logits costs no digits", _offset_cases, _judge_offset),
    Check("non_finite", "NaN and Inf show where they must", lambda s: s.quick(2), _judge_non_finite),
)
