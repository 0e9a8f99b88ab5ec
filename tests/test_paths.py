"""The four paths of a new user, each a page whose commands run as printed, from an installed package, outside the
checkout.

tests/test_docs.py runs the other pages inside its process and shortens their runs; here nothing is changed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from pages import commands
from places import ROOT

pytestmark = pytest.mark.prove
PATHS = {
    "benchmarking hardware": "benchmark.md",
    "training on own text": "train-on-your-text.md",
    "planning for a cluster": "train-on-a-cluster.md",
    "examining a release": "examine-a-release.md",
}


@pytest.mark.parametrize("page", PATHS.values(), ids=PATHS)
def test_commands_as_printed(page: str, installed: Path, tmp_path: Path) -> None:
    prepare(page, tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WEFTRAIN", "PYTEST"))}
    environment["PYTHONPATH"] = str(installed)
    environment["PATH"] = os.pathsep.join(
        [str(installed / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    where = "import weftrain.core.config as config; print(config.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith(str(installed)), "the checkout is used, not the package"
    for command in commands(ROOT / "docs" / page):
        # As a reader types it: bash reads the quotes, the comments and the redirections.
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def prepare(page: str, folder: Path) -> None:
    """What the reader has before the page: texts, and for the benchmarks a dataset of the demo's name."""
    (folder / "my_texts").mkdir()
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]:
        (folder / "my_texts" / f"{source.stem}.txt").write_bytes(source.read_bytes()[:20_000])
    if page == "benchmark.md":  # `weftrain prep` comes first, on the front page
        from weftrain.cli.main import main

        words = ["prep", str(folder / "my_texts"), "--name", "python_stdlib", "--vocab-size", "8192"]
        main([*words, "--sequence-length", "256", "--output", str(folder / "datasets")], standalone_mode=False)
