"""A torch older than this package's kernels brings an older triton: its ops are named, and nothing else changes."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from packaging.version import Version

from weftrain.kernels import OPS, load_catalog, table
from weftrain.kernels.checks import run_checks
from weftrain.kernels.checks.compile_gate import compile_all
from weftrain.kernels.contract import KernelError
from weftrain.kernels.triton_version import interpreting, why_not_triton

OLD = "needs triton 3.4 or newer, this is 3.2.0: install torch 2.8 or newer, which brings one"


@pytest.fixture
def triton_of_torch_2_6(monkeypatch: pytest.MonkeyPatch) -> None:
    """triton 3.2.0, which has no `knobs`, imported as torch imports it."""
    found = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.2.0" if name == "triton" else found(name))
    old = ModuleType("triton")
    old.__spec__ = importlib.machinery.ModuleSpec("triton", None)
    monkeypatch.setitem(sys.modules, "triton", old)


def test_the_installed_triton_is_new_enough() -> None:
    """With a torch that brings one; on an older torch it is named."""
    if importlib.util.find_spec("triton") is not None:
        assert (why_not_triton() is None) == (Version(torch.__version__) >= Version("2.8"))


@pytest.mark.usefixtures("triton_of_torch_2_6")
def test_an_old_triton_is_named_and_the_other_sources_stay() -> None:
    assert why_not_triton() == OLD
    rows = {(row.op, row.source): row for row in table("cpu", torch.float32)}
    assert {row.reason for (_, source), row in rows.items() if source == "triton"} == {OLD}
    assert all(rows[op, "reference"].reason is None for op in OPS)
    (rope,) = load_catalog()["rope"]["triton"]
    with pytest.raises(KernelError, match=r"rope of source 'triton' was called: needs triton 3.4"):
        rope.function()


@pytest.mark.usefixtures("triton_of_torch_2_6")
def test_checks_and_the_compile_gate_know_an_old_triton() -> None:
    assert not interpreting()
    report = run_checks(["rms_norm"], ["reference"], "cpu", [torch.float32], ["unwanted"], examples=["odd"])
    assert not report.failed
    with pytest.raises(KernelError, match=r"^nothing can be compiled: needs triton 3.4"):
        compile_all()


def test_without_triton_its_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why_not_triton() == "triton is not installed: pip install 'weftrain[triton]'"
