"""Everything that one page says of a run or release, collected from its folder; nothing is trained, loaded or verified.

The folder may be untrusted: the readers of ledger and metrics refuse values of wrong types, and a damaged analysis is
left out with a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from weftrain.analysis.evaluation.records import EvaluationRecord, read_record, records_folder
from weftrain.analysis.report.curves import METRIC_CHARTS, Curves, LoggedCurve, MetricChart, read_curves
from weftrain.analysis.report.ledger import (
    Band,
    Entry,
    LedgerLine,
    LedgerLines,
    Mark,
    RunStart,
    SavedCheckpoint,
    bands,
    marks,
    run_starts,
    saved_checkpoints,
    whole,
)
from weftrain.analysis.report.samples import Samples
from weftrain.analysis.report.time_spent import TimeSpent, time_spent
from weftrain.core.config import Recipe
from weftrain.core.errors import DataError, RunFolderError, one_line
from weftrain.core.formats.canonical import sha256_json
from weftrain.core.formats.plain_file import real_path
from weftrain.core.formats.strict_model import first_problem, read_json_model
from weftrain.core.run.ledger import no_collection, read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import lineage
from weftrain.core.run.metrics import METRICS
from weftrain.core.run.run_folder import stored_recipe

RELEASE = "release.json"
MEMORIZATION = Path("analyses", "memorization")


@dataclass(frozen=True)
class Cell:
    """How much of a chunk a checkpoint recites, over `rows` rows: extractible percentage, mean score in 0..1."""

    extractible_percent: float
    mean_score: float
    rows: int
    relation: str


@dataclass(frozen=True)
class Matrix:
    """Memorization for one set of parameters. rows: (step, root); cells: (root, chunk) -> Cell, where measured."""

    words: str
    rows: tuple[tuple[int, str], ...]
    chunks: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]


@dataclass(frozen=True)
class Metric:
    """A chart of figures in the step records, its lines, and the median of the effective one."""

    chart: MetricChart
    curves: tuple[LoggedCurve, ...]
    median: float | None


@dataclass(frozen=True)
class RunReport:
    """Everything that the page shows. Pairs are (name, value); tiles are the few figures at its head."""

    name: str
    description: str
    status: str
    folder: Path
    identity: tuple[tuple[str, str], ...]
    tiles: tuple[tuple[str, str, str], ...]  # name, value, what it is
    arithmetic: tuple[tuple[str, str], ...]
    last_step: int
    loss: tuple[LoggedCurve, ...]
    heldout: tuple[LoggedCurve, ...]
    scores: tuple[tuple[str, tuple[LoggedCurve, ...]], ...]  # the curves of each metric
    learning_rate: tuple[LoggedCurve, ...]
    metrics: tuple[Metric, ...]
    time_spent: TimeSpent | None
    samples: Samples
    marks: tuple[Mark, ...]
    bands: tuple[Band, ...]
    checkpoints: tuple[SavedCheckpoint, ...]
    starts: tuple[RunStart, ...]
    ledger: Sequence[LedgerLine]
    memorization: tuple[Matrix, ...]
    evaluations: tuple[EvaluationRecord, ...]
    warnings: tuple[str, ...]


def collect(folder: Path, arithmetic: Callable[[Recipe], Sequence[str]]) -> RunReport:
    """Read the run or release in `folder`. arithmetic: a recipe's derived quantities, "tokens  52 x 6 = 312" a line.

    Raises RunFolderError where there is no run, or its ledger or metrics are damaged; ReleaseError for release.json.
    """
    with no_collection():
        return _collected(folder, arithmetic)


def _collected(folder: Path, arithmetic: Callable[[Recipe], Sequence[str]]) -> RunReport:
    entries = read_ledger(folder / LEDGER)
    recipe_json = stored_recipe(folder, missing_ok=True)
    if recipe_json is None and not entries and not (folder / METRICS).exists():
        raise RunFolderError(
            f"{folder}: has neither {LEDGER} nor {METRICS} nor recipe.json: name the folder of a run, or a release"
        )
    warnings: list[str] = []
    line = lineage(entries)
    recipe = _recipe(recipe_json, warnings)
    curves = read_curves(folder, entries, [entry["time"] for entry in entries if entry["kind"] in ("start", "resume")])
    starts = run_starts(entries, curves.starts)
    points = saved_checkpoints(entries, folder)
    p50 = curves.median("tokens_per_second")
    planned = None if recipe is None else recipe.schedule.steps
    reached = max([0, curves.reached, *(point.step for point in points), *(one.reached for one in starts)])
    found_marks = marks(entries) if entries else _marks_of_metrics(curves)
    found_marks += [Mark(step, "alert", words) for step, words in curves.alerts]
    last = next((one for one in reversed(entries) if one["kind"] != "evaluation"), None)  # it may come after the end
    ended = last is not None and last["kind"] == "end" and last["step"] == planned
    done = max([curves.last_step["step"] if curves.last_step else 0, *(point.step for point in line.checkpoints)])
    return RunReport(
        name=real_path(folder).name,
        description="" if recipe is None else recipe.description,
        status=_status(done, planned, ended),
        folder=folder,
        identity=tuple(_identity(folder, recipe_json, recipe, entries, points)),
        tiles=tuple(_tiles(curves, p50, found_marks)),
        arithmetic=tuple(_split(words) for words in arithmetic(recipe)) if recipe is not None else (),
        last_step=max(reached, 1),
        loss=curves.logged("loss", "training"),
        heldout=curves.heldout(),
        scores=curves.scores(),
        learning_rate=curves.learning_rates(),
        metrics=tuple(
            Metric(chart, curves.logged(chart.key, chart.name), curves.median(chart.key)) for chart in METRIC_CHARTS
        ),
        time_spent=time_spent(curves, next((entry["time"] for entry in entries if entry["kind"] == "start"), None)),
        samples=curves.samples,
        marks=tuple(found_marks),
        bands=tuple(bands(entries)),
        checkpoints=tuple(points),
        starts=tuple(starts),
        ledger=LedgerLines(entries),
        memorization=tuple(read_matrices(folder / MEMORIZATION, warnings)),
        evaluations=tuple(_evaluations(folder, warnings)),
        warnings=tuple(warnings),
    )


def _marks_of_metrics(curves: Curves) -> list[Mark]:
    """Restarts and skipped steps of a run without a ledger."""
    found = [Mark(step, "restart", "restarted") for step in curves.restarts]
    found += [Mark(step, "skip", "step skipped") for step in curves.skips]
    return sorted(found, key=lambda mark: mark.step)


# The head of the page


def _recipe(value: Mapping[str, Any] | None, warnings: list[str]) -> Recipe | None:
    if value is None:
        return None
    try:
        return Recipe.from_record(value)
    except ValidationError as error:
        warnings.append(f"recipe.json is not one that this version understands: {first_problem(error)}")
        return None


def _split(words: str) -> tuple[str, str]:
    """ "tokens       52 x 6 = 312" -> ("tokens", "52 x 6 = 312")"""
    name, _, value = words.partition("  ")
    return name.strip(), value.strip()


def _status(done: int, planned: int | None, ended: bool) -> str:
    if ended:
        return f"complete: {done:,} steps"
    return f"{done:,} steps done" if planned is None else f"not finished: {done:,} of {planned:,} steps done"


def _identity(
    folder: Path,
    recipe_json: Mapping[str, Any] | None,
    recipe: Recipe | None,
    entries: Sequence[Entry],
    points: Sequence[SavedCheckpoint],
) -> list[tuple[str, str]]:
    starts = [entry for entry in entries if entry["kind"] in ("start", "resume")]
    versions = dict.fromkeys(str(entry["environment"].get("weftrain", "?")) for entry in starts)
    datasets = dict.fromkeys(entry["dataset_id"] for entry in starts)
    counted = [point for point in points if point.abandoned is None]
    found = [("run", real_path(folder).name)]
    if recipe is not None:
        found.append(("recipe", recipe.name))
    if recipe_json is not None:
        found.append(("recipe SHA-256", sha256_json(recipe_json)))
    found += [("dataset id", name) for name in datasets]
    found.append(("weftrain", ", ".join(versions) or "not recorded"))
    if counted:
        found.append((f"root of the last checkpoint (step {counted[-1].step:,})", counted[-1].root))
    if entries:
        found.append((f"ledger head ({len(entries):,} lines)", str(entries[-1]["hash"])))
    if (folder / RELEASE).exists():
        from weftrain.exchange.release.release import BUNDLE, SIGNATURE, read_release  # brings torch

        release = read_release(folder)
        signatures = [name for name in (BUNDLE, SIGNATURE) if (folder / name).exists()]
        signed = f"signed in {' and '.join(signatures)}" if signatures else "not signed"
        found += [
            ("release root", release.root),
            ("released by", f"weftrain {release.weftrain}; {signed}; check it with weftrain verify"),
            ("licence of the weights", release.licences.weights),
            *((f"licence of {name}", licence) for name, licence in sorted(release.licences.data.items())),
        ]
    return found


def _tiles(curves: Curves, p50: float | None, found: Sequence[Mark]) -> list[tuple[str, str, str]]:
    """The few figures at the head: name, value, what it is."""
    tiles = []
    losses = curves.own.training["loss"]
    finite = np.flatnonzero(np.isfinite(losses.values))
    if len(finite):
        (first, start), (last, loss) = ((losses.steps[place], losses.values[place]) for place in finite[[0, -1]])
        tiles.append(("training loss", f"{loss:.4f}", f"at step {last:,}; {start:.4f} at step {first:,}"))
    for name, points in sorted(curves.own.heldout.items())[:2]:
        tiles.append((f"held-out {name}", f"{points.values[-1]:.4f}", f"loss at step {points.steps[-1]:,}"))
    if curves.last_step is not None and (tokens := curves.last_step.get("tokens")) is not None:
        tiles.append(("tokens", _short(tokens), f"{tokens:,} trained on"))
    if p50 is not None:
        tiles.append(("tokens/s", _short(p50), "median after the first tenth"))
        if (used := curves.utilization.result()) is not None:
            share, peak = used
            tiles.append(
                ("MFU", f"{share:.2%}", f"of {(peak.flops or 0) / 1e12:,.3g} TFLOP/s, the highest peak measured")
            )
    if curves.alerts:
        step, words = curves.alerts[-1]
        tiles.append(("alerts", f"{len(curves.alerts):,}", f"the last at step {step:,}: {words}"))
    # A skipped step that a rollback or restart went back behind is none of the run's steps.
    counted = [mark.kind for mark in found if not (mark.kind == "skip" and mark.abandoned)]
    counts = {kind: counted.count(kind) for kind in ("restart", "rollback", "skip")}
    tiles.append(
        (
            "incidents",
            str(sum(counts.values())),
            ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items()),
        )
    )
    return tiles


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):,.3g} {letter}"
    return f"{value:,.0f}"


# Analyses


def _evaluations(folder: Path, warnings: list[str]) -> list[EvaluationRecord]:
    """The intact records by task and step."""
    found = []
    for path in sorted(records_folder(folder).glob("[0-9]*.json")):
        try:
            found.append(read_record(path))
        except DataError as error:
            warnings.append(f"left out: {error}")
    return sorted(
        found, key=lambda record: (str(record.get("task")), whole(record.get("step")) or 0, str(record.get("shots")))
    )


def read_matrices(folder: Path, warnings: list[str]) -> list[Matrix]:
    """A matrix for each set of parameters under analyses/memorization; damaged results are left out with a warning."""
    paths = sorted(folder.glob("k*_l*/step_*/*.json"))
    if not paths:
        return []
    from weftrain.analysis.memorization.scores import MemorizationResult, result_path  # brings torch

    sets: dict[str, list[MemorizationResult]] = {}
    for path in paths:
        try:
            result = read_json_model(path, MemorizationResult, "record", follow=False)
            if path != result_path(folder, result.parameters, result.step, result.chunk):
                raise ValueError("is of other inputs than its name says")
            sets.setdefault(result.parameters.folder_name, []).append(result)
        except (OSError, ValueError) as error:
            warnings.append(f"left out: {path}: {one_line(error, 200)}: measure it again, or remove the file")
    return [_matrix(results) for _, results in sorted(sets.items())]


def _matrix(results: Sequence[Any]) -> Matrix:
    """results: of one set of parameters. Chunks in the run's reading order, then held-out sets and samples."""
    used = results[0].parameters
    order = sorted({(one.first_step is None, one.first_step or 0, one.chunk) for one in results})
    cells = {
        (one.root, one.chunk): Cell(one.extractible_percent, one.mean_score, len(one.matches), one.relation)
        for one in results
    }
    words = (
        f"k = {used.prompt_tokens}, l = {used.continuation_tokens}, up to {used.samples:,} rows a chunk, seed "
        f"{used.seed}"
    )
    return Matrix(
        words, tuple(sorted({(one.step, one.root) for one in results})), tuple(chunk for *_, chunk in order), cells
    )
