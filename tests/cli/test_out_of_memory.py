"""Memory that ends in the middle of a step: one line, and the run goes on from its last checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from weftrain.backends.common import in_memory
from weftrain.cli import show


@pytest.mark.prove
def test_the_run_goes_on_from_its_last_checkpoint(
    train_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update of step 3 cannot allocate; the same command then ends with the bits of a run that could."""
    steps = ["schedule.steps=4", "checkpoint.every_steps=2", "batch.micro_batch_size=2"]
    update, calls = in_memory.update, 0

    def fails_once(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        update(*arguments)

    monkeypatch.setattr(in_memory, "update", fails_once)
    failed: Result = train_tiny(*steps)
    assert failed.exit_code == 5, failed.output
    (line,) = [line for line in failed.output.splitlines() if "out of memory" in line]
    assert "weftrain: out of memory in step 2, this machine's memory: CUDA out of memory" in line
    assert "the last checkpoint is whole" in line
    assert "batch.micro_batch_size=1" in line.rpartition("try ")[2]
    assert train_tiny(*steps).exit_code == 0
    assert calls == 5


def test_a_verb_without_a_message_of_its_own_says_it_in_one_line(
    weftrain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*_: object) -> None:
        raise MemoryError("Unable to allocate 3.00 TiB for an array")

    monkeypatch.setattr(show, "resolve_recipe", raises)
    found = weftrain("show", "crystal_demo")
    assert found.exit_code == 5
    assert "weftrain: out of memory: Unable to allocate 3.00 TiB for an array: what is saved is whole" in found.output
