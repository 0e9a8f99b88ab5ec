"""`weftrain bench train`: one RESULT line alone, and against another program in turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

TINY = ["model.num_layers=1", "model.vocab_size=300", "data.sequence_length=32", "backend.options.compile=false"]
SHORT = ["--steps", "3", "--warmup", "1"]


def test_result_line(weftrain: Callable[..., Result]) -> None:
    result = weftrain("bench", "train", "bench_70m", *TINY, *SHORT, "--threads", "1")
    assert result.exit_code == 0, result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("RESULT "))
    found = json.loads(line.removeprefix("RESULT "))
    assert found["name"] == "weftrain-local-bfloat16"
    assert (found["steps"], found["threads"]) == (2, 1)
    assert found["tokens_per_second"] == pytest.approx(64 / found["step_ms"] * 1e3, rel=0.01)
    assert 0 < found["model_flops_utilization"] < 1.5
    torch.set_num_threads(2)


def test_against_another_program(weftrain: Callable[..., Result], tmp_path: Path) -> None:
    theirs = {"name": "theirs", "tokens_per_second": 1.0, "step_ms": 1.0, "loss_first": 0.0, "loss_last": 0.0}
    program = tmp_path / "other program.py"
    program.write_text(f"import sys\nassert sys.argv[1:] == ['--flag'], sys.argv\nprint('RESULT ' + {json.dumps(theirs)!r})\n")
    result = weftrain("bench", "train", "bench_70m", *TINY, *SHORT, "--rounds", "1", "--against", f"'{program}' --flag")
    assert result.exit_code == 0, result.output
    assert "ratio of tokens/s:" in result.output
    assert "NOT the same training" in result.output  # its losses are invented


def test_a_program_that_fails_is_named(weftrain: Callable[..., Result], tmp_path: Path) -> None:
    program = tmp_path / "broken.py"
    program.write_text("raise SystemExit('no such model')\n")
    result = weftrain("bench", "train", "bench_70m", *TINY, *SHORT, "--rounds", "1", "--against", str(program))
    assert result.exit_code == 2
    assert "its last words: no such model" in result.output
    assert weftrain("bench", "train", "bench_70m", "--steps", "3", "--warmup", "3").exit_code == 2
