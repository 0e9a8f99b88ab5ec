"""The pages docs/add-*.md, followed step by step: files are written, changes made in a copy of the code, commands run.

A block whose info string has a second word is a file (or, marked `diff`, a change of one: hunks are separated by @@).
A `bash` block is run; each line of an unnamed `text` block must be in what the commands before it printed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from places import ROOT

from weftrain.cli.main import main
from weftrain.core.run.speed import Peak

PAGES = sorted((ROOT / "docs").glob("add-*.md"))
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()
BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LONG = ("add-an-op.md", "add-a-metric.md")


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.stem, marks=[pytest.mark.prove] if page.name in LONG else []) for page in PAGES]
)
def test_following_the_page_works(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # the two seconds in which a run measures the machine
    monkeypatch.setattr("weftrain.cli.assembly.measured_peak", lambda device, dtype: Peak(1e11, "known in tests"))
    torch.set_num_threads(1)
    blocks = BLOCK.findall(page.read_text())
    assert any(language == "bash" for language, _, _ in blocks), "a page ends with commands that show that it works"
    copy = copied({name.split("/")[0] for _, name, _ in blocks} & set(PACKAGES), tmp_path / "copy")
    printed = ""
    for language, name, text in blocks:
        place = (tmp_path if copy is None or name.split("/")[0] not in PACKAGES else copy / "weftrain") / name
        if language == "diff":
            place.write_text(changed(place.read_text(), text, name))
        elif name:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        elif language == "bash":
            printed = "".join(run(line, copy) for line in text.splitlines())
        elif language == "text":
            for line in text.splitlines():
                assert line in printed, printed


def copied(edited: set[str], folder: Path) -> Path | None:
    """A folder to put before the installed weftrain, in which the packages that a page edits are copies; None without."""
    if not edited:
        return None
    (folder / "weftrain").mkdir(parents=True)
    for package in PACKAGES:
        if package in edited:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / package, folder / "weftrain" / package, ignore=ignored)
        else:
            (folder / "weftrain" / package).symlink_to(ROOT / package)
    return folder


def changed(text: str, diff: str, name: str) -> str:
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
        assert text.count(old) == 1, f"{name}: the page's lines stand there {text.count(old)} times:\n{old}"
        text = text.replace(old, new)
    return text


def run(command: str, copy: Path | None) -> str:
    words = shlex.split(command)
    if words[0] == "grep":
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert words[0] == "weftrain", command
    if copy is None:
        result = CliRunner().invoke(main, words[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}"
        return result.output
    done = subprocess.run(
        [sys.executable, "-m", "weftrain.cli", *words[1:]],
        env={**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_add_a_model_shows_what_stands_in_the_code() -> None:
    """Each python block of the page, in the file that the heading above it names."""
    shown = 0
    for section in (ROOT / "docs" / "add-a-model.md").read_text().split("\n## ")[1:]:
        heading, _, rest = section.partition("\n")
        for language, _, text in BLOCK.findall(rest):
            if language == "python":
                (file,) = re.findall(r"`([\w/]+\.py)`", heading)
                assert text in (ROOT / file).read_text(), f"{file}: not there any more:\n{text}"
                shown += 1
    assert shown == 7
