"""Ranks above 0: they wait for a run, join and leave it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from replica_runs import alone, asked, command, finished, started, train, wait_for

from weftrain.backends.streaming import BACKEND
from weftrain.backends.streaming.replicas.rendezvous import agreement, open_rendezvous, remove_rendezvous
from weftrain.backends.streaming.replicas.worker import carry_out_commands, join_run
from weftrain.core.backend import Job, Plan
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.formats.strict_model import StrictModel
from weftrain.core.run.metrics import read_metrics
from weftrain.core.stop import StopRequest

CPU = torch.device("cpu")


def test_waiting_for_a_run_ends_by_a_signal(tiny_recipe: type[Recipe], tmp_path: Path) -> None:
    job = Job(tiny_recipe(), Plan(0, 1), StrictModel(), folder=tmp_path, stop=asked())
    with pytest.raises(SystemExit) as ended:
        join_run(lambda: job, lambda job: CPU, 600.0)
    assert ended.value.code == 143


@pytest.mark.parametrize(("replicas", "ends"), [(2, True), (1, False)])
def test_waiting_ends_where_the_run_is_complete(
    replicas: int, ends: bool, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Which the process says that was to lead it, if the run is one of replicas."""
    recipe, options = (
        tiny_recipe("crystal", f"batch.replicas={replicas}", "batch.micro_batch_size=1"),
        BACKEND.options(),
    )
    job = Job(recipe, Plan(0, 1), options, folder=tmp_path, stop=StopRequest())
    BACKEND.nothing_to_lead(job)
    if ends:
        assert join_run(lambda: job, lambda job: CPU, 600.0) is None
    else:
        with pytest.raises(BackendError, match="after 0 s no run waits for replicas there"):
            join_run(lambda: job, lambda job: CPU, 0.0)


def test_a_run_that_ends_before_it_admits_a_replica_is_not_waited_for(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Its rendezvous is gone. torch would wait for it as long as `timeout_s`, and hear no signal."""
    options = BACKEND.options(timeout_s=5)
    job = Job(tiny_recipe("crystal"), Plan(0, 1), options, folder=tmp_path, stop=StopRequest())
    rendezvous, joins = open_rendezvous(tmp_path, agreement(job)), 0

    def device(job: Job) -> torch.device:
        return CPU

    class Ends(StopRequest):
        def leave_if_requested(self) -> None:
            nonlocal joins
            joins += 1
            if joins == 2:  # after the ticket was taken
                assert rendezvous.exists()
                remove_rendezvous(tmp_path)

    with pytest.raises(BackendError, match="after 3 s its run ended before it admitted this replica"):
        join_run(lambda: replace(job, stop=Ends()), device, 3.0)
    assert joins > 2
    assert not rendezvous.exists()


def test_a_replica_without_a_run_says_so(tmp_path: Path) -> None:
    with started(command("replica", str(tmp_path / "nowhere"), "--wait", "0")) as (process,):
        output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "no run there" in output


@pytest.mark.prove
def test_replicas_join_and_leave_between_steps(overrides: list[str], tmp_path: Path) -> None:
    """One is there from the start and leaves, another joins while it trains; no bit changes."""
    small = [*overrides, "model.num_layers=2"]
    _, expected = alone(small)
    long = [item for item in small if not item.startswith("schedule.steps=")] + ["schedule.steps=400"]
    short = tmp_path / "run" / "metrics.jsonl"
    with started(train(tmp_path, "run", [*long, "batch.replicas=2"]), command("replica", str(tmp_path / "run"))) as (
        leader,
        first,
    ):
        wait_for(lambda: short.exists() and short.read_text().count('"kind": "step"') > 5, leader)
        with started(command("replica", str(tmp_path / "run"))) as (second,):
            first.send_signal(signal.SIGTERM)
            assert "left the run" in first.communicate(timeout=60)[0]
            output = finished(leader)
            assert "the run ended" in finished(second)
    assert "400 steps" in output
    losses = [record["loss"] for record in read_metrics(tmp_path / "run") if record["kind"] == "step"]
    assert losses[:6] == expected


def test_a_replica_that_is_asked_to_save_says_that_it_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    stop = StopRequest()
    stop.ask_save()
    commands = iter([{"do": "nothing"}, None])
    run = SimpleNamespace(store=None, job=SimpleNamespace(stop=stop))
    member = SimpleNamespace(next_command=lambda: next(commands))
    carry_out_commands(run, member, None)  # type: ignore[arg-type]
    assert "a replica saves nothing: send SIGUSR2" in capsys.readouterr().err
