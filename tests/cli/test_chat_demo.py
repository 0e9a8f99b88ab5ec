"""docs/chat-demo.md from end to end, cut in width and steps: the win rate, the margin and what is said move."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from weftrain.cli import demo_chats
from weftrain.cli.main import main
from weftrain.data_prep.tokens.training import train_encoder

SMALL = ["model.hidden_size=64", "model.num_layers=2", "model.intermediate_size=176", "model.rotary_dim=16"]
SMALL += ["model.vocab_size=1056", "log.tensorboard=false", "precision.compute=float32", "backend.options.threads=1"]


def do(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.prove
def test_the_demonstration_teaches_what_is_preferred(tmp_path: Path) -> None:
    made = CliRunner().invoke(demo_chats.main, ["make", str(tmp_path / "chats")])
    assert made.exit_code == 0, made.output
    said = [(tmp_path / "chats" / name).read_text() for name in ("conversations.jsonl", "preferences.jsonl")]
    tokenizer, runs, data = tmp_path / "tokenizer.json", tmp_path / "runs", tmp_path / "datasets"
    tokenizer.write_bytes(train_encoder(said, 1024).data)
    shared = ["--tokenizer", tokenizer, "--output", data, "--chat-template", "chatml", "--heldout-fraction", 0.1]
    shared += ["--workers", 1]
    do("prep", tmp_path / "chats" / "conversations.jsonl", "--name", "chat_demo_sft", "--sequence-length", 128, *shared)
    pairs = ["--name", "chat_demo_pairs", "--preferences", "pairs", "--sequence-length", 96]
    do("prep", tmp_path / "chats" / "preferences.jsonl", *pairs, *shared)
    place = ["--runs", runs, *SMALL, f"data.root={data}"]
    do("train", "chat_demo_sft", *place, "start_from=null", "schedule.learning_rate.0.end=3e-3", "schedule.steps=120")
    do("data", "reference", data / "chat_demo_pairs", "--of", runs / "chat_demo_sft")
    wide = ["data.sequence_length=96", "data.row_length=192", "schedule.steps=60", "schedule.learning_rate.0.end=1e-3"]
    do("train", "chat_demo_dpo", *place, *wide)

    words = ["score", data / "chat_demo_pairs", runs / "chat_demo_sft", runs / "chat_demo_dpo", "--json"]
    scored = CliRunner().invoke(demo_chats.main, [str(word) for word in words])
    assert scored.exit_code == 0, scored.output
    before, after = (json.loads(line) for line in scored.output.splitlines() if line.startswith("{"))
    assert after["chosen_likelier"] > 0.9
    assert after["log_ratio"] > before["log_ratio"] + 2
    lines = [json.loads(line) for line in (runs / "chat_demo_dpo" / "metrics.jsonl").read_text().splitlines()]
    held = [line for line in lines if line["kind"] == "evaluation"]
    assert held[0]["reward_margin"] == pytest.approx(0, abs=1e-4)  # the policy is the reference
    assert held[-1]["reward_margin"] > 0.2
    assert held[-1]["reward_accuracy"] > 0.9
