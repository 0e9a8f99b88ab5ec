"""What each figure shows, as numbers: nothing is measured here, all of it stands in the record of the series.

A figure is several panels of lines, or several matrices. `paper_figures` gives those that the record has, and for each
of the others one line: what is missing, and the command that makes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from weftrain.analysis.compare.series import MeasureColumn, Series
from weftrain.analysis.compare.table import headings, plain
from weftrain.analysis.memorization.report import by_relation, correlation, distribution
from weftrain.analysis.memorization.scores import MemorizationResult, Parameters

PANELS_OF_A_FILE = 12
CHECKPOINTS_OF_A_DISTRIBUTION = 10  # as in the paper
_LARGEST_LOSS = 700.0  # exp of more is no float64
_RELATIONS = {"just seen": "latest chunk", "earlier": "earlier chunks", "unseen": "not yet seen"}


@dataclass(frozen=True)
class Line:
    """points: (x, y), ascending in x. colour: an index; lines of one series have one in all panels."""

    label: str
    colour: int
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Panel:
    """Lines over one x axis. bottom_zero: the y axis begins at 0. symmetric_log: small percentages stay visible."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    bottom_zero: bool = False
    symmetric_log: bool = False


@dataclass(frozen=True)
class Matrix:
    """values[i][j] in -1..1, of the labels i and j; None where it is undefined."""

    title: str
    labels: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class PaperFigure:
    """name: of its files, without suffix. notes: for the page beside the picture."""

    name: str
    title: str
    panels: tuple[Panel, ...] = ()
    matrices: tuple[Matrix, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class NotDrawn:
    """why: one line, with the command that makes what is missing."""

    name: str
    why: str


def paper_figures(series: Sequence[Series]) -> tuple[list[PaperFigure], list[NotDrawn]]:
    """The figures of one series, or of several in the same panels; memorization is drawn of each by itself."""
    drawn: list[PaperFigure] = []
    missing: list[NotDrawn] = []
    for name, kind, title, command in (
        ("tasks", "score", "task scores over checkpoints", "weftrain eval {} --preset llm360 --watch"),
        ("perplexity", "held-out loss", "held-out perplexity over checkpoints", "weftrain eval {} --watch"),
    ):
        panels = _measure_panels(series, kind)
        if panels:
            drawn += _pages(name, title, panels, series)
        else:
            commands = " and ".join(command.format(one.folder) for one in series)
            what = "no task score" if kind == "score" else "no held-out loss"
            missing.append(NotDrawn(name, f"{what} is recorded: {commands}"))
    for one in series:
        suffix = f"_{_file_part(one.name)}" if len(series) > 1 else ""
        found, lacking = _memorization_figures(one, suffix)
        drawn += found
        missing += lacking
    return drawn, missing


# ---- measures over tokens seen


def _measure_panels(series: Sequence[Series], kind: str) -> list[Panel]:
    """A panel for each measure, with a line for each series that has it; what is not finite is left out."""
    columns = sorted(
        {column for one in series for point in one.points for column in point.values if column.kind == kind}
    )
    panels = []
    for column, heading in zip(columns, headings(columns, 1), strict=True):
        lines = []
        for index, one in enumerate(series):
            points = tuple(
                (float(point.tokens), _shown(column, point.values[column]))
                for point in one.points
                if column in point.values and math.isfinite(_shown(column, point.values[column]))
            )
            if points:
                lines.append(Line(plain(one.name), index, points))
        if lines:
            title, label = heading, column.measure
            if kind == "held-out loss":
                title, label = heading.replace("held-out loss", "held-out set"), "perplexity"
            panels.append(Panel(title, "tokens seen", label, tuple(lines)))
    return panels


def _shown(column: MeasureColumn, value: float) -> float:
    """exp of a loss; a score as it is."""
    if column.kind != "held-out loss":
        return value
    return math.exp(value) if value < _LARGEST_LOSS else math.inf


def _pages(name: str, title: str, panels: Sequence[Panel], series: Sequence[Series]) -> list[PaperFigure]:
    """So many panels a file; the first has no number."""
    pages = [panels[first : first + PANELS_OF_A_FILE] for first in range(0, len(panels), PANELS_OF_A_FILE)]
    of = ", ".join(plain(one.name) for one in series)
    return [
        PaperFigure(f"{name}_{number}" if number > 1 else name, f"{of}: {title}", tuple(page))
        for number, page in enumerate(pages, 1)
    ]


# ---- memorization


def _memorization_figures(series: Series, suffix: str) -> tuple[list[PaperFigure], list[NotDrawn]]:
    names = [f"memorization_{name}{suffix}" for name in ("distribution", "chunks", "correlation")]
    if series.kind == "huggingface":
        why = f"{series.name} is a series of Hugging Face, whose order of the training data is not known"
        return [], [NotDrawn(name, why) for name in names]
    results, parameters, notes = _largest_group(series.memorization)
    if parameters is None:
        return [], [NotDrawn(name, f"no memorization is recorded: weftrain memorize {series.folder}") for name in names]
    drawn: list[PaperFigure] = []
    missing: list[NotDrawn] = []
    makers = (_distribution, _chunks, _correlation)
    for name, make in zip(names, makers, strict=True):
        found = make(series, results, parameters)
        if isinstance(found, str):
            missing.append(NotDrawn(name, found))
        else:
            title, panels, matrices = found
            drawn.append(PaperFigure(name, f"{plain(series.name)}: {title}", panels, matrices, notes))
    return drawn, missing


Made = tuple[str, tuple[Panel, ...], tuple[Matrix, ...]]


def _largest_group(
    results: Sequence[MemorizationResult],
) -> tuple[list[MemorizationResult], Parameters | None, tuple[str, ...]]:
    """Results of one k, l, sample and seed are drawn, those of the most rows; others are named."""
    groups: dict[str, list[MemorizationResult]] = {}
    for result in results:
        groups.setdefault(result.parameters.folder_name, []).append(result)
    if not groups:
        return [], None, ()
    chosen = max(sorted(groups), key=lambda name: sum(len(one.matches) for one in groups[name]))
    others = ", ".join(sorted(set(groups) - {chosen}))
    notes = (f"of {chosen}", *((f"also recorded, and not drawn: {others}",) if others else ()))
    return sorted(groups[chosen], key=lambda one: (one.step, one.chunk)), groups[chosen][0].parameters, notes


def _distribution(series: Series, results: Sequence[MemorizationResult], parameters: Parameters) -> Made | str:
    """The share of rows at each score, of rows trained on; a checkpoint a line, at most ten, evenly spread."""
    trained = [one for one in results if one.relation in ("just seen", "earlier")]
    steps = sorted({one.step for one in trained})
    if not steps:
        return f"no memorization of rows trained on is recorded: weftrain memorize {series.folder}"
    if len(steps) > CHECKPOINTS_OF_A_DISTRIBUTION:
        last = len(steps) - 1
        steps = [
            steps[round(i * last / (CHECKPOINTS_OF_A_DISTRIBUTION - 1))] for i in range(CHECKPOINTS_OF_A_DISTRIBUTION)
        ]
    lines = []
    for index, step in enumerate(steps):
        counts = distribution([one for one in trained if one.step == step])
        length, total = parameters.continuation_tokens, sum(counts)
        points = tuple((match / length, 100 * count / total) for match, count in enumerate(counts))
        lines.append(Line(f"step {step:,}: {points[-1][1]:.2f} % extractible", index, points))
    k, length = parameters.prompt_tokens, parameters.continuation_tokens
    x_label = f"memorization score ({k} prompt tokens, {length} continued; 1 is {k}-extractible)"
    panel = Panel("", x_label, "% of the sampled rows trained on", tuple(lines), symmetric_log=True)
    return "distribution of memorization scores", (panel,), ()


def _chunks(series: Series, results: Sequence[MemorizationResult], parameters: Parameters) -> Made | str:
    """Of each checkpoint, the chunk it has just read against those it had read before and those it has not read."""
    means = by_relation(results)
    panels = []
    for value, label in (("mean_score", "mean memorization score"), ("extractible_percent", "extractible rows, %")):
        lines = []
        for index, (relation, words) in enumerate(_RELATIONS.items()):
            points = tuple(
                (float(step), float(getattr(groups[relation], value)))
                for step, groups in sorted(means.items())
                if relation in groups
            )
            if points:
                lines.append(Line(words, index, points))
        panels.append(Panel("", "step of the checkpoint", label, tuple(lines), bottom_zero=True))
    if not any(line.label == "latest chunk" for line in panels[0].lines):
        return f"no checkpoint's latest chunk is measured: weftrain memorize {series.folder}"
    return "memorization of the latest chunk against earlier ones", tuple(panels), ()


def _correlation(series: Series, results: Sequence[MemorizationResult], parameters: Parameters) -> Made | str:
    """Pearson's between each two checkpoints, over the rows that all of them were measured on."""
    chunks = [one for one in results if one.kind == "training"]
    matrices = []
    compared: tuple[tuple[Literal["scores", "extractible"], str], ...] = (
        ("scores", "memorization scores"),
        ("extractible", "extractibility"),
    )
    for value, words in compared:
        steps, table = correlation(chunks, value)
        if len(steps) < 2 or not any(one is not None for row in table for one in row):
            return f"two checkpoints with the same chunks are needed: weftrain memorize {series.folder}"
        labels = tuple(f"{step:,}" for step in steps)
        matrices.append(Matrix(words, labels, tuple(tuple(row) for row in table)))
    return "correlation of memorization across checkpoints", (), tuple(matrices)


def _file_part(name: str) -> str:
    """A series' name as part of a file's."""
    return "".join(character if character.isalnum() or character in "-." else "_" for character in name)[:80]


def as_json(series: Sequence[Series], drawn: Sequence[PaperFigure], missing: Sequence[NotDrawn]) -> dict[str, Any]:
    """figures.json: every number of every picture, so that a picture can be drawn again elsewhere."""
    return {
        "format": "weftrain-figures",
        "version": 1,
        "series": [{"name": one.name, "kind": one.kind, "tokens": one.tokens_words} for one in series],
        "figures": [_figure_json(one) for one in drawn],
        "not_drawn": [{"figure": one.name, "why": one.why} for one in missing],
    }


def _figure_json(figure: PaperFigure) -> dict[str, Any]:
    panels = [
        {
            "title": panel.title,
            "x": panel.x_label,
            "y": panel.y_label,
            "lines": [{"label": line.label, "points": [list(point) for point in line.points]} for line in panel.lines],
        }
        for panel in figure.panels
    ]
    matrices = [
        {"title": one.title, "labels": list(one.labels), "values": [list(row) for row in one.values]}
        for one in figure.matrices
    ]
    return {
        "figure": figure.name,
        "title": figure.title,
        "panels": panels,
        "matrices": matrices,
        "notes": list(figure.notes),
    }
