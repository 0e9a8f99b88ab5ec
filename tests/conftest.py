"""What every test shares: small recipes, made from the shipped ones so that they stay true to them."""

from __future__ import annotations

import gc
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from weftrain.core.config import Recipe
from weftrain.core.recipe_file import load_recipe


class Helpers:
    """Finds the helper modules that lie beside tests, by their plain names: importlib mode puts no test folder on
    sys.path. A helper is any file below tests/ that is neither a test, a conftest nor part of a package.
    """

    PATHS = {  # noqa: RUF012  never changed
        path.stem: path
        for path in Path(__file__).parent.rglob("*.py")
        if not path.name.startswith("test_") and path.name not in ("conftest.py", "__init__.py", "make.py")
    }

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, cls.PATHS[name]) if name in cls.PATHS else None


sys.meta_path.append(Helpers)

TINY = [
    "model.vocab_size=97",
    "model.num_layers=2",
    "model.hidden_size=48",
    "model.num_heads=3",
    "model.intermediate_size=70",
    "model.max_position_embeddings=16",
    "data.sequence_length=13",
    "data.sources=[]",
    "data.synthetic_rows=12",
    "batch.global_batch_size=4",
    "batch.micro_batch_size=4",
    "schedule.steps=6",
    "precision.compute=float32",
    "schedule.learning_rate=[{shape: linear, steps: 2, start: 0, end: 0.01}, {shape: constant, steps: 1000, start: "
    "0.01}]",
    "checkpoint.every_steps=2",
    "log.evaluate_every_steps=0",
]
# what the width of each family's demo asks for beside
SIZES = {
    "crystal": ["model.rotary_dim=4", "model.mup.base_hidden_size=16"],
    "amber": ["model.rotary_dim=16"],
    "llama": [
        "model.num_heads=4",
        "model.rotary_dim=12",
        "model.rotary_scaling.original_max_position_embeddings=4",
    ],
    "qwen": ["model.num_heads=4", "model.head_dim=16", "model.rotary_dim=16"],
    "moe": ["model.num_heads=4", "model.rotary_dim=12", "model.experts.intermediate_size=24"],
}


def pytest_addoption(parser: pytest.Parser) -> None:
    # Here and not in tests/kernels: pytest reads options from the conftest of its root alone.
    parser.addoption(
        "--kernel-device", default="cpu", choices=("cpu", "cuda"), help="device that tests/kernels examines kernels on"
    )
    parser.addoption(
        "--update-golden", action="store_true", help="store what is lowered now as what must not change unseen"
    )


def pytest_collection_finish() -> None:
    """What imports and collection made stays until the process ends: the garbage collector, which takes a tenth of the
    tests' time otherwise, need not look at it again.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def vendor() -> Path:
    """The Python of the Cerebras vendor's environment, for tests marked `cerebras`. Without one they are skipped."""
    from weftrain.backends.cerebras import environment

    if reason := environment.missing():
        pytest.skip(f"the cerebras backend cannot run here: {reason}")
    return environment.python()


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def tiny_overrides() -> list[str]:
    """For the command line: crystal_demo cut to 2 layers of width 48 on synthetic rows, at its own precision and
    learning rate.
    """
    kept = [item for item in TINY if not item.startswith(("precision.", "schedule.", "checkpoint."))]
    return [*kept, *SIZES["crystal"], "log.tensorboard=false"]


@pytest.fixture
def tiny_recipe() -> Callable[..., Recipe]:
    """tiny_recipe('crystal', 'amber', 'llama', 'qwen' or 'moe', 'key=value', ...): that demo cut to 2 layers of width 48, fp32."""

    def make(family: str = "crystal", *overrides: str) -> Recipe:
        return load_recipe(f"{family}_demo", [*TINY, *SIZES[family], *overrides]).recipe

    return make


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the package was installed from a wheel, and nothing else: first on PYTHONPATH it stands for an
    installation.
    """
    pytest.importorskip("setuptools", minversion="77")
    root, folder = Path(__file__).parent.parent, tmp_path_factory.mktemp("installed")
    skipped = (".venv", ".git", "runs", "datasets", "__pycache__", "*.egg-info", ".*_cache", ".typecheck", "build")
    shutil.copytree(root, folder / "tree", ignore=shutil.ignore_patterns(*skipped))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder / "site")]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(folder / "tree")],
        check=True,
        capture_output=True,
        text=True,
    )
    return folder / "site"
