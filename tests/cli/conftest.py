"""Running the command line, in this process (quick) and in another (signals, kills)."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from known_peak import PROGRAM

from weftrain.cli.main import main
from weftrain.core.run.speed import Peak


@pytest.fixture(autouse=True)
def _known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run measures the machine's matrix-multiply peak twice, a second each; what it does with it needs no measurement
    here.
    """
    monkeypatch.setattr("weftrain.cli.assembly.measured_peak", lambda device, dtype: Peak(1e11, "known in tests"))


@pytest.fixture
def weftrain() -> Callable[..., Result]:
    """weftrain('show', 'amber_7b') -> click's Result: exit_code, output (stdout and stderr as they came)."""

    def run(*arguments: str | Path) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def train_tiny(weftrain: Callable[..., Result], tiny_overrides: list[str], tmp_path: Path) -> Callable[..., Result]:
    """train_tiny('schedule.steps=6', '--allow', 'x'): crystal_demo cut to width 48 on synthetic rows, in
    tmp_path/runs.
    """

    def run(*arguments: str) -> Result:
        return weftrain("train", "crystal_demo", *tiny_overrides, "--runs", tmp_path / "runs", *arguments)

    return run


@pytest.fixture
def tiny_process(tiny_overrides: list[str], tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """The same as a process of its own."""

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [
            *PROGRAM,
            "train",
            "crystal_demo",
            *tiny_overrides,
            "--runs",
            str(tmp_path / "runs"),
            *arguments,
        ]
        return subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start
