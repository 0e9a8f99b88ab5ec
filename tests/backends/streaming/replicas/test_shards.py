"""Stores that are sharded across ranks are continued together."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from replica_runs import assert_same_as, command, finished, started, train, wait_for

from weftrain.analysis.compare.same_state import compare
from weftrain.core.backend import State

SHARDED = ["batch.replicas=2", "backend.options.fabric=sharded", "backend.options.tile_elements=4096"]


@pytest.mark.prove
def test_a_sharded_store_is_continued(overrides: list[str], single: tuple[State, list[float]], tmp_path: Path) -> None:
    """Both ranks end after three steps, and both go on from their stores."""
    first = [item for item in overrides if not item.startswith("schedule.steps=")] + ["schedule.steps=3"]
    options = [*SHARDED, "backend.options.tier=mapped"]
    for steps, allow in ((first, []), (overrides, ["--allow", "schedule.steps"])):
        with started(
            train(tmp_path, "run", [*steps, *options, *allow]), command("replica", str(tmp_path / "run"))
        ) as processes:
            outputs = [finished(process) for process in processes]
    assert "stands at 3 completed steps: the run goes on from there" in outputs[0]
    assert_same_as(single, tmp_path / "run")


@pytest.mark.prove
@pytest.mark.parametrize(
    ("tier", "kills"),
    [("direct", 2), *(pytest.param(tier, 4, marks=pytest.mark.soak) for tier in ("mapped", "direct"))],
)
def test_a_sharded_run_is_killed_and_goes_on(tier: str, kills: int, overrides: list[str], tmp_path: Path) -> None:
    """All ranks die at random moments, also with some of the tiles updated on one and others on the other."""
    steps, randomness = 15 * kills, random.Random(tier)
    long = [item for item in overrides if not item.startswith("schedule.steps=")] + [f"schedule.steps={steps}"]
    options = [*SHARDED, f"backend.options.tier={tier}", "batch.global_batch_size=2"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    both = (train(tmp_path, "run", [*long, *options]), command("replica", str(tmp_path / "run")))
    for number in range(kills):
        with started(*both) as (leader, replica):
            logged = metrics.read_text().count('"kind": "step"') if number else 0
            wait_for(
                lambda before=logged: metrics.exists() and metrics.read_text().count('"kind": "step"') > before + 3,
                leader,
            )
            time.sleep(randomness.uniform(0, 0.03))
            for process in randomness.sample([leader, replica], 2):
                process.kill()
    with started(*both) as processes:
        for process in processes:
            finished(process)
    alone = [*long, "batch.global_batch_size=2"]
    with started(train(tmp_path, "alone", alone, "local")) as (process,):
        finished(process)
    line, same = compare(tmp_path / "run", tmp_path / "alone")
    assert same, line
