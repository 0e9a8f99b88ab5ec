"""Several trainings side by side by tokens seen: a table, notes on what is not comparable, as JSON and Markdown.

Nothing is interpolated: a row is a number of tokens at which a series has a checkpoint or a measurement, and `-` means
none was made there. The notes are part of the result: models with different tokenizers may be compared by score, not by
loss.
"""

from __future__ import annotations

import importlib.metadata
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftrain.analysis.compare.huggingface import is_series, read_huggingface
from weftrain.analysis.compare.series import (
    KINDS,
    TRAIN_LOSS,
    MeasureColumn,
    MeasureKind,
    Series,
    SeriesPoint,
    read_run,
)
from weftrain.analysis.compare.window import default_window, logged_steps, windowed
from weftrain.analysis.evaluation.records import number
from weftrain.core.errors import RunFolderError
from weftrain.core.formats.plain_file import real_path
from weftrain.core.run.metrics import METRICS
from weftrain.core.run.run_folder import RECIPE
from weftrain.exchange.huggingface.folder import CONFIG
from weftrain.exchange.release.release import RELEASE

FORMAT = "weftrain-comparison"
VERSION = 1
MISSING = "-"


@dataclass(frozen=True)
class Comparison:
    """Series, the columns that any of them has, the token positions shown, and notes, one line each."""

    series: tuple[Series, ...]
    columns: tuple[MeasureColumn, ...]
    positions: tuple[int, ...]
    notes: tuple[str, ...]
    window_steps: int

    def rows(self) -> list[tuple[Series, SeriesPoint]]:
        """The table's rows by tokens, then in the order the series were named."""
        shown = set(self.positions)
        found = [(series, point) for series in self.series for point in series.points if point.tokens in shown]
        return sorted(found, key=lambda row: row[1].tokens)


def read_series(path: Path, name: str, tokens_per_step: int | None = None) -> Series:
    """Read a run, a release or a folder of Hugging Face revisions. Raises WeftrainError."""
    if any((path / file).exists() for file in (RELEASE, RECIPE, METRICS)):
        return read_run(path, name)
    if is_series(path):
        return read_huggingface(path, name, tokens_per_step)
    what = (
        "is one model: name the folder that holds its revisions"
        if (path / CONFIG).exists()
        else "is none of them: name one"
    )
    raise RunFolderError(
        f"{path}: a run or a release has a {RECIPE}, a Hugging Face series sub-folders such as step1000; this {what}"
    )


def names_of(paths: Sequence[Path]) -> list[str]:
    """A distinct name for each path: the folder's own, with as many parent folders as needed."""
    parts = [real_path(path).parts for path in paths]
    for length in range(1, 1 + max(map(len, parts), default=0)):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    twice = next(path for path, part in zip(paths, parts, strict=True) if parts.count(part) > 1)
    raise RunFolderError(f"{twice}: is named twice: name each series once")


def compare(
    series: Sequence[Series],
    *,
    window_steps: int | None = None,
    every_position: bool = False,
    notes: Iterable[str] = (),
) -> Comparison:
    """Put series side by side. every_position: show all token positions, not only those that all series have.

    window_steps: of the train loss's mean; None: window.default_window. notes: further ones, from measuring.
    """
    window_steps = window_steps or default_window(series)
    series = [windowed(one, window_steps) if one.losses else one for one in series]
    columns = sorted({column for one in series for point in one.points for column in point.values}, key=_place)
    positions, said = _positions(series, every_position)
    found = [*said, *_arithmetic(series, window_steps), *_comparability(series, columns), *notes]
    for one in series:
        if one.kind == "huggingface" and not _has(one, columns):
            found.append(f"{one.name}: nothing is recorded of a Hugging Face series: --loss-on and --sample measure it")
        found += one.remarks
        found += [f"left out: {line}" for line in one.left_out]
    return Comparison(tuple(series), tuple(columns), tuple(positions), tuple(map(plain, found)), window_steps)


def _place(column: MeasureColumn) -> tuple[int, MeasureColumn]:
    return list(KINDS).index(column.kind), column


