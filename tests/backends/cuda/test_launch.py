"""Ranks as torchrun starts them: a rank that is killed, one that stalls, a launcher that is killed, and ranks that
cannot meet.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from known_peak import PROGRAM
from ranks import environment, free_port

from weftrain.core import checkpoint
from weftrain.core.run.metrics import read_metrics

TRAIN = [
    *PROGRAM[1:],
    "train",
    "crystal_demo",
    "--backend",
    "cuda",
    "backend.options.device=cpu",
    "backend.options.timeout_s=60",
]
SMALL = [
    "batch.micro_batch_size=1",
    "precision.compute=float32",
    "schedule.steps=40",
    "checkpoint.every_steps=5",
    "log.every_steps=1",
]


def torchrun(ranks: int, folder: Path, overrides: list[str], *more: str) -> list[str]:
    # name= and not --run, which torchrun takes for an abbreviation of an option of its own.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *more]
    return [*launcher, *TRAIN, "--runs", str(folder), "name=r", f"batch.replicas={ranks}", *overrides, *SMALL]


@contextmanager
def started(command: list[str], environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )
    try:
        yield process
    finally:
        with_children = [
            process,
            *(psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []),
        ]
        for one in with_children:
            one.kill()
        process.wait()


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def logged_steps(folder: Path) -> int:
    metrics = folder / "r" / "metrics.jsonl"
    return metrics.read_text().count('"kind": "step"') if metrics.exists() else 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """In the order of their ranks."""
    found = [child for child in psutil.Process(process.pid).children() if "RANK" in child.environ()]
    return sorted(found, key=lambda child: int(child.environ()["RANK"]))


def state(folder: Path) -> dict[str, torch.Tensor]:
    found, _ = checkpoint.load(folder / "r" / "checkpoints" / "step_00000040")
    return dict(found.tensors)


@pytest.fixture
def overrides(tiny_overrides: list[str]) -> list[str]:
    return tiny_overrides


@pytest.mark.prove
def test_the_world_may_shrink_and_grow(overrides: list[str], tmp_path: Path) -> None:
    """2 ranks and then 4, against the local backend; what changes is named."""
    small = [item for item in SMALL if not item.startswith("schedule.steps")]
    for number, ranks in enumerate((2, 4)):
        allowed = ["--allow", "schedule.steps", "--allow", "batch.replicas", "--allow", "backend.options.parallel"]
        command = [
            *torchrun(ranks, tmp_path, overrides)[: -len(SMALL)],
            *small,
            f"schedule.steps={(20, 40)[number]}",
            *allowed,
        ]
        with started([*command, f"backend.options.parallel={'ddp' if ranks == 2 else 'fsdp'}"]) as process:
            finished(process)
    alone = [
        sys.executable,
        *TRAIN[:3],
        "--backend",
        "local",
        "--runs",
        str(tmp_path / "local"),
        "name=r",
        *overrides,
        *SMALL,
    ]
    with started(alone) as process:
        finished(process)
    found, wanted = state(tmp_path), state(tmp_path / "local")
    for name, tensor in wanted.items():
        if name.startswith("weights/") and "k_proj.bias" not in name:
            assert (found[name] - tensor).norm() < 1e-4 * tensor.norm(), name


@pytest.mark.prove
@pytest.mark.parametrize("trains", [True, False], ids=["while they train", "before they meet"])
def test_no_orphan_of_a_killed_launcher(trains: bool, overrides: list[str], tmp_path: Path) -> None:
    long = [
        *overrides,
        "schedule.learning_rate=[{shape: constant, steps: 100000, start: 0.01}]",
        "backend.options.timeout_s=600",
    ]
    with started([*torchrun(2, tmp_path, long), "schedule.steps=100000", "log.every_steps=50"]) as process:
        wait_for(lambda: logged_steps(tmp_path) > 2 if trains else len(workers(process)) == 2, process)
        left = workers(process)
        process.kill()
        psutil.wait_procs(left, timeout=60)
        assert not any(worker.is_running() for worker in left)


STALL = """
import sys, time
sys.path[:0] = []
from weftrain.core.order.synthetic import SyntheticSource
rows = SyntheticSource.rows
def slow_rows(self, step, first, count):
    if step == 3:
        time.sleep(600)
    return rows(self, step, first, count)
