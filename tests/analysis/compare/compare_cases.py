"""Series, runs and records that the tests of comparisons share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from weftrain.analysis.compare.series import (
    MeasureColumn,
    Series,
    SeriesPoint,
)
from weftrain.analysis.evaluation.records import EvaluatedCheckpoint, EvaluationSettings, inputs_of, once
from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.config import Recipe
from weftrain.core.formats.canonical import canonical_json
from weftrain.core.initialization import draw
from weftrain.core.parameters import parameter_specs
from weftrain.core.run.metrics import MetricsWriter

transformers = pytest.importorskip("transformers")


SETTINGS = EvaluationSettings(batch_size=2)


def make_run(
    folder: Path, recipe: Recipe, steps: tuple[int, ...] = (2, 4), losses: Mapping[int, float] | None = None
) -> list[str]:
    """A run's folder with checkpoints of random weights; their roots."""
    roots = []
    for step in steps:
        tensors = {f"weights/{spec.name}": draw(spec, recipe.model, step) for spec in parameter_specs(recipe.model)}
        claims: dict[str, Any] = {
            "recipe": recipe.model_dump(mode="json"),
            "dataset_id": "d",
            "fingerprint": {},
            "kernels": {},
        }
        state = State(step, step, tensors)
        roots.append(checkpoint.save(folder / "checkpoints", state, tokens=0, position=0, parent=None, **claims).root)
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "recipe.json").write_bytes(canonical_json(recipe.model_dump(mode="json")) + b"\n")
    with MetricsWriter(folder) as metrics:
        for step, loss in (losses if losses is not None else {step: 5.0 - step for step in range(1, 5)}).items():
            metrics.step({"step": step, "loss": loss, "skipped": False})
    return roots


def score(folder: Path, root: str, step: int, value: float, **other: Any) -> None:
    """A record of a task's score in a run's folder."""
    inputs = (
        inputs_of("task", EvaluatedCheckpoint(root, step, "t" * 64), SETTINGS)
        | {"task": "arc", "include_sha256": None}
        | other.pop("inputs", {})
    )
    measured: dict[str, Any] = {
        "task": "arc",
        "task_version": "1",
        "shots": 5,
        "metric": "acc",
        "samples": 10,
        "samples_available": 10,
    }
    measured |= {
        "value": value,
        "value_percent": 100 * value,
        "stderr": None,
        "stderr_percent": None,
        "decoding": {"kind": "log_likelihood"},
    }
    once(folder / "analyses" / "evaluations", inputs, "arc", lambda: measured | other, print)


def series(name: str, values: Mapping[int, Mapping[MeasureColumn, float]], **other: Any) -> Series:
    points = tuple(SeriesPoint(step, 10 * step, "c", some) for step, some in values.items())
    return Series(name, "run", Path(name), points, "step x 10", {}, **other)


def save_neox(folder: Path, seed: int, **other: Any) -> Any:
    """A GPT-NeoX of about 4,000 parameters with random weights, as transformers saves it."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    model = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**settings, max_position_embeddings=32, initializer_range=0.5, **other)
    )
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return model.eval().requires_grad_(False)


def save_gpt2(folder: Path, seed: int) -> Any:
    """A GPT-2, whose learned positions weftrain's decoder does not have: it is computed by transformers."""
    torch.manual_seed(seed)
    settings = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 32, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings, initializer_range=0.5))
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return model.eval().requires_grad_(False)


def save_llama(folder: Path, seed: int) -> Any:
    """A Llama of about 4,000 parameters, which weftrain's decoder computes."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**settings, max_position_embeddings=32, initializer_range=0.5)
    )
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return model.eval().requires_grad_(False)
