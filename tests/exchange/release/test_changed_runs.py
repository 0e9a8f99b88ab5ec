"""A run whose recipe planned changes, and one changed by hand, are released, verified and replayed link by link."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from record_runs import done, prepare, trainer, weftrain

BATCH = "batch.global_batch_size"
PLAN = (
    f"changes=[{{step: 2, set: {{{BATCH}: 8}}, reason: a ramp}}, {{step: 4, set: {{data.sequence_length: 6}}}}, "
    "{step: 6, set: {data.skip.0: {source: twelve, rows: [3, 9], reason: noise}}}]"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("changed")
    torch.set_num_threads(2)
    prepare(found)
    names = ("--output", found / "datasets", "--name", "twelve", "--sequence-length", "12", "--vocab-size", "400")
    done(weftrain("prep", found / "texts", *names))
    return found


@pytest.mark.prove
def test_a_run_with_planned_changes_and_one_by_hand_is_released_verified_and_replayed(
    folder: Path, tmp_path: Path
) -> None:
    train = trainer(folder)
    shape = (
        "data.chunks=null",
        "data.sources=[{name: twelve, path: twelve, weight: 1}]",
        "log.evaluate_every_steps=0",
        "data.row_length=12",
        "data.sequence_length=12",
        "schedule.steps=8",
        "log.every_steps=1",
    )
    done(train(*shape, "checkpoint.every_steps=3", PLAN))
    later = ("schedule.steps=10", f"{BATCH}=4", "--allow", "schedule.steps", "--allow", BATCH)
    done(train(*shape, "checkpoint.every_steps=3", PLAN, *later))
    release = tmp_path / "release"
    done(weftrain("release", folder / "runs" / "crystal_demo", "--to", release, "--licence", "MIT"))
    checked = done(weftrain("verify", release))
    replayed = done(weftrain("replay", release))
    links = json.loads((release / "release.json").read_bytes())["links"]
    assert f"{len(links)} links: complete and consistent" in checked
    assert len(links) == 7
    assert verdicts_of(replayed) == ["equal"] * len(links)


def verdicts_of(output: str) -> list[str]:
    return [line.split()[-1] for line in output.splitlines() if line.strip()[:1].isdigit() and " of " in line]