def _positions(series: Sequence[Series], every_position: bool) -> tuple[list[int], list[str]]:
    sets = [{point.tokens for point in one.points} for one in series]
    every = sorted(set().union(*sets))
    common = sorted(set.intersection(*sets)) if sets else []
    if every_position or len(series) == 1 or common == every:
        return every, []
    if not common:
        return every, [
            "no number of tokens is common to all series: each is shown where it was measured, and nothing is "
            "interpolated"
        ]
    return common, [
        f"shown are the {len(common)} of {len(every)} token positions that all series have; --all-positions shows the "
        "others"
    ]


def _arithmetic(series: Sequence[Series], window_steps: int) -> list[str]:
    lines = [f"tokens of {one.name}: {one.tokens_words}" for one in series]
    if any(TRAIN_LOSS in point.values for one in series for point in one.points):
        lines.append(
            f"{train_loss_words(window_steps)}, as logged; none where fewer steps were trained; --window sets how many"
        )
    for one in series:
        if one.losses and (steps := logged_steps(one)) < window_steps:
            lines.append(
                f"{one.name}: no train loss: {steps:,} steps were logged, the window is {window_steps:,}: give a "
                "smaller --window"
            )
    return lines


# What cannot be compared


def _comparability(series: Sequence[Series], columns: Sequence[MeasureColumn]) -> list[str]:
    """A line for each way in which similar columns differ, or one column covers models that differ."""
    losing = [one for one in series if any(point.of("train loss") or point.of("held-out loss") for point in one.points)]
    sizes = {one.name: "unknown" if one.vocab_size is None else f"{one.vocab_size:,} ids" for one in series}
    own_rows = [column for column in columns if _own_rows(column)]
    lines = []
    for what, values in (
        (
            "tokenizers differ or are unknown, so losses per token may not be comparable",
            {one.name: _short(one.tokenizer_sha256) for one in losing},
        ),
        ("vocabularies differ", sizes),
        (
            "train losses are of different objectives",
            {one.name: one.objective for one in series if _has(one, [TRAIN_LOSS])},
        ),
        ("train losses are over different data", _datasets(series, [TRAIN_LOSS])),
        ("memorization of training rows is of different data", _datasets(series, own_rows)),
    ):
        if len(set(values.values())) > 1:
            lines.append(f"{what}: {_listed(values)}")
    for (kind, name), alike in _alike(columns).items():
        lines += _differing(series, kind, name, alike)
    return lines


def _datasets(series: Sequence[Series], columns: Sequence[MeasureColumn]) -> dict[str, str]:
    """The training data of each series that has one of the columns."""
    return {one.name: _short(one.dataset_id) for one in series if _has(one, columns)}


def _own_rows(column: MeasureColumn) -> bool:
    return column.kind == "memorization" and not column.detail("dataset_id")


def _alike(columns: Sequence[MeasureColumn]) -> dict[tuple[MeasureKind, str], list[MeasureColumn]]:
    """Groups of columns with one kind and name, without measures that stand beside another of the same rows: the mean
    score beside what is extractible, the rewards beside the loss of pairs.
    """
    groups: dict[tuple[MeasureKind, str], list[MeasureColumn]] = {}
    for column in columns:
        if column.measure != "mean score" and (column.kind != "preference" or column.measure == "loss"):
            groups.setdefault((column.kind, column.name), []).append(column)
    return {key: group for key, group in groups.items() if len(group) > 1}


def _differing(series: Sequence[Series], kind: MeasureKind, name: str, alike: Sequence[MeasureColumn]) -> list[str]:
    keys = [key for key, _ in alike[0].details if len({column.detail(key) for column in alike}) > 1]
    pieces = []
    for column in alike:
        owners = ", ".join(one.name for one in series if _has(one, [column]))
        shown = ", ".join(f"{key} {_short(column.detail(key))}" for key in keys)
        measure = f"{column.measure}, " if len({one.measure for one in alike}) > 1 else ""
        pieces.append(f"{owners}: {measure}{shown}".rstrip(" ,"))
    words = KINDS[kind].differing
    if kind == "held-out loss" and "dataset_id" not in keys:
        words = "held-out losses are over other rows of one set, or with another attention"
    return [f"{words}: {name}: {'; '.join(pieces)}"]


def _has(series: Series, columns: Sequence[MeasureColumn]) -> bool:
    return any(column in point.values for point in series.points for column in columns)


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _short(text: str | None) -> str:
    """The first digits of a hash; "unknown" for None."""
    if not text:
        return "unknown" if text is None else "none"
    return text[:12] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


# Showing


