"""A small prepared dataset, and a run of three chunks on it, for tests of the record. Made once for a module."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from weftrain.cli.main import main
from weftrain.core.run.speed import Peak

CUT = [
    "model.vocab_size=512",
    "model.num_layers=2",
    "model.hidden_size=48",
    "model.num_heads=3",
    "model.intermediate_size=70",
    "model.max_position_embeddings=16",
    "model.rotary_dim=4",
    "model.mup.base_hidden_size=16",
    "data.sequence_length=13",
    "data.sources=[{name: words, path: words, weight: 1}]",
    "batch.global_batch_size=4",
    "batch.micro_batch_size=2",
    "schedule.steps=6",
    "data.chunks=3",
    "checkpoint.every_steps=0",
    "log.evaluate_every_steps=2",
    "log.evaluate_rows=4",
    "log.tensorboard=false",
    "backend.options.threads=1",  # so small a model on two busy cores is ten times slower with two
]


def weftrain(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.output


def prepare(folder: Path) -> Path:
    """folder/datasets/words, of 60 short made-up documents with a trained tokenizer of a few hundred ids."""
    generator = random.Random(1)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 6))) for _ in range(80)]
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for number in range(60):
        (texts / f"{number:03d}.txt").write_text(" ".join(generator.choices(words, k=60)) + ".\n")
    options = ["--name", "words", "--sequence-length", "13", "--vocab-size", "400", "--heldout-fraction", "0.1"]
    done(weftrain("prep", texts, "--output", folder / "datasets", *options))
    return folder / "datasets"


def trainer(folder: Path) -> Callable[..., Result]:
    """train('schedule.steps=6', '--run', 'x'): crystal_demo cut to width 48 in three chunks, below folder/runs."""

    def train(*arguments: str) -> Result:
        with pytest.MonkeyPatch.context() as patch:  # a fixture that is wider than a test trains too
            patch.setattr("weftrain.cli.assembly.measured_peak", lambda device, dtype: Peak(1e11, "known in tests"))
            return weftrain(
                "train", "crystal_demo", *CUT, f"data.root={folder / 'datasets'}", "--runs", folder / "runs", *arguments
            )

    return train
