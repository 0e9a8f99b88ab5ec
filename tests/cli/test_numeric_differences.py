"""The tool that measures what one kind of difference does: equal runs are equal, and other kernels are not."""

from __future__ import annotations

import json
import platform
import re
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from weftrain.cli import numeric_differences
from weftrain.cli.numeric_differences import (
    PACES,
    RECIPES,
    Asked,
    cases,
    differing_rows,
    largest,
    main,
    measure,
    moved,
    size,
    train_all,
)
from weftrain.cli.numeric_table import COMPUTES, STEPS, page
from weftrain.cli.numeric_variants import VARIANTS, Variant, with_python
from weftrain.exchange.release.tolerance import ROWS, TABLE, read_table


def test_distances_of_an_equal_run_and_of_one_with_other_kernels(tiny_overrides: list[str], tmp_path: Path) -> None:
    asked = Asked("crystal_demo", (*tiny_overrides, "schedule.steps=2"))
    for name, overrides in {"base": (), "again": (), "other": ("kernels.preferences=[reference]",)}.items():
        train_all(asked, 1, overrides, tmp_path / name)
    assert largest(tmp_path / "base", tmp_path / "again") == {}
    found = largest(tmp_path / "base", tmp_path / "other")["as given"]
    assert found.keys() == set(COMPUTES)
    for compute, apart in found.items():
        assert {"weights", "exp_avg", "exp_avg_sq"} <= apart.keys(), compute
        assert all(len(there) == 2 and 0 < there[1] < 1 for there in apart.values())
    ends = tmp_path / "base" / "as given" / "float32" / "crystal_demo" / "1"
    assert sorted(path.name for path in ends.glob("end-*")) == ["end-1", "end-2"]
    assert differing_rows(tmp_path / "base", tmp_path / "again") == []
    assert differing_rows(tmp_path / "base", tmp_path / "other") == ["kernels"]
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
        known = {variant.what for variant in VARIANTS if variant.row == row}
        assert all(what in known or (row == "libraries" and what.startswith("torch ")) for what in differences)
    every = [case for seed in (1, 2) for case in cases(Asked(), seed)]
    assert len({case.place for case in every}) == len(every) == 2 * len(COMPUTES) * len(RECIPES) * len(PACES)


def test_the_page_has_the_tables_figures() -> None:
    written = Path("docs/examine-a-release.md").read_text(encoding="utf-8")
    assert f"\n\n{page(TABLE)}\n\n" in written, "print it: from weftrain.cli.numeric_table import page"


def test_figures_of_two_files_are_put_together_and_those_of_other_recipes_are_refused(tmp_path: Path) -> None:
    value = json.loads(TABLE.read_bytes())
    later = json.loads(TABLE.read_bytes())
    later["commands"], later["measured"] = ["later"], {"libraries": {"torch 0.0": 1}}
    kinds = {kind: [0.25] * len(STEPS) for kind in value["distances"]["slow"]["float32"]["threads"]}
    later["distances"] = {pace: {compute: {"libraries": kinds} for compute in COMPUTES} for pace in PACES}
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text(json.dumps(value | _here()))
    two.write_text(json.dumps(later | _here()))
    asked = ["--seeds", "0", "--add", str(one), "--add", str(two), "--to", str(tmp_path / "both.json")]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 0, result.output
    both, alone = read_table(tmp_path / "both.json"), read_table(one)
    assert both.measured["libraries"] == {**alone.measured.get("libraries", {}), "torch 0.0": 1}
    assert both.measured == {**alone.measured, "libraries": both.measured["libraries"]}
    assert json.loads((tmp_path / "both.json").read_bytes())["commands"] == [*value["commands"], "later"]
    assert both.moved == alone.moved
    for compute in COMPUTES:
        for step in STEPS:
            assert (
                both.distance("slow", compute, "weights", step)
                == 0.25
                > alone.distance("slow", compute, "weights", step)
            )
            assert both.distances["slow"][compute]["threads"] == alone.distances["slow"][compute]["threads"]
    two.write_text(json.dumps(later | _here() | {"width": 64}))
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 2
    assert "two.json: its width is 64, and here 256" in result.output.replace("\n", " ")


def _here() -> dict[str, str]:
    """What a table that was measured by this torch, on this processor, says of them."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "processor": f"{platform.machine()}, {capability}"}


def test_an_interpreter_that_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(click.BadParameter, match="--python nowhere/python: cannot be started: No such file"):
        with_python("nowhere/python")
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # -S: without the packages that are installed
    bare.chmod(0o755)
    with pytest.raises(
        click.BadParameter, match=r"PackageNotFoundError.*install this weftrain and another torch there"
    ):
        with_python(str(bare))
    found = with_python(sys.executable)
    assert (found.row, found.python) == ("libraries", sys.executable)
    assert re.fullmatch(r"torch \d+\.\d+\S*", found.what)


def test_a_difference_that_is_none_on_this_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as an instruction set of a library that reads another variable, or the same torch once more."""
    told = {"base": {"torch": "2.0", "threads": 1}, "again": {"torch": "2.0", "threads": 2}}

    def trained(asked: Asked, seed: int, variant: Variant, folder: Path) -> None:
        folder.mkdir()
        (folder / "fingerprint.json").write_text(json.dumps(told["again" if variant.row else "base"]))

    monkeypatch.setattr(numeric_differences, "_start", trained)
    words = "torch 2.0: its fingerprint differs in threads, and not in libraries: .*leave it out with --only"
    with pytest.raises(click.ClickException, match=words):
        next(measure(Asked("crystal_demo"), [Variant("libraries", "torch 2.0")], tmp_path))


def test_a_recipe_that_is_refused_is_told_with_its_reason() -> None:
    result = CliRunner().invoke(main, ["crystal_demo", "batch.micro_batch_size=0", "--only", "threads"])
    assert result.exit_code == 1
    assert "micro_batch_size" in result.output
