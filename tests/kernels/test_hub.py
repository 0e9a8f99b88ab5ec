"""Kernels of the Hugging Face Hub: refused unless commit and files are those that were asked for, and never downloaded
by a run. Stand-ins take the place of the two packages, so nothing is looked up anywhere.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from weftrain.cli.kernels import kernels
from weftrain.kernels import OPS, Implementation, KernelError
from weftrain.kernels.hub import HubKernel, builds_in, fetch

REPOSITORY, COMMIT, BUILD = "their/activation", "0123456789abcdef0123456789abcdef01234567", "torch-universal"
HUB = """
import pathlib
asked = []
def snapshot_download(repository, *, repo_type, revision, allow_patterns, cache_dir, local_files_only):
    asked.append((repository, repo_type, revision, allow_patterns, local_files_only))
    folder = pathlib.Path(__file__).parent.parent / "cache" / revision
    if repo_type != "kernel" or not folder.exists():
        raise OSError("no such entry, and offline" if local_files_only else "no such repository")
    return str(folder)
"""
KERNELS = """
import importlib.util, pathlib
from huggingface_hub import constants
def get_kernel(repository, revision=None, trust_remote_code=False):
    assert constants.HF_HUB_OFFLINE and trust_remote_code
    path = pathlib.Path(__file__).parent / "cache" / revision / "build" / "torch-universal" / "__init__.py"
    spec = importlib.util.spec_from_file_location("activation_of_the_hub", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""
ACTIVATION = """
import torch
def silu_and_mul(gate, up):
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with both packages and the kernel in its cache."""
    build = tmp_path / "cache" / COMMIT / "build" / BUILD
    build.mkdir(parents=True)
    (build / "__init__.py").write_text(ACTIVATION)
    (tmp_path / "huggingface_hub").mkdir()
    (tmp_path / "huggingface_hub" / "__init__.py").write_text(HUB)
    (tmp_path / "huggingface_hub" / "constants.py").write_text("HF_HUB_OFFLINE = False\n")
    (tmp_path / "kernels.py").write_text(KERNELS)
    monkeypatch.delenv("KERNELS_CACHE", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("kernels", "huggingface_hub")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def kernel(site: Path) -> HubKernel:
    return HubKernel(REPOSITORY, COMMIT, builds_in(site / "cache" / COMMIT))


def test_a_pinned_kernel_is_loaded_and_computes(site: Path) -> None:
    pinned = kernel(site)
    assert pinned.unavailable() is None

    def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return pinned.load().silu_and_mul(gate, up)  # type: ignore[no-any-return]

    found = Implementation("swiglu", "hub", swiglu, pinned.unavailable, pinned.version)
    arguments = OPS["swiglu"].examples["odd"]("cpu", torch.float32)
    torch.testing.assert_close(found.function(**arguments), OPS["swiglu"].function(**arguments))
    assert found.version == "their/activation 0123456789ab"
    assert sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE is False  # as it was
    # whatever was asked of the Hub's client, it was of files that are here
    assert all(asked[-1] for asked in sys.modules["huggingface_hub"].asked)


def test_other_files_and_builds_are_refused_before_anything_runs(site: Path) -> None:
    pinned = kernel(site)
    module = site / "cache" / COMMIT / "build" / BUILD / "__init__.py"
    module.write_text("raise SystemExit('this ran')\n")
    assert "and " + pinned.builds[BUILD] + " is asked for" in str(pinned.unavailable())
    with pytest.raises(KernelError, match="build torch-universal of their/activation 0123456789ab has the SHA-256"):
        pinned.load()
    module.write_text(ACTIVATION)
    (module.parent / "__pycache__").mkdir()
    (module.parent / "__pycache__" / "x.pyc").write_text("written by Python")
    assert pinned.unavailable() is None
    (module.parent.parent / "torch211-cu130").mkdir()
    assert pinned.unavailable() == (
        "build torch211-cu130 of their/activation 0123456789ab is on this machine, and nobody vouches for it"
    )


def test_what_is_not_here_is_not_downloaded(site: Path) -> None:
    pinned = kernel(site)
    (site / "cache").rename(site / "elsewhere")
    assert pinned.unavailable() == (
        "their/activation 0123456789ab is not on this machine, and a run downloads nothing; fetch it: weftrain kernels "
        f"fetch their/activation --revision {COMMIT}"
    )


def test_without_the_package_it_says_what_to_do(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout of this repository the folder of this package is found by that name."""
    found = importlib.util.find_spec("weftrain.kernels")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    assert "hides the package `kernels`: run from another directory" in str(kernel(site).unavailable())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernel(site).unavailable() == "the package `kernels` is not installed: pip install kernels"


@pytest.mark.parametrize(
    ("repository", "revision", "builds", "message"),
    [
        (REPOSITORY, "main", {BUILD: "0" * 64}, "'main' is no commit of 40 hex digits; branches and tags move"),
        (REPOSITORY, COMMIT, {BUILD: "0"}, "is no SHA-256 of 64 hex digits"),
        (REPOSITORY, COMMIT, {}, "has no build that is vouched for; fetch it: weftrain kernels fetch"),
        ("../activation", COMMIT, {BUILD: "0" * 64}, "is no repository of the Hub: it is written owner/name"),
    ],
)
def test_a_pin_that_pins_nothing_is_refused(
    repository: str, revision: str, builds: dict[str, str], message: str
) -> None:
    with pytest.raises(KernelError, match=message):
        HubKernel(repository, revision, builds)


def test_fetching_prints_what_to_pin(site: Path) -> None:
    result = CliRunner().invoke(kernels, ["fetch", REPOSITORY, "--revision", COMMIT, "--build", BUILD])
    assert result.exit_code == 0, result.output
    assert result.output == f"{kernel(site).builds[BUILD]}  {BUILD}\n"
    hub: Any = sys.modules["huggingface_hub"]
    assert hub.asked == [(REPOSITORY, "kernel", COMMIT, [f"build/{BUILD}/**"], False)]
    with pytest.raises(KernelError, match=r"has no such build: .*OSError: no such repository"):
        fetch(REPOSITORY, "f" * 40)
    with pytest.raises(KernelError, match="branches and tags move"):
        fetch(REPOSITORY, "main")
