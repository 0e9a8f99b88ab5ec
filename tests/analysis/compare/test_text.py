"""A comparison fits a terminal."""

from __future__ import annotations

from pathlib import Path

from compare_cases import series

from weftrain.analysis.compare.series import (
    MeasureColumn,
    heldout_column,
)
from weftrain.analysis.compare.table import compare
from weftrain.analysis.compare.text import as_text


def test_the_table_fits_a_terminal(tmp_path: Path) -> None:
    one, two = heldout_column("words", "1" * 64, 52, False, 4, 9), heldout_column("words", "1" * 64, 117, False, 9, 9)
    task = MeasureColumn("score", "arc_challenge_with_a_long_name", "acc_norm, %", (("version", "1"), ("shots", "25")))
    names = [f"a_run_with_a_rather_long_name_{number}" for number in range(12)]
    some = [series(name, {1: {one: 2.0, task: 40.0}, 2_000_000_000: {one: 1.5}}) for name in names[:11]]
    found = compare([*some, series(names[11], {1: {two: 3.0}})], every_position=True)
    lines = as_text(found, 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[:2] == [f"A  {names[0]}", f"B  {names[1]}"]
    assert "held-out loss words 11111111, 4 of 9 rows" in lines
    assert "held-out loss words 11111111, all 9 rows" in lines
    narrow = compare([series("a", {1: {one: 2.0}, 3: {one: 1.0}}), series("b", {1: {one: 2.5}})], every_position=True)
    assert as_text(narrow, 80).splitlines() == [
        "held-out loss words 11111111, 4 of 9 rows",
        " tokens seen       a       b",
        "          10  2.0000  2.5000",
        "          30  1.0000       -",
    ]
