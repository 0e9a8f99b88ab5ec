"""What a machine can do, on one process and on two, and the one rank that is slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from weftrain.analysis.machine.survey import machine_lines, outliers


def found(**changes: Any) -> dict[str, Any]:
    ranks = [
        {"rank": rank, "matmul_flops": {"bfloat16": 1e11 if rank != 2 else 5e10}, "memory_bytes_per_s": 1e10}
        for rank in range(4)
    ]
    seconds = [0.001, 0.001, 0.001, 0.002]
    collective = {"operation": "all_reduce", "bytes": 1 << 20, "seconds": seconds, "bus_bytes_per_s": 1e9}
    about = {"device": "x", "cpu_count": 4, "memory_bytes": 2**34, "libraries": {"torch": "2"}}
    sourced = {"bf16_flops": None, "origin": "none"}
    return {"environment": about, "ranks": ranks, "collectives": [collective], "sourced_peak": sourced} | changes


def test_outliers() -> None:
    assert outliers({0: 10.0, 1: 9.5, 2: 8.0, 3: 10.2}) == [2]
    assert outliers({0: 10.0}) == []


def test_the_slow_rank_is_named() -> None:
    text = "\n".join(machine_lines(found()))
    assert "outlier: rank 2 has 50.0 GFLOP/s" in text
    assert "outliers: rank 3" in text
    assert "data sheet" in text
    assert "unknown" in text


@pytest.mark.soak
def test_two_ranks(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "weftrain.cli",
        "bench",
        "machine",
        "--ranks",
        "2",
        "--largest-mib",
        "1",
        "--json",
        str(tmp_path / "m.json"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "m.json").read_bytes())
    assert [one["rank"] for one in told["ranks"]] == [0, 1]
    assert {one["operation"] for one in told["collectives"]} == {
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "all_to_all",
    }
    assert all(len(one["seconds"]) == 2 and min(one["seconds"]) > 0 for one in told["collectives"])
    assert "all_reduce" in done.stdout
