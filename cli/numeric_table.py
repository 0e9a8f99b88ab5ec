"""The file that numeric_differences writes: exchange/release/measured_differences.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from weftrain.core.formats import fsops

COMPUTES = ("float32", "bfloat16")
STEPS = (1, 2, 4, 8, 16, 32)
# pace -> compute -> (row ->) kind -> the largest distance after each of STEPS
Figures = dict[str, dict[str, Any]]


def flat(figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[tuple[str, str, str, Any]]:
    for pace, computes in figures.items():
        for compute, kinds in computes.items():
            for kind, distances in kinds.items():
                yield pace, compute, kind, distances


def keep_largest(found: dict[str, Any], key: str, values: list[float]) -> None:
    found[key] = [max(pair) for pair in zip(found.get(key, values), values, strict=True)]


class Measured:
    """What was measured: by this call, and by earlier ones. measured: row -> difference, in words -> its seeds."""

    def __init__(self, commands: Sequence[str], conditions: Mapping[str, Any]) -> None:
        """conditions: of the runs as they are: what must be equal where figures of two calls are put together."""
        self.commands = list(commands)
        self.measured: dict[str, dict[str, int]] = {}
        self.moved: dict[str, list[float]] = {}
        self.distances: Figures = {}
        self._conditions = conditions

    def keep(self, row: str, what: str, seed: int, figures: Figures, paces: Mapping[str, list[float]]) -> None:
        self.measured.setdefault(row, {})[what] = seed
        for pace, values in paces.items():
            keep_largest(self.moved, pace, values)
        for pace, compute, kind, distances in flat(figures):
            kinds = self.distances.setdefault(pace, {}).setdefault(compute, {}).setdefault(row, {})
            keep_largest(kinds, kind, distances)

    def add(self, file: Path) -> None:
        """What another call wrote. Raises BadParameter where it measured other recipes, or with another torch or on
        another kind of processor: then its runs as they are were others.
        """
        value = json.loads(file.read_bytes())
        for key, here in self._conditions.items():
            if value[key] != here:
                raise click.BadParameter(f"--add {file}: its {key} is {value[key]}, and here {here}")
        self.commands += value["commands"]
        for row, differences in value["measured"].items():
            kept = self.measured.setdefault(row, {})
            for what, seeds in differences.items():
                kept[what] = max(seeds, kept.get(what, 0))
        for pace, values in value["moved"].items():
            keep_largest(self.moved, pace, values)
        for pace, compute, row, kinds in flat(value["distances"]):
            there = self.distances.setdefault(pace, {}).setdefault(compute, {}).setdefault(row, {})
            for kind, distances in kinds.items():
                keep_largest(there, kind, distances)

    def write(self, to: Path) -> None:
        steps = list(STEPS[: max(map(len, self.moved.values()))])
        measured = {"measured": self.measured, "steps": steps, "moved": self.moved, "distances": self.distances}
        fsops.write_bytes(to, (_json({"commands": self.commands, **self._conditions, **measured}) + "\n").encode())


def page(table: Path) -> str:
    """The rows of docs/examine-a-release.md, in Markdown: of each dtype and pace the largest distances of any kind."""
    from weftrain.exchange.release.tolerance import WIDEST, read_table

    known = read_table(table)
    there = {kind for pace, compute, row, kinds in flat(known.distances) for kind in kinds}
    kinds = [kind for kind in WIDEST if kind in there]
    lines = [f"| dtype, pace | steps | moved | {' | '.join(kinds)} |", "|---" * (3 + len(kinds)) + "|"]
    for compute in COMPUTES:
        for pace, moved in known.moved.items():
            for number, step in [(at, step) for at, step in enumerate(known.steps) if step in (1, 8, 32)]:
                numbers = (known.distance(pace, compute, kind, step) for kind in kinds)
                row = [f"{compute}, {pace}", str(step), f"{moved[number]:.2g}", *(f"{one:.1e}" for one in numbers)]
                lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _json(value: Any, depth: int = 0) -> str:
    """JSON with a line for each entry, but a list of numbers on one line."""
    if not isinstance(value, dict):
        return json.dumps(
            [float(f"{one:.2g}") if isinstance(one, float) else one for one in value]
            if isinstance(value, list)
            else value
        )
    lines = [f"{' ' * (depth + 1)}{json.dumps(key)}: {_json(one, depth + 1)}" for key, one in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"
