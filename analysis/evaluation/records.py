"""An evaluation's record: canonical JSON under RUN/analyses/evaluations, named by the hash of its inputs.

What is there is not computed again. A record holds no clock and no path, so equal evaluations give equal bytes. Another
batch size, precision or device is another evaluation, since it changes the last digits.
"""

from __future__ import annotations

import importlib.metadata
import math
import numbers
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import parse_json, parse_sealed, sealed, sha256_json
from weftrain.core.formats.plain_file import read_plain, real_path
from weftrain.core.run.retention_rule import ARCHIVE

FORMAT = "weftrain-evaluation"
VERSION = 1
FOLDER = Path("analyses", "evaluations")
SEED = 1234  # lm-eval's own for drawing few-shot examples, so that its published scores see the same ones

EvaluationRecord = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class EvaluatedCheckpoint:
    """root: the checkpoint's; None: a state in memory, of which weights_sha256 is the hash. tokenizer_sha256: of
    tokenizer.json, None where no text is involved.
    """

    root: str | None
    step: int
    tokenizer_sha256: str | None = None
    weights_sha256: str | None = None


@dataclass(frozen=True)
class EvaluationSettings:
    """limit: documents (problems, rows) of each task; None: all. include: a folder of task files. evaluation: name of
    the recipe's evaluation that asks for it; None: a person did.
    """

    batch_size: int = 16
    seed: int = SEED
    limit: int | None = None
    precision: str = "float32"
    device: str = "cpu"
    include: Path | None = None
    evaluation: str | None = None


def inputs_of(kind: str, subject: EvaluatedCheckpoint, settings: EvaluationSettings) -> dict[str, Any]:
    """The inputs that every kind of evaluation depends on; each kind adds its own."""
    later = {"weights_sha256": subject.weights_sha256, "evaluation": settings.evaluation}
    return {key: value for key, value in later.items() if value is not None} | {
        "kind": kind,
        "checkpoint": subject.root,
        "step": subject.step,
        "tokenizer_sha256": subject.tokenizer_sha256,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "limit": settings.limit,
        "precision": settings.precision,
        "device": settings.device,
    }


def once(
    folder: Path, inputs: dict[str, Any], name: str, measure: Callable[[], EvaluationRecord], say: Say
) -> EvaluationRecord:
    """The record of these inputs: the stored one, or a new one. Raises what `measure` raises, and OSError.

    measure: returns task, task_version, shots, metric, value, value_percent, stderr, stderr_percent, samples and
    decoding at least; a record of fewer than samples_available is partial.
    """
    if (found := stored(folder, inputs, name, say)) is not None:
        return found
    measured = measure()
    # Where nobody knows how many there are, a limit is taken to have left some out.
    partial = measured.get("samples_available", 0 if inputs["limit"] is None else math.inf) > measured["samples"]
    software = {package: version_of(package) for package in ("weftrain", "lm_eval", "torch", "tokenizers")}
    record = {"format": FORMAT, "version": VERSION, **inputs, **measured, "software": software, "inputs": inputs}
    record |= {"partial": True} if partial else {}
    data = sealed(record)
    fsops.make_dirs(folder)
    fsops.write_bytes(folder / f"{_stem(inputs, name, record['shots'])}.json", data)
    result: EvaluationRecord = parse_json(data)
    return result


def _stem(inputs: Mapping[str, Any], name: str, shots: Any) -> str:
    shown = re.sub(r"[^A-Za-z0-9_.]+", "_", name)[:80]
    shots = "mixed" if isinstance(shots, list) else shots
    return f"{inputs['step']:08d}-{shown}-{shots}-{sha256_json(dict(inputs))[:16]}"


def stored(folder: Path, inputs: dict[str, Any], name: str, say: Say) -> EvaluationRecord | None:
    """The record of these inputs, if it exists and is intact."""
    for path in sorted(folder.glob(f"{_stem(inputs, name, '*')}.json")):
        try:
            return read_record(path, inputs)
        except DataError as error:
            say(f"warning: {error}; it is made again")
    return None


def read_record(path: Path, inputs: Mapping[str, Any] | None = None) -> EvaluationRecord:
    """A record, checked in itself and against its inputs where they are given. Raises DataError."""
    try:
        record = parse_sealed(read_plain(path, "record", follow=False), FORMAT, (VERSION,))
        if inputs is not None and record.get("inputs") != inputs:
            raise ValueError("is of other inputs than its name says")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}: remove the file") from error
    return record


def read_records(folder: Path) -> Iterator[EvaluationRecord]:
    """Every record of a folder, by step and task. Raises DataError for a damaged one."""
    for path in sorted(folder.glob("[0-9]*.json")):
        yield read_record(path)


def records_folder(run: Path) -> Path:
    """The folder for records of a run or of one of its checkpoints or archives; their own folders hold none."""
    if (run / "manifest.json").exists():
        within = real_path(run).parent.name in ("checkpoints", ARCHIVE)
        run = real_path(run).parent.parent if within else real_path(run).parent
    return run / FOLDER


def number(value: float) -> float | str:
    """The value for JSON, which has no infinity: "inf", "-inf" and "nan", as in metrics.jsonl."""
    return float(value) if math.isfinite(value) else ("nan" if math.isnan(value) else "inf" if value > 0 else "-inf")


def score_fields(value: float, stderr: Any, metric: str) -> EvaluationRecord:
    """The fields of one score; in percent too where the metric is a share. stderr: whatever the harness states."""
    deviation = float(stderr) if isinstance(stderr, numbers.Real) and math.isfinite(stderr) else None
    share = is_share(metric)
    return {
        "value": number(value),
        "value_percent": round(100 * value, 6) if share else None,
        "stderr": deviation,
        "stderr_percent": round(100 * deviation, 6) if share and deviation is not None else None,
    }


def is_share(metric: str) -> bool:
    """Whether lm-eval's metric of this name is a share of one; bleu (a percentage) and perplexity are not."""
    shares = metric in ("acc", "exact_match", "pct_stereotype") or metric.endswith("_share")
    return shares or metric.startswith(("acc_", "pass@"))


def version_of(package: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
