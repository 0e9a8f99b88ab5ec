"""What a run's folder, or a release's, says of the run, collected for one page (run_page.py): nothing is trained, loaded or verified.

What a reader would get wrong: metrics.jsonl keeps what a rollback or a crash left. `read_metrics` gives the line that counts; what was left
is found here in the raw lines, before the `resume` that cut it off, so that a page can show it faintly. The folder may be a stranger's:
only the chains and hashes that its readers check are relied upon, and a value of another type than it should have is left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from weftrain.analysis.evaluation_records import read_record, records_folder
from weftrain.analysis.run_ledger import (
    MAX_STEP,
    Band,
    Begun,
    Entered,
    Entry,
    Mark,
    Saved,
    bands,
    begun,
    clock,
    entered,
    followed,
    marks,
    saved,
    whole,
)
from weftrain.core.canonical import parse_json, sha256_json
from weftrain.core.config import Recipe
from weftrain.core.errors import DataError, RunFolderError
from weftrain.core.ledger import LEDGER, read_ledger
from weftrain.core.metrics import METRICS, read_metrics
from weftrain.core.run_folder import stored_recipe

RELEASE = "release.json"
MEMORIZATION = Path("analyses", "memorization")
_MAX_RESULT_BYTES = 64 << 20

MEASURED = ("step", "evaluation")

Record = dict[str, Any]
Points = tuple[tuple[int, float], ...]  # (completed steps, value), ascending; a value may be nan or infinite


@dataclass(frozen=True)
class Trace:
    """One line of a chart. left: why it does not count (a branch); None for the line that does."""

    name: str
    points: Points
    left: str | None = None


@dataclass(frozen=True)
class Cell:
    """How much of a chunk a checkpoint recites: extractible in per cent, mean score in 0..1, over `rows` rows."""

    extractible_percent: float
    mean_score: float
    rows: int
    relation: str


@dataclass(frozen=True)
class Matrix:
    """Memorization of one set of parameters. rows: (step, root); cells: (root, chunk) -> Cell, with holes where nothing was measured."""

    words: str
    rows: tuple[tuple[int, str], ...]
    chunks: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]


@dataclass(frozen=True)
class Left:
    """Measurements that do not count: made before the run went back behind them."""

    words: str
    records: tuple[Record, ...]


@dataclass(frozen=True)
class RunReport:
    """All that the page shows. Pairs are (name, value) as they are read; tiles are the few figures at its head."""

    name: str
    description: str
    status: str
    folder: Path
    identity: tuple[tuple[str, str], ...]
    tiles: tuple[tuple[str, str, str], ...]  # name, value, what it is
    arithmetic: tuple[tuple[str, str], ...]
    last_step: int
    loss: tuple[Trace, ...]
    heldout: tuple[Trace, ...]
    gradient_norm: tuple[Trace, ...]
    learning_rate: tuple[Trace, ...]
    throughput: tuple[Trace, ...]
    tokens_per_second_p50: float | None
    marks: tuple[Mark, ...]
    bands: tuple[Band, ...]
    saved: tuple[Saved, ...]
    begun: tuple[Begun, ...]
    entered: tuple[Entered, ...]
    memorization: tuple[Matrix, ...]
    evaluations: tuple[Record, ...]
    warnings: tuple[str, ...]


def collect(folder: Path, arithmetic: Callable[[Recipe], Sequence[str]]) -> RunReport:
    """Read the run or release in `folder`. arithmetic: a recipe's derived quantities, a line each ("tokens       52 x 6 = 312").

    Raises RunFolderError where the folder holds no run, or its ledger or metrics are damaged; ReleaseError where release.json is. An
    analysis that is damaged is left out, and `warnings` says so.
    """
    entries = read_ledger(folder / LEDGER)
    records = _effective(folder, entries)
    recipe_json = stored_recipe(folder, missing_ok=True)
    if recipe_json is None and not entries and not records:
        raise RunFolderError(f"{folder}: has neither {LEDGER} nor {METRICS} nor recipe.json: name the folder of a run, or a release")
    warnings: list[str] = []
    line = followed(entries, folder / LEDGER)
    steps = [record for record in records if record["kind"] == "step"]
    left = left_records(folder, entries)
    recipe = _recipe(recipe_json, warnings)
    measured = [(clock(record), record["step"]) for record in (*steps, *(one for branch in left for one in branch.records))]
    starts = begun(entries, measured)
    points = saved(entries, folder)
    p50 = _p50(steps)
    planned = None if recipe is None else recipe.schedule.steps
    reached = max([0, *(step for _, step in measured), *(point.step for point in points), *(one.reached for one in starts)])
    found_marks = marks(entries) if entries else _marks_of_metrics(records)
    ended = bool(entries) and entries[-1]["kind"] == "end" and entries[-1]["step"] == planned
    done = max([0, *(record["step"] for record in steps), *(point.step for point in line.checkpoints)])
    return RunReport(
        name=folder.resolve().name,
        description="" if recipe is None else recipe.description,
        status=_status(done, planned, ended),
        folder=folder,
        identity=tuple(_identity(folder, recipe_json, recipe, entries, points)),
        tiles=tuple(_tiles(records, steps, p50, found_marks, starts)),
        arithmetic=tuple(_split(words) for words in arithmetic(recipe)) if recipe is not None else (),
        last_step=max(reached, 1),
        loss=_traces(steps, left, "loss", "training"),
        heldout=_heldout(records, left),
        gradient_norm=_traces(steps, left, "grad_norm", "gradient norm"),
        learning_rate=_learning_rates(steps),
        throughput=_traces(steps, left, "tokens_per_second", "tokens/s"),
        tokens_per_second_p50=p50,
        marks=tuple(found_marks),
        bands=tuple(bands(entries)),
        saved=tuple(points),
        begun=tuple(starts),
        entered=tuple(entered(entries)),
        memorization=tuple(read_matrices(folder / MEMORIZATION, warnings)),
        evaluations=tuple(_evaluations(folder, warnings)),
        warnings=tuple(warnings),
    )


# Measurements


def _effective(folder: Path, entries: Sequence[Entry]) -> list[Record]:
    """read_metrics, and beyond a rollback after which the run did not go on yet nothing counts either."""
    records = read_metrics(folder)
    pending = _pending(entries)
    limit = MAX_STEP if pending is None else pending[0]
    return [one for one in records if one["kind"] not in (*MEASURED, "resume") or 0 <= one["step"] <= limit]


def _pending(entries: Sequence[Entry]) -> tuple[int, str] | None:
    """Step and words of the rollbacks since the last start, which no resume in metrics.jsonl tells of yet."""
    found = None
    for entry in entries:
        if entry["kind"] in ("start", "resume"):
            found = None
        elif entry["kind"] == "rollback" and (found is None or entry["step"] < found[0]):
            found = entry["step"], f"branch {entry['branch']}, left by the rollback to step {entry['step']:,}: {entry['reason']}"
    return found


def left_records(folder: Path, entries: Sequence[Entry]) -> list[Left]:
    """Step and evaluation records that a resume, or a rollback that no resume followed yet, went back behind; oldest first.

    The file is one that read_metrics could read. entries: the ledger's, which tell a rollback from a crash.
    """
    if not (folder / METRICS).exists():
        return []
    live: list[Record] = []
    found: list[Left] = []
    rollbacks = [entry for entry in entries if entry["kind"] == "rollback"]
    for line in (folder / METRICS).read_bytes().split(b"\n")[:-1]:
        record = parse_json(line)
        if record["kind"] in MEASURED and 0 <= record["step"] <= MAX_STEP:
            live.append(record)
        elif record["kind"] == "resume" and (gone := _cut(live, record["step"])):
            found.append(Left(_why(rollbacks, record, clock(gone[-1])), tuple(gone)))
    if (pending := _pending(entries)) is not None and (gone := _cut(live, pending[0])):
        found.append(Left(pending[1], tuple(gone)))
    return found


def _cut(live: list[Record], step: int) -> list[Record]:
    """Take what lies beyond `step` off the end of `live`, whose steps ascend."""
    keep = len(live)
    while keep and live[keep - 1]["step"] > step:
        keep -= 1
    gone = live[keep:]
    del live[keep:]
    return gone


def _why(rollbacks: Sequence[Entry], resume: Record, last: float) -> str:
    for entry in rollbacks:
        if entry["step"] == resume["step"] and last <= clock(entry) <= clock(resume):
            return f"branch {entry['branch']}, left by the rollback to step {entry['step']:,}: {entry['reason']}"
    return f"made again after the restart at step {resume['step']:,}"


def _number(value: Any) -> float:
    """A measurement; nan for "nan", and for anything that is none."""
    if isinstance(value, str):
        return {"inf": math.inf, "-inf": -math.inf}.get(value, math.nan)
    plain = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if plain else math.nan


def _traces(steps: Sequence[Record], left: Sequence[Left], key: str, name: str) -> tuple[Trace, ...]:
    """The line that counts first, if it has a point; then what was left."""
    own = Trace(name, _points(steps, key))
    others = (Trace(name, _points([one for one in part.records if one["kind"] == "step"], key), part.words) for part in left)
    return tuple(trace for trace in (own, *others) if trace.points)


def _points(records: Sequence[Record], key: str) -> Points:
    return tuple((record["step"], _number(record[key])) for record in records if key in record)


def _heldout(records: Sequence[Record], left: Sequence[Left]) -> tuple[Trace, ...]:
    found = []
    for words, part in [(None, records), *((one.words, one.records) for one in left)]:
        sets: dict[str, list[Record]] = {}
        for record in part:
            if record["kind"] == "evaluation":
                sets.setdefault(str(record.get("set")), []).append(record)
        found += [Trace(f"held-out {name}", _points(chosen, "loss"), words) for name, chosen in sorted(sets.items())]
    return tuple(trace for trace in found if trace.points)


def _learning_rates(steps: Sequence[Record]) -> tuple[Trace, ...]:
    """A trace for each parameter group; groups of equal rates throughout are one."""
    groups: dict[str, list[tuple[int, float]]] = {}
    for record in steps:
        rates = record.get("learning_rate")
        for name, rate in rates.items() if isinstance(rates, Mapping) else ():
            groups.setdefault(str(name), []).append((record["step"], _number(rate)))
    alike: dict[Points, list[str]] = {}
    for name, points in groups.items():
        alike.setdefault(tuple(points), []).append(name)
    return tuple(Trace(", ".join(names), points) for points, names in alike.items())


def _p50(steps: Sequence[Record]) -> float | None:
    """Tokens per second as analysis/summary.py defines it: the median over the logged steps after the first tenth."""
    warm = [_number(record.get("tokens_per_second")) for record in steps[len(steps) // 10 :]]
    finite = [value for value in warm if math.isfinite(value)]
    return statistics.median(finite) if finite else None


def _marks_of_metrics(records: Sequence[Record]) -> list[Mark]:
    """A run without a ledger: its metrics tell of restarts and skipped steps."""
    found = []
    for record in records:
        if record["kind"] == "resume":
            found.append(Mark(record["step"], "restart", "restarted"))
        elif record["kind"] == "step" and record.get("skipped") is True:
            found.append(Mark(record["step"], "skip", "step skipped"))
    return found


# The head of the page


def _recipe(value: Mapping[str, Any] | None, warnings: list[str]) -> Recipe | None:
    if value is None:
        return None
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        warnings.append(f"recipe.json is not one that this version understands: key '{'.'.join(map(str, first['loc']))}': {first['msg']}")
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
    folder: Path, recipe_json: Mapping[str, Any] | None, recipe: Recipe | None, entries: Sequence[Entry], points: Sequence[Saved]
) -> list[tuple[str, str]]:
    starts = [entry for entry in entries if entry["kind"] in ("start", "resume")]
    versions = dict.fromkeys(
        str(entry["environment"].get("weftrain", "?")) for entry in starts if isinstance(entry["environment"], Mapping)
    )
    datasets = dict.fromkeys(str(entry["dataset_id"]) for entry in starts)
    counted = [point for point in points if point.left is None]
    found = [("run", folder.resolve().name)]
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
        from weftrain.core.release import SIGNATURE, read_release  # brings torch

        release = read_release(folder)
        signed = "is there" if (folder / SIGNATURE).exists() else "is absent"
        found += [
            ("release root", release.root),
            ("released by", f"weftrain {release.weftrain}; signature.json {signed}; check it with weftrain verify"),
            ("licence of the weights", release.licences.weights),
            *((f"licence of {name}", licence) for name, licence in sorted(release.licences.data.items())),
        ]
    return found


def _tiles(
    records: Sequence[Record], steps: Sequence[Record], p50: float | None, found: Sequence[Mark], starts: Sequence[Begun]
) -> list[tuple[str, str, str]]:
    """The few figures at the head: name, value, what it is."""
    tiles = []
    losses = [(record["step"], _number(record.get("loss"))) for record in steps]
    finite = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    if finite:
        tiles.append(("training loss", f"{finite[-1][1]:.4f}", f"at step {finite[-1][0]:,}; {finite[0][1]:.4f} at step {finite[0][0]:,}"))
    last = {str(one.get("set")): one for one in records if one["kind"] == "evaluation"}
    for name, record in sorted(last.items())[:2]:
        tiles.append((f"held-out {name}", f"{_number(record.get('loss')):.4f}", f"loss at step {record['step']:,}"))
    if steps and (tokens := whole(steps[-1].get("tokens"))) is not None:
        tiles.append(("tokens", _short(tokens), f"{tokens:,} trained on"))
    if p50 is not None:
        tiles.append(("tokens/s", _short(p50), "median after the first tenth"))
        peaks = [_number(one.get("peak_flops")) for one in records if one["kind"] in ("start", "end")]
        flops = [_number(one.get("flops_per_token")) for one in records if one["kind"] in ("start", "end")]
        best = max((pair for pair in zip(peaks, flops, strict=True) if pair[0] > 0 and pair[1] > 0), default=None)
        if best is not None:
            tiles.append(("MFU", f"{p50 * best[1] / best[0]:.2%}", f"of {best[0] / 1e12:,.3g} TFLOP/s, the highest peak measured"))
    counts = {kind: sum(mark.kind == kind for mark in found) for kind in ("restart", "rollback", "skip")}
    tiles.append(
        ("incidents", str(sum(counts.values())), ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items()))
    )
    return tiles


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):,.3g} {letter}"
    return f"{value:,.0f}"


# Analyses


def _evaluations(folder: Path, warnings: list[str]) -> list[Record]:
    """The records that are whole, in the order of task and step."""
    found = []
    for path in sorted(records_folder(folder).glob("[0-9]*.json")):
        try:
            found.append(read_record(path))
        except DataError as error:
            warnings.append(f"left out: {error}")
    return sorted(found, key=lambda record: (str(record.get("task")), whole(record.get("step")) or 0, str(record.get("shots"))))


def read_matrices(folder: Path, warnings: list[str]) -> list[Matrix]:
    """The results under analyses/memorization, a matrix for each set of parameters. A damaged one is left out, with a warning."""
    paths = sorted(folder.glob("k*_l*/step_*/*.json"))
    if not paths:
        return []
    from weftrain.analysis.memorization import Result, result_path  # brings torch

    sets: dict[str, list[Result]] = {}
    for path in paths:
        try:
            if path.is_symlink() or path.stat().st_size > _MAX_RESULT_BYTES:
                raise ValueError("is a link, or larger than a result")
            result = Result.model_validate(parse_json(path.read_bytes()))
            if path != result_path(folder, result.parameters, result.step, result.chunk):
                raise ValueError("is of other inputs than its name says")
            sets.setdefault(result.parameters.folder_name, []).append(result)
        except (OSError, ValueError) as error:
            warnings.append(f"left out: {path}: {' '.join(str(error).split())[:200]}: measure it again, or remove the file")
    return [_matrix(results) for _, results in sorted(sets.items())]


def _matrix(results: Sequence[Any]) -> Matrix:
    """results: of one set of parameters. Chunks in the order in which the run reads them, then held-out sets and samples."""
    used = results[0].parameters
    order = sorted({(one.first_step is None, one.first_step or 0, one.chunk) for one in results})
    cells = {(one.root, one.chunk): Cell(one.extractible_percent, one.mean_score, len(one.matches), one.relation) for one in results}
    words = f"k = {used.prompt_tokens}, l = {used.continuation_tokens}, up to {used.samples:,} rows a chunk, seed {used.seed}"
    return Matrix(words, tuple(sorted({(one.step, one.root) for one in results})), tuple(chunk for *_, chunk in order), cells)
