"""Power and clocks while something is timed, by a stand-in for nvidia-smi."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from weftrain.analysis.machine.clock_log import ClockLog


def test_samples_between_two_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    lines = "\\n".join(["100.5, 1200, 2619, 40, 3", "690.0, 1980, 2619, [N/A], 100", "650.0, 1900, 2619, 61, 99"])
    tool.write_text(f"#!/bin/sh\nprintf '{lines}\\nbroken\\n'\nexec sleep 30\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    start = time.monotonic()
    with ClockLog() as clocks:
        for _ in range(100):
            found = clocks.between(start, time.monotonic())
            if found.get("power, W", {}).get("least") == 100.5 and found["power, W"]["median"] == 650.0:
                break
            time.sleep(0.02)
    assert found["power, W"] == {"least": 100.5, "median": 650.0, "greatest": 690.0}
    assert found["temperature, C"] == {"least": 40.0, "median": 50.5, "greatest": 61.0}
    assert clocks.between(0.0, 1.0) == {}


def test_without_the_tool_there_are_no_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with ClockLog() as clocks:
        assert clocks.between(0.0, time.monotonic()) == {}
