"""How much of its training data a model can recite: the score of each chunk of a run at each checkpoint.

The first k tokens of a training row are the prompt, l tokens are decoded greedily, and the score is the share of the l
that match the row; a row of score 1 is k-extractible (arXiv 2312.06550, Amber: k = l = 32, 1,000 rows a chunk). A model
continues common text well without having seen it, so compare a chunk's score with that of unseen rows. "Unseen" refers
to the run's steps: with repeated data, an unseen chunk holds rows of an earlier epoch, which `repeated` counts.

One file holds one (checkpoint, chunk) and is written whole, so an interrupted measurement resumes. One checkpoint is in
memory at a time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from weftrain.analysis.evaluation.generation import Generator
from weftrain.core.data import TokenSource
from weftrain.core.errors import DataError, one_line
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json
from weftrain.core.formats.checkpoint_manifest import folder_name
from weftrain.core.formats.plain_file import open_plain, read_plain
from weftrain.core.formats.strict_model import Count, PositiveInt, StrictModel, validated
from weftrain.core.order import feistel
from weftrain.core.order.batch import EvaluationSource
from weftrain.core.run.run_source import RunSource

FORMAT = "weftrain-memorization"
BATCH_SIZE = 128  # rows decoded together; not an option, because it changes the last bits of logits
MAX_LINE_BYTES = 1 << 20

Kind = Literal["training", "heldout", "sample"]
Relation = Literal["just seen", "earlier", "partly seen", "unseen", "unknown"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Parameters(StrictModel):
    """prompt_tokens is k, continuation_tokens l. samples: of each chunk; a smaller chunk is taken whole."""

    prompt_tokens: PositiveInt = 32
    continuation_tokens: PositiveInt = 32
    samples: PositiveInt = 1000
    seed: Count = 0

    @property
    def folder_name(self) -> str:
        return f"k{self.prompt_tokens}_l{self.continuation_tokens}_samples{self.samples}_seed{self.seed}"

    @property
    def row_tokens(self) -> int:
        return self.prompt_tokens + self.continuation_tokens


class MemorizationResult(StrictModel):
    """The file of one (checkpoint, chunk). matches[i]: correct tokens, 0..l, of row `sample_numbers[i]`'s continuation.

    sample_numbers: positions in the run's order for a training chunk (core/run/run_source.py), else row numbers in the
    set or file. rows_sha256: of the rows' first k + l ids, little-endian int64. repeated: rows read in an earlier
    epoch.
    """

    format: Literal["weftrain-memorization"]
    version: Literal[1]
    software: dict[str, str]
    step: Count
    root: Sha256  # of the checkpoint
    chunk: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,200}$")]
    kind: Kind
    first_step: Count | None
    stop_step: Count | None
    dataset_id: str
    parameters: Parameters
    sample_numbers: Annotated[tuple[Count, ...], Field(min_length=1, strict=False)]
    repeated: Count
    rows_sha256: Sha256
    matches: Annotated[tuple[Count, ...], Field(min_length=1, strict=False)]
    mean_score: Annotated[float, Field(ge=0, le=1)]
    extractible_percent: Annotated[float, Field(ge=0, le=100)]

    @model_validator(mode="after")
    def _check(self) -> MemorizationResult:
        if len(self.matches) != len(self.sample_numbers):
            raise ValueError(f"{len(self.matches)} matches of {len(self.sample_numbers)} samples")
        if max(self.matches) > self.parameters.continuation_tokens:
            raise ValueError(f"{max(self.matches)} matches of {self.parameters.continuation_tokens} tokens")
        if (self.mean_score, self.extractible_percent) != figures(self.matches, self.parameters.continuation_tokens):
            raise ValueError("mean_score and extractible_percent are not those of the matches")
        return self

    @property
    def scores(self) -> np.ndarray:
        """fp64 [samples], in 0..1."""
        return np.asarray(self.matches, dtype=np.float64) / self.parameters.continuation_tokens

    @property
    def extractible(self) -> np.ndarray:
        """bool [samples]."""
        return np.asarray(self.matches) == self.parameters.continuation_tokens

    @property
    def relation(self) -> Relation:
        return relation(self.step, self.kind, self.first_step, self.stop_step)


def figures(matches: Sequence[int], continuation_tokens: int) -> tuple[float, float]:
    """Mean score in 0..1, and the percentage of rows that are right in every token."""
    whole = sum(match == continuation_tokens for match in matches)
    return sum(matches) / (continuation_tokens * len(matches)), 100 * whole / len(matches)


@dataclass(frozen=True)
class Chunk:
    """Rows that a checkpoint may have been trained on. first_step, stop_step: when the run reads them; None for never.

    read: rows of the chunk counted from 0, int64 [n] -> ids int64 [n, at least k + l]. number: sample number of row 0.
    repeated: how many of the rows the run had read in an earlier epoch.
    """

    name: str
    kind: Kind
    dataset_id: str
    num_rows: int
    read: Callable[[np.ndarray], np.ndarray]
    number: int = 0
    first_step: int | None = None
    stop_step: int | None = None
    repeated: Callable[[np.ndarray], int] | None = None

    def sample(self, parameters: Parameters) -> np.ndarray:
        """The rows to measure, int64, ascending: a function of (seed, name, dataset id, rows, samples).

        The first of a keyed permutation, so a larger sample contains the smaller.
        """
        key = feistel.derive_key("memorization", parameters.seed, self.dataset_id, self.name)
        places = np.arange(min(parameters.samples, self.num_rows), dtype=np.int64)
        return np.sort(feistel.permute(places, self.num_rows, key))


@dataclass(frozen=True)
class LazyCheckpoint:
    """A checkpoint to be measured. load: builds a model with its weights at each call."""

    step: int
    root: str
    load: Callable[[], Generator]


def relation(step: int, kind: Kind, first_step: int | None, stop_step: int | None) -> Relation:
    """What a checkpoint after `step` steps has seen of a chunk that the run reads in steps [first_step, stop_step)."""
    if kind == "sample":
        return "unknown"
    if first_step is None or stop_step is None or first_step >= step:
        return "unseen"
    if stop_step > step:
        return "partly seen"
    return "just seen" if stop_step == step else "earlier"


# Chunks


def training_chunks(run: RunSource, steps: int, checkpoint_steps: Sequence[int]) -> list[Chunk]:
    """The run's chunks in reading order: the recipe's, else the intervals between consecutive checkpoints.

    steps: of the whole run; what lies beyond the last checkpoint is a chunk no checkpoint has seen. checkpoint_steps:
    all of the run's.
    """
    chunks = run.chunks
    if chunks is None:
        ends = sorted({0, *(step for step in checkpoint_steps if step <= steps), steps})
        return [
            _training_chunk(run, f"steps_{first:08d}_{stop:08d}", first, stop)
            for first, stop in itertools.pairwise(ends)
        ]
    each = steps // chunks.count
    return [
        _training_chunk(run, f"chunk_{chunks.chunk_at(p):05d}", p * each, (p + 1) * each) for p in range(chunks.count)
    ]


def _training_chunk(run: RunSource, name: str, first_step: int, stop_step: int) -> Chunk:
    first = run.sample(first_step)

    def read(rows: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [run.at(step).rows(step, row, 1).ids for step, row in map(run.step_of, (first + rows).tolist())]
        )

    def repeated(rows: np.ndarray) -> int:
        places = ((run.at(step), step, row) for step, row in map(run.step_of, (first + rows).tolist()))
        return sum(
            source.locate(step, row).epoch > 0 for source, step, row in places if isinstance(source, TokenSource)
        )

    count = run.sample(stop_step) - first
    return Chunk(name, "training", run.at(first_step).dataset_id, count, read, first, first_step, stop_step, repeated)


def heldout_chunk(held: EvaluationSource) -> Chunk:
    """A held-out set, which no checkpoint of the run saw."""

    def read(rows: np.ndarray) -> np.ndarray:
        return np.concatenate([held.rows(row, 1).ids for row in rows.tolist()])

    return Chunk(f"heldout_{_file_name(held.name)}", "heldout", held.dataset_id, held.num_rows, read)


def sample_chunk(path: Path, parameters: Parameters) -> Chunk:
    """A released sample as a chunk; whether a checkpoint saw it is unknown. Raises DataError."""
    rows = read_released(path)
    found = (len(rows[0].prompt), len(rows[0].continuation))
    if found != (parameters.prompt_tokens, parameters.continuation_tokens):
        raise DataError(
            f"{path}: prompts of {found[0]} tokens and continuations of {found[1]}: measure it with --k {found[0]} --l "
            f"{found[1]}"
        )
    ids = np.array([[*row.prompt, *row.continuation] for row in rows], dtype=np.int64)
    return Chunk(
        f"sample_{_file_name(path.stem)}", "sample", fsops.sha256_file(path), len(ids), lambda numbers: ids[numbers]
    )


def _file_name(name: str) -> str:
    """A name as part of a file's name: other characters are replaced, and a hash keeps two names apart."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:80]
    return plain if plain == name else f"{plain}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


