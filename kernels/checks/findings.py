"""What a check is asked about, and what it answers.

A check that raises has *failed*. Code under test may raise anything, so the engine turns every exception into a
finding; only what is unavailable, by the implementation's own words or this machine's lack, is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from weftrain.kernels.contract import Arguments, Implementation, Op, Spec
from weftrain.kernels.ops import OPS
from weftrain.kernels.triton_version import interpreting

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Finding:
    """One question and its answer. figures: what was measured, by name (relative errors, bounds, counts)."""

    op: str
    source: str
    check: str
    example: str  # of kernels/ops/, or the name of a call
    dtype: str  # "float32", "bfloat16", "float16"
    ok: bool
    detail: str  # one line
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SkippedCase:
    """What was not asked, and why. check and example are "*" where it holds for all of them."""

    op: str
    source: str
    check: str
    example: str
    dtype: str
    reason: str


class CheckReport(list[Finding]):
    """The findings, in order; `skipped` says what was left out."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped: list[SkippedCase] = []

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self if not finding.ok]


@dataclass(frozen=True)
class Subject:
    """One implementation under examination, on one device, in the dtypes in which it is available there."""

    implementation: Implementation
    device: str
    dtypes: tuple[torch.dtype, ...]

    @property
    def op(self) -> Op:
        return OPS[self.implementation.op]

    def unavailable(self, example: str, dtype: torch.dtype) -> str | None:
        """The implementation's own reason not to take that example's attributes."""
        return self._refusal(self.op.examples[example](self.device, dtype), dtype)

    def _refusal(self, arguments: Arguments, dtype: torch.dtype) -> str | None:
        attributes = {**self.op.attributes, **self.op.attributes_of(arguments)}
        return self.implementation.unavailable(Spec(self.op.name, "example", self.device, dtype, attributes))

    def taken(self, cases: Sequence[Case]) -> list[Case]:
        """Those whose calls the implementation is available for."""
        return [case for case in cases if self._refusal(case.build(), case.dtype) is None]

    @property
    def interpreted(self) -> bool:
        """Whether its kernels are run by numpy, one program after the other: large calls take minutes there."""
        return self.implementation.source == "triton" and self.device == "cpu" and interpreting()

    def cases(self, *examples: str, dtypes: Sequence[torch.dtype] = DTYPES) -> list[Case]:
        """Those of the examples, in those of the dtypes, that the implementation is available for."""
        wanted = [(example, dtype) for example in examples for dtype in dtypes if dtype in self.dtypes]
        return [
            Case(example, dtype, lambda example=example, dtype=dtype: self.op.examples[example](self.device, dtype))  # type: ignore[misc]
            for example, dtype in wanted
            if self.unavailable(example, dtype) is None
        ]

    def quick(self, count: int = len(DTYPES)) -> list[Case]:
        """The smallest available example in each of the first `count` available dtypes, for expensive checks."""
        found = []
        for dtype in self.dtypes:
            found += self.cases(self.op.smallest, *self.op.small, dtypes=(dtype,))[:1]
        return found[:count]


@dataclass(frozen=True)
class Case:
    """One question of a check. build: fresh arguments, the same at every call."""

    example: str
    dtype: torch.dtype
    build: Callable[[], Arguments]


@dataclass(frozen=True)
class Verdict:
    """The answer to one case."""

    ok: bool
    detail: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class NotHere:
    """The case cannot be asked on this machine."""

    reason: str


@dataclass(frozen=True)
class Check:
    """cases: what is asked; judge: the answer to one case, where an exception is a failed finding."""

    name: str
    meaning: str  # one line, for people
    cases: Callable[[Subject], list[Case]]
    judge: Callable[[Subject, Case], Verdict | NotHere]
    thorough: Callable[[Subject], list[Case]] | None = None  # what is asked instead where there is time for it

    def asked(self, subject: Subject, thorough: bool) -> list[Case]:
        return self.thorough(subject) if thorough and self.thorough is not None else self.cases(subject)


def describe(finding: Finding) -> str:
    """One line."""
    return f"{finding.op} {finding.source} {finding.check} {finding.example} {finding.dtype}: {finding.detail}"


def to_json(report: CheckReport) -> str:
    """The findings and what was skipped, in the form that `weftrain kernels check --json` writes."""
    document = {
        "schema_version": 1,
        "findings": [{**vars(finding), "figures": dict(finding.figures)} for finding in report],
        "skipped": [vars(item) for item in report.skipped],
    }
    return json.dumps(document, indent=1) + "\n"


def name_of(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")
