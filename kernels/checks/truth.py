"""What a call of any size should give: the formula in float64, and the reference, each computed once for all sources.

An implementation may err 2x (forward) or 3x (gradients) as much as the reference does at that call. Where the reference
itself is far off (numbers at the end of a range), the bound is as wide, and what is asked is that nothing overflows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from weftrain.kernels.checks.evaluation import Results, distance, evaluate, exact_arguments
from weftrain.kernels.checks.findings import Case, Subject, Verdict, name_of

FORWARD, GRADIENT = 2.0, 3.0  # times the reference's error
# A result of thousands of terms: what may be erred in any case, in roundings of its dtype (2^-24, 2^-9, 2^-12).
_FLOOR = {torch.float32: 2.4e-7, torch.bfloat16: 2e-3, torch.float16: 2.5e-4}
_KEPT = 96  # truths, most of them of a few thousand elements
_TRUTHS: OrderedDict[tuple[str, ...], tuple[Results, Results]] = OrderedDict()


def truth(subject: Subject, case: Case, arrange: Callable[[Tensor], Tensor] = lambda g: g) -> tuple[Results, Results]:
    """(in float64, the reference's). The case's name and dtype stand for its arguments and for `arrange`."""
    key = (subject.op.name, case.example, name_of(case.dtype), subject.device)
    if key not in _TRUTHS:
        op = subject.op
        exact = evaluate(op, op.exact, exact_arguments(case.build()), arrange=arrange)
        _TRUTHS[key] = exact, evaluate(op, op.function, case.build(), arrange=arrange)
        while len(_TRUTHS) > _KEPT:
            _TRUTHS.popitem(last=False)
    return _TRUTHS[key]


def allowed(name: str, dtype: torch.dtype, reference_error: float, roundings: float) -> float:
    """The error that a result may have."""
    return (GRADIENT if name.startswith("grad_") else FORWARD) * max(reference_error, roundings * _FLOOR[dtype])


def judged(
    subject: Subject, case: Case, arrange: Callable[[Tensor], Tensor] = lambda g: g, roundings: float = 1
) -> Verdict:
    """The implementation's results of the case against the truth."""
    got = evaluate(subject.op, subject.implementation.function, case.build(), arrange=arrange)
    return compared(got, *truth(subject, case, arrange), case.dtype, roundings)


def compared(
    got: Mapping[str, Tensor], exact: Results, reference: Results, dtype: torch.dtype, roundings: float = 1
) -> Verdict:
    """Whether each result is as near the truth as the reference lets it be, or as so many roundings do."""
    figures: dict[str, float] = {}
    faults = []
    for name, wanted in exact.items():
        if name == "copies":
            continue  # rounded parameters; numerics compares the bits
        coarser = max((dtype, reference[name].dtype), key=_FLOOR.__getitem__)
        if reference[name].isfinite().all() and not got[name].isfinite().all():
            faults.append(f"{name} is not finite in {int((~got[name].isfinite()).sum())} elements")
            continue
        if not reference[name].isfinite().all():
            continue  # beyond what the reference computes
        figures[name] = distance(got[name], wanted)
        bound = allowed(name, coarser, distance(reference[name], wanted), roundings)
        if not figures[name] <= bound:
            faults.append(f"{name}: error {figures[name]:.2e}, allowed {bound:.2e}")
    worst = max(figures, key=figures.__getitem__, default="nothing")
    return Verdict(not faults, "; ".join(faults) or f"{worst}: error {figures.get(worst, 0.0):.2e}", figures)