SyntheticSource.rows = slow_rows
from weftrain.cli.main import main
main()
"""


@pytest.mark.prove
def test_a_stalled_rank_is_named_with_its_stack(overrides: list[str], tmp_path: Path) -> None:
    port = free_port()
    arguments = [
        *TRAIN[1:],
        "--runs",
        str(tmp_path),
        "name=r",
        "batch.replicas=2",
        "backend.options.stall_s=2",
        *overrides,
        *SMALL,
    ]
    slow = started([sys.executable, "-c", STALL, *arguments], environment(1, 2, port))
    with slow, started([sys.executable, *TRAIN[:1], *arguments], environment(0, 2, port)) as leader:
        assert leader.stdout is not None
        told = ""
        while "the last collectives of rank 0 are in" not in told:
            line = leader.stdout.readline()
            assert line, told
            told += line
    assert "wait for rank 1, which should read rows" in told
    assert "slow_rows" in told
    assert "rank 0, which" not in told
    assert (tmp_path / "r" / "flight-recorder-rank0.json").stat().st_size > 100


def one_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith("weftrain: ")]
    assert len(lines) == 1, output
    assert "Traceback" not in output
    return lines[0]


def fails(command: list[str], variables: dict[str, str]) -> str:
    with started(command, variables) as process:
        output, _ = process.communicate(timeout=90)
        assert process.returncode == 2, output
    return one_line(output)


def alone_of_two(folder: Path, overrides: list[str]) -> list[str]:
    return [
        sys.executable,
        *TRAIN,
        "--runs",
        str(folder),
        "batch.replicas=2",
        *overrides,
        *SMALL,
        "backend.options.timeout_s=2",
    ]


@pytest.mark.prove
def test_a_port_that_is_taken(overrides: list[str], tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        line = fails(alone_of_two(tmp_path, overrides), environment(0, 2, port))
    assert f"port {port} is taken" in line


@pytest.mark.prove
def test_ranks_that_do_not_come(overrides: list[str], tmp_path: Path) -> None:
    line = fails(alone_of_two(tmp_path, overrides), environment(0, 2, free_port()))
    assert "the ranks could not meet at 127.0.0.1" in line
    assert "all 2 ranks were started" in line


@pytest.mark.prove
def test_ranks_that_are_not_alike(overrides: list[str], tmp_path: Path) -> None:
    port = free_port()
    command = alone_of_two(tmp_path, overrides)[:-1]
    with started([*command, "backend.options.threads=2"], environment(1, 2, port)) as other:
        line = fails(command, environment(0, 2, port))
        assert other.wait(timeout=30) == 2
        assert other.stdout is not None
        assert "weftrain" not in other.stdout.read()
    assert "the ranks are not alike: threads is 1 on rank 0" in line


@pytest.mark.prove
def test_a_number_of_ranks_that_the_recipe_does_not_ask_for(overrides: list[str], tmp_path: Path) -> None:
    port = free_port()
    command = [*alone_of_two(tmp_path, overrides)[:-1], "batch.replicas=1"]
    with started(command, environment(1, 2, port)):
        line = fails(command, environment(0, 2, port))
    assert (
        "2 ranks make 2 data-parallel replicas, and batch.replicas is 1: set batch.replicas=2, or start 1 processes"
        in line
    )


def one_checkpoint(folder: Path) -> str:
    """That of the last step that was logged, and whole."""
    (found,) = (folder / "r" / "checkpoints").iterdir()
    assert found.name == f"step_{logged_steps(folder):08d}"
    assert (found / "manifest.json").exists()
    return found.name


LONG = ["schedule.learning_rate=[{shape: constant, steps: 100000, start: 0.01}]", "checkpoint.every_steps=0"]


@pytest.mark.prove
def test_a_signal_at_one_rank_stops_all_after_the_same_step(overrides: list[str], tmp_path: Path) -> None:
    """All ranks end with the code of the signal, also those that it did not reach."""
    port = free_port()
    command = [
        sys.executable,
        *TRAIN,
        "--runs",
        str(tmp_path),
        "name=r",
        "batch.replicas=2",
        *overrides,
        *SMALL,
        *LONG,
        "schedule.steps=100000",
    ]
    with started(command, environment(1, 2, port)) as other, started(command, environment(0, 2, port)) as leader:
        wait_for(lambda: logged_steps(tmp_path) > 2, leader)
        other.send_signal(signal.SIGTERM)
        output, _ = leader.communicate(timeout=60)
        assert (leader.returncode, other.wait(timeout=60)) == (143, 143), output
    assert "and saved; the same command resumes" in output
    one_checkpoint(tmp_path)


def test_a_signal_ends_a_rank_that_waits_for_the_others_at_once(overrides: list[str], tmp_path: Path) -> None:
    port = free_port()
    command = [*alone_of_two(tmp_path, overrides), "backend.options.timeout_s=600"]
    with started(command, environment(0, 2, port)) as process:
        wait_for(
            lambda: any(item.laddr.port == port for item in psutil.Process(process.pid).net_connections()), process
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert not (tmp_path / "r").exists()


@pytest.mark.prove
@pytest.mark.parametrize("whom", [pytest.param("launcher", marks=pytest.mark.soak), "everybody"])
def test_a_stopped_run_is_not_started_again_and_a_complete_one_ends(
    whom: str, overrides: list[str], tmp_path: Path
) -> None:
    """torchrun alone, or with it all ranks, as a scheduler signals a step; --max-restarts does not undo it."""
    command = [*torchrun(2, tmp_path, overrides, "--max-restarts", "3"), *LONG]
    with started([*command, "schedule.steps=100000"]) as process:
        wait_for(lambda: logged_steps(tmp_path) > 2, process)
        for one in (psutil.Process(process.pid), *(workers(process) if whom == "everybody" else [])):
            one.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert output.count("and saved; the same command resumes") == 1
    done = logged_steps(tmp_path)
    one_checkpoint(tmp_path)
    if whom == "launcher":  # rank 0 finds nothing to do, and rank 1 does not wait for it
        with started([*command, f"schedule.steps={done}", "--allow", "schedule.steps"]) as process:
            assert f"is complete: {done} of {done} steps" in finished(process)


# An evaluation after step 2 that takes 12 s, in a run whose ranks wait 8 s at most. The argument: seconds between words.
SLOW_EVALUATION = """
import sys
import time

