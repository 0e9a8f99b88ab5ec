"""The plan as files: small ones for what every task needs, and tables of which a task reads its lines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fault_injection import DEATHS, Death, Faults, injected

from weftrain.core.errors import DataError
from weftrain.core.formats.line_table import LineTable
from weftrain.data_prep.readers import shares
from weftrain.data_prep.readers.documents import InputFile, SkippedFile
from weftrain.data_prep.stages.plan import PLAN, PrepPlan, is_saved, load_plan, make_plan, save_plan
from weftrain.data_prep.stages.settings import Inputs, Settings

SETTINGS = Settings("x" * 64, None, None, 16, 0.1, 100, 0)


def plan_of(folder: Path, files: int) -> PrepPlan:
    listed = tuple(
        InputFile(f"/in/{index:07d}.txt", f"in/{index:07d}.txt", "in", "text", 300, index) for index in range(files)
    )
    skipped = (SkippedFile("in/.hidden", 3, "hidden file"),)
    return make_plan(folder / "work", Inputs(listed, "many", skipped=skipped), SETTINGS, "auto")


def test_a_plan_comes_back_as_it_was_and_its_lines_are_read_one_by_one(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 30_000)
    assert not save_plan(plan)
    assert save_plan(plan)
    loaded = load_plan(plan.folder)
    assert isinstance(loaded.inputs.files, LineTable)
    assert loaded.header == plan.header
    assert (len(loaded.inputs.files), loaded.inputs.files[29_999]) == (30_000, plan.inputs.files[29_999])
    assert list(loaded.parts) == list(plan.parts)
    assert list(loaded.inputs.skipped) == list(plan.inputs.skipped)
    assert max(len(part.shares) for part in plan.parts) == shares.MAX_PART_SHARES
    assert sum(part.num_bytes for part in plan.parts) == 300 * 30_000
    assert (plan.folder / PLAN).stat().st_size < 5000  # however many files there are


def test_another_file_is_another_plan_and_a_damaged_table_is_named(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 20)
    save_plan(plan)
    files = list(plan.inputs.files)
    files[7] = replace(files[7], modified_ns=8888)
    assert not is_saved(make_plan(plan.folder, replace(plan.inputs, files=files), SETTINGS, "auto"))
    table = plan.folder / "files.jsonl"
    table.write_bytes(table.read_bytes().replace(b"0000007", b"0000008"))
    with pytest.raises(DataError, match=r"files\.jsonl: hashes to .*; remove .*work and prepare again"):
        load_plan(plan.folder)


def test_a_plan_that_was_not_written_to_its_end_is_none(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 20)
    with injected(Faults()) as faults:
        save_plan(plan)
    for operation in range(len(faults.trace) - 2):
        (plan.folder / PLAN).unlink(missing_ok=True)
        with injected(Faults(DEATHS[operation % 3], operation)), pytest.raises(Death):
            save_plan(plan)
        assert not is_saved(plan) or operation > len(faults.trace) - 4
    save_plan(plan)
    assert list(load_plan(plan.folder).parts) == list(plan.parts)
