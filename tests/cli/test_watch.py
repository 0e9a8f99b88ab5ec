"""`weftrain watch`: lines, JSON, the live view, and how it ends."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from weftrain.analysis.watch.view import RunState
from weftrain.cli import watch
from weftrain.cli.display import Console

RUN = RunState(
    "a_run",
    "running",
    step=50,
    steps=1000,
    loss=2.5,
    tokens_per_second=1234.0,
    eta_s=7300.0,
    evaluations={"words": (40, 2.6)},
    alerts=((45, "loss_spike: loss 9 \x1b[2J"),),
    age_s=3.0,
    losses=(3.0, 2.0, 9.0, 2.5),
    speeds=(1234.0,),
)


def test_a_line_a_run_and_json(
    weftrain: Callable[..., Result], train_tiny: Callable[..., Result], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        assert train_tiny("--backend", "null", "schedule.steps=3", "--run", name).exit_code == 0
    result = weftrain("watch", tmp_path / "runs")  # all are complete, so it ends
    assert result.exit_code == 0, result.output
    assert [line.split(",")[0] for line in result.output.splitlines()] == ["one: complete", "two: complete"]
    assert "step 3 of 3 (100.0%), loss " in result.output
    found = json.loads(weftrain("watch", tmp_path / "runs" / "one", "--once", "--json").output)
    assert [(one["name"], one["state"], one["step"], one["checkpoint_step"]) for one in found] == [
        ("one", "complete", 3, 3)
    ]


def test_it_looks_again_until_all_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter(["running", "stalled", "complete"])
    slept: list[float] = []

    class View:
        def update(self) -> RunState:
            return RunState("a", next(states))  # type: ignore[arg-type]

    monkeypatch.setattr("weftrain.cli.watch.time.sleep", slept.append)
    assert [one[0].state for one in watch._looks([View()], False, 7)] == ["running", "stalled", "complete"]  # type: ignore[list-item]
    assert slept == [7, 7]


@pytest.mark.parametrize("states", [[RUN], [RUN, RunState("b", "unreadable", problem="damaged")]])
def test_the_live_view_shows_everything_and_no_escape_sequence(states: list[RunState]) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None, legacy_windows=False)
    watch._show(console, iter([states]))
    shown = screen.getvalue()
    for words in ("a_run", "running", "50 of 1,000", "2.5000", "loss_spike: loss 9", "2 h 01 min"):
        assert words in shown
    assert "\x1b[2J" not in shown


def test_what_is_no_run_is_told(weftrain: Callable[..., Result], tmp_path: Path) -> None:
    result = weftrain("watch", tmp_path, "--once")
    assert result.exit_code == 2
    assert "there is no run in" in result.output
    assert weftrain("watch").exit_code == 2


def test_sparklines_keep_spikes_and_durations_are_short() -> None:
    assert watch.sparkline([1, 1, 9, 1, 1, 1], 3) == "▁█▁"
    assert watch.sparkline([1, float("nan"), 2], 9) == "▁x█"
    assert watch.sparkline([2, 2], 9) == "▁▁"
    assert watch.sparkline([float("inf")], 9) == "x"
    assert watch.sparkline([], 9) == watch.sparkline([1], 0) == ""
    assert [watch.duration(one) for one in (-3, 42, 600, 11_100, 352_800)] == [
        "0 s",
        "42 s",
        "10 min",
        "3 h 05 min",
        "4 d 02 h",
    ]
