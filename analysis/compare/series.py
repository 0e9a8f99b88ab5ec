"""A series: one training as points over tokens seen, each with its recorded measures; read from a run or a release.

Everything comes from the record: metrics.jsonl (losses), analyses/evaluations (scores), analyses/memorization; only
means are computed. A `MeasureColumn` is more than a name: two held-out sets called "words" with
different dataset ids, or one task at 0 and at 5 shots, are two columns. Tokens seen follow the ledger where there is
one, because a run may have resumed with another batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from weftrain.analysis.evaluation.records import FOLDER as EVALUATIONS
from weftrain.analysis.evaluation.records import EvaluationRecord, read_record
from weftrain.analysis.memorization.scores import MemorizationResult, figures
from weftrain.core.config import Recipe
from weftrain.core.errors import DataError, ReleaseError, RunFolderError, one_line
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, sha256_json
from weftrain.core.formats.checkpoint_manifest import STEP_FOLDER, read_checkpoint_manifest
from weftrain.core.formats.dataset import read_dataset_manifest
from weftrain.core.formats.reference_file import reference_root, training_id
from weftrain.core.formats.strict_model import read_json_model
from weftrain.core.recipe_file import recorded_recipe
from weftrain.core.run.ledger import read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import Lineage, lineage
from weftrain.core.run.metrics import METRICS, effective_records, rows_label
from weftrain.core.run.run_folder import RECIPE, stored_recipe
from weftrain.exchange.release.release import RELEASE, Release, checked_name, read_release

MEMORIZATION = Path("analyses", "memorization")

Kind = Literal["run", "release", "huggingface"]
MeasureKind = Literal["train loss", "held-out loss", "preference", "score", "memorization"]


@dataclass(frozen=True)
class KindOfMeasure:
    """differing: the note where columns of one name differ in details. axis: label of its panel, "" for none."""

    differing: str
    axis: str


# In the order in which their columns stand in a table.
KINDS: dict[MeasureKind, KindOfMeasure] = {
    "train loss": KindOfMeasure("", ""),
    "held-out loss": KindOfMeasure("held-out losses are over different sets", "loss, nats per token"),
    "preference": KindOfMeasure(
        "preferences are of different pairs or objectives", "loss and rewards, mean over pairs"
    ),
    "score": KindOfMeasure("scores are of different tasks or settings", "score"),
    "memorization": KindOfMeasure("memorization is of different rows or lengths", "memorization"),
}


@dataclass(frozen=True, order=True)
class MeasureColumn:
    """What a number is: `measure` of `name`; `details` (name, text) must be equal for two numbers to be comparable."""

    kind: MeasureKind
    name: str
    measure: str
    details: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        """Unique text: the column's name in compare.json."""
        return canonical_json([self.kind, self.name, self.measure, dict(self.details)]).decode()

    def detail(self, name: str) -> str:
        return dict(self.details).get(name, "")


TRAIN_LOSS = MeasureColumn("train loss", "train", "loss")


@dataclass(frozen=True)
class SeriesPoint:
    """After `step` steps and `tokens` tokens. checkpoint: root or revision; None where only metrics exist."""

    step: int
    tokens: int
    checkpoint: str | None
    values: Mapping[MeasureColumn, float]

    def of(self, kind: MeasureKind) -> dict[MeasureColumn, float]:
        """The values of one kind: loss, scores or memorization."""
        return {column: value for column, value in self.values.items() if column.kind == kind}


@dataclass(frozen=True)
class Series:
    """One training. places: step -> that checkpoint's weights, a path below `folder`. losses: (step, tokens, loss).

    curve: (tokens, smoothed train loss). memorization: the records that belong to the series. tokens_words: how tokens
    follow from steps. positions: the model's maximum; None: not stated. left_out, remarks: notes for people.
    """

    name: str
    kind: Kind
    folder: Path
    points: tuple[SeriesPoint, ...]
    tokens_words: str
    places: Mapping[int, Path]
    vocab_size: int | None = None
    positions: int | None = None
    tokenizer_sha256: str | None = None
    dataset_id: str | None = None
    objective: str = "next_token"
    losses: tuple[tuple[int, int, float], ...] = ()
    log_every_steps: int = 1
    curve: tuple[tuple[int, float], ...] = ()
    memorization: tuple[MemorizationResult, ...] = ()
    left_out: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass
