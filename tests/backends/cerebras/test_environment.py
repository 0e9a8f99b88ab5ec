"""The vendor's environment: each state that it can be in, and what can go wrong while it is made. Nothing is installed
here.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weftrain.backends.cerebras import environment
from weftrain.core.errors import BackendError
from weftrain.core.formats import fsops


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(environment.PYTHON_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fsops, "free_bytes", lambda path: 1 << 40)
    return environment.environment_folder()


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for venv and pip: what was run. `pip.append` a word to have that command fail."""
    ran: list[str] = []

    def run(command: list[str], log: Path, mode: str, watch: Callable[[str], None]) -> None:
        words = " ".join(command)
        ran.append(words)
        if "venv" in words:
            target = Path(command[-1]) / "bin"
            target.mkdir(parents=True)
            (target / "python").write_text("#!/bin/sh\n")
            (target / "python").chmod(0o755)
        else:
            for line in (
                "Collecting numpy==1.25.0 (from -r x)",
                "Collecting torch==2.4.0",
                "Installing collected packages: numpy, torch",
            ):
                watch(line)

    monkeypatch.setattr(environment, "_run", run)
    return ran


def test_pins_are_whole_and_exact() -> None:
    lines = environment.pins().splitlines()
    assert all("==" in line for line in lines)
    assert (environment.pinned("cerebras-pytorch"), environment.pinned("torch"), environment.pinned("numpy")) == (
        "2.10.0",
        "2.4.0",
        "1.25.0",
    )
    assert not any(line.startswith("triton") for line in lines)


def test_other_pins_are_another_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "pins", lambda: "torch==2.4.1\n")
    assert environment.environment_folder() != folder


def test_it_is_made_once_and_marked_last(folder: Path, pip: list[str]) -> None:
    assert "is not installed: run `weftrain backends setup cerebras`" in str(environment.missing())
    shares: list[float] = []
    python = environment.make(lambda words, share: shares.append(share))
    assert python == folder / "bin" / "python"
    assert environment.missing() is None
    assert environment.python() == python
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert "--no-deps" in pip[1]
    environment.make(lambda words, share: None)
    assert len(pip) == 2  # nothing was run again


def test_what_was_interrupted_is_not_whole_and_is_made_anew(
    folder: Path, pip: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    working = environment._run

    def interrupted(command: list[str], *rest: Any) -> None:
        working(command, *rest)
        if "pip" in command:
            raise KeyboardInterrupt

    monkeypatch.setattr(environment, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        environment.make(lambda words, share: None)
    assert "is incomplete" in str(environment.missing())
    (folder / "leftover").write_text("half")
    monkeypatch.setattr(environment, "_run", working)
    environment.make(lambda words, share: None)
    assert environment.missing() is None
    assert not (folder / "leftover").exists()


def test_a_python_that_is_gone(folder: Path, pip: list[str]) -> None:
    environment.make(lambda words, share: None).unlink()
    assert "its Python is missing" in str(environment.missing())
    environment.make(lambda words, share: None)
    assert environment.missing() is None


def test_no_room(folder: Path, pip: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsops, "free_bytes", lambda path: 10**9)
    with pytest.raises(
        BackendError, match=r"1\.00 GB are free and making the environment needs 8\.59 GB: .* XDG_CACHE_HOME"
    ):
        environment.make(lambda words, share: None)
    assert pip == []
    assert not folder.exists()


def test_another_process_makes_it(folder: Path, pip: list[str]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BackendError, match="another process is making this environment"):
            environment.make(lambda words, share: None)
    environment.make(lambda words, share: None)


def test_a_package_that_cannot_be_had(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(BackendError, match=rf"failed: no such package; its output is in {log}"):
        environment._run(["sh", "-c", "echo fetching; echo no such package; exit 1"], log, "w", lambda line: None)
    assert log.read_text() == "fetching\nno such package\n"


def stand_in(folder: Path, name: str, says: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho {says}\n")
    path.chmod(0o755)
    return str(path)


def test_only_cpython_3_11_will_do(tmp_path: Path) -> None:
    newer, other = stand_in(tmp_path, "newer", "CPython 3 12"), stand_in(tmp_path, "other", "PyPy 3 11")
    right = stand_in(tmp_path, "right", "CPython 3 11")
    assert environment.find_python_3_11((newer, "no such program", other, right)) == Path(right)
    with pytest.raises(BackendError, match=r"needs CPython 3\.11, .* \(CPython 3 12\).* \(PyPy 3 11\).*--python"):
        environment.find_python_3_11((newer, other))
    with pytest.raises(BackendError, match="found no Python"):
        environment.find_python_3_11(("no such program",))


def test_an_environment_that_is_there_already_can_be_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = stand_in(tmp_path, "python", "hello")
    monkeypatch.setenv(environment.PYTHON_VARIABLE, python)
    assert environment.missing() is None
    assert environment.python() == Path(python)
    monkeypatch.setenv(environment.PYTHON_VARIABLE, str(tmp_path / "nothing"))
    assert "correct it, or unset it" in str(environment.missing())
    with pytest.raises(BackendError, match="cannot run here"):
        environment.python()
