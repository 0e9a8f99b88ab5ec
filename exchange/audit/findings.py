"""What an audit finds: a finding for each mistake, with the revisions that it is in and how it was seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "duplicate",
    "near duplicate",
    "gap",
    "repeated step",
    "out of order",
    "dtype change",
    "shape change",
    "config change",
    "config contradicted",
    "norm jump",
    "movement jump",
    "loss jump",
    "not finite",
    "bad file",
    "incomplete",
    "vanished",
    "unread",
]
FoundBy = Literal["name", "hash", "header", "config", "tensor", "record", "listing"]

# Kind -> what it means for whoever measures the series.
MEANING: dict[Kind, str] = {
    "duplicate": "at most one of these revisions is the step that its name says",
    "near duplicate": "these revisions share most of their weights: one may be a mixture of two steps",
    "gap": "curves over steps have a hole here",
    "repeated step": "two revisions claim one step, and nothing says which is meant",
    "out of order": "the order by names is not the order of training",
    "dtype change": "small differences across this point are rounding, not training",
    "shape change": "revisions across this point are different architectures",
    "config change": "the same weights would compute something else under the other config",
    "config contradicted": "the revision does not load as its config says, or loads as another model",
    "norm jump": "a revision's weights do not continue those of its neighbours",
    "movement jump": "a revision lies far from the path between its neighbours",
    "loss jump": "a loss does not continue that of its neighbours",
    "not finite": "the revision cannot be used",
    "bad file": "the revision's weights cannot be read",
    "incomplete": "the revision cannot be loaded",
    "vanished": "the revision was listed and is not there any more: it was not examined",
    "unread": "the revision could not be examined",
}


@dataclass(frozen=True)
class Finding:
    """A mistake. revisions: their names, in the order of their steps. evidence: what shows it, in words."""

    kind: Kind
    revisions: tuple[str, ...]
    evidence: str
    found_by: FoundBy


@dataclass(frozen=True)
class Fact:
    """What the series has or lacks, which is no mistake. status: in a word."""

    name: str
    status: str
    evidence: str


def named(names: Sequence[str], most: int = 4) -> str:
    """Names in words: the first few, and how many there are."""
    shown = [name[:80] for name in names]
    if len(shown) <= most:
        return ", ".join(shown)
    return f"{', '.join(shown[: most - 1])} .. {shown[-1]} ({len(shown):,} revisions)"


def equal(names: Iterable[str], most: int = 4) -> str:
    """`a = b = c`, shortened where there are many."""
    shown = [name[:80] for name in names]
    if len(shown) <= most:
        return " = ".join(shown)
    return f"{' = '.join(shown[: most - 1])} = .. = {shown[-1]} ({len(shown):,} revisions)"
