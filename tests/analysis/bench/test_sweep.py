"""A sweep goes on after failures, records them and resumes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from weftrain.analysis.bench.report import (
    BenchReport,
)
from weftrain.analysis.bench.sweep import combinations, run_sweep
from weftrain.analysis.bench.train import BenchError


def test_sweep_goes_on_and_records_what_fails(report: BenchReport, tmp_path: Path) -> None:
    """By a program that fails as a benchmark does: refused, out of memory, killed, too slow; what was measured is not
    measured again.
    """
    (tmp_path / "canned.json").write_text(report.model_dump_json())
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, shutil, signal, sys, time\n"
        "*_, option, folder = sys.argv\n"
        "case = sys.argv[1].partition('=')[2]\n"
        "if case == 'refused': sys.exit('weftrain: no such kernel')\n"
        "if case == 'memory': sys.exit('weftrain: out of memory: tried to allocate')\n"
        "if case == 'killed': os.kill(os.getpid(), signal.SIGKILL)\n"
        "if case == 'slow': time.sleep(60)\n"
        "os.makedirs(folder)\n"
        f"shutil.copy({str(tmp_path / 'canned.json')!r}, pathlib.Path(folder) / 'report.json')\n"
    )
    command, told = [sys.executable, str(program)], []
    # The slow one alone has little time: on a busy machine the others may need some to start.
    slow = run_sweep(command, combinations(["case=slow"]), tmp_path / "slow", 1, lambda done, words: None)
    assert [row["error"] for row in slow] == ["did not finish within 1 s"]
    chosen = combinations(["case=refused,memory,killed,good"])
    rows = run_sweep(command, chosen, tmp_path / "sweep", 60, lambda done, words: told.append(words))
    assert told == [f"case={case}" for case in ("refused", "memory", "killed", "good")]
    assert float(rows[-1]["tokens_per_second"]) == report.speed.tokens_per_second
    memory = ["out of memory: weftrain: out of memory: tried to allocate", "out of memory: killed by the system"]
    assert [row["error"] for row in rows] == ["no such kernel", *memory, ""]
    before = (tmp_path / "sweep" / "case=good" / "report.json").stat().st_mtime_ns
    more = combinations(["case=good,refused,new"])
    again = run_sweep(command, more, tmp_path / "sweep", 60, lambda done, words: None)
    assert [row["error"] for row in again] == ["", "no such kernel", ""]
    assert (tmp_path / "sweep" / "case=good" / "report.json").stat().st_mtime_ns == before
    with pytest.raises(BenchError, match="is of another sweep"):
        run_sweep(command, combinations(["other=1"]), tmp_path / "sweep", 60, lambda done, words: None)


def test_combinations() -> None:
    assert combinations(["a=1,2", "b=[x,y],[z]"]) == [
        (("a", "1"), ("b", "[x,y]")),
        (("a", "1"), ("b", "[z]")),
        (("a", "2"), ("b", "[x,y]")),
        (("a", "2"), ("b", "[z]")),
    ]
    for wrong in (["a"], ["a="], ["a=1", "a=2"]):
        with pytest.raises(BenchError):
            combinations(wrong)
