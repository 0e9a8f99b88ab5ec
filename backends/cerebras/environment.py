"""The Python environment of the vendor's package: where it is, whether it is complete, and how it is made.

The package pins CPython 3.11, torch 2.4.0 and numpy 1.25.0, so it cannot share this process's environment. It has a
virtual environment in the user's cache folder, named by a hash of the pins, so that other pins make another folder. A
marker file is written last; a folder without it was interrupted and is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from weftrain.core.errors import BackendError
from weftrain.core.formats import fsops
from weftrain.core.formats.units import gb

# names the Python of an existing environment, for instance on a cluster's user node
PYTHON_VARIABLE = "WEFTRAIN_CEREBRAS_PYTHON"
PYTHON_VERSION = (3, 11)
NEEDED_BYTES = 8 << 30  # 5.3 GB installed, and the downloads
SETUP_COMMAND = "weftrain backends setup cerebras"
_MARKER = "complete.json"
Progress = Callable[[str, float], None]


def pins() -> str:
    """The text of requirements.txt: every package of the environment with its version."""
    return resources.files("weftrain.backends.cerebras").joinpath("requirements.txt").read_text()


def pinned(package: str) -> str:
    """The version that the pins give a package."""
    match = re.search(rf"^{re.escape(package)}==(\S+)$", pins(), re.MULTILINE)
    assert match is not None, package
    return match.group(1)


def environment_folder() -> Path:
    """The folder of the environment with these pins, whether it exists or not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "weftrain" / f"cerebras-{hashlib.sha256(pins().encode()).hexdigest()[:12]}"


def missing() -> str | None:
    """None, or what is missing and the command that repairs it. It looks at files only; the worker checks the
    versions.
    """
    named = os.environ.get(PYTHON_VARIABLE)
    if named is not None:
        return (
            None
            if os.access(named, os.X_OK)
            else f"{PYTHON_VARIABLE}={named} is not an executable file: correct it, or unset it"
        )
    folder = environment_folder()
    if not (folder / _MARKER).is_file():
        state = "is incomplete" if folder.exists() else "is not installed"
        return (
            f"its own environment (cerebras-pytorch {pinned('cerebras-pytorch')}, 5.3 GB) {state}: run "
            f"`{SETUP_COMMAND}`"
        )
    if not os.access(folder / "bin" / "python", os.X_OK):
        return f"{folder}: its Python is missing: remove the folder and run `{SETUP_COMMAND}`"
    return None


def python() -> Path:
    """The environment's Python. Raises BackendError with what is missing."""
    reason = missing()
    if reason is not None:
        raise BackendError(f"the cerebras backend cannot run here: {reason}")
    named = os.environ.get(PYTHON_VARIABLE)
    return Path(named) if named is not None else environment_folder() / "bin" / "python"


def find_python_3_11(candidates: tuple[str, ...] = (sys.executable, "python3.11", "python3", "python")) -> Path:
    """A CPython 3.11 that can make a virtual environment. Raises BackendError naming what was found instead."""
    seen = []
    for candidate in candidates:
        path = shutil.which(candidate)
        if path is None:
            continue
        ask = "import platform, sys; print(platform.python_implementation(), *sys.version_info[:2])"
        try:
            answer = subprocess.run(
                [path, "-I", "-c", ask], capture_output=True, text=True, check=False, timeout=30
            ).stdout.split()
        except (OSError, subprocess.TimeoutExpired):
            continue
        if answer == ["CPython", *map(str, PYTHON_VERSION)]:
            return Path(path)
        seen.append(f"{path} ({' '.join(answer) or 'does not start'})")
    raise BackendError(
        f"cerebras-pytorch {pinned('cerebras-pytorch')} needs CPython 3.11, and there is none on PATH "
        f"(found {', '.join(dict.fromkeys(seen)) or 'no Python'}): install Python 3.11, or name one with --python"
    )


def make(progress: Progress, interpreter: Path | None = None) -> Path:
    """Make the environment if it does not exist, and return its Python.

    progress: called with what is being installed and the share done. Raises BackendError if another process is making
    it, for no Python 3.11, too little disk space, or a package that cannot be installed. An incomplete environment is
    never used.
    """
    folder = environment_folder()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BackendError(
            f"{folder.parent}: cannot be made: {error.strerror}: set XDG_CACHE_HOME to a folder that may be written"
        ) from error
    with _locked(folder.with_suffix(".lock"), folder):
        if missing() is None and PYTHON_VARIABLE not in os.environ:
            return folder / "bin" / "python"
        base = (
            find_python_3_11(() if interpreter is None else (str(interpreter),)) if interpreter else find_python_3_11()
        )
        free = fsops.free_bytes(folder.parent)
        if free < NEEDED_BYTES:
            raise BackendError(
                f"{folder.parent}: {gb(free)} are free and making the environment needs "
                f"{gb(NEEDED_BYTES)}: free some, or set XDG_CACHE_HOME to a folder on another disk"
            )
        if folder.exists():
            fsops.remove_tree(folder)  # interrupted, or its Python is missing
        log = folder.with_suffix(".log")
        progress("making a virtual environment", 0.0)
        _run([str(base), "-m", "venv", str(folder)], log, "w", lambda line: None)
        total = len(pins().splitlines())
        done: set[str] = set()

        def watch(line: str) -> None:
            if match := re.match(r"Collecting (\S+?)(?:==\S+)?(?: .*)?$", line):
                done.add(match.group(1))
                progress(f"fetching {match.group(1)}", 0.9 * min(1.0, len(done) / total))
            elif line.startswith("Installing collected packages"):
                progress("installing", 0.92)

        wanted = folder / "requirements.txt"
        wanted.write_text(pins())
        pip = [
            str(folder / "bin" / "python"),
            "-m",
            "pip",
            "install",
            "--disable-pip-version-check",
            "--no-input",
            "--progress-bar",
            "off",
        ]
        _run([*pip, "--no-deps", "--requirement", str(wanted)], log, "a", watch)
        progress("done", 1.0)
        fsops.write_bytes(folder / _MARKER, json.dumps({"cerebras_pytorch": pinned("cerebras-pytorch")}).encode())
    return folder / "bin" / "python"


def _run(command: list[str], log: Path, mode: str, watch: Callable[[str], None]) -> None:
    """Run a command, its output written to `log` and passed to `watch` line by line. Raises BackendError with its last
    line.
    """
    last = ""
    with (
        log.open(mode) as record,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                record.write(line)
                last = line.strip() or last
                watch(line)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise BackendError(
            f"{' '.join(command[1:4])} failed: {last[:300]}; its output is in {log}; then run `{SETUP_COMMAND}` again"
        )


@contextmanager
def _locked(path: Path, folder: Path) -> Iterator[None]:
    with open(path, "w", opener=fsops.open_own) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackendError(
                f"{folder}: another process is making this environment: wait for it, and run the command again"
            ) from None
        yield
