"""Pairs on several processes: the losses, measures and weights of one, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from replica_runs import BASE, assert_same_as, command, finished, started, train

from weftrain.cli.resolve import backend_options
from weftrain.core.backend import Job, Plan
from weftrain.core.data import training_source
from weftrain.core.recipe_file import load_recipe
from weftrain.core.run.metrics import read_metrics

DPO = "objective={name: dpo, beta: 0.1, reference: none}"


@pytest.mark.prove
@pytest.mark.parametrize(
    ("fabric", "tier"), [pytest.param("central", "ram", marks=pytest.mark.soak), ("sharded", "direct")]
)
def test_the_bits_of_one_process(fabric: str, tier: str, tiny_overrides: list[str], tmp_path: Path) -> None:
    micro = ["batch.global_batch_size=8", "batch.micro_batch_size=2"]
    recipe = [*tiny_overrides, *(item for item in BASE if item != "batch.micro_batch_size=1"), *micro, DPO]
    recipe = [*recipe, "backend.options.threads=1"]
    file = load_recipe("crystal_demo", [*recipe, "backend.name=local"])
    backend, options = backend_options(file)
    run = backend.prepare(Job(file.recipe, Plan(0, 6), options))
    results = list(run.train(training_source(file.recipe)))
    store = [f"backend.options.fabric={fabric}", f"backend.options.tier={tier}", "batch.replicas=2"]
    both = train(tmp_path, "run", [*recipe, *store]), command("replica", str(tmp_path / "run"))
    with started(*both) as processes:
        for process in processes:
            finished(process)
    assert_same_as((run.export_state(), [float(result.loss) for result in results]), tmp_path / "run")
    steps = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "step"]
    for record, result in zip(steps, results, strict=True):
        assert {name: float(value) for name, value in result.measures.items()}.items() <= record.items()
    assert len({record["reward_margin"] for record in steps}) == 6
