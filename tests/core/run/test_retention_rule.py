"""What a rule of retention keeps, and the disk that follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_ledgers import Tiny, chunked

from weftrain.core.backend import plan_of
from weftrain.core.config import KeepConfig
from weftrain.core.recipe_file import load_recipe
from weftrain.core.run.retention_rule import disk_need, disk_warning, reasons, saved_steps


@given(
    st.sets(st.integers(0, 40), max_size=12),
    st.builds(
        KeepConfig,
        last=st.integers(1, 4),
        every_steps=st.none() | st.integers(1, 9),
        chunk_ends=st.booleans(),
        best=st.integers(0, 3),
    ),
    st.none() | st.integers(1, 9),
    st.dictionaries(st.integers(0, 40), st.floats(allow_nan=True), max_size=12),
)
def test_the_rule_keeps_what_it_says_and_applying_it_again_removes_no_more(
    have: set[int], keep: KeepConfig, chunk_steps: int | None, losses: dict[int, float]
) -> None:
    ordered = sorted(have)
    kept = set(reasons(ordered, keep, chunk_steps, losses))
    assert kept <= have
    assert set(ordered[-keep.last :]) <= kept
    for step in have - kept:
        assert keep.every_steps is None or step % keep.every_steps
        assert not (keep.chunk_ends and chunk_steps) or step % chunk_steps
        better = [other for other in kept if losses.get(other, float("inf")) <= losses.get(step, float("inf"))]
        assert losses.get(step) is None or losses[step] != losses[step] or len(better) >= keep.best
    assert set(reasons(sorted(kept), keep, chunk_steps, losses)) == kept


def test_the_best_are_those_with_the_lowest_loss_and_nan_is_none() -> None:
    losses = {1: 2.0, 2: float("nan"), 3: 1.0, 4: 1.0}
    assert reasons([1, 2, 3, 4, 5], KeepConfig(last=1, best=1), None, losses) == {
        5: "the newest",
        3: "held-out loss 1.0000",
    }


def test_chunk_ends(tiny_recipe: Tiny) -> None:
    recipe = chunked(tiny_recipe)
    each = recipe.schedule.steps // (recipe.data.chunks or 1)
    assert set(reasons(range(1, 7), KeepConfig(last=1), each, {})) == {*range(each, 7, each), 6}
    assert set(reasons(range(1, 7), KeepConfig(last=1, chunk_ends=False), each, {})) == {6}


def test_the_steps_of_the_plan_are_those_counted(tiny_recipe: Tiny) -> None:
    changes = ("checkpoint.every_steps=4", "checkpoint.every_steps=0", "checkpoint.at_end=false", "schedule.steps=5")
    for recipe in (*(tiny_recipe("crystal", change) for change in changes), chunked(tiny_recipe)):
        plan = plan_of(recipe, 0)
        assert saved_steps(recipe) == [step for step in range(1, plan.last_step + 1) if plan.wants_state(step)]


def test_all_states_of_amber_take_29_terabytes_and_a_rule_makes_it_less() -> None:
    need = disk_need(load_recipe("amber_7b", []).recipe)
    assert 28e12 < need.total_bytes < 30e12
    kept = disk_need(
        load_recipe("amber_7b", ["checkpoint.keep={last: 2, chunk_ends: false, every_steps: 7620}"]).recipe
    )
    assert kept.checkpoints < need.checkpoints / 8
    weights = disk_need(
        load_recipe("amber_7b", ["checkpoint.keep={last: 2, chunk_ends: false, archive: weights}"]).recipe
    )
    assert weights.checkpoints + weights.archives == need.checkpoints
    assert weights.total_bytes < need.total_bytes * 0.4


def test_a_disk_that_is_too_small_is_told_before_the_run(
    tiny_recipe: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("crystal", "checkpoint.every_steps=1")
    need = disk_need(recipe).total_bytes
    assert disk_warning(recipe, tmp_path) == ""
    monkeypatch.setattr("weftrain.core.run.retention_rule.fsops.free_bytes", lambda path: need - 1)
    assert "set checkpoint.keep" in disk_warning(recipe, tmp_path)
    saved = tmp_path / "checkpoints" / "step_00000001"
    saved.mkdir(parents=True)
    (saved / "state").write_bytes(b"x")
    assert disk_warning(recipe, tmp_path) == ""
