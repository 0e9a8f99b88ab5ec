"""Sizes and numbers that no example has: past every threshold, grown where nobody declared one, and far from the usual.

The examples of an op are small, so a path that begins at a size, an accumulator that stalls after some hundred terms,
an exponential that overflows and an offset of 32 bits never show in them. A threshold is crossed by one. The large
strides take address space, and memory for the pages that are touched alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weftrain.kernels.checks.bounds import in_a_process_of_its_own, strided_arguments
from weftrain.kernels.checks.evaluation import evaluate, far, map_tensors
from weftrain.kernels.checks.findings import Case, Check, NotHere, Subject, Verdict
from weftrain.kernels.checks.truth import judged
from weftrain.kernels.contract import Arguments, KernelError

# ---- thresholds, declared and looked for


def of_size(subject: Subject, name: str, value: int, dtype: torch.dtype) -> Case:
    example = subject.op.sizes[name].example(value)
    return Case(f"{name} {value}", dtype, lambda: example(subject.device, dtype))


def _threshold_cases(subject: Subject) -> list[Case]:
    """One more than each declared threshold. Raises KernelError for a size that the op does not have."""
    cases = []
    for name, value in subject.implementation.thresholds.items():
        if name not in subject.op.sizes:
            known = ", ".join(subject.op.sizes) or "none"
            raise KernelError(
                f"{subject.op.name} of source '{subject.implementation.source}': thresholds names the size '{name}'; "
                f"the op has: {known}"
            )
        cases += [of_size(subject, name, value + 1, dtype) for dtype in subject.dtypes[:1]]
    return subject.taken(cases)


def _grown_cases(subject: Subject) -> list[Case]:
    """Under an interpreter they take minutes: only the thorough run asks them there."""
    if subject.interpreted:
        return []
    cases = [
        of_size(subject, name, value, dtype)
        for name, size in subject.op.sizes.items()
        for value in size.grown
        for dtype in subject.dtypes[:1]
    ]
    return subject.taken(cases)


def _every_size(subject: Subject) -> list[Case]:
    cases = [
        of_size(subject, name, value, dtype)
        for name, size in subject.op.sizes.items()
        for value in (*size.grown, *size.thorough)
        for dtype in subject.dtypes
    ]
    return subject.taken(cases)


# ---- ranges


def _range_cases(subject: Subject) -> list[Case]:
    return _changed(subject, subject.cases(subject.op.smallest))


def _every_range(subject: Subject) -> list[Case]:
    return _changed(subject, subject.cases(*subject.op.small))


def _changed(subject: Subject, cases: list[Case]) -> list[Case]:
    return [
        Case(f"{case.example}: {name}", case.dtype, lambda case=case, change=change: change(case.build()))  # type: ignore[misc]
        for name, change in subject.op.ranges.items()
        for case in cases
    ]


# ---- accumulation


def _accumulation_cases(subject: Subject) -> list[Case]:
    """In one narrow dtype where there is one: the others share the accumulator."""
    if subject.interpreted:
        return []
    return _accumulating(subject, [dtype for dtype in subject.dtypes if dtype != torch.float32][:1])


def _every_accumulation(subject: Subject) -> list[Case]:
    return _accumulating(subject, subject.dtypes)


def _accumulating(subject: Subject, dtypes: Sequence[torch.dtype]) -> list[Case]:
    cases = []
    for name, size in subject.op.sizes.items():
        for value in size.grown if size.accumulates else ():
            for dtype in dtypes:
                cases.append(_of_positive_numbers(of_size(subject, name, value, dtype)))
    return subject.taken(cases)


def _of_positive_numbers(case: Case) -> Case:
    def build() -> Arguments:
        return map_tensors(lambda tensor: tensor.abs() if tensor.is_floating_point() else tensor, case.build())

    return Case(f"{case.example}, all positive", case.dtype, build)


def _judge_accumulation(subject: Subject, case: Case) -> Verdict:
    """Sums of thousands of positive terms: a narrow accumulator stalls where a term is less than its rounding."""
    return judged(subject, case, torch.ones_like)


# ---- offsets of more than 32 bits


def _judge_offsets(subject: Subject, case: Case) -> Verdict | NotHere:
    """The dense result from tensors whose elements lie more than 2^31 elements apart."""
    if subject.device == "cpu":
        return in_a_process_of_its_own(subject, case, "offsets", "every element is found beyond 2^31 elements")
    op, function = subject.op, subject.implementation.function
    dense = evaluate(op, function, case.build())
    faults = []
    for axis, word in ((0, "rows"), (-1, "columns")):
        try:
            arguments = strided_arguments(op, case.build(), axis)
        except torch.OutOfMemoryError:
            return NotHere("the device has not the memory for tensors of more than 2^31 elements")
        faults += [f"{word} far apart: {name}" for name in far(evaluate(op, function, arguments), dense, case.dtype)]
    return Verdict(not faults, "; ".join(faults[:4]) or "every element is found beyond 2^31 elements")


# A saved logsumexp of 200 is exact to 1e-5, and so are the probabilities that a backward computes from it; the
# reference's are exactly 1 and 0 there.
_ROUNDINGS_OF_A_RANGE = 16


def _judge_range(subject: Subject, case: Case) -> Verdict:
    return judged(subject, case, roundings=_ROUNDINGS_OF_A_RANGE)


def _judged(subject: Subject, case: Case) -> Verdict:
    return judged(subject, case)


CHECKS = (
    Check("thresholds", "right past every threshold that it declares", _threshold_cases, _judged),
    Check("sizes", "right where calls grow, whatever it declares", _grown_cases, _judged, thorough=_every_size),
    Check("ranges", "right for numbers far from the usual", _range_cases, _judge_range, thorough=_every_range),
    Check("accumulation", "long sums are kept in fp32", _accumulation_cases, _judge_accumulation, _every_accumulation),
    Check("offsets", "elements more than 2^31 apart are found", lambda s: s.quick(1), _judge_offsets),
)
