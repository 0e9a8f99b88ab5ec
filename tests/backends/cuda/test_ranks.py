"""The tests' own world of ranks: one that is lost fails the test at once, with what it said."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from ranks import Others, on_ranks, world_of

from weftrain.core.errors import EverywhereError
from weftrain.core.recipe_file import load_recipe


def test_a_rank_that_is_lost_fails_what_waits_and_what_follows(
    tiny_overrides: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["batch.replicas=2", "batch.micro_batch_size=1"]
    recipe = load_recipe("crystal_demo", [*tiny_overrides, *words]).recipe
    with pytest.raises(AssertionError, match="rank 2 ended with status -9"), world_of(4):
        others = Others.current
        assert others is not None
        on_ranks(recipe, parallel="hsdp", shard_group=2).close()
        os.kill(others.processes[0].pid, signal.SIGSTOP)  # for which this process would wait until its patience ends
        threading.Timer(0.5, os.kill, (others.processes[1].pid, signal.SIGKILL)).start()
        began = time.monotonic()
        with pytest.raises(EverywhereError, match="another rank failed"):
            on_ranks(recipe, parallel="hsdp", shard_group=2)
        print(f"noticed after {time.monotonic() - began:.1f} s")
        on_ranks(recipe)
    assert "rank 2 ended with status -9" in capfd.readouterr().err
