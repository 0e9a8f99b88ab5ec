"""The controls of replay: a fresh one in another process and folder and that of a resumed run are equal bit for bit, and
one with a deliberate fault is not, from the very step at which the fault begins.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from record_runs import done, trainer, weftrain
from release_cases import verdicts

from weftrain.backends.common import in_memory
from weftrain.core.data import TokenSource
from weftrain.core.order.batch import Batch

FIRST = 4  # completed steps at which link 3 begins; it has two steps


def test_another_process_in_another_folder(release: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(release, elsewhere / "it")
    command = [sys.executable, "-m", "weftrain.cli", "replay", "it"]
    found = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in found.stdout.splitlines() if " of 117 " in line] == ["equal"] * 3


@pytest.mark.prove
def test_a_run_that_was_resumed(made: Path, tmp_path: Path) -> None:
    (tmp_path / "datasets").symlink_to(made / "datasets")
    train, shape = trainer(tmp_path), ("data.chunks=null", "checkpoint.every_steps=3")
    done(train(*shape, "schedule.steps=3"))
    done(train(*shape, "schedule.steps=6", "--allow", "schedule.steps"))
    target = tmp_path / "release"
    done(weftrain("release", tmp_path / "runs" / "crystal_demo", "--to", target, "--licence", "MIT"))
    assert verdicts(weftrain("replay", target)) == ["equal"] * 2


def one_bit_of_a_weight(patch: pytest.MonkeyPatch) -> int:
    """Of a matrix, after the first step of the link: the loss of the next step is the first that can show it."""
    update = in_memory.InMemoryRun.update

    def flipped(run: in_memory.InMemoryRun, *arguments: Any) -> None:
        update(run, *arguments)
        if run.optimizer_updates == FIRST + 1:
            run.planes["weights"]["layers.0.ffn.up_proj.weight"].view(torch.int32)[1, 2] ^= 1 << 20
            run.bound.refresh()

    patch.setattr(in_memory.InMemoryRun, "update", flipped)
    return FIRST + 2


def a_reordered_batch(patch: pytest.MonkeyPatch) -> int:
    """Rows of the second step of the link change places across its micro-batches: the sum is another."""
    rows = TokenSource.rows

    def swapped(source: TokenSource, step: int, first: int, count: int) -> Batch:
        if step != FIRST + 1:
            return rows(source, step, first, count)
        return rows(source, step, 0, source.global_batch_size).take(np.array([0, 2, 1, 3])[first : first + count])

    patch.setattr(TokenSource, "rows", swapped)
    return FIRST + 2


def another_kernel(patch: pytest.MonkeyPatch) -> int:
    """An update that forgets to correct the second moment's bias, as if at a late step."""
    adamw = in_memory.update

    def late(
        kernel: Any, sets: Any, planes: Any, gradients: Any, optimizer: Any, rates: Any, count: int, *more: Any
    ) -> None:
        adamw(kernel, sets, planes, gradients, optimizer, rates, count + 1, *more)

    patch.setattr(in_memory, "update", late)
    return FIRST + 2


def no_clipping(patch: pytest.MonkeyPatch) -> int:
    patch.setattr(in_memory, "clip_coefficient", lambda norm, most: torch.ones_like(norm))
    return FIRST + 2


@pytest.fixture
def faulty() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize("fault", [one_bit_of_a_weight, a_reordered_batch, another_kernel, no_clipping])
def test_a_fault_is_seen_at_its_step(
    fault: Callable[[pytest.MonkeyPatch], int], release: Path, faulty: pytest.MonkeyPatch
) -> None:
    step = fault(faulty)
    result = weftrain("replay", release, "--link", "3")
    assert verdicts(result) == ["different"], result.output
    assert result.exit_code == 3
    assert f"link 3: the first line that is not equal is of step {step}" in result.output
