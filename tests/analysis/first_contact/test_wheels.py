"""What a machine without a package index is sent: everything but its torch, and a version that names the commit."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from places import ROOT

from weftrain.analysis.first_contact import wheels
from weftrain.analysis.machine.environment import NOT_AVAILABLE, commit_of

DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def test_everything_is_sent_but_torch_and_what_only_torch_needs() -> None:
    found = wheels.needed(["weftrain"], wheels.THERE, "3.12")
    wanted = {canonicalize_name(Requirement(text).name) for text in DEPENDENCIES} - {"torch"}
    assert wanted <= found.keys()
    assert {"pydantic-core", "typing-inspection", "annotated-types"} <= found.keys()
    assert not {"torch", "triton", "sympy", "networkx", "weftrain", "pytest"} & found.keys()
    fewer = wheels.needed(["weftrain"], [*wheels.THERE, "Tensorboard", "bokeh"], "3.12")
    assert not {"tensorboard", "bokeh", "grpcio", "tornado"} & fewer.keys()


def test_the_wheels_version_names_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def pip(*words: str) -> None:
        seen.append((Path(words[-1]) / "pyproject.toml").read_text())

    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    monkeypatch.setattr(wheels, "_pip", pip)
    for dirty, ending in ((False, ""), (True, ".changed")):
        monkeypatch.setattr(
            wheels, "commit_of", lambda file, dirty=dirty: {"commit": "0123456789abcdef", "dirty": dirty}
        )
        wheels.build_own(tree, tmp_path)
        assert tomllib.loads(seen[-1])["project"]["version"] == f"0.1.0+g0123456789ab{ending}"
    monkeypatch.setattr(wheels, "commit_of", lambda file: {"commit": NOT_AVAILABLE, "dirty": NOT_AVAILABLE})
    wheels.build_own(tree, tmp_path)
    assert tomllib.loads(seen[-1])["project"]["version"] == "0.1.0"


def test_a_file_that_a_checkout_does_not_track_has_no_commit(tmp_path: Path) -> None:
    """An installation below somebody else's checkout would be given that one's commit."""
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", commit_of(ROOT / "pyproject.toml")["commit"])
    assert commit_of(tmp_path / "environment.py") == {"commit": NOT_AVAILABLE, "dirty": NOT_AVAILABLE}
    assert commit_of(ROOT / "build" / "environment.py")["commit"] == NOT_AVAILABLE
