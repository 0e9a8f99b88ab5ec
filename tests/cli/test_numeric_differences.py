"""The tool that measures what one kind of difference does: equal runs are equal, and other kernels are not."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from weftrain.cli.numeric_differences import COMPUTES, VARIANTS, Asked, largest, main, train_all
from weftrain.exchange.release.distance import ROWS


def test_distances_of_an_equal_run_and_of_one_with_other_kernels(tiny_overrides: list[str], tmp_path: Path) -> None:
    more = {"base": (), "again": (), "other": ("kernels.preferences=[reference]",)}
    for name, overrides in more.items():
        train_all(Asked("crystal_demo", (*tiny_overrides, "schedule.steps=2", *overrides), 1, 2), tmp_path / name)
    assert largest(tmp_path / "base", tmp_path / "again") == {compute: {} for compute in COMPUTES}
    for compute, apart in largest(tmp_path / "base", tmp_path / "other").items():
        assert {"weights", "exp_avg", "exp_avg_sq"} <= apart.keys(), compute
        assert all(0 < distance < 1 for distance in apart.values())
    ends = tmp_path / "base" / "float32" / "1"
    assert sorted(path.name for path in ends.glob("end-*")) == ["end-1", "end-2"]


def test_its_rows_are_the_tables_and_others_are_refused() -> None:
    assert {variant.row for variant in VARIANTS} <= set(ROWS)
    result = CliRunner().invoke(main, ["crystal_demo", "--only", "weather"])
    assert result.exit_code == 2
    assert "--only weather: there are the rows threads, instruction set, kernels, layout" in result.output


@pytest.mark.prove
def test_a_run_that_fails_is_told_with_its_reason() -> None:
    result = CliRunner().invoke(main, ["crystal_demo", "batch.micro_batch_size=0", "--only", "threads"])
    assert result.exit_code == 1
    assert "micro_batch_size" in result.output
