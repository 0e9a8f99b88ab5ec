"""The paths of a new user, each a page whose commands run as printed, from an installed package, outside the checkout.

tests/test_docs.py runs the other pages inside its process and shortens their runs; here nothing is changed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from pages import commands, needs_vendor
from places import ROOT

from weftrain.backends.cerebras.environment import PYTHON_VARIABLE, SETUP_COMMAND

pytestmark = pytest.mark.prove
PATHS = {
    "benchmarking hardware": "benchmark.md",
    "training on own text": "train-on-your-text.md",
    "planning for a cluster": "train-on-a-cluster.md",
    "planning for a wafer": "from-laptop-to-wafer.md",
    "examining a release": "examine-a-release.md",
}


@pytest.mark.parametrize(
    "page",
    # test_docs.py runs the commands of every page in this process: of an installation, CI runs one path
    [
        pytest.param(page, marks=() if name == "training on own text" else pytest.mark.soak, id=name)
        for name, page in PATHS.items()
    ],
)
def test_commands_as_printed(page: str, installed: Path, tmp_path: Path) -> None:
    prepare(page, tmp_path)
    found = commands(ROOT / "docs" / page)
    run_as_printed([command for command in found if not of_the_vendor(command)], installed, tmp_path)


@pytest.mark.cerebras
@pytest.mark.usefixtures("vendor")
def test_commands_of_the_vendors_environment_as_printed(installed: Path, tmp_path: Path) -> None:
    page = PATHS["planning for a wafer"]
    prepare(page, tmp_path)
    found = [command for command in commands(ROOT / "docs" / page) if of_the_vendor(command)]
    run_as_printed(found[1:], installed, tmp_path)  # the first one made the environment that `vendor` found


def of_the_vendor(command: str) -> bool:
    return command == SETUP_COMMAND or (command.startswith("weftrain") and needs_vendor(command))


def run_as_printed(found: list[str], installed: Path, folder: Path) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name == PYTHON_VARIABLE or not name.startswith(("WEFTRAIN", "PYTEST"))
    }
    environment["PYTHONPATH"] = str(installed)
    environment["PATH"] = os.pathsep.join(
        [str(installed / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    where = "import weftrain.core.config as config; print(config.__file__)"
    used = subprocess.run(
        [sys.executable, "-c", where], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    assert used.stdout.startswith(str(installed)), "the checkout is used, not the package"
    for command in found:
        # As a reader types it: bash reads the quotes, the comments and the redirections.
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def prepare(page: str, folder: Path) -> None:
    """What the reader has before the page: texts, and for some pages a dataset of the demo's name."""
    (folder / "my_texts").mkdir()
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]:
        (folder / "my_texts" / f"{source.stem}.txt").write_bytes(source.read_bytes()[:20_000])
    if page in ("benchmark.md", "from-laptop-to-wafer.md"):  # `weftrain prep` comes first, on the front page
        from weftrain.cli.main import main

        words = ["prep", str(folder / "my_texts"), "--name", "python_stdlib", "--vocab-size", "8192"]
        main([*words, "--sequence-length", "256", "--output", str(folder / "datasets")], standalone_mode=False)
