"""A comparison for a terminal: one narrow table for each measure, rows by tokens seen, a column for each series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weftrain.analysis.compare.table import Comparison, headings, plain, shown


@dataclass(frozen=True)
class MeasureTable:
    """One measure of all series: a row (tokens, one cell a series) for each number of tokens."""

    title: str
    series: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]


def blocks(comparison: Comparison) -> list[MeasureTable]:
    """One table a measure, with a column for each series that has it: narrow, however many measures there are."""
    found = []
    shown_rows = comparison.rows()
    for column, title in zip(comparison.columns, headings(comparison.columns, comparison.window_steps), strict=True):
        values = {
            (series.name, point.tokens): point.values[column] for series, point in shown_rows if column in point.values
        }
        names = [one.name for one in comparison.series if any(name == one.name for name, _ in values)]
        positions = sorted({tokens for _, tokens in values})
        rows = tuple(
            (tokens, tuple(shown(column, values.get((name, tokens))) for name in names)) for tokens in positions
        )
        if rows:
            found.append(MeasureTable(title, tuple(map(plain, names)), rows))
    return found


def as_text(comparison: Comparison, width: int) -> str:
    """The tables for a terminal of `width` columns; series get letters where their names are too long."""
    names = [plain(one.name) for one in comparison.series]
    letters = {name: _letter(number) for number, name in enumerate(names)}
    edge = 1 + max([len("tokens seen"), *(len(f"{position:,}") for position in comparison.positions)])
    long = edge + sum(2 + max(9, len(name)) for name in names) > width
    lines = [f"{letters[name]}  {name}" for name in names] + [""] if long else []
    for block in blocks(comparison):
        heads = [letters[name] if long else name for name in block.series]
        sizes = [2 + max(len(head), *(len(row[1][place]) for row in block.rows)) for place, head in enumerate(heads)]
        lines += [block.title[at : at + width] for at in range(0, len(block.title), width)]
        for some in _that_fit(sizes, width - edge):
            lines.append("tokens seen".rjust(edge) + "".join(heads[place].rjust(sizes[place]) for place in some))
            lines += [
                f"{tokens:,}".rjust(edge) + "".join(cells[place].rjust(sizes[place]) for place in some)
                for tokens, cells in block.rows
            ]
        lines.append("")
    return "\n".join(lines)


def _letter(number: int) -> str:
    return (_letter(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)


def _that_fit(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Groups of neighbouring columns that fit side by side, at least one each."""
    groups: list[list[int]] = [[]]
    for place in range(len(sizes)):
        if groups[-1] and sum(sizes[one] for one in groups[-1]) + sizes[place] > width:
            groups.append([])
        groups[-1].append(place)
    return groups
