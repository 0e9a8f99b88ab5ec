"""run_checks: every check of every implementation, as a list of findings.

An exception out of an implementation is a finding that failed, not an error of the run. That is the one place here
where every exception is caught, because what somebody else's kernel raises is exactly what is examined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from weftrain.kernels.checks import bad_input, bounds, composition, cost, numerics, side_effects, sizes
from weftrain.kernels.checks.findings import (
    DTYPES,
    Case,
    Check,
    CheckReport,
    Finding,
    NotHere,
    SkippedCase,
    Subject,
    Verdict,
    describe,
    name_of,
)
from weftrain.kernels.checks.time_limit import LIMIT_S, time_limit
from weftrain.kernels.contract import Implementation, KernelError
from weftrain.kernels.ops import OPS
from weftrain.kernels.plugins import one_line
from weftrain.kernels.registry import load_catalog

_MODULES = (numerics, sizes, composition, side_effects, bounds, bad_input, cost)
CHECKS: dict[str, Check] = {check.name: check for module in _MODULES for check in module.CHECKS}
Progress = Callable[[int, int, str], None]  # done, total, "rms_norm triton: numerics"


def run_checks(
    ops: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] = DTYPES,
    checks: Sequence[str] | None = None,
    progress: Progress | None = None,
    implementations: Sequence[Implementation] | None = None,
    examples: Sequence[str] | None = None,
    *,
    thorough: bool = False,
    limit_s: float = LIMIT_S,
    found: Callable[[Finding], None] | None = None,
) -> CheckReport:
    """Ask every question of every implementation (of the catalog, or of those given) that `ops` and `sources` leave.
    None: all.

    examples: names of kernels/ops/, or of calls, that alone are asked about; a name that nothing has leaves nothing.
    thorough: every size and range in every dtype, which takes minutes. limit_s: for one case; what takes longer has
    failed. found: hears of each finding when it is made.

    Raises KernelError for an unknown op, source or check. What is unavailable is in the report's `skipped`, with its
    reason.
    """
    if implementations is None:
        implementations = [
            item for by_source in load_catalog().values() for variants in by_source.values() for item in variants
        ]
    _known("op", ops, [*OPS])
    _known("source", sources, sorted({item.source for item in implementations}))
    _known("check", checks, [*CHECKS])
    chosen = [i for i in implementations if (ops is None or i.op in ops) and (sources is None or i.source in sources)]
    report = CheckReport()
    plan: list[tuple[Subject, Check, list[Case]]] = []
    for implementation in chosen:
        subject = _available(implementation, device, dtypes, report)
        for check in (CHECKS[name] for name in checks or CHECKS if subject.dtypes):
            asked = check.asked(subject, thorough)
            cases = [case for case in asked if examples is None or case.example in examples]
            plan.append((subject, check, cases))
    done, total = 0, sum(len(cases) for _, _, cases in plan)
    for subject, check, cases in plan:
        for case in cases:
            if progress is not None:
                progress(done, total, f"{subject.op.name} {subject.implementation.source}: {check.name} {case.example}")
            before = len(report)
            _ask(subject, check, case, report, limit_s)
            if found is not None:
                for finding in report[before:]:
                    found(finding)
            done += 1
    if progress is not None:
        progress(total, total, "done")
    return report


def _known(kind: str, asked: Sequence[str] | None, known: Sequence[str]) -> None:
    for name in asked or ():
        if name not in known:
            raise KernelError(f"kernels check: unknown {kind} '{name}'; there is: {', '.join(known)}")


def _available(
    implementation: Implementation, device: str, dtypes: Sequence[torch.dtype], report: CheckReport
) -> Subject:
    """The subject in the dtypes that it takes for at least one small example; what it refuses is reported."""
    subject = Subject(implementation, device, tuple(dtypes))
    op, source = implementation.op, implementation.source
    usable = []
    for dtype in dtypes:
        try:
            reasons = {example: subject.unavailable(example, dtype) for example in subject.op.small}
        except Exception as error:  # of the op's own examples, which another package may have written
            detail = f"its examples cannot be made: raised {one_line(error)}"
            report.append(Finding(op, source, "examples", "*", name_of(dtype), False, detail))
            continue
        if all(reasons.values()):
            report.skipped.append(
                SkippedCase(op, source, "*", "*", name_of(dtype), " / ".join(dict.fromkeys(map(str, reasons.values()))))
            )
            continue
        usable.append(dtype)
        report.skipped += [
            SkippedCase(op, source, "*", example, name_of(dtype), reason)
            for example, reason in reasons.items()
            if reason
        ]
    return Subject(implementation, device, tuple(usable))


def _ask(subject: Subject, check: Check, case: Case, report: CheckReport, limit_s: float) -> None:
    op, source, dtype = subject.op.name, subject.implementation.source, name_of(case.dtype)
    where = f"{op} {source} {check.name} {case.example} {dtype}"
    try:
        with time_limit(limit_s, where):
            answer = check.judge(subject, case)
    except Exception as error:  # code under test raised it: that is the finding
        answer = Verdict(False, f"raised {one_line(error)}")
    if isinstance(answer, NotHere):
        report.skipped.append(SkippedCase(op, source, check.name, case.example, dtype, answer.reason))
    else:
        report.append(Finding(op, source, check.name, case.example, dtype, answer.ok, answer.detail, answer.figures))


def summary(report: CheckReport) -> Iterator[str]:
    """A line for each finding that failed, then the counts."""
    for finding in report.failed:
        yield describe(finding)
    yield f"{len(report) - len(report.failed)} passed, {len(report.failed)} failed, {len(report.skipped)} skipped"
