"""One run and its release for all tests of this folder; each test gets a copy that it may edit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from record_runs import done, prepare, trainer, weftrain


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, a run of three chunks and its release."""
    folder = tmp_path_factory.mktemp("release")
    torch.set_num_threads(2)
    prepare(folder)
    done(trainer(folder)())
    done(weftrain("release", folder / "runs" / "crystal_demo", "--to", folder / "release", "--licence", "Apache-2.0"))
    return folder


@pytest.fixture
def release(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may edit. The original run and datasets are not there for whoever has it."""
    return Path(shutil.copytree(made / "release", tmp_path / "release"))
