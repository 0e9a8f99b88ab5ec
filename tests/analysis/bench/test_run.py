"""A benchmark with a wrong peak or wrong losses does not give the same report."""

from __future__ import annotations

from typing import Any

import pytest
from invented_runs import Tiny

from weftrain.analysis.bench import run as bench_run
from weftrain.analysis.bench.report import (
    BenchReport,
)
from weftrain.analysis.bench.run import BenchRequest, bench
from weftrain.backends.common.registry import get_backend
from weftrain.core.run.speed import Peak


# Mutations: a benchmark that is wrong in one of these ways must not give the same report.
@pytest.mark.prove
def test_mutation_a_wrong_peak_is_seen(report: BenchReport, monkeypatch: pytest.MonkeyPatch, tiny_recipe: Tiny) -> None:
    """The peak in a report is what was measured: half of it doubles the utilisation, and its origin is told."""
    local = get_backend("local")
    recipe = tiny_recipe("amber")
    shares = []
    for peak in (1e12, 5e11):
        monkeypatch.setattr(bench_run, "measured_peak", lambda device, dtype, peak=peak: Peak(peak, "planted"))
        found = bench(recipe, local, local.options(), local, BenchRequest(steps=5, check_steps=0))
        shares.append(float(found.efficiency.mfu_measured) / found.efficiency.flops_per_second)
        assert found.efficiency.measured_peak_origin == "planted"
    assert shares[1] == pytest.approx(2 * shares[0])


@pytest.mark.prove
def test_mutation_wrong_losses_fail_the_benchmark(monkeypatch: pytest.MonkeyPatch, tiny_recipe: Tiny) -> None:
    """Training half of the batch is faster: its losses give it away."""
    local, recipe = get_backend("local"), tiny_recipe("amber")

    class Half:
        def __getattr__(self, name: str) -> Any:
            return getattr(local, name)

        def prepare(self, job: Any) -> Any:
            small = recipe.batch.model_copy(update={"global_batch_size": 2, "micro_batch_size": 2})
            import dataclasses

            return local.prepare(dataclasses.replace(job, recipe=recipe.model_copy(update={"batch": small})))

    found = bench(recipe, Half(), local.options(), local, BenchRequest(steps=5))  # type: ignore[arg-type]
    assert found.correctness.passed is False