def headings(columns: Sequence[MeasureColumn], window_steps: int) -> list[str]:
    """A distinct heading for each column: what most readers need, and the details by which similar ones differ."""
    texts = [_heading(column, window_steps) for column in columns]
    clashes = {text for text, count in Counter(texts).items() if count > 1}
    for index, column in enumerate(columns):
        if texts[index] in clashes:
            others = [other for other in columns if _heading(other, window_steps) == texts[index]]
            keys = [key for key, _ in column.details if len({other.detail(key) for other in others}) > 1]
            texts[index] += ", " + ", ".join(f"{key} {_short(column.detail(key))}" for key in keys)
    return [plain(text) for text in texts]


def train_loss_words(window_steps: int) -> str:
    """What a train loss is the mean of."""
    return f"train loss, mean of {window_steps:,} steps" if window_steps > 1 else "train loss of the step"


def _heading(column: MeasureColumn, window_steps: int) -> str:
    if column.kind == "train loss":
        return train_loss_words(window_steps)
    if column.kind in ("held-out loss", "preference"):
        dataset_id = column.detail("dataset_id")
        of = _short(dataset_id)[:8] if len(dataset_id) == 64 else f"({dataset_id})"
        what = column.kind if column.kind == "held-out loss" else f"preference {column.measure.replace('_', ' ')}"
        return f"{what} {column.name} {of}, {column.detail('rows')}"
    if column.kind == "score":
        return f"{column.name}, {column.measure}, {column.detail('shots')} shots"
    return f"memorized {column.name}, k {column.detail('k')} l {column.detail('l')}, {column.measure}"


def shown(column: MeasureColumn, value: float | None) -> str:
    """A cell: percents with two digits after the point, all else with four; what is missing as `-`."""
    if value is None:
        return MISSING
    return f"{value:.2f}" if column.measure.endswith("%") else f"{value:.4f}"


def cells(comparison: Comparison) -> list[list[str]]:
    """The table as text, headings first."""
    table = [["series", "step", "tokens seen", *headings(comparison.columns, comparison.window_steps)]]
    for series, point in comparison.rows():
        values = [shown(column, point.values.get(column)) for column in comparison.columns]
        table.append([plain(series.name), f"{point.step:,}", f"{point.tokens:,}", *values])
    return table


def plain(text: str) -> str:
    """Text from a record without control characters."""
    return "".join("?" if unicodedata.category(letter).startswith("C") else letter for letter in text)


def as_markdown(comparison: Comparison, picture: str | None) -> str:
    """compare.md: the table, the notes, and the plot where there is one."""
    table = [[cell.replace("\\", "\\\\").replace("|", "\\|") for cell in row] for row in cells(comparison)]
    rule = ["---", *["---:"] * (len(table[0]) - 1)]
    lines = ["# Comparison", "", *("| " + " | ".join(row) + " |" for row in (table[0], rule, *table[1:])), ""]
    lines += [f"- {note}" for note in comparison.notes]
    lines += ["", f"![loss, scores and memorization by tokens seen]({picture})"] if picture else []
    return "\n".join(lines) + "\n"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """compare.json: every point of every series. No clock and no path: equal inputs give equal bytes."""

    named = zip(comparison.columns, headings(comparison.columns, comparison.window_steps), strict=True)
    return {
        "format": FORMAT,
        "version": VERSION,
        "software": {"weftrain": importlib.metadata.version("weftrain")},
        "window_steps": comparison.window_steps,
        "columns": [
            {"key": one.key, "heading": heading, "kind": one.kind, "name": one.name, "measure": one.measure}
            | {"details": dict(one.details)}
            for one, heading in named
        ],
        "series": [_series_json(one) for one in comparison.series],
        "positions": list(comparison.positions),
        "notes": list(comparison.notes),
    }


def _series_json(series: Series) -> dict[str, Any]:
    points = []
    for point in series.points:
        values = {column.key: number(value) for column, value in point.values.items()}
        points.append({"step": point.step, "tokens": point.tokens, "checkpoint": point.checkpoint, "values": values})
    return {
        "name": series.name,
        "kind": series.kind,
        "tokens": series.tokens_words,
        "vocab_size": series.vocab_size,
        "tokenizer_sha256": series.tokenizer_sha256,
        "dataset_id": series.dataset_id,
        "points": points,
        "left_out": [plain(line) for line in series.left_out],
    }
