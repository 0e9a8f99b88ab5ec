"""Measurements for a comparison: the loss over given tokens and the memorization of given rows, for every series.

Each number is stored under the hash of its inputs, so an interrupted comparison resumes. A loss over tokens is
comparable only where an id means the same text to both models: a series with another tokenizer is left out, and an
unknown tokenizer is reported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from weftrain.analysis.compare.huggingface import TOKENIZER, TransformersModel, load_revision, revision_root
from weftrain.analysis.compare.series import (
    MeasureColumn,
    Series,
    SeriesPoint,
    memorization_values,
    record_values,
    with_values,
)
from weftrain.analysis.evaluation.generation import Generator, load_model
from weftrain.analysis.evaluation.heldout import RaggedRows, run_heldout
from weftrain.analysis.evaluation.records import EvaluatedCheckpoint, EvaluationSettings, Say
from weftrain.analysis.memorization.scores import (
    Chunk,
    LazyCheckpoint,
    Parameters,
    measure,
    read_released,
    sample_chunk,
)
from weftrain.core import checkpoint
from weftrain.core.errors import DataError, file_problem
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.plain_file import open_plain, read_plain, real_path
from weftrain.core.formats.shard_set import open_set
from weftrain.core.formats.tokenizer_file import tokenizer_from
from weftrain.core.model import Decoder
from weftrain.core.model_config import ModelConfig
from weftrain.core.order.batch import EvaluationSource
from weftrain.core.order.source_sets import HeldOut
from weftrain.core.recipe_file import recorded_recipe

SAMPLES = 1000
_MAX_LINE_BYTES = 16 << 20
_MAX_ROWS = 1_000_000


@dataclass(frozen=True)
class HeldoutTokens:
    """Tokens for a loss. Ids lie below vocab_size. tokenizer: its file and SHA-256; None: unknown."""

    source: EvaluationSource
    vocab_size: int
    tokenizer: tuple[Path, str] | None


@dataclass(frozen=True)
class Sample:
    """Rows to continue, with the prompt and continuation lengths (k and l)."""

    chunk: Chunk
    parameters: Parameters
    vocab_size: int


@dataclass(frozen=True)
class MeasureRequest:
    """Everything that is to be measured."""

    losses: tuple[HeldoutTokens, ...] = ()
    samples: tuple[Sample, ...] = ()


def open_held(path: Path, rows: int | None = None) -> HeldoutTokens:
    """The held-out set of a dataset's folder, or the rows of an ids.jsonl: a JSON list of ids or {"ids": [..]} a line.

    rows: at most that many, from the first. Raises DataError.
    """
    if path.is_dir():
        manifest, shards = open_set(path, "heldout")
        if manifest.pairs:
            raise DataError(
                f"{path}: holds preference pairs, and a row of two answers is no text to measure a loss on: name a "
                "dataset of `weftrain prep --preferences chosen`; `weftrain eval RUN` measures pairs"
            )
        count = shards.num_rows if rows is None else min(rows, shards.num_rows)
        source = HeldOut(real_path(path).name, shards, count)  # attention across documents, as any model can
        return HeldoutTokens(source, manifest.vocab_size, (path / TOKENIZER, manifest.tokenizer_sha256))
    found = _read_ids(path, _MAX_ROWS if rows is None else rows)
    return HeldoutTokens(RaggedRows(path.stem, found, fsops.sha256_file(path)), 1 + max(map(max, found)), None)


def _read_ids(path: Path, rows: int) -> list[list[int]]:
    found: list[list[int]] = []
    try:
        with open_plain(path) as file:
            while len(found) < rows and (line := file.readline(_MAX_LINE_BYTES + 1)):
                value = parse_json(line) if len(line) <= _MAX_LINE_BYTES else None
                ids = value.get("ids") if isinstance(value, dict) else value
                if (
                    not isinstance(ids, list)
                    or len(ids) < 2
                    or not all(type(one) is int and 0 <= one < 2**31 for one in ids)
                ):
                    raise ValueError("is not a list of two ids or more")
                found.append(ids)
        if not found:
            raise ValueError("there is no row")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}:{len(found) + 1}: {error}: name a prepared dataset's folder, or a file with a JSON list of ids a "
            "line"
        ) from error
    return found


def open_sample(path: Path, samples: int = SAMPLES) -> Sample:
    """A released sample, with the k and l that its rows have. Raises DataError, OSError."""
    row = read_released(path)[0]
    parameters = Parameters(prompt_tokens=len(row.prompt), continuation_tokens=len(row.continuation), samples=samples)
    chunk = sample_chunk(path, parameters)
    return Sample(chunk, parameters, 1 + int(chunk.read(np.arange(chunk.num_rows)).max()))


# Which series can be measured


def why_not(series: Series, held: HeldoutTokens) -> str | None:
    """Why the tokens mean nothing to the series' models; None where they fit, as far as is known."""
    if (problem := _too_large(series, held.vocab_size, held.source.sequence_length)) is not None:
        return problem
    if held.tokenizer is None:
        return None
    path, sha256 = held.tokenizer
    if series.tokenizer_sha256 in (None, sha256):
        return None
    own = series.folder / series.places[min(series.places)] / TOKENIZER if series.places else path
    if series.kind == "huggingface" and _vocabulary(own) == _vocabulary(path):
        return None  # other bytes, the same text for each id
    return (
        f"its tokenizer ({str(series.tokenizer_sha256)[:12]}) is not the one the tokens were made with ({sha256[:12]})"
    )


