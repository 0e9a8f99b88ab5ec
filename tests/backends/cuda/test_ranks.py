"""The tests' own world of ranks: one that is lost fails the test at once, with what it said."""

from __future__ import annotations

import os
import re
import signal
import threading
import time

import pytest
from ranks import PATIENCE_S, Others, on_ranks, source_of, world_of

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


@pytest.mark.prove
def test_a_rank_of_a_pipeline_that_is_killed_ends_the_others(tiny_overrides: list[str]) -> None:
    """Between two steps or in one: rank 2 has the second stage for rank 0, and rank 3 for rank 1, which sends rank 2
    nothing. All end, and say that a rank was lost.
    """
    words = ["batch.replicas=2", "batch.micro_batch_size=1", "model.tie_embeddings=false", "schedule.steps=100000"]
    recipe = load_recipe("crystal_demo", [*tiny_overrides, *words]).recipe
    with pytest.raises(AssertionError, match="rank 2 ended with status -9"), world_of(4):
        others = Others.current
        assert others is not None
        others.spares = True
        run = on_ranks(recipe, pipeline_parallel=2)
        steps = run.train(source_of(recipe))
        next(steps)
        threading.Timer(0.3, os.kill, (others.processes[1].pid, signal.SIGKILL)).start()
        with pytest.raises(EverywhereError) as raised:
            for _ in steps:
                pass
        left = [rank for rank in (1, 3) if others.processes[rank - 1].wait(timeout=PATIENCE_S) == 0]
        assert left == []
        told = [str(raised.value), *(others.said(rank) for rank in (1, 3))]
        # gloo may notice before the watch on processes, which knows the rank, and a rank that looks late may find first
        # one that ended because of it
        assert all(re.search(r"rank [123] \(process \d+\) has ended|another rank failed", one) for one in told), told
        run.close()
