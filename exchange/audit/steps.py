"""The sequence of steps by the revisions' names: what is missing in it, what is twice, and what contradicts it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from weftrain.exchange.audit.findings import Finding, equal
from weftrain.exchange.audit.names import Place

_WINDOW = 6  # spacings on each side of one, by which it is judged
_MIN_EQUAL = 3  # spacings that make a rule


def in_order(places: Mapping[str, Place]) -> list[str]:
    """The names by part and step."""
    return sorted(places, key=lambda name: (places[name].part, places[name].step, name))


def parts_of(places: Mapping[str, Place]) -> dict[str, list[str]]:
    """Part of the training -> its revisions in the order of their steps."""
    parts: dict[str, list[str]] = defaultdict(list)
    for name in in_order(places):
        parts[places[name].part].append(name)
    return dict(parts)


def step_findings(places: Mapping[str, Place]) -> Iterator[Finding]:
    """Repeated steps, gaps, and tokens that contradict the steps, in each part of the training."""
    for part, names in parts_of(places).items():
        by_step: dict[int, list[str]] = defaultdict(list)
        for name in names:
            by_step[places[name].step].append(name)
        for step, same in by_step.items():
            if len(same) > 1:
                yield Finding("repeated step", tuple(same), f"{equal(same)}: all are step {step:,}", "name")
        yield from _gaps(part, {step: same[0] for step, same in by_step.items()})
        yield from _tokens(names, places)


def spacing(steps: Sequence[int]) -> int | None:
    """The most frequent distance between neighbours, if there is one."""
    found = Counter(after - before for before, after in pairwise(steps)).most_common(1)
    return found[0][0] if found else None


def _gaps(part: str, names: Mapping[int, str]) -> Iterator[Finding]:
    """Places where whole steps of the spacing around them are missing.

    The spacing is the most frequent one nearby. It must hold on both sides, so that a series which becomes sparser for
    good has no gap where it does, and at the end of the series on the side before.
    """
    steps = sorted(names)
    spacings = [after - before for before, after in pairwise(steps)]
    for index, found in enumerate(spacings):
        before, after = spacings[max(0, index - _WINDOW) : index], spacings[index + 1 : index + 1 + _WINDOW]
        if found in before[-1:] or found in after[:1]:
            continue  # two in a row are a rule of their own
        counted = Counter(before + after).most_common(1)
        if not counted or counted[0][1] < _MIN_EQUAL:
            continue
        rule = counted[0][0]
        holds = rule in before and (rule in after or not after)
        at_start = not before and rule in after and steps[0] > 0
        if (holds or at_start) and found > rule and found % rule == 0:
            missing = range(steps[index] + rule, steps[index + 1], rule)
            shown = f"{missing[0]:,}" if len(missing) == 1 else f"{missing[0]:,} to {missing[-1]:,}"
            where = f" of {part}" if part else ""
            words = f"step {shown}{where} is missing" if len(missing) == 1 else f"steps {shown}{where} are missing"
            words += f", {len(missing):,} at a spacing of {rule:,}"
            yield Finding("gap", (names[steps[index]], names[steps[index + 1]]), words, "name")


def _tokens(names: Sequence[str], places: Mapping[str, Place]) -> Iterator[Finding]:
    """Revisions of a later step that say fewer tokens than one of an earlier step."""
    most: tuple[int, str] | None = None
    for name in names:
        tokens = places[name].tokens
        if tokens is None:
            continue
        if most is not None and tokens < most[0]:
            words = (
                f"{name} says {tokens:,} tokens, fewer than the {most[0]:,} of {most[1]}, whose step is before its own"
            )
            yield Finding("out of order", (most[1], name), words, "name")
        if most is None or tokens > most[0]:
            most = (tokens, name)