from weftrain.analysis.evaluation import scores
from weftrain.cli import assembly
from weftrain.cli.main import main
from weftrain.core.run.speed import Peak


class Slow:
    def is_due(self, plan, completed):
        return completed == 2

    def is_due_at_start(self, plan, scored):
        return False

    def measure(self, run, completed):
        words = scores._Words(run, "slow", lambda: False)
        for part in range(30):
            time.sleep(0.4)
            words.progress(part, 30, "parts")
        yield {"kind": "score", "step": completed, "set": "slow/a", "metric": "acc", "value": 1.0, "metrics": {}}


scores._WORD_S = float(sys.argv.pop(1))
assembly.open_evaluators = lambda *arguments: [Slow()]
assembly.measured_peak = lambda device, dtype: Peak(1e11, "known")  # while which the others would wait too
main()
"""


@pytest.mark.prove
def test_ranks_wait_as_long_as_rank_0_says_that_it_works(tiny_overrides: list[str], tmp_path: Path) -> None:
    """With 100 in place of 0.5, rank 1 ends after 8 s."""
    (tmp_path / "slow.py").write_text(SLOW_EVALUATION)
    command = torchrun(2, tmp_path, tiny_overrides)
    place = command.index(*PROGRAM[1:])
    command[place : place + 1] = [str(tmp_path / "slow.py"), "0.5"]
    command += ["backend.options.timeout_s=8", "schedule.steps=4", "checkpoint.every_steps=0"]
    with started(command) as process:
        finished(process)
    found = [(one["kind"], one["step"]) for one in read_metrics(tmp_path / "r") if one["kind"] in ("step", "score")]
    assert found == [("step", 1), ("step", 2), ("score", 2), ("step", 3), ("step", 4)]
