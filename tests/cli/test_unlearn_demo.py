"""The demonstration of unlearning in docs/safety.md from end to end, cut in width and steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from weftrain.cli import demo_facts
from weftrain.cli.main import main
from weftrain.data_prep.tokens.training import train_encoder

SMALL = ["model.hidden_size=64", "model.num_layers=2", "model.intermediate_size=176", "model.rotary_dim=16"]
SMALL += ["model.vocab_size=416", "log.tensorboard=false", "precision.compute=float32", "backend.options.threads=1"]
SMALL += ["data.sequence_length=128", "model.max_position_embeddings=128", "log.evaluate_rows=16"]


def do(*words: object) -> None:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output


def sources(*named: str) -> str:
    listed = ", ".join(
        f"{{name: {name}, path: {path}, weight: 0.5}}" for name, path in (one.split("=") for one in named)
    )
    return f"data.sources=[{listed}]"


def test_the_facts_of_both_sets_are_all_different() -> None:
    forget, keep = demo_facts.facts()
    assert len({*forget, *keep}) == 2 * demo_facts.FACTS
    assert not {fact.split()[3] for fact in forget} & {fact.split()[3] for fact in keep}  # the places


@pytest.mark.prove
def test_one_set_of_facts_is_forgotten_and_the_other_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = CliRunner().invoke(demo_facts.main, [str(tmp_path / "facts")])
    assert made.exit_code == 0, made.output
    tokenizer, runs, data = tmp_path / "tokenizer.json", tmp_path / "runs", tmp_path / "datasets"
    files = {name: tmp_path / "facts" / f"{name}.jsonl" for name in ("forget", "keep")}
    tokenizer.write_bytes(train_encoder([file.read_text() for file in files.values()], 384).data)
    for name, file in files.items():
        shared = ["--tokenizer", tokenizer, "--output", data, "--heldout-fraction", 0.1, "--workers", 1]
        do("prep", file, "--name", name, "--sequence-length", 128, *shared)
    place = ["--runs", runs, *SMALL, f"data.root={data}"]
    batch = ["batch.global_batch_size=8", "batch.micro_batch_size=8", "schedule.steps=150"]
    do("train", "amber_demo", "--run", "unlearn_demo_before", *place, *batch, sources("a=forget", "b=keep"))
    rmu = ["objective.layer=0", "objective.steering=20.0"]
    do("train", "unlearn_demo", *place, *rmu, sources("facts_to_forget=forget", "facts_to_keep=keep"))
    lines = [json.loads(line) for line in (runs / "unlearn_demo" / "metrics.jsonl").read_text().splitlines()]
    held = {(line["step"], line["set"]): line["loss"] for line in lines if line["kind"] == "evaluation"}
    assert held[40, "facts_to_forget"] > held[0, "facts_to_forget"] + 2
    assert held[40, "facts_to_keep"] < held[0, "facts_to_keep"] + 0.2
