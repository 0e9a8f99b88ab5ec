"""What a revision's name says: its step, the tokens seen, and the part of the training that it belongs to.

Names in use: `step1000` (Pythia), `stage1-step1000-tokens5B` (OLMo 2), `ckpt_001` (LLM360), `checkpoint-500`
(transformers' trainer), `global_step1000`, `iter_0001000`. Steps are compared within one part: a name without its step
and tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_STEP = re.compile(
    r"(?<![a-z])(?:global[_-]?)?(?:step|ckpt|checkpoint|iter|iteration|chunk)[_-]?(\d{1,12})(?!\d)", re.I
)
_NUMBERED = re.compile(r"[A-Za-z]{0,40}[_-]?(\d{1,12})")
_TOKENS = re.compile(r"[_-]?tokens?[_-]?(\d{1,6})([KMBT]?)(?![A-Za-z0-9])", re.I)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a revision stands. part: what is left of its name, as `stage1`. tokens: None where the name has none."""

    part: str
    step: int
    tokens: int | None


def place_of(name: str) -> Place | None:
    """What a name says, or None where it has no step."""
    above, _, last = name.rpartition("/")
    if (found := _STEP.search(last)) is None:
        return None
    rest, tokens = last[: found.start()] + "\0" + last[found.end() :], None
    if said := _TOKENS.search(rest):
        tokens = int(said[1]) * _UNITS[said[2].upper()]
        rest = rest[: said.start()] + rest[said.end() :]
    before, _, after = rest.partition("\0")
    part = " ".join(filter(None, (above, before.strip("-_. "), after.strip("-_. "))))
    return Place(part, int(found[1]), tokens)


def places_of(names: Iterable[str]) -> Mapping[str, Place]:
    """The places of those names that have a step. Where none has, a word and a number, as `rev12`, is one."""
    names = list(names)
    found = {name: place for name in names if (place := place_of(name)) is not None}
    if found:
        return found
    return {
        name: Place(name.rpartition("/")[0], int(match[1]), None)
        for name in names
        if (match := _NUMBERED.fullmatch(name.rpartition("/")[2]))
    }