def why_not_model(path: Path, config: ModelConfig, held: HeldoutTokens) -> str | None:
    """`why_not` of one model of Hugging Face, in the folder `path`."""
    tokenizer = path / TOKENIZER
    sha256 = fsops.sha256_file(tokenizer) if tokenizer.is_file() else None
    positions = config.max_position_embeddings
    one = Series(path.name, "huggingface", path, (), "", {0: Path()}, config.vocab_size, positions, sha256)
    return why_not(one, held)


def _too_large(series: Series, vocab_size: int, length: int) -> str | None:
    if series.vocab_size is not None and vocab_size > series.vocab_size:
        return f"its vocabulary of {series.vocab_size:,} ids does not hold id {vocab_size - 1:,}"
    if series.positions is not None and length > series.positions:
        return f"its {series.positions:,} positions do not hold rows of {length:,} tokens"
    return None


def _vocabulary(path: Path) -> dict[str, int]:
    try:
        data = read_plain(path, "tokenizer")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {file_problem(error)}; put the model's own there") from error
    found: dict[str, int] = tokenizer_from(data, str(path), "put the model's own there").get_vocab(
        with_added_tokens=True
    )
    return found


# Measuring


@dataclass(frozen=True)
class _LoadedModel:
    """A loaded model, as each of the two measurements uses it."""

    decoder: Decoder
    generator: Generator


def measure_series(
    series: Series,
    wanted: MeasureRequest,
    folder: Path,
    settings: EvaluationSettings,
    say: Say = lambda line: None,
    progress: Callable[[str], None] = lambda note: None,
) -> tuple[Series, list[str]]:
    """The series with everything requested, at each point whose weights are here, and notes on what was left out.

    folder: results by checkpoint, so one that two series share is measured once. At most one model is in memory.
    progress: called after each point. Raises CheckpointError, DataError, NonFiniteError, OSError.
    """
    notes: list[str] = []
    losses = [
        held
        for held in wanted.losses
        if not _noted(notes, series, f"loss on {held.source.name}", why_not(series, held))
    ]
    samples = [
        one
        for one in wanted.samples
        if not _noted(notes, series, one.chunk.name, _too_large(series, one.vocab_size, one.parameters.row_tokens))
    ]
    for held in losses:
        if held.tokenizer is None or series.tokenizer_sha256 is None:
            notes.append(
                f"{series.name}: loss on {held.source.name}: no tokenizer is known to compare, so only the ids' range "
                "was checked"
            )
    found: dict[int, Mapping[MeasureColumn, float]] = {}
    if losses or samples:
        for point in series.points:
            if point.step in series.places:
                found[point.step] = _measure_point(series, point, losses, samples, folder, settings, say)
                progress(f"{series.name}, step {point.step}")
        if absent := [
            point.step for point in series.points if point.checkpoint is not None and point.step not in series.places
        ]:
            notes.append(f"{series.name}: not measured where the weights are not here: {', '.join(map(str, absent))}")
    return with_values(series, found), notes


def _noted(notes: list[str], series: Series, what: str, why: str | None) -> bool:
    if why is not None:
        notes.append(f"{series.name}: {what}: not measured: {why}")
    return why is not None


def _measure_point(
    series: Series,
    point: SeriesPoint,
    losses: Sequence[HeldoutTokens],
    samples: Sequence[Sample],
    folder: Path,
    settings: EvaluationSettings,
    say: Say,
) -> dict[MeasureColumn, float]:
    """A function of its own so that the model is freed before the next is loaded."""
    path = series.folder / series.places[point.step]
    root = revision_root(path) if series.kind == "huggingface" else str(point.checkpoint)
    folder = folder / root[:16]
    load = functools.cache(functools.partial(_load, series, path, settings.device))
    values: dict[MeasureColumn, float] = {}
    sources = [held.source for held in losses]
    records = run_heldout(
        sources, EvaluatedCheckpoint(root, point.step), settings, lambda: load().decoder, folder / "evaluations", say
    )
    for record in records:
        values.update(record_values(record, within_documents=False))
    snapshot = LazyCheckpoint(point.step, root, lambda: load().generator)
    for sample in samples:
        results = measure(folder / "memorization", [snapshot], [sample.chunk], sample.parameters, say)
        values.update(memorization_values(results))
    return values


def _load(series: Series, path: Path, device: str) -> _LoadedModel:
    if series.kind == "huggingface":
        model: Any = load_revision(path, device)
        if isinstance(model, Decoder):
            return _LoadedModel(model, Generator(model))
        # It does what both are asked for here: TransformersModel's own words say what that is.
        return _LoadedModel(cast(Decoder, model), cast(Generator, cast(TransformersModel, model)))
    state, manifest = checkpoint.load(path)
    recipe = recorded_recipe(manifest["recipe"], f"checkpoint of step {manifest['step']}").recipe
    decoder = load_model(checkpoint.Weights(state.tensors, recipe.tuning.lora), recipe.model, device)
    return _LoadedModel(decoder, Generator(decoder))
