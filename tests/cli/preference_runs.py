"""A dataset of preference pairs, a small model to start from, its reference, and runs of DPO against it, by commands."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest
from click.testing import CliRunner, Result

from weftrain.cli.main import main
from weftrain.core.run.speed import Peak
from weftrain.data_prep.tokens.training import train_encoder

T = 32
MODEL = [
    "model.vocab_size=352",
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.rotary_dim=16",
    "model.intermediate_size=64",
    "precision.compute=float32",
    "log.tensorboard=false",
    "backend.options.threads=1",
    "checkpoint.every_steps=2",
]
SMALL = ["schedule.steps=4", "batch.global_batch_size=4", "batch.micro_batch_size=4", "log.evaluate_every_steps=2"]
DPO = ["objective.name=dpo", "objective.beta=0.1", "objective.reference=frozen", f"data.row_length={2 * T}"]
START = "start_from={run: sft, state: weights}"


def record(number: int) -> dict[str, str]:
    return {"prompt": f"What is {number} + 1?", "chosen": f"It is {number + 1}.", "rejected": "Who knows?"}


def do(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def succeed(*words: object) -> str:
    result = do(*words)
    assert result.exit_code == 0, result.output or repr(result.exception)
    return result.output


def make(root: Path, runs: Mapping[str, Sequence[str]] = MappingProxyType({})) -> Path:
    """datasets/pairs, datasets/chosen, runs/sft of a model of one layer, the reference `frozen` of it, and `runs` of
    DPO: their further words.
    """
    (root / "tokenizer.json").write_bytes(train_encoder([json.dumps(record(1))] * 3, 295).data)
    (root / "records.jsonl").write_text("".join(json.dumps(record(number)) + "\n" for number in range(40)))
    for rows in ("pairs", "chosen"):
        words = ["prep", root / "records.jsonl", "--name", rows, "--output", root / "datasets", "--preferences", rows]
        words += ["--sequence-length", T, "--heldout-fraction", 0.3, "--tokenizer", root / "tokenizer.json"]
        succeed(*words, "--workers", 1)
    with pytest.MonkeyPatch.context() as patch:  # a fixture of a module, which the one for tests does not reach
        patch.setattr("weftrain.cli.assembly.measured_peak", lambda device, dtype: Peak(1e11, "known in tests"))
        train(root, "sft", "chosen")
        reference(root)
        for run, words in runs.items():
            succeed(*command(root, run, "pairs", *DPO, START, *words))
    return root


def train(root: Path, run: str, dataset: str, *words: str, steps: int = 4) -> str:
    return succeed(*command(root, run, dataset, *words), f"schedule.steps={steps}")


def command(root: Path, run: str, dataset: str, *words: str) -> list[object]:
    data = [f"data.root={root / 'datasets'}", f"data.sources.0.path={dataset}", f"data.sequence_length={T}"]
    return ["train", "amber_demo", "--run", run, "--runs", root / "runs", *MODEL, *SMALL, *data, *words]


def reference(root: Path, *words: str, of: str = "sft", name: str = "frozen") -> str:
    place = root / "datasets" / "pairs"
    return succeed("data", "reference", place, "--of", root / "runs" / of, "--name", name, *words)
