"""Which tasks an executor does, and when it gives up waiting for others."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from typing import Any

import pytest

from weftrain.core.errors import DataError
from weftrain.data_prep.choices import STAGE_NAMES
from weftrain.data_prep.inputs.files import local_file
from weftrain.data_prep.stages import executors
from weftrain.data_prep.stages.executors import STAGES, LocalExecutor, Stage, TaskExecutor
from weftrain.data_prep.stages.plan import PrepPlan, make_plan, save_plan
from weftrain.data_prep.stages.settings import Inputs, Settings


def test_the_option_names_the_stages_that_there_are() -> None:
    assert tuple(STAGES) == STAGE_NAMES


@pytest.fixture
def plan(tmp_path: Path) -> PrepPlan:
    text = tmp_path / "a.txt"
    text.write_text("weft")
    settings = Settings("trained", 300, None, 8, 0.0, 1, 0)
    made = make_plan(tmp_path / "work", Inputs((local_file(str(text), "a.txt", "a", "text"),), "a"), settings, "auto")
    save_plan(made)
    return made


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Five tasks that each write a file."""

    def output(plan: PrepPlan, index: int) -> Path:
        return plan.folder / f"{index}.done"

    made = Stage("five", lambda plan: 5, lambda plan, index: output(plan, index).touch(), output)
    monkeypatch.setitem(STAGES, "five", made)
    return made


def test_what_is_done_is_reported_and_not_done_again(plan: PrepPlan, stage: Stage) -> None:
    stage.output(plan, 3).write_text("before")
    reported: list[int] = []
    LocalExecutor().run(plan, stage, reported.append)
    assert reported == [3, 0, 1, 2, 4]
    assert not stage.pending(plan)
    assert stage.output(plan, 3).read_text() == "before"


def test_a_sparing_executor_starts_no_process_for_little(
    plan: PrepPlan, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Started(Exception):  # noqa: N818  no error
        pass

    def start(*arguments: Any, **named: Any) -> None:
        raise Started

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", start)
    with pytest.raises(Started):
        LocalExecutor(2).run(plan, stage, lambda index: None)
    size = sum(part.num_bytes for part in plan.parts)
    monkeypatch.setattr(executors, "_FEW_BYTES", size)
    with pytest.raises(Started):
        LocalExecutor(2, sparing=True).run(plan, stage, lambda index: None)
    monkeypatch.setattr(executors, "_FEW_BYTES", size + 1)
    LocalExecutor(2, sparing=True).run(plan, stage, lambda index: None)
    assert not stage.pending(plan)


def test_a_member_does_its_own_tasks_and_names_the_members_that_it_waited_for(plan: PrepPlan, stage: Stage) -> None:
    with pytest.raises(DataError, match=r"waited 0 s for 3 tasks of members \[0\]"):
        TaskExecutor(1, 2, patience_s=0).run(plan, stage, lambda index: None)
    assert stage.pending(plan) == [0, 2, 4]
    with pytest.raises(DataError, match="waited 0 s for it, which member 0 makes"):
        TaskExecutor(1, 2, patience_s=0).wait_until(lambda: False, "it")
    with pytest.raises(DataError, match="--index 2 --of 2"):
        TaskExecutor(2, 2)
