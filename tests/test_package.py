"""The house: who imports whom, what ships, and that both ways of installing give the same package."""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from places import ROOT

FOLDERS = ("cli", "analysis", "backends", "data_prep", "exchange", "core", "kernels")
# Every arrow runs down: a module may import what stands in its own row, and nothing else of weftrain.
# The longest name that a module's name begins with is its row.
MAY_IMPORT = {
    "cli": ("cli", "analysis", "backends", "data_prep", "exchange", "core", "kernels"),
    "analysis": ("analysis", "exchange", "core", "kernels"),
    "backends": ("backends", "core", "kernels"),
    "exchange": ("exchange", "core"),
    "data_prep": ("data_prep", "core.formats", "core.errors"),
    "core": ("core", "kernels"),
    "core.order": ("core.order", "core.formats", "core.errors"),
    "core.formats": ("core.formats", "core.errors"),
    "core.errors": (),
    "kernels": ("kernels",),
}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "torch.load", "torch.save", "yaml.load", "numpy.load", "np.load"}
# The one program that unpickles, in a process of its own, and that nobody imports: see exchange/huggingface/pickled.py.
UNPICKLES = ROOT / "exchange" / "huggingface" / "pickled_worker.py"


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write weftrain.…"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name, without `weftrain.`."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources()}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def test_imports_run_downwards() -> None:
    for module, path in modules().items():
        row = max((row for row in MAY_IMPORT if f"{module}.".startswith(f"{row}.")), key=len)
        for name in imports(path):
            top, _, rest = name.partition(".")
            assert top not in FOLDERS, f"{path}: import weftrain.{top}, not {top}"
            if top == "weftrain":
                assert any(f"{rest}.".startswith(f"{other}.") for other in MAY_IMPORT[row]), (
                    f"{path} may not import {name}"
                )
            if row == "core" and rest.startswith("kernels"):
                assert rest.count(".") == 1, (
                    f"{path}: core takes from weftrain.kernels what the package exports, not {name}"
                )


def test_no_import_goes_in_a_circle() -> None:
    """Imports inside functions count too: a circle that is only put off is one."""
    known = modules()
    edges = {
        module: {found for name in imports(path) if (found := _module_of(name.removeprefix("weftrain."), known))}
        - {module}
        for module, path in known.items()
    }
    while free := [module for module, targets in edges.items() if not targets & edges.keys()]:
        for module in free:
            del edges[module]
    assert not edges, {module: sorted(targets & edges.keys()) for module, targets in edges.items()}


def _module_of(name: str, known: dict[str, Path]) -> str | None:
    """Of `core.errors.DataError` the module `core.errors`."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def test_no_pickle_and_no_unsafe_loading() -> None:
    for path in sources():
        tree = tree_of(path)
        assert not {name.split(".")[0] for name in imports(path)} & {
            "pickle",
            "cPickle",
            "dill",
            "cloudpickle",
            "shelve",
            "marshal",
        }, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                if (path, call) == (UNPICKLES, "torch.load"):
                    assert {item.arg: ast.unparse(item.value) for item in node.keywords if item.arg}.get(
                        "weights_only"
                    ) == "True", path
                    continue
                assert call not in {
                    "eval",
                    "exec",
                    "os.system",
                    "torch.load",
                    "torch.save",
                    "yaml.load",
                    "numpy.load",
                    "np.load",
                }, f"{path}: {call}"
                assert not any(keyword.arg in ("shell", "allow_pickle") for keyword in node.keywords), (
                    f"{path}: {ast.unparse(node)}"
                )


def test_nobody_imports_the_program_that_unpickles() -> None:
    assert "torch.load" in UNPICKLES.read_text()
    assert not [path for path in sources() for name in imports(path) if UNPICKLES.stem in name.split(".")]


def test_every_folder_with_code_is_a_declared_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = set(project["tool"]["setuptools"]["packages"])
    found = {"weftrain." + ".".join(path.parent.relative_to(ROOT).parts) for path in sources()}
    assert declared == found
    assert all((ROOT / Path(*name.split(".")[1:]) / "__init__.py").exists() for name in declared)


def install_check(environment: dict[str, str], cwd: Path) -> dict[str, str]:
    program = """
import importlib, importlib.metadata, importlib.resources, json
names = ["cli.main", "backends.local", "core.model", "kernels", "kernels.bench.roofline", "data_prep"]
out = {name: importlib.import_module("weftrain." + name).__file__ for name in names}
from weftrain.core.recipe_file import builtin_recipes
out["recipes"] = ",".join(builtin_recipes())
out["readme"] = str((importlib.resources.files("weftrain.kernels") / "README.md").is_file())
print(json.dumps(out))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=cwd, capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_editable_install(tmp_path: Path) -> None:
    found = install_check(dict(os.environ), tmp_path)
    assert found["core.model"] == str(ROOT / "core" / "model.py")
    assert "amber_7b" in found["recipes"]


def test_normal_install(installed: Path, tmp_path: Path) -> None:
    """A wheel, installed into an empty folder: the same modules, recipes and READMEs; nothing but `weftrain` at the
    top.
    """
    site = installed
    assert {entry.name for entry in site.iterdir() if not entry.name.endswith(".dist-info")} <= {"weftrain", "bin"}
    found = install_check({**os.environ, "PYTHONPATH": str(site)}, tmp_path)
    assert found["core.model"] == str(site / "weftrain" / "core" / "model.py")
    assert found["recipes"] == ",".join(sorted(path.stem for path in (ROOT / "core" / "recipes").glob("*.yaml")))
    assert found["readme"] == "True"


def test_console_script_and_module_agree() -> None:
    script = Path(sys.executable).parent / "weftrain"
    outputs = [
        subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
        for command in ([str(script)], [sys.executable, "-m", "weftrain.cli"])
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("weftrain, version ")
