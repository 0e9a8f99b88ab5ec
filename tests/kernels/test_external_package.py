"""kernels/README.md's five steps, followed by a real package: installed by pip, found, chosen, checked - and, when
wrong, caught.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "external_package"
Run = Callable[..., subprocess.CompletedProcess[str]]


def install(source: Path, site: Path) -> None:
    """What `pip install .` does, from a copy (a build leaves files behind), without the network."""
    options = [
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--disable-pip-version-check",
        "--target",
        str(site),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def runner(site: Path) -> Run:
    """run("kernels", ...): the command line in a process that sees the package."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "weftrain.cli", *arguments]
        return subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=False
        )

    return run


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77")
    root = tmp_path_factory.mktemp("external")
    shutil.copytree(PACKAGE, root / "source")
    install(root / "source", root / "site")
    return root / "site"


def test_the_table_shows_it(site: Path) -> None:
    done = runner(site)("kernels", "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = {row["op"]: row for row in json.loads(done.stdout)["rows"] if row["source"] == "example"}
    assert set(rows) == {"swiglu", "rms_norm", "squared_relu"}
    assert all(row["reason"] is None and row["version"] == "weftrain-example-kernels 1.2" for row in rows.values())


def test_what_it_implements_is_chosen_and_the_op_that_it_adds_is_checked(site: Path) -> None:
    program = """
import json, torch
from weftrain.kernels import Spec, select
from weftrain.kernels.checks import run_checks
specs = [Spec("swiglu", "layers.0.ffn", "cpu", torch.float32, {"intermediate_size": 8})]
specs += [Spec("rms_norm", name, "cpu", torch.float32, {"hidden_size": n, "eps": 1e-6}) for name, n in (("narrow", 64), ("wide", 8192))]
chosen = [select(specs, ["example", "torch"]).manifest, select(specs, ["torch"], {"swiglu@layers.0.*": "example"}).manifest]
added = select([Spec("squared_relu", "ffn", "cpu", torch.float32)], ["example"]).manifest["ops"]["squared_relu"][0]
findings = run_checks(["squared_relu"], dtypes=[torch.float32], checks=["numerics", "refused"])
print(json.dumps([chosen, added, [[f.source, f.check, f.ok] for f in findings]]))
"""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (preferred, pinned), added, findings = json.loads(done.stdout)
    assert added["function"] == "weftrain_example_kernels:squared_relu_by_maximum"
    assert list(added["files"]) == ["__init__.py"]
    assert {(source, check) for source, check, _ in findings} == {
        (source, check) for source in ("reference", "example") for check in ("numerics", "refused")
    }
    assert all(ok for _, _, ok in findings)
    narrow, wide = preferred["ops"]["rms_norm"]
    assert (narrow["source"], narrow["modules"]) == ("example", ["narrow"])
    assert (wide["source"], wide["passed_over"]["example"]) == ("torch", "needs hidden_size <= 4096, this is 8192")
    (swiglu,) = pinned["ops"]["swiglu"]
    assert (swiglu["source"], swiglu["pin"]) == ("example", "swiglu@layers.0.*")
    assert swiglu["function"] == "weftrain_example_kernels:swiglu"
    assert len(swiglu["sha256"]) == 64
    assert {entry["source"] for entry in pinned["ops"]["rms_norm"]} == {"torch"}


@pytest.mark.prove
def test_it_passes_the_checks(site: Path, tmp_path: Path) -> None:
    done = runner(site)("kernels", "check", "--source", "example", "--json", str(tmp_path / "findings.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads((tmp_path / "findings.json").read_text())["findings"]
    assert {(finding["op"], finding["source"]) for finding in findings} == {
        ("swiglu", "example"),
        ("rms_norm", "example"),
        ("squared_relu", "example"),
    }
    assert {finding["dtype"] for finding in findings} == {"float32", "bfloat16", "float16"}
    assert all(finding["ok"] for finding in findings)
    measured = runner(site)("kernels", "bench", "--op", "squared_relu", "--source", "example", "--repeats", "1")
    assert measured.returncode == 0, measured.stderr
    assert "squared_relu" in measured.stdout


def test_a_wrong_one_is_caught(tmp_path: Path) -> None:
    """The same package with one term of one gradient wrong."""
    pytest.importorskip("setuptools", minversion="77")
    shutil.copytree(PACKAGE, tmp_path / "source")
    module = tmp_path / "source" / "weftrain_example_kernels" / "__init__.py"
    right = "sigmoid * (1 + gate32 * (1 - sigmoid))"
    assert right in module.read_text()
    module.write_text(module.read_text().replace(right, "sigmoid * (1 + gate32 * sigmoid)"))
    install(tmp_path / "source", tmp_path / "site")
    done = runner(tmp_path / "site")(
        "kernels", "check", "--source", "example", "--op", "swiglu", "--dtype", "float32", "--check", "numerics"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED swiglu example numerics" in done.stdout
    assert "gate" in done.stdout.split("FAILED swiglu example numerics")[1].splitlines()[0]