# Released samples


class ReleasedRow(StrictModel):
    """A row of a released sample: its origin, its first k tokens and the l after them."""

    source: str
    prompt: Annotated[tuple[Count, ...], Field(min_length=1, strict=False)]
    continuation: Annotated[tuple[Count, ...], Field(min_length=1, strict=False)]


def read_released(path: Path) -> list[ReleasedRow]:
    """Read a released sample, JSON Lines with one k and one l. Raises DataError naming the line, OSError."""
    rows: list[ReleasedRow] = []
    with open_plain(path) as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                break
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"is longer than {MAX_LINE_BYTES:,} bytes")
                row = validated(ReleasedRow, parse_json(line))
                lengths, wanted = ((len(one.prompt), len(one.continuation)) for one in (row, rows[0] if rows else row))
                if lengths != wanted:
                    raise ValueError(f"has {lengths[0]} + {lengths[1]} tokens, line 1 has {wanted[0]} + {wanted[1]}")
            except ValueError as error:
                raise DataError(f"{path}:{number}: {one_line(error)}; correct the line or remove it") from error
            rows.append(row)
    if not rows:
        raise DataError(f"{path}: holds no rows; name a JSON Lines file of source, prompt and continuation")
    return rows


# Measurement


def count_matches(generator: Generator, ids: np.ndarray, parameters: Parameters) -> list[int]:
    """ids int64 [n, at least k + l] -> for each row, how many of the l greedily decoded tokens match the row.

    Raises DataError for rows that are too short, or ids and lengths that the model does not take.
    """
    k, end = parameters.prompt_tokens, parameters.row_tokens
    if ids.shape[1] < end:
        raise DataError(f"memorization: rows have {ids.shape[1]} tokens, k + l = {end}: take a smaller k or l")
    decoded = generator.generate(ids[:, :k].tolist(), end - k, batch_size=BATCH_SIZE)
    return [int(count) for count in (np.asarray(decoded) == ids[:, k:end]).sum(axis=1)]


