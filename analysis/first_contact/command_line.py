"""What a person types, on the device: prepare, train, release, verify, replay."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from weftrain.analysis.first_contact.conditions import TINY, Conditions
from weftrain.analysis.first_contact.findings import Answer, Findings

PROGRAM = (sys.executable, "-m", "weftrain.cli")
_LIMIT_S = 100
_SMALL = (
    "model.vocab_size=512",
    "model.max_position_embeddings=64",
    "data.sources=[{name: words, path: words, weight: 1}]",
    "data.sequence_length=64",
    "batch.global_batch_size=4",
    "batch.micro_batch_size=2",
    "data.chunks=2",
    "schedule.steps=4",
    "checkpoint.every_steps=0",
    "log.evaluate_every_steps=2",
    "log.evaluate_rows=4",
    "log.tensorboard=false",
)
_DRY = (
    *(item for item in TINY if not item.startswith("data.")),
    "model.rotary_dim=4",
    "model.mup.base_hidden_size=16",
    "backend.options.threads=1",
)


def command_line(conditions: Conditions, findings: Findings) -> None:
    """The product's own path from text to a release whose links are trained again, each as a command of its own."""
    folder = conditions.scratch()
    texts, data, runs, released = (str(folder / name) for name in ("texts", "data", "runs", "release"))
    _write_texts(Path(texts))
    run = f"{runs}/crystal_demo"
    train = ["train", "crystal_demo", *_SMALL, f"data.root={data}", f"backend.options.device={conditions.device}"]
    train += ["--runs", runs, *(_DRY if conditions.dry else ())]
    prep = ["prep", texts, "--output", data, "--name", "words", "--sequence-length", "64", "--vocab-size", "400"]
    commands = {
        "prep": [*prep, "--heldout-fraction", "0.1"],
        "train": train,
        "the same command again: complete": train,
        "release": ["release", run, "--to", released, "--licence", "Apache-2.0"],
        "verify": ["verify", released],
        "replay, bit for bit": ["replay", released, "--device", conditions.device],
    }
    for name, words in commands.items():
        findings.ask(name, lambda words=words: _said(words))  # type: ignore[misc]


def _said(words: list[str]) -> Answer:
    done = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    details = {"command": " ".join(["weftrain", *words[:2]]), "last_lines": said[-8:]}
    if done.returncode:
        details["why"] = f"exit {done.returncode}: {said[-1] if said else 'it printed nothing'}"
    return Answer(done.returncode == 0, details=details)


def _write_texts(folder: Path) -> None:
    """60 short documents of made-up words, the same each time."""
    generator = random.Random(1)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 6))) for _ in range(80)]
    folder.mkdir(parents=True)
    for number in range(60):
        (folder / f"{number:03d}.txt").write_text(" ".join(generator.choices(words, k=120)) + ".\n")
