"""Many benchmarks, one CSV: all combinations of some values, each in its own process, so that none affects the next.

A failed combination is a result: out of memory or refused is recorded in its row and not tried again when the sweep
resumes. Remove the row to run it again.
"""

from __future__ import annotations

import csv
import itertools
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from weftrain.analysis.bench.pages import csv_text, flat
from weftrain.analysis.bench.report import read_report
from weftrain.analysis.bench.train import BenchError
from weftrain.core.formats import fsops

Combination = tuple[tuple[str, str], ...]
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "killed by the system", "GiB of memory", "GiB (")


def combinations(vary: Sequence[str]) -> list[Combination]:
    """['a=1,2', 'b=[x,y]'] -> [(('a', '1'), ('b', '[x,y]')), ...]; brackets protect commas. Raises BenchError."""
    keys: dict[str, list[str]] = {}
    for item in vary:
        key, equals, values = item.partition("=")
        found = [value for value in re.split(r",(?![^\[\{]*[\]\}])", values) if value]
        if not equals or not found:
            raise BenchError(f"--vary {item}: give KEY=VALUE,VALUE,...")
        if key in keys:
            raise BenchError(f"--vary {item}: {key} is given twice")
        keys[key] = found
    return [tuple(zip(keys, values, strict=True)) for values in itertools.product(*keys.values())]


def run_sweep(
    command: Sequence[str],
    chosen: Sequence[Combination],
    folder: Path,
    timeout_s: float,
    tell: Callable[[int, str], None],
) -> list[dict[str, Any]]:
    """Run what sweep.csv does not hold yet; its rows, one a combination, in order. Raises BenchError, OSError."""
    fsops.make_dirs(folder)
    table = folder / "sweep.csv"
    rows: list[dict[str, Any]] = []
    if table.exists():
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
    keys = [key for key, _ in chosen[0]]
    if rows and any(key not in rows[0] for key in keys):
        raise BenchError(
            f"{table}: is of another sweep, which varied other keys than {', '.join(keys)}: name another folder"
        )
    done = {tuple((key, row[key]) for key in keys): row for row in rows}
    for number, combination in enumerate(chosen):
        words = " ".join(f"{key}={value}" for key, value in combination)
        tell(number, words)
        if combination in done:
            continue
        row = dict(combination) | _measure(
            [*command, *(f"{key}={value}" for key, value in combination)], folder / _name(combination), timeout_s
        )
        done[combination] = row
        rows.append(row)
        fsops.write_bytes(table, csv_text(rows).encode())
    return [dict.fromkeys(("tokens_per_second", "error"), "") | done[combination] for combination in chosen]


def _measure(command: list[str], report: Path, timeout_s: float) -> dict[str, Any]:
    try:
        ended = subprocess.run(
            [*command, "--report", str(report)], capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"did not finish within {timeout_s:.0f} s"}
    if ended.returncode == 0:
        return {key: str(value) for key, value in flat(read_report(report)).items()} | {"error": ""}
    told = [line for line in ended.stderr.splitlines() if line.strip()]
    last = next(
        (line for line in reversed(told) if line.startswith("weftrain: ")),
        told[-1] if told else f"exit code {ended.returncode}",
    )
    killed = ended.returncode == -9
    memory = killed or any(words in last for words in _OUT_OF_MEMORY)
    return {
        "error": f"out of memory: {'killed by the system' if killed else last}"
        if memory
        else last.removeprefix("weftrain: ")
    }


def _name(combination: Combination) -> str:
    return re.sub(
        r"[^A-Za-z0-9_.=-]+", "_", "-".join(f"{key.rpartition('.')[2]}={value}" for key, value in combination)
    )[:120]
