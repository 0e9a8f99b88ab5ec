"""Several processes compute the bits of one, also when one of them is killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from replica_runs import alone, assert_same_as, command, finished, started, train, wait_for

from weftrain.core.backend import State
from weftrain.core.run.metrics import read_metrics

STORES = [
    (2, "central", "ram"),
    (4, "sharded", "direct"),
    *(
        pytest.param(*store, marks=pytest.mark.soak)
        for store in (
            (2, "sharded", "mapped"),
            (2, "sharded", "direct"),
            (2, "central", "direct"),
            (2, "sharded", "ram"),
            (4, "central", "ram"),
        )
    ),
]


@pytest.mark.prove
@pytest.mark.parametrize(("replicas", "fabric", "tier"), STORES)
def test_the_bits_of_one_process(
    replicas: int, fabric: str, tier: str, overrides: list[str], single: tuple[State, list[float]], tmp_path: Path
) -> None:
    options = [f"backend.options.fabric={fabric}", f"backend.options.tier={tier}", f"batch.replicas={replicas}"]
    others = [command("replica", str(tmp_path / "run")) for _ in range(replicas - 1)]
    with started(
        train(tmp_path, "run", [*overrides, *options, "backend.options.tile_elements=4096"]), *others
    ) as processes:
        for process in processes:
            finished(process)
    assert_same_as(single, tmp_path / "run")


@pytest.mark.prove
@pytest.mark.parametrize(
    ("replicas", "fabric", "tier"),
    [(3, "central", "ram"), pytest.param(2, "sharded", "direct", marks=pytest.mark.soak)],
)
def test_the_bits_of_one_process_in_the_fixed_tree(
    replicas: int, fabric: str, tier: str, overrides: list[str], tmp_path: Path
) -> None:
    """Of any number of micro-batches a replica: a link carries as many partial sums as the tree needs."""
    tree = [*overrides, "precision.numerics=replayable", "batch.global_batch_size=6"]
    test_the_bits_of_one_process(replicas, fabric, tier, tree, alone(tree), tmp_path)


@pytest.mark.prove
def test_a_killed_replica_is_reported_and_the_last_step_is_intact(overrides: list[str], tmp_path: Path) -> None:
    long = [item for item in overrides if not item.startswith("schedule.steps=")] + ["schedule.steps=1000"]
    options = ["batch.replicas=2", "backend.options.tier=mapped"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with started(train(tmp_path, "run", [*long, *options]), command("replica", str(tmp_path / "run"))) as (
        leader,
        replica,
    ):
        wait_for(lambda: metrics.exists() and metrics.read_text().count('"kind": "step"') > 5, leader)
        replica.kill()
        output, _ = leader.communicate(timeout=60)
    assert leader.returncode != 0
    assert "a replica failed" in output
    assert "the last completed step is intact" in output
    steps = [record["step"] for record in read_metrics(tmp_path / "run") if record["kind"] == "step"]
    stopped = [item if item != "batch.replicas=2" else "batch.replicas=1" for item in options]
    again = [
        *long[:-1],
        f"schedule.steps={steps[-1] + 3}",
        *stopped,
        "--allow",
        "schedule.steps",
        "--allow",
        "batch.replicas",
    ]
    with started(train(tmp_path, "run", again)) as (alone,):
        assert f"stands at {steps[-1]} completed steps" in finished(alone)
