"""A clock that only tests move, and one real report, which the tests of benchmarks share."""

from __future__ import annotations

import pytest
from invented_runs import Clock

from weftrain.analysis.bench import train as bench_train
from weftrain.analysis.bench.report import (
    BenchReport,
)
from weftrain.analysis.bench.run import BenchRequest, bench
from weftrain.backends.common.registry import get_backend


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(bench_train.time, "perf_counter", clock.perf_counter)
    return clock


@pytest.fixture(scope="session")
def report() -> BenchReport:
    from weftrain.core.recipe_file import load_recipe

    recipe = load_recipe(
        "bench_70m", ["model.num_layers=1", "model.vocab_size=300", "data.sequence_length=32", "backend.options={}"]
    ).recipe
    local = get_backend("local")
    return bench(recipe, local, local.options(), local, BenchRequest(steps=6, rounds=2))
