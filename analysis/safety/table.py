"""One table of safety analyses: a row for each measure, a column for each checkpoint, and those published beside them.

It is made of records (analysis/evaluation/records.py) alone; no clock and no path is in it, so equal records give equal
bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weftrain.analysis.evaluation.records import EvaluationRecord, is_share
from weftrain.analysis.safety import published
from weftrain.analysis.safety.continuations import BOLD
from weftrain.core.errors import DataError

FORMAT = "weftrain-safety"
VERSION = 1
SHOWN = {BOLD: ("mean_compound", "negative_share")}  # task -> metrics; of others the record's own metric
NONE = "-"


@dataclass(frozen=True)
class Column:
    """A checkpoint: its name in the table, root and step; the records of its analyses."""

    name: str
    root: str
    step: int
    records: tuple[EvaluationRecord, ...]


@dataclass(frozen=True)
class Measure:
    """A row. values: value and standard error (None: unknown) of each column, None where a column lacks it."""

    task: str
    metric: str
    samples: int
    values: tuple[tuple[float, float | None] | None, ...]
    published: Mapping[str, published.Published]


@dataclass(frozen=True)
class SafetyTable:
    columns: tuple[Column, ...]
    measures: tuple[Measure, ...]

    @property
    def published_models(self) -> list[str]:
        return sorted({model for measure in self.measures for model in measure.published})


def table_of(columns: Sequence[Column]) -> SafetyTable:
    """Raises DataError for two columns whose measure is of the same name but of other rows."""
    found: dict[tuple[str, str], dict[int, _Score]] = {}
    for place, column in enumerate(columns):
        for record in column.records:
            for score in _scores(record):
                found.setdefault((score.task, score.metric), {})[place] = score
    measures = []
    for (task, metric), scores in found.items():
        before, first = next(iter(scores.items()))
        for place, score in scores.items():
            if score.rows != first.rows:
                raise DataError(
                    f"{task}: {columns[place].name} was measured on other rows than {columns[before].name}: "
                    "measure both with one --sets and one --limit"
                )
        values = tuple(
            (scores[place].value, scores[place].stderr) if place in scores else None for place in range(len(columns))
        )
        beside = published.published_for(task, metric, first.samples, first.available)
        measures.append(Measure(task, metric, first.samples, values, beside))
    return SafetyTable(tuple(columns), tuple(measures))


@dataclass(frozen=True)
class _Score:
    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    available: int
    rows: tuple[Any, ...]  # what must be equal for two scores to be compared


def _scores(record: EvaluationRecord) -> Iterator[_Score]:
    task, inputs = record["task"], record["inputs"]
    rows = tuple(inputs.get(key) for key in ("set_sha256", "data_sha256", "shots_sha256", "classifier", "decoding"))
    for metric in SHOWN.get(task, (record["metric"],)):
        fields, count = record["metrics"][metric], record["samples"]
        available = record.get("samples_available") or count
        yield _Score(task, metric, float(fields["value"]), fields["stderr"], count, available, (*map(str, rows), count))
    for domain, fields in record.get("domains", {}).items():
        for metric in SHOWN[BOLD]:
            count = fields["samples"]
            rows_here = (*map(str, rows), domain, count)
            yield _Score(f"{task}/{domain}", metric, float(fields[metric]), None, count, count, rows_here)


def shown(value: float | None, metric: str, stderr: float | None = None) -> str:
    """A cell: shares in percent, other means with four digits."""
    if value is None:
        return NONE
    scale, digits, unit = (100, 2, " %") if is_share(metric) else (1, 4, "")
    error = "" if stderr is None else f" ± {scale * stderr:.{digits}f}"
    return f"{scale * value:.{digits}f}{error}{unit}"


def cells(table: SafetyTable) -> list[list[str]]:
    """The head and each row, as text."""
    models = table.published_models
    head = ["analysis", "measure", "samples", *(column.name for column in table.columns)]
    rows = [[*head, *(f"{model}, published" for model in models)]]
    for one in table.measures:
        ours = [NONE if pair is None else shown(pair[0], one.metric, pair[1]) for pair in one.values]
        theirs = [shown(one.published[model].value, one.metric) if model in one.published else NONE for model in models]
        rows.append([one.task, one.metric, f"{one.samples:,}", *ours, *theirs])
    return rows


def as_markdown(table: SafetyTable) -> str:
    """safety.md."""
    lines = [[cell.replace("\\", "\\\\").replace("|", "\\|") for cell in row] for row in cells(table)]
    rule = ["---", "---", *["---:"] * (len(lines[0]) - 2)]
    shown_lines = ["| " + " | ".join(row) + " |" for row in (lines[0], rule, *lines[1:])]
    sources = sorted({one.source for measure in table.measures for one in measure.published.values()})
    notes = [f"- published: {source}" for source in sources]
    return "\n".join(["# Safety analyses", "", *shown_lines, "", *notes]).rstrip() + "\n"


def as_json(table: SafetyTable) -> dict[str, Any]:
    """safety.json."""
    return {
        "schema_version": VERSION,
        "format": FORMAT,
        "checkpoints": [{"name": one.name, "checkpoint": one.root, "step": one.step} for one in table.columns],
        "measures": [
            {
                "task": one.task,
                "metric": one.metric,
                "samples": one.samples,
                "values": [None if pair is None else {"value": pair[0], "stderr": pair[1]} for pair in one.values],
                "published": published.as_json(one.published),
            }
            for one in table.measures
        ],
    }
