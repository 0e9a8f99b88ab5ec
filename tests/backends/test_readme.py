"""backends/README.md, followed: its package is installed by pip and found, and every command accepts its backend."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from places import ROOT

from weftrain.backends.common.registry import get_backend
from weftrain.cli.main import main
from weftrain.core.run.speed import Peak

BLOCKS = re.findall(
    r"^```(\w+) ?(\S*)\n(.*?)^```$", (ROOT / "backends/README.md").read_text(), re.MULTILINE | re.DOTALL
)
FILES = {name: text for _, name, text in BLOCKS if name}
COMMANDS = [line for language, _, text in BLOCKS if language == "bash" for line in text.splitlines()]
PACKAGE = Path(__file__).parent / "external_package"


def test_its_package_is_the_one_that_is_checked_here() -> None:
    assert {name: (PACKAGE / name).read_text() for name in ("pyproject.toml", "weftrain_minimal/__init__.py")} == FILES
    assert len(FILES["weftrain_minimal/__init__.py"].splitlines()) < 64


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first command, from files that are its blocks."""
    pytest.importorskip("setuptools", minversion="77")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name, text in FILES.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    command = [sys.executable, "-m", *shlex.split(COMMANDS[0]), "--no-index", "--quiet", "--target", str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def test_every_command_accepts_it(
    site: Path, tmp_path: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("weftrain.cli.assembly.measured_peak", lambda device, dtype: Peak(1e11, "known in tests"))
    monkeypatch.setattr("weftrain.analysis.bench.run.measured_peak", lambda device, dtype: Peak(1e11, "known in tests"))
    assert get_backend("minimal").summary in run("weftrain backends")
    (tmp_path / "texts").mkdir()
    for number in range(20):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"The text of file {number}, and what follows.\n" * 20)
    run("weftrain prep texts --name text --vocab-size 300 --sequence-length 13 --heldout-fraction 0.3 --workers 1")
    own = [one for one in tiny_overrides if not one.startswith(("data.", "model.vocab_size", "log."))]
    own += ["model.vocab_size=332", "data.sequence_length=13", "data.sources=[{name: text, path: text, weight: 1}]"]
    for command in COMMANDS[1:-1]:
        verb = shlex.split(command)[1]
        output = run(command, *([] if verb == "eval" else own if verb != "bench" else tiny_overrides))
        assert {"train": "loss", "eval": "perplexity", "bench": "RESULT", "show": "parameters"}[verb] in output


@pytest.mark.prove
def test_the_conformance_suite_accepts_it(site: Path) -> None:
    words = shlex.split(COMMANDS[-1].replace("WEFTRAIN", str(ROOT)))
    command = [sys.executable, "-m", *words, "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 20


def run(command: str, *more: str) -> str:
    result = CliRunner().invoke(main, [*shlex.split(command)[1:], *more])
    assert result.exit_code == 0, f"{command}\n{result.output}"
    return result.output
