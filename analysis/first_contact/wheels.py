"""The wheels that `weftrain gpu` needs on a machine without a package index, beside its own torch:
`python -m weftrain.analysis.first_contact.wheels . --to FOLDER --python 3.12`.

weftrain's own wheel carries the commit in its version, since git is not there to be asked. Everything else is taken in
the versions that are installed here, for the other machine's Python on x86-64 Linux.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from weftrain.analysis.machine.environment import commit_of
from weftrain.core.errors import WeftrainError
from weftrain.core.formats.units import gb

# What a machine with a GPU has: a torch that fits its driver, and what that torch brought.
THERE = ("torch", "triton")
_PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17)), "manylinux2014_x86_64")
_NOT_IN_A_WHEEL = (
    ".git",
    ".venv",
    "build",
    "dist",
    "runs",
    "datasets",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".typecheck",
)


class WheelsError(WeftrainError):
    """A wheel that cannot be built or downloaded."""


def needed(roots: Iterable[str], there: Iterable[str], python: str) -> dict[str, str]:
    """Distribution -> version installed here, of all that `roots` need on Linux with that Python. Themselves, what is
    `there`, and what only that needs, are left out.
    """
    environment = {"python_version": python, "sys_platform": "linux", "platform_system": "Linux", "extra": ""}
    skipped, found = {canonicalize_name(name) for name in there}, dict[str, str]()
    waiting = list(roots)
    while waiting:
        for text in importlib.metadata.requires(waiting.pop()) or ():
            wanted = Requirement(text)
            name = canonicalize_name(wanted.name)
            if name in found or name in skipped or (wanted.marker and not wanted.marker.evaluate(environment)):
                continue
            found[name] = importlib.metadata.version(name)
            waiting.append(name)
    return dict(sorted(found.items()))


def download(packages: dict[str, str], folder: Path, python: str) -> None:
    """One wheel each, for another Python. Raises WheelsError for what has none."""
    options = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    options += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    for name, version in packages.items():
        _pip("download", *options, "--dest", str(folder), f"{name}=={version}")


def build_own(tree: Path, folder: Path) -> None:
    """weftrain's wheel from a source tree, version 0.1.0+g<commit>."""
    commit = commit_of(tree / "pyproject.toml")
    changed = ".changed" if commit["dirty"] is True else ""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "tree"  # a build writes beside pyproject.toml
        shutil.copytree(tree, copy, ignore=shutil.ignore_patterns(*_NOT_IN_A_WHEEL))
        text = (copy / "pyproject.toml").read_text()
        local = f"+g{commit['commit'][:12]}{changed}" if re.fullmatch("[0-9a-f]{12,}", commit["commit"]) else ""
        text = re.sub(
            r'^version = "([^"]+)"', lambda found: f'version = "{found[1]}{local}"', text, count=1, flags=re.M
        )
        (copy / "pyproject.toml").write_text(text)
        _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(copy))


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", words[0], "--quiet", "--disable-pip-version-check", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip said nothing"]
        raise WheelsError(f"{words[-1]}: {said[-1]}")


def main() -> None:
    """Gather the wheels into a new folder, and say how they are installed there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tree", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--python", default="3.12", help="of the other machine")
    parser.add_argument("--there", nargs="*", default=[], help="what that machine has beside torch and triton")
    parser.add_argument("--float8", action="store_true", help="torchao too")
    given = parser.parse_args()
    given.to.mkdir(parents=True)
    try:
        build_own(given.tree, given.to)
        extra = ["torchao"] if given.float8 else []
        packages = needed(["weftrain", *extra], [*THERE, *given.there], given.python)
        download(packages | {name: importlib.metadata.version(name) for name in extra}, given.to, given.python)
    except WheelsError as error:
        sys.exit(str(error))
    size = sum(path.stat().st_size for path in given.to.iterdir())
    print(f"{len(list(given.to.iterdir()))} wheels, {gb(size)} in {given.to}; on the other machine:")
    print(f"python{given.python} -m pip install --no-index --no-deps --target site {given.to.name}/*.whl")
    print(f"PYTHONPATH=site python{given.python} -m weftrain.cli gpu")


if __name__ == "__main__":
    main()
