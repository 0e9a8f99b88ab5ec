"""Chunks, results and random models that the tests of memorization share."""

from __future__ import annotations

from typing import Any

import numpy as np

from weftrain.analysis.evaluation.generation import Generator, load_model
from weftrain.analysis.memorization import scores as memorization
from weftrain.analysis.memorization.scores import Chunk, MemorizationResult, Parameters
from weftrain.core.initialization import draw as initial_value
from weftrain.core.model_config import ModelConfig
from weftrain.core.parameters import parameter_specs

K, L = 6, 8
PARAMETERS = Parameters(prompt_tokens=K, continuation_tokens=L, samples=8, seed=0)


ROOTS = ("a" * 64, "b" * 64)


def random_generator(config: ModelConfig, seed: int) -> Generator:
    return Generator(
        load_model({spec.name: initial_value(spec, config, seed) for spec in parameter_specs(config)}, config)
    )


def chunk_of(rows: np.ndarray, name: str, **fields: Any) -> Chunk:
    return Chunk(name, fields.pop("kind", "training"), "d" * 64, len(rows), lambda numbers: rows[numbers], **fields)


def result_of(
    step: int, matches: list[int], name: str = "c", first: int | None = 0, stop: int | None = 1, **changes: Any
) -> MemorizationResult:
    score, percent = memorization.figures(matches, L)
    fields: dict[str, Any] = {
        "format": "weftrain-memorization",
        "version": 1,
        "software": {},
        "step": step,
        "root": "a" * 64,
    }
    fields |= {
        "chunk": name,
        "kind": "training",
        "first_step": first,
        "stop_step": stop,
        "dataset_id": "d",
        "parameters": PARAMETERS,
    }
    fields |= {"sample_numbers": list(range(len(matches))), "repeated": 0, "rows_sha256": "0" * 64, "matches": matches}
    return MemorizationResult(**{**fields, "mean_score": score, "extractible_percent": percent, **changes})