class _Reading:
    """What is gathered while a run or release is read."""

    folder: Path
    name: str
    release: Release | None
    recipe: Recipe
    line: Lineage | None
    values: dict[int, dict[MeasureColumn, float]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    no_ids: str = ""  # why the ids of held-out sets cannot be had from the datasets

    def put(self, step: int, values: Mapping[MeasureColumn, float]) -> None:
        self.values.setdefault(step, {}).update(values)


def read_run(folder: Path, name: str) -> Series:
    """The series of a run or a release; a release's files that are read are checked against release.json.

    Its points have no train loss yet (window.py). Raises RunFolderError, ReleaseError, DataError for damage; a record
    that belongs to no checkpoint of the series is left out and named.
    """
    release = read_release(folder) if (folder / RELEASE).exists() else None
    _hold_to_hashes(folder, release, [folder / file for file in (RECIPE, LEDGER, METRICS)])
    recipe = recorded_recipe(stored_recipe(folder), str(folder / RECIPE)).recipe
    reading = _Reading(folder, name, release, recipe, _line(folder))
    tokens_of, tokens_words = _token_count(recipe, reading.line)
    roots, places, dataset_id = _checkpoints(reading)
    ids, tokenizer = _heldout_ids(reading, dataset_id)
    losses = _losses(reading, ids)
    _scores(reading, roots)
    memorization = _memorization(reading, roots)
    if recipe.start_from is not None:
        reading.remarks.append(
            f"{name} starts from the {recipe.start_from.source}: its tokens are counted from there, without those "
            "seen before"
        )
    named = {step: root for root, step in roots.items()}
    steps = sorted({*named, *reading.values})
    return Series(
        name=name,
        kind="run" if release is None else "release",
        folder=folder,
        points=tuple(
            SeriesPoint(step, tokens_of(step), named.get(step), reading.values.get(step, {})) for step in steps
        ),
        tokens_words=tokens_words,
        places=places,
        vocab_size=recipe.model.vocab_size,
        positions=recipe.model.max_position_embeddings,
        tokenizer_sha256=tokenizer,
        dataset_id=dataset_id,
        objective=recipe.objective.name,
        losses=tuple((step, tokens_of(step), loss) for step, loss in losses),
        log_every_steps=recipe.log.every_steps,
        memorization=memorization,
        left_out=tuple(reading.left_out),
        remarks=tuple(reading.remarks),
    )


def _hold_to_hashes(folder: Path, release: Release | None, paths: Iterable[Path]) -> list[Path]:
    """The files that release.json does not name. Raises ReleaseError for one that has changed."""
    unlisted = []
    for path in paths if release is not None else ():
        entry = release.files.get(path.relative_to(folder).as_posix()) if release is not None else None
        if not path.exists() and entry is None:
            continue
        if entry is None:
            unlisted.append(path)
        elif not path.exists() or fsops.sha256_file(path) != entry.sha256:
            raise ReleaseError(f"{path}: has changed since the release was made (SHA-256 differs): fetch it again")
    return unlisted


# Steps, tokens, checkpoints


def _line(folder: Path) -> Lineage | None:
    entries = read_ledger(folder / LEDGER)
    try:
        return lineage(entries) if entries else None
    except ValueError as error:
        raise RunFolderError(
            f"{folder / LEDGER}: {error}: the ledger contradicts itself: restore it from a copy"
        ) from error


def _token_count(recipe: Recipe, line: Lineage | None) -> tuple[Callable[[int], int], str]:
    """step -> tokens seen after it, and the arithmetic in words."""
    batch, length = recipe.batch.global_batch_size, recipe.data.sequence_length
    words = f"step x {batch:,} x {length:,} = step x {batch * length:,}"
    segments = line.segments if line is not None else ()
    rates = [one.tokens_per_step for one in segments]
    if line is None or set(rates) <= {batch * length}:
        return lambda step: step * batch * length, words
    pieces = ", ".join(
        f"{rate:,} a step from step {one.first_step:,}" for rate, one in zip(rates, segments, strict=True)
    )
    return line.tokens_read, f"by the ledger, whose recipe changed: {pieces}"


def _checkpoints(reading: _Reading) -> tuple[dict[str, int], dict[int, Path], str | None]:
    """Root -> step of the checkpoints, step -> folder of those whose weights are here, and the training data's id.

    The ledger says which count; a checkpoint older than the ledger counts by its manifest. Weights are not read.
    """
    line = reading.line
    roots = {point.root: point.step for point in line.checkpoints} if line is not None else {}
    dataset_id = line.segments[-1].dataset_id if line is not None and line.segments else None
    begins = line.segments[0].first_step if line is not None and line.segments else math.inf
    places: dict[int, Path] = {}
    inside = reading.folder / "checkpoints"
    for path in sorted(inside.iterdir()) if inside.is_dir() else ():
        if not STEP_FOLDER.fullmatch(path.name):
            continue
        try:
            manifest = read_checkpoint_manifest(path)
        except (OSError, ValueError) as error:
            reading.left_out.append(f"{reading.name}: {path.name}: manifest.json: {error}")
            continue
        if manifest["root"] not in roots and manifest["step"] <= begins:
            roots[manifest["root"]] = manifest["step"]
        if roots.get(manifest["root"]) == manifest["step"]:
            places[manifest["step"]] = path.relative_to(reading.folder)
            dataset_id = dataset_id or manifest["dataset_id"]
        else:
            reading.left_out.append(
                f"{reading.name}: {path.name}: the checkpoint {manifest['root'][:12]} is not on the ledger's line"
            )
    return roots, places, dataset_id


def _heldout_ids(reading: _Reading, dataset_id: str | None) -> tuple[dict[str, str], str | None]:
    """Source -> id of its held-out set, and the tokenizer's SHA-256; only while the datasets are unchanged."""
    data = reading.recipe.data
    if not data.sources:
        return {}, None
    root = Path(data.root) if reading.release is None else reading.folder / "data"
    try:
        folders = [root / checked_name(source.path) for source in data.sources]
        if missing := [folder for folder in folders if not folder.is_dir()]:
            raise DataError(f"{missing[0]} is not there")
        manifests = [read_dataset_manifest(folder) for folder in folders]
        ids = [manifest.train.id for manifest in manifests]
        name = reading.recipe.objective.reference
        roots = [] if name is None else [reference_root(folder, name) for folder in folders]
        if dataset_id not in (None, training_id(ids, roots)):
            raise DataError(f"{root} holds other data by now than the run was trained on")
    except (DataError, ReleaseError) as error:
        reading.no_ids = str(error)
        return {}, None
    tokenizers = {manifest.tokenizer_sha256 for manifest in manifests}
    found = {
        source.name: one.heldout.id
        for source, one in zip(data.sources, manifests, strict=True)
        if one.heldout is not None
    }
    return found, tokenizers.pop() if len(tokenizers) == 1 else sha256_json(sorted(tokenizers))


# Losses


def heldout_column(
    name: str, dataset_id: str, tokens: int, within_documents: bool, rows: object = None, available: object = None
) -> MeasureColumn:
    """Held-out loss over `tokens` tokens; other rows or another attention mask make another column."""
    details = {
        "dataset_id": dataset_id,
        "rows": rows_label(rows, available),
        "tokens": f"{tokens:,}",
        "attention": "within documents" if within_documents else "across documents",
    }
    return MeasureColumn("held-out loss", name, "loss", tuple(details.items()))


def _of_pairs(
    column: MeasureColumn, objective: Mapping[str, Any], values: Mapping[str, float]
) -> dict[MeasureColumn, float]:
    """What was measured of a set of pairs. column: the set's, as one of held-out loss. objective: its section."""
    words = ", ".join(f"{key} {value}" for key, value in sorted(objective.items()))
    details = (*column.details, ("objective", words))
    return {MeasureColumn("preference", column.name, name, details): value for name, value in values.items()}


def _losses(reading: _Reading, ids: Mapping[str, str]) -> list[tuple[int, float]]:
    """Store the held-out losses; return (step, loss) of training without skipped or non-finite steps."""
    losses, unknown = [], False
    for record in effective_records(reading.folder):
        if record["kind"] == "step" and not record.get("skipped") and math.isfinite(record["loss"]):
            losses.append((record["step"], float(record["loss"])))
        elif record["kind"] == "evaluation":
            dataset_id = record.get("dataset_id") or ids.get(record["set"])
            if dataset_id is None:
                dataset_id, unknown = f"unknown, of {reading.name}", True
            rows, within = (record.get("rows"), record.get("rows_available")), reading.recipe.data.document_attention
            column = heldout_column(record["set"], dataset_id, record.get("tokens", 0), within, *rows)
            if measured := [name for name in reading.recipe.objective.measures if name in record]:
                found = {name: float(record[name]) for name in ("loss", *measured)}
                reading.put(record["step"], _of_pairs(column, reading.recipe.objective.model_dump(), found))
            else:
                reading.put(record["step"], {column: float(record["loss"])})
    if unknown:
        why = reading.no_ids or "the recipe's datasets have no such set"
        reading.remarks.append(
            f"{reading.name}: the ids of its held-out sets are unknown, so they share no column with others': {why}"
        )
    return sorted(losses)


# Records


def _record_files(reading: _Reading, folder: Path, pattern: str) -> list[Path]:
    paths = [
        path for path in sorted((reading.folder / folder).glob(pattern)) if path.is_file() and not path.is_symlink()
    ]
    for path in _hold_to_hashes(reading.folder, reading.release, paths):
        reading.remarks.append(
            f"{reading.name}: {path.relative_to(reading.folder)} is not in release.json: it was added since"
        )
    return paths


def _scores(reading: _Reading, roots: Mapping[str, int]) -> None:
    found: dict[tuple[int, MeasureColumn], list[tuple[EvaluationRecord, float]]] = {}
    for path in _record_files(reading, EVALUATIONS, "[0-9]*.json"):
        try:
            record = read_record(path)
        except DataError as error:
            reading.left_out.append(f"{reading.name}: {error}")
            continue
        if _foreign(reading, path, record["checkpoint"], record["step"], roots):
            continue
        for column, value in record_values(record, reading.recipe.data.document_attention).items():
            found.setdefault((record["step"], column), []).append((record, value))
    for (step, column), records in found.items():
        # One score, computed in several ways: fp32 before others, then whichever hash comes first.
        chosen = min(records, key=lambda one: (one[0]["precision"] != "float32", one[0]["root"]))
        if len({value for _, value in records}) > 1:
            settings = ", ".join(
                f"{one['precision']} on {one['device']}, {one['batch_size']} at once: {value:g}"
                for one, value in records
            )
            reading.remarks.append(
                f"{reading.name}: step {step}, {column.name}: {len(records)} records ({settings}); shown is "
                f"{chosen[1]:g}"
            )
        reading.put(step, {column: chosen[1]})


def _foreign(reading: _Reading, path: Path, root: str, step: int, roots: Mapping[str, int]) -> bool:
    """Whether a record belongs to no checkpoint of the series; it is then noted as left out."""
    if roots.get(root) == step:
        return False
    where = path.relative_to(reading.folder)
    reading.left_out.append(
        f"{reading.name}: {where}: of checkpoint {root[:12]} at step {step}, which is none of the series'"
    )
    return True


def record_values(record: EvaluationRecord, within_documents: bool) -> dict[MeasureColumn, float]:
    """The columns of an evaluation's record with their values: in percent where the metric is a share of one."""
    if record["kind"] == "heldout":
        rows = (record["samples"], record.get("samples_available"))
        column = heldout_column(record["set"], record["dataset_id"], record["tokens"], within_documents, *rows)
        if (objective := record.get("objective")) is not None:
            return _of_pairs(column, objective, {name: float(one["value"]) for name, one in record["metrics"].items()})
        return {column: float(record["value"])}
    percent = record["value_percent"]
    details = {
        "version": str(record["task_version"]),
        "shots": ",".join(map(str, record["shots"])) if isinstance(record["shots"], list) else str(record["shots"]),
        "samples": f"{record['samples']:,}" + (" (partial)" if record.get("partial") else ""),
        "decoding": canonical_json(record["decoding"]).decode(),
        "include": str(record.get("include_sha256") or ""),
    }
    measure = f"{record['metric']}, %" if percent is not None else record["metric"]
    column = MeasureColumn("score", record["task"], measure, tuple(details.items()))
    return {column: float(record["value"] if percent is None else percent)}


def _memorization(reading: _Reading, roots: Mapping[str, int]) -> tuple[MemorizationResult, ...]:
    results: dict[int, list[MemorizationResult]] = {}
    for path in _record_files(reading, MEMORIZATION, "k*_l*_samples*_seed*/step_*/*.json"):
        try:
            result = read_json_model(path, MemorizationResult, "record")
        except (OSError, ValueError) as error:
            reading.left_out.append(
                f"{reading.name}: {path.relative_to(reading.folder)}: damaged: {one_line(error, 120)}"
            )
            continue
        if not _foreign(reading, path, result.root, result.step, roots):
            results.setdefault(result.step, []).append(result)
    for step, some in results.items():
        reading.put(step, memorization_values(some))
    repeated = sorted(
        {one.chunk for some in results.values() for one in some if one.relation == "unseen" and one.repeated}
    )
    if repeated:
        reading.remarks.append(
            f"{reading.name}: not yet seen, but for rows that an earlier epoch had: {', '.join(repeated)}"
        )
    return tuple(one for some in results.values() for one in some)


def memorization_values(results: Sequence[MemorizationResult]) -> dict[MeasureColumn, float]:
    """For one checkpoint: extractible percent and mean score over rows trained on, not yet seen, and of other sets.

    Chunks that it has partly seen are in none of them.
    """
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[MemorizationResult]] = {}
    for result in results:
        parameters = result.parameters
        details = {
            "k": str(parameters.prompt_tokens),
            "l": str(parameters.continuation_tokens),
            "samples": str(parameters.samples),
            "seed": str(parameters.seed),
        }
        if result.kind != "training":
            groups.setdefault((result.chunk, (*details.items(), ("dataset_id", result.dataset_id))), []).append(result)
        elif result.relation in ("just seen", "earlier", "unseen"):
            name = "not yet seen" if result.relation == "unseen" else "trained on"
            groups.setdefault((name, tuple(details.items())), []).append(result)
    values = {}
    for (name, details_), some in groups.items():
        matches = [match for result in some for match in result.matches]
        score, percent = figures(matches, some[0].parameters.continuation_tokens)
        values[MeasureColumn("memorization", name, "extractible, %", details_)] = percent
        values[MeasureColumn("memorization", name, "mean score", details_)] = score
    return values


def with_values(series: Series, values: Mapping[int, Mapping[MeasureColumn, float]]) -> Series:
    """The series with further values of its points, by step."""
    points = tuple(replace(point, values={**point.values, **values.get(point.step, {})}) for point in series.points)
    return replace(series, points=points)
