"""Four ranks on two nodes, with a spare: ranks are killed, a node is lost, a rank is stopped, and the run ends with the
bits of one that nothing happened to.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nodes import Node, nodes

from weftrain.core import checkpoint
from weftrain.core.run.ledger import read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.metrics import effective_records, read_metrics

STEPS = 120
WORDS = [
    "crystal_demo",
    "--backend",
    "cuda",
    "name=r",
    "batch.replicas=4",
    "batch.global_batch_size=4",
    "batch.micro_batch_size=1",
    "precision.compute=float32",
    f"schedule.steps={STEPS}",
    "checkpoint.every_steps=10",
    "log.every_steps=1",
    "backend.options.device=cpu",
    "backend.options.timeout_s=60",
    "backend.options.stall_s=2",
    "backend.options.stalled=replace",
    "backend.options.memory_copies_every_steps=5",
]


class Losses:
    """What happens to a run, and how long it takes from there to the next step."""

    def __init__(self, folder: Path, started: list[Node]) -> None:
        self.run, self.nodes, self._metrics = folder / "runs" / "r", started, folder / "runs" / "r" / "metrics.jsonl"

    def steps(self) -> int:
        return self._metrics.read_text().count('"kind": "step"') if self._metrics.exists() else 0

    def wait(self, condition: Callable[[], object], seconds: float = 100) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "\n".join(node.output.read_text()[-3000:] for node in self.nodes)
            time.sleep(0.01)

    def node_of(self, rank: int) -> Node:
        return next(node for node in self.nodes if rank in node.ranks())

    def completed(self) -> int:
        return max((record["step"] for record in effective_records(self.run) if record["kind"] == "step"), default=0)

    def resumed(self, what: str, happens: Callable[[], None]) -> None:
        """Let it happen, and wait for the next step of a new start."""
        before, start = len(self._starts()), time.monotonic()
        happens()
        self.wait(lambda: len(self._starts()) > before and self.completed() > self._starts()[-1]["step"])
        print(f"{what}: {time.monotonic() - start:.1f} s to the next step")

    def _starts(self) -> list[dict[str, int]]:
        return [record for record in read_metrics(self.run) if record["kind"] == "start"]


@pytest.mark.prove
def test_ranks_and_a_node_are_lost_and_nothing_of_the_run(tiny_overrides: list[str], tmp_path: Path) -> None:
    straight, lossy = tmp_path / "straight", tmp_path / "lossy"
    states = []
    for folder in (straight, lossy):
        folder.mkdir()
        memory = f"backend.options.memory_copies_folder={folder}/memory"
        words = [*WORDS[:3], "--runs", str(folder / "runs"), *tiny_overrides, *WORDS[3:], memory]
        spares, step_s = (1, 0.05) if folder == lossy else (0, 0.0)
        with nodes(folder, 2, spares, 2, words, step_s) as started:
            losses = Losses(folder, started)
            if folder == lossy:
                lose(losses)
            losses.wait((losses.run / "checkpoints" / f"step_{STEPS:08d}").exists)
            for node in started:
                if node.process.poll() != -signal.SIGKILL:
                    assert node.process.wait(timeout=60) == 0, node.output.read_text()
        states.append(checkpoint.load(losses.run / "checkpoints" / f"step_{STEPS:08d}")[0].tensors)
        recorded = [record["step"] for record in effective_records(losses.run) if record["kind"] == "step"]
        assert recorded == list(range(1, STEPS + 1))
        saved = {path.name for path in (losses.run / "checkpoints").iterdir()}
        assert saved == {f"step_{step:08d}" for step in range(10, STEPS + 1, 10)}
        assert not list((folder / "memory").glob("*/*/*/step_*"))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    told = "\n".join(node.output.read_text() for node in losses.nodes)
    assert "no state in memory is complete" in told
    assert told.count("the run goes on from there") == 2
    assert "which should" in told
    assert (losses.run / "flight-recorder-rank0.json").stat().st_size > 100
    resumes = [entry for entry in read_ledger(losses.run / LEDGER) if entry["kind"] == "resume"]
    assert [entry.get("continues") is None for entry in resumes] == [True, False, False]


def lose(losses: Losses) -> None:
    def a_rank_of_each_node_and_its_part() -> None:
        for rank in (1, 3):
            losses.node_of(rank).ranks()[rank].kill()
        for copy in (losses.run.parents[1] / "memory").glob("*/*/*/step_*-part_00001"):
            shutil.rmtree(copy)

    def the_node_of_rank_0_during_a_save() -> None:
        losses.wait(lambda: list((losses.run / "checkpoints").glob(".tmp-*")))
        losses.node_of(0).lose()

    def a_rank_is_stopped() -> None:
        losses.node_of(3).ranks()[3].send_signal(signal.SIGSTOP)

    losses.wait(lambda: losses.steps() > 12)
    losses.resumed("a rank of each node is killed, and one's part is lost", a_rank_of_each_node_and_its_part)
    losses.wait(lambda: losses.completed() > 35)
    losses.resumed("the node of rank 0 is lost during a save", the_node_of_rank_0_during_a_save)
    losses.wait(lambda: losses.completed() > 70)
    losses.resumed("a rank is stopped", a_rank_is_stopped)
