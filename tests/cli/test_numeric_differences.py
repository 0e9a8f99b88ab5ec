"""The tool that measures what one kind of difference does: equal runs are equal, and other kernels are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from weftrain.cli.numeric_differences import (
    COMPUTES,
    PACES,
    RECIPES,
    STEPS,
    VARIANTS,
    Asked,
    cases,
    largest,
    main,
    moved,
    page,
    size,
    train_all,
)
from weftrain.exchange.release.tolerance import ROWS, TABLE


def test_distances_of_an_equal_run_and_of_one_with_other_kernels(tiny_overrides: list[str], tmp_path: Path) -> None:
    asked = Asked("crystal_demo", (*tiny_overrides, "schedule.steps=2"))
    for name, overrides in {"base": (), "again": (), "other": ("kernels.preferences=[reference]",)}.items():
        train_all(asked, overrides, tmp_path / name)
    assert largest(tmp_path / "base", tmp_path / "again") == {}
    found = largest(tmp_path / "base", tmp_path / "other")["as given"]
    assert found.keys() == set(COMPUTES)
    for compute, apart in found.items():
        assert {"weights", "exp_avg", "exp_avg_sq"} <= apart.keys(), compute
        assert all(len(there) == 2 and 0 < there[1] < 1 for there in apart.values())
    ends = tmp_path / "base" / "as given" / "float32" / "crystal_demo" / "1"
    assert sorted(path.name for path in ends.glob("end-*")) == ["end-1", "end-2"]
    first, second = moved(tmp_path / "base")["as given"]
    assert 0 == first < second, "its warm-up begins at 0"


def test_its_rows_are_the_tables_and_others_are_refused() -> None:
    assert {variant.row for variant in VARIANTS} <= set(ROWS)
    result = CliRunner().invoke(main, ["crystal_demo", "--only", "2 threads", "--only", "weather"])
    assert result.exit_code == 2
    assert "--only weather: there are the rows threads, kernels, instruction set, layout" in result.output


def test_the_table_of_the_package_is_what_it_would_measure() -> None:
    """Else nobody could make the table again."""
    written = json.loads(TABLE.read_bytes())
    assert written["recipes"] == {recipe: list(overrides) for recipe, (overrides, _) in RECIPES.items()}
    assert {"width": written["width"], "layers": written["layers"]} == size(Asked())
    assert written["width"] >= 256, "narrower models are less far apart, and bound no larger one"
    assert tuple(written["steps"]) == STEPS
    assert written["moved"].keys() == PACES.keys()
    for row, differences in written["measured"].items():
        assert set(differences) <= {variant.what for variant in VARIANTS if variant.row == row}
    every = list(cases(Asked(seeds=2)))
    assert len({case.place for case in every}) == len(every) == 2 * len(COMPUTES) * len(RECIPES) * len(PACES)


def test_the_page_has_the_tables_figures() -> None:
    written = Path("docs/examine-a-release.md").read_text(encoding="utf-8")
    assert f"\n\n{page(TABLE)}\n\n" in written, "print it: from weftrain.cli.numeric_differences import page"


@pytest.mark.prove
def test_a_run_that_fails_is_told_with_its_reason() -> None:
    result = CliRunner().invoke(main, ["crystal_demo", "batch.micro_batch_size=0", "--only", "threads"])
    assert result.exit_code == 1
    assert "micro_batch_size" in result.output
