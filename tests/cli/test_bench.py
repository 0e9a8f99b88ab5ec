"""`weftrain bench`: the RESULT line and the report, another program in turns, comparison, sweep, streaming and the data
path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

TINY = ["model.num_layers=1", "model.vocab_size=300", "data.sequence_length=32", "backend.options.compile=false"]
NULL = ["bench_70m", *TINY[:3], "--backend", "null", "--steps", "5"]
SHORT = ["--steps", "5", "--check-steps", "1"]


def test_against_another_program(weftrain: Callable[..., Result], tmp_path: Path) -> None:
    theirs = {"name": "theirs", "tokens_per_second": 1.0, "step_ms": 1.0, "loss_first": 1.0, "loss_last": 0.0}
    program = tmp_path / "other program.py"
    program.write_text(
        f"import sys\nassert sys.argv[1:] == ['--flag'], sys.argv\nprint('RESULT ' + {json.dumps(theirs)!r})\n"
    )
    result = weftrain("bench", "train", *NULL, "--rounds", "1", "--against", f"'{program}' --flag")
    assert result.exit_code == 0, result.output
    assert "ratio of tokens/s:" in result.output
    assert "no interval, so no verdict" in result.output
    assert "NOT the same start" in result.output  # its losses are invented
    assert "theirs does not report which step its loss_last is of" in result.output


def test_a_program_that_fails_is_named(weftrain: Callable[..., Result], tmp_path: Path) -> None:
    program = tmp_path / "broken.py"
    program.write_text("raise SystemExit('no such model')\n")
    result = weftrain("bench", "train", *NULL, "--rounds", "1", "--against", str(program))
    assert result.exit_code == 2
    assert "its last words: no such model" in result.output


def test_a_program_of_other_length_is_refused_after_one_round(weftrain: Callable[..., Result], tmp_path: Path) -> None:
    theirs = {"name": "theirs", "tokens_per_second": 1.0, "step_ms": 1.0, "loss_first": 1.0, "loss_last": 0.0}
    program = tmp_path / "longer.py"
    program.write_text(f"print('RESULT ' + {json.dumps(theirs | {'last_step': 9})!r})\n")
    result = weftrain("bench", "train", *NULL, "--against", str(program))
    assert result.exit_code == 2
    assert "made 5 steps and theirs 9: compare the same number: --steps 9" in result.output
    assert "round 2" not in result.output


@pytest.mark.prove
def test_a_report_with_profile_and_mllog_and_its_comparison(weftrain: Callable[..., Result], tmp_path: Path) -> None:
    for name in ("a", "b"):
        more = ["--profile", str(tmp_path / "profile"), "--mllog", str(tmp_path / "mllog.txt")] if name == "a" else []
        result = weftrain(
            "bench", "train", "bench_70m", *TINY, *SHORT, "--threads", "1", "--report", str(tmp_path / name), *more
        )
        assert result.exit_code == 0, result.output
        (line,) = (line for line in result.output.splitlines() if line.startswith("RESULT "))
        found = json.loads(line.removeprefix("RESULT "))
        assert found["name"] == "bench_70m-local-bfloat16"
        assert (found["steps"] + found["warm_up_steps"], found["threads"], found["correct"]) == (5, 1, True)
        assert found["tokens_per_second"] == pytest.approx(64 / found["step_ms"] * 1e3, rel=0.01)
        assert 0 < found["model_flops_utilization"] < 1.5
    assert json.loads((tmp_path / "profile" / "trace.json").read_bytes())["traceEvents"]
    assert "| operator | calls |" in (tmp_path / "profile" / "operators.md").read_text()
    assert ":::MLLOG" in (tmp_path / "mllog.txt").read_text()
    torch.set_num_threads(2)
    result = weftrain("bench", "compare", str(tmp_path / "a"), str(tmp_path / "b"))
    assert result.exit_code == 0, result.output
    assert "step time B / A = " in result.output
    assert "of one round each" in result.output
    assert weftrain("bench", "compare", str(tmp_path / "a")).exit_code == 2
    missing = weftrain("bench", "compare", str(tmp_path / "a"), str(tmp_path / "none"))
    assert (missing.exit_code, "is not there" in missing.output) == (2, True)


def test_a_sweep_that_cannot_be(weftrain: Callable[..., Result], tmp_path: Path) -> None:
    result = weftrain("bench", "sweep", "bench_70m", "--vary", "seed", "--to", str(tmp_path))
    assert (result.exit_code, "give KEY=VALUE,VALUE" in result.output) == (2, True)
    options = ["--backend", "cuda", "--vary", "backend.options.bucket_mb=1,2", "--to", str(tmp_path)]
    result = weftrain("bench", "sweep", "bench_70m", *options)
    assert (result.exit_code, "bucket_mb" in result.output) == (2, True)


def test_a_sweep_of_another_backend(
    weftrain: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weftrain.analysis.bench import sweep

    asked: list[list[str]] = []
    monkeypatch.setattr(sweep, "run_sweep", lambda command, *rest: asked.append(command) or [])
    options = ["--vary", "backend.options.bucket_mib=1,25", "--to", str(tmp_path)]
    assert weftrain("bench", "sweep", "bench_70m", "--backend", "cuda", *options).exit_code == 0
    assert asked[0][-2:] == ["--backend", "cuda"]


def test_stream_and_data(weftrain: Callable[..., Result], tmp_path: Path) -> None:
    result = weftrain("bench", "stream", "bench_70m", *TINY, *SHORT, "--report", str(tmp_path))
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert report["shape"]["backend"] == "streaming"
    assert report["memory"]["predicted"]["total"] > 0
    assert report["backend_stats"]
    result = weftrain("bench", "data", "bench_70m", "--steps", "10")
    assert result.exit_code == 0, result.output
    assert re.search(
        r"^reads [\d,]+ rows of [\d,]+ tokens of synthetic rows in memory, .*: no file is read$", result.output, re.M
    )
    assert re.search(r"M tokens/s = [\d,]+ rows/s = [\d.]+ GB/s$", result.output, re.M)


def test_a_backend_without_threads_and_options(weftrain: Callable[..., Result]) -> None:
    """Nothing is written into backend.options: what a backend has no key for is measured all the same, and said where
    it is asked for.
    """
    result = weftrain("bench", "train", "bench_70m", *TINY[:3], "--backend", "null", "--steps", "4")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output.partition("RESULT ")[2].splitlines()[0])
    assert (found["name"], found["correct"], found["model_flops_utilization"]) == (
        "bench_70m-null-bfloat16",
        None,
        "unknown",
    )
    result = weftrain("bench", "train", "bench_70m", *TINY[:3], "--backend", "null", "--steps", "4", "--threads", "2")
    assert (result.exit_code, "the null backend does not compute with CPU threads" in result.output) == (2, True), (
        result.output
    )