def result_path(folder: Path, parameters: Parameters, step: int, chunk_name: str) -> Path:
    """The file of one (checkpoint, chunk): folder/<parameters>/step_NNNNNNNN/<chunk>.json."""
    return folder / parameters.folder_name / folder_name(step) / f"{chunk_name}.json"


def measure(
    folder: Path,
    snapshots: Sequence[LazyCheckpoint],
    chunks: Sequence[Chunk],
    parameters: Parameters,
    report: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> list[MemorizationResult]:
    """Every (checkpoint, chunk), in that order; existing files of the same inputs are read, not measured again.

    A checkpoint is loaded when it is needed and dropped before the next. report: a line for each file measured anew;
    progress(done, of how many, what). Raises DataError, CheckpointError, OSError.
    """
    results: list[MemorizationResult] = []
    total = len(snapshots) * len(chunks)
    for snapshot in snapshots:
        for result in _of_snapshot(folder, snapshot, chunks, parameters, report):
            results.append(result)
            progress(
                len(results),
                total,
                f"step {result.step}, {result.chunk}: {result.extractible_percent:.2f} % extractible",
            )
    return results


def _of_snapshot(
    folder: Path,
    snapshot: LazyCheckpoint,
    chunks: Sequence[Chunk],
    parameters: Parameters,
    report: Callable[[str], None],
) -> Iterator[MemorizationResult]:
    """A function of its own so that the model is freed before the next is loaded."""
    generator: Generator | None = None
    for chunk in chunks:
        path = result_path(folder, parameters, snapshot.step, chunk.name)
        numbers = chunk.sample(parameters)
        ids = np.ascontiguousarray(chunk.read(numbers)[:, : parameters.row_tokens], dtype="<i8")
        inputs: dict[str, Any] = {
            "step": snapshot.step,
            "root": snapshot.root,
            "chunk": chunk.name,
            "kind": chunk.kind,
            "first_step": chunk.first_step,
            "stop_step": chunk.stop_step,
            "dataset_id": chunk.dataset_id,
            "parameters": parameters.model_dump(),
            "sample_numbers": (numbers + chunk.number).tolist(),
            "rows_sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
        }
        result = _stored(path, inputs, report)
        if result is None:
            generator = snapshot.load() if generator is None else generator
            matches = count_matches(generator, ids, parameters)
            repeated = 0 if chunk.repeated is None else chunk.repeated(numbers)
            result = _write(path, inputs, matches, repeated, parameters)
        yield result


def _write(
    path: Path, inputs: dict[str, Any], matches: list[int], repeated: int, parameters: Parameters
) -> MemorizationResult:
    mean_score, extractible_percent = figures(matches, parameters.continuation_tokens)
    software = {"weftrain": importlib.metadata.version("weftrain"), "torch": torch.__version__}
    found: dict[str, Any] = {"matches": matches, "mean_score": mean_score, "extractible_percent": extractible_percent}
    data = canonical_json(
        {"format": FORMAT, "version": 1, "software": software, **inputs, **found, "repeated": repeated}
    )
    fsops.make_dirs(path.parent)
    fsops.write_bytes(path, data + b"\n")
    return MemorizationResult.model_validate(parse_json(data))


def _stored(path: Path, inputs: dict[str, Any], report: Callable[[str], None]) -> MemorizationResult | None:
    """The stored result of these inputs; None where it must be measured."""
    try:
        tree = parse_json(read_plain(path, "record"))
        result = validated(MemorizationResult, tree)
    except FileNotFoundError:
        return None
    except ValueError as error:
        report(f"{path}: damaged, measured anew: {one_line(error)}")
        return None
    if differs := [name for name, value in inputs.items() if tree[name] != value]:
        report(f"{path}: of another {' and '.join(differs)}, measured anew")
        return None
    return result
