"""Steps, tokens and parts in the names that published series have, and what contradicts them."""

from __future__ import annotations

import random

import pytest
from planted_series import PYTHIA_STEPS

from weftrain.exchange.audit.names import Place, place_of, places_of
from weftrain.exchange.audit.steps import step_findings


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("step1000", Place("", 1000, None)),
        ("step1000-tokens4B", Place("", 1000, 4 * 10**9)),
        ("stage1-step150-tokens1B", Place("stage1", 150, 10**9)),
        ("stage2-ingredient3-step11931-tokens50B", Place("stage2-ingredient3", 11931, 50 * 10**9)),
        ("ckpt_001", Place("", 1, None)),
        ("checkpoint-500", Place("", 500, None)),
        ("global_step143000", Place("", 143000, None)),
        ("iter_0001000", Place("", 1000, None)),
        ("CrystalCoder_phase1_checkpoint_055500", Place("CrystalCoder_phase1", 55500, None)),
        ("runs/one/step_00000010", Place("runs/one", 10, None)),
        ("main", None),
        ("v1.0", None),
        ("footstep", None),
        ("step", None),
    ],
)
def test_a_name(name: str, place: Place | None) -> None:
    assert place_of(name) == place


def found_of(names: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    return [(one.kind, one.revisions) for one in step_findings(places_of(names))]


@pytest.mark.parametrize(
    "steps",
    [
        PYTHIA_STEPS,
        range(0, 1_000_000, 5000),
        [0, *range(10_000, 100_000, 1000)],  # none while it warmed up
        [*range(1000, 10_000, 1000), *range(10_000, 60_000, 10_000)],  # sparser for good
        [*range(1000, 10_000, 1000), 9_537],  # the end is at no multiple
        [1, 10, 100, 1000, 10_000],
        [5],
        sorted(random.Random(0).sample(range(10**6), 100)),
    ],
)
def test_clean_sequences_have_no_gap(steps: list[int]) -> None:
    assert found_of([f"step{step}" for step in steps]) == []


def test_gaps_in_the_middle_and_at_the_ends() -> None:
    steps = [step for step in range(1000, 41_000, 1000) if step not in (2000, 9000, 12_000, 13_000, 39_000)]
    assert found_of([f"step{step}" for step in steps]) == [
        ("gap", ("step1000", "step3000")),
        ("gap", ("step8000", "step10000")),
        ("gap", ("step11000", "step14000")),
        ("gap", ("step38000", "step40000")),
    ]


def test_repeated_steps_and_parts_of_their_own() -> None:
    names = ["stage1-step1000", "stage1-step01000", "stage2-step1000", "stage2-step2000"]
    assert found_of(names) == [("repeated step", ("stage1-step01000", "stage1-step1000"))]
    assert found_of(["step1-tokens4B", "step2-tokens2B", "step3-tokens12B"]) == [
        ("out of order", ("step1-tokens4B", "step2-tokens2B"))
    ]
