"""Calls that cannot be meant, and calls at the edge of what can: the reference's error in the same words, or the
reference's result.

Labels and document starts are *values*. On a CPU a wrong one is refused; on an accelerator and in a compiled graph
nobody looks at it, and a label outside the vocabulary makes its token's loss NaN and no other's.
"""

from __future__ import annotations

import torch

from weftrain.kernels.checks.evaluation import evaluate, far
from weftrain.kernels.checks.findings import Case, Check, Subject, Verdict
from weftrain.kernels.contract import Change, KernelError
from weftrain.kernels.ops import OPS


def _wrong_cases(subject: Subject) -> list[Case]:
    wrong = dict(subject.op.wrong)
    if subject.device == "cpu":
        wrong |= subject.op.wrong_values
    return [
        _changed(case, name, change)
        for case in subject.quick(1)
        for name, change in wrong.items()
        if _applies(case, name)
    ]


def _applies(case: Case, name: str) -> bool:
    """An example without documents has no document starts to change."""
    return "document" not in name or case.build()["document_start"] is not None


def _changed(case: Case, name: str, change: Change) -> Case:
    return Case(name, case.dtype, lambda: change(case.build()))


def _judge_refused(subject: Subject, case: Case) -> Verdict:
    """The same KernelError as the reference's, by its first words."""
    try:
        subject.op.function(**case.build())
    except KernelError as error:
        expected = str(error)
    else:
        return Verdict(False, "the reference itself accepts this call: it is no wrong call")
    try:
        subject.implementation.function(**case.build())
    except KernelError as error:
        same = str(error).split()[:4] == expected.split()[:4]
        return Verdict(same, f"refused: {error}" if same else f"refused as '{error}', by the reference as '{expected}'")
    except Exception as error:  # code under test raised something else: that is the finding
        return Verdict(
            False, f"raised {type(error).__name__} instead of a KernelError: {' '.join(str(error).split())[:200]}"
        )
    return Verdict(False, f"was accepted; the reference refuses it: {expected}")


# ---- the edge of what can be meant


def _edge_cases(subject: Subject) -> list[Case]:
    changes = subject.op.edges.items()
    edges = [
        _changed(case, name, change) for case in subject.quick(1) for name, change in changes if _applies(case, name)
    ]
    return subject.taken(edges)


def _judge_edge(subject: Subject, case: Case) -> Verdict:
    """The reference's results, gradients too."""
    op = subject.op
    expected = evaluate(op, op.function, case.build())
    got = evaluate(op, subject.implementation.function, case.build())
    wrong = far(got, expected, case.dtype)
    return Verdict(not wrong, f"not the reference's: {', '.join(wrong)}" if wrong else "the reference's result")


# ---- labels that nobody looks at


def _label_cases(subject: Subject) -> list[Case]:
    if not subject.op.name.endswith("cross_entropy"):
        return []
    cases = subject.quick(1)
    return [_changed(case, name, change) for case in cases for name, change in subject.op.wrong_values.items()]


def _judge_unseen_label(subject: Subject, case: Case) -> Verdict:
    """NaN for that token, the other rows unchanged and no crash: compiled, and on an accelerator also eagerly."""
    op, function = subject.op, subject.implementation.function
    if subject.device == "cpu":
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = evaluate(op, function, case.build())["output"]
    if subject.device == "cpu":
        torch._dynamo.reset()
    if got.dim() == 0:
        return Verdict(
            bool(got.isnan()), "the sum is NaN" if bool(got.isnan()) else f"the sum is {float(got)}; it must be NaN"
        )
    good = OPS[op.name].function(**op.examples[op.smallest](subject.device, case.dtype))
    others = torch.arange(got.shape[0], device=got.device) != 1
    alike = not far({"loss": got[others]}, {"loss": good[others]}, case.dtype)
    right = bool(got[1].isnan()) and alike
    others_are = "as they were" if alike else "changed"
    return Verdict(
        right, "NaN in its row alone" if right else f"its row is {float(got[1])}, the others are {others_are}"
    )


CHECKS = (
    Check("refused", "wrong calls are refused in the reference's words", _wrong_cases, _judge_refused),
    Check("edges", "no rows, no tokens, one column: the reference's result", _edge_cases, _judge_edge),
    Check(
        "unseen_labels",
        "a label outside the vocabulary gives NaN where values are not looked at",
        _label_cases,
        _judge_unseen_label,
    ),
)
