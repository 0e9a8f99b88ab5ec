"""Whose a backend's stored state is, by the ledger alone, and what the record of its last step lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from weftrain.core.backend import Plan, StepResult, StoredState
from weftrain.core.run.stored_state import Owner, completed, is_unfinished, left_by, made_by, owner_of, skip_is_entered

A, B, ROOT = "a" * 32, "b" * 32, "f" * 64


def ledger(*lines: dict[str, Any]) -> list[dict[str, Any]]:
    """A run that began with the segment A, and further lines."""
    where = {"dataset_id": "d", "environment": {}, "parent": None, "recipe": {}}
    begun = {"kind": "start", "step": 0, "stretch": A}
    return [{"n": n, **where, **line} for n, line in enumerate((begun, *lines))]


def stored(step: int, segment: str = A, *, skipped: bool = False) -> StoredState:
    result = StepResult(step - 1, 1.0, 1.0, {}, 8, 8, 1.0, 0.0, skipped)
    return StoredState(step, segment, Path("store"), "d", result)


CHECKPOINT = {"kind": "checkpoint", "step": 4, "root": ROOT, "metrics_after": 0, "metrics_sha256": ROOT}
RESUME = {"kind": "resume", "step": 4, "parent": ROOT, "stretch": B}
ROLLBACK = {"kind": "rollback", "step": 4, "branch": 1, "abandoned": [], "reason": "spike"}
TAKEN_OVER = {"kind": "resume", "step": 6, "stretch": B, "continues": A}


@pytest.mark.parametrize(
    ("lines", "state", "owner"),
    [
        ([], stored(6), "current"),
        ([], stored(6, B), "foreign"),
        ([], stored(6, ""), "foreign"),
        ([CHECKPOINT, RESUME], stored(4), "behind"),
        ([CHECKPOINT, RESUME], stored(6), "left"),
        ([CHECKPOINT, RESUME], stored(6, B), "current"),
        ([CHECKPOINT, ROLLBACK], stored(6), "left"),
        ([CHECKPOINT, ROLLBACK], stored(4), "behind"),
        ([TAKEN_OVER], stored(6), "current"),
    ],
)
def test_the_ledger_says_whose_a_state_is(lines: list[dict[str, Any]], state: StoredState, owner: Owner) -> None:
    entries = ledger(*lines)
    assert owner_of(state, entries) == owner
    assert completed(state, entries) == (state.step if owner == "current" else 0)
    assert completed(None, entries) == completed(state, []) == 0


def test_who_made_a_state_and_what_left_one() -> None:
    assert made_by(stored(6), ledger(TAKEN_OVER)).entry == 0
    assert left_by(ledger(CHECKPOINT, ROLLBACK)) == "line 3 of the ledger: a rollback went back to step 4"
    assert left_by(ledger(CHECKPOINT, RESUME)).endswith("training went on without it from step 4")


def test_what_the_record_of_the_last_step_lacks() -> None:
    plan = Plan(0, 8, checkpoint_every_steps=4, evaluate_every_steps=3, log_every_steps=2)
    step = [{"kind": "step", "step": 6}]
    both = [*step, {"kind": "evaluation", "step": 6, "set": "a"}]
    assert is_unfinished(stored(4), plan, 0, ledger(), [], [])  # no checkpoint of step 4
    assert not is_unfinished(stored(4), plan, 4, ledger(), [], [])
    assert is_unfinished(stored(6), plan, 4, ledger(), step, ["a"])
    assert not is_unfinished(stored(6), plan, 4, ledger(), both, ["a"])
    assert is_unfinished(stored(5, skipped=True), plan, 4, ledger(), [{"kind": "step", "step": 5}], [])
    assert not is_unfinished(stored(5), plan, 4, ledger(), [], [])


def test_a_skip_counts_until_a_rollback() -> None:
    skip = {"kind": "skip", "step": 5}
    assert skip_is_entered(ledger(skip), 5)
    assert not skip_is_entered(ledger(skip), 4)
    assert not skip_is_entered(ledger(skip, ROLLBACK), 5)
