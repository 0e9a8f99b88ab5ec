"""The tool that measures what `numerics: replayable` costs, and the processes that it starts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from weftrain.cli import replayable_cost
from weftrain.cli.rank_processes import run_ranks
from weftrain.core.backend import Backend, Job


def test_both_numerics_are_trained_in_turn_and_compared(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    measured = replayable_cost._round

    def here(command: Sequence[str], ranks: int, environment: Mapping[str, str]) -> str | None:
        """In this process what a group of one would do."""
        *asked, _, rounds, _, steps, _, folder = command[3:]
        replayable_cost._take_part(asked[0], asked[1:], int(rounds), int(steps), Path(folder))
        return None

    def round_of(backend: Backend, job: Job, steps: int) -> replayable_cost.Round:
        trained.append(job.recipe.precision.numerics)
        found = measured(backend, job, steps)
        assert found.wall_s > 0
        assert found.cpu_s >= 0
        return replayable_cost.Round(2.0 if trained[-1] == "replayable" else 1.0, 1.0)

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(replayable_cost, "run_ranks", here)
    monkeypatch.setattr(replayable_cost, "_round", round_of)
    arguments = ["crystal_demo", *tiny_overrides, "--only", "local", "--rounds", "2", "--steps", "1"]
    result = CliRunner().invoke(replayable_cost.main, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "local: 1.000 -> 2.000; 2.000, 1.000"
    assert trained == ["replayable", "fast", "fast", "replayable"]


def test_ranks_are_told_who_they_are_and_the_first_that_fails_is_told() -> None:
    program = (
        "import os, sys; assert os.environ['WORLD_SIZE'] == '2'; sys.exit(os.environ['RANK'] == os.environ['BAD'])"
    )
    command = [sys.executable, "-S", "-c", program]
    assert run_ranks(command, 2, {"BAD": "2"}) is None
    told = run_ranks([*command[:-1], "import os; os.environ['MASTER_PORT']; raise SystemExit('no disk')"], 2, {})
    assert told == "no disk"
