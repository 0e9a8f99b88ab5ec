"""The jobs that `weftrain launch` writes, run as they stand, with stand-ins for what starts and signals them.

Slurm's script is the one that docs/train-on-a-cluster.md shows: `srun` starts one step on this machine, `scancel`
signals the processes of the step and, as Slurm does where --full or --batch is given, the batch shell, and `scontrol
requeue` is only noted. A kubelet signals the first process of a container, and kills it when its grace period is over;
SkyPilot's machines are gone without a word, and its controller starts the task on others.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from click.testing import CliRunner
from places import ROOT

from weftrain.cli.main import main

STAND_INS = {
    "srun": 'echo $$ > step; exec "$@"',
    "scontrol": '[ "$1" = show ] && { echo localhost; exit; }; echo "scontrol $*" >> log',
    "scancel": """
echo "scancel $*" >> log
case "$*" in *--full*|*--batch*) kill -TERM "$(cat batch)";; esac
kill -TERM $(pgrep -P "$(cat step)") "$(cat step)"
""",
}
# A step that takes a second to save; what it is to do otherwise is its exit code.
SAVES = """
trap 'sleep 1; echo saved >> log; exit 1' TERM
touch started
[ "$EXIT_CODE" ] && exit "$EXIT_CODE"
while :; do sleep 0.05; done
"""


def script() -> str:
    (found,) = re.findall(
        r"```text\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "docs" / "train-on-a-cluster.md").read_text(), re.DOTALL
    )
    return str(found)


@contextmanager
def job(folder: Path, torchrun: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (STAND_INS | {"torchrun": torchrun}).items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    (folder / "job.sh").write_text(script())
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-56]",
    }
    process = subprocess.Popen(["bash", "job.sh"], cwd=folder, env=environment | variables)
    (folder / "batch").write_text(str(process.pid))
    try:
        yield process
    finally:
        left = [process, *(psutil.Process(process.pid).children(recursive=True) if process.poll() is None else [])]
        for one in left:
            one.kill()
        process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the job ended early"
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_the_page_shows_what_launch_writes() -> None:
    page = (ROOT / "docs" / "train-on-a-cluster.md").read_text()
    command, *_ = re.findall(r"^weftrain (launch .*)$", page, re.MULTILINE)  # another one has spare nodes
    assert CliRunner().invoke(main, shlex.split(command)).output == script()


def test_the_job_outlives_the_save_and_is_requeued_once(tmp_path: Path) -> None:
    with job(tmp_path, SAVES) as process:
        wait_for((tmp_path / "started").exists, process)
        process.send_signal(signal.SIGTERM)
        wait_for((tmp_path / "log").exists, process)
        process.send_signal(signal.SIGTERM)  # once more, while it is being saved
        assert process.wait(timeout=60) != 0
    assert (tmp_path / "log").read_text().splitlines() == ["scancel --signal=TERM 7", "saved", "scontrol requeue 7"]


@pytest.mark.parametrize("code", ["0", "3"])
def test_a_complete_run_and_one_that_fails_are_not_requeued(code: str, tmp_path: Path) -> None:
    with job(tmp_path, SAVES, EXIT_CODE=code) as process:
        assert process.wait(timeout=60) == int(code)
    assert not (tmp_path / "log").exists()


def test_torchrun_and_weftrain_take_the_options_of_the_script() -> None:
    from torch.distributed.run import get_args_parser

    from weftrain.cli.train import train
    from weftrain.core.recipe_file import load_recipe

    (line,) = re.findall(r"^srun torchrun (.*?) &$", script(), re.DOTALL | re.MULTILINE)
    launcher = get_args_parser().parse_args(shlex.split(line.replace("\\\n", " ")))
    limit_s = int(re.findall(r"--signal=B:TERM@(\d+)", script())[0])
    assert 30 < launcher.shutdown_timeout < limit_s  # torchrun's own default would cut a save off
    assert launcher.training_script == "weftrain.cli"
    verb, *words = launcher.training_script_args
    assert verb == "train"
    arguments = train.make_context("train", words).params
    load_recipe(arguments["recipe"], arguments["overrides"], arguments["backend"])


# The script's own torchrun line on two processes of this machine and a small model, with no option of torchrun left
# out.
SMALL = f"""
arguments=("$@")
for number in "${{!arguments[@]}}"; do
    case "${{arguments[$number]}}" in 56) arguments[$number]=1;; 4) arguments[$number]=2;; *:29500) arguments[$number]=localhost:0;;
        amber_7b) arguments[$number]=crystal_demo;; /shared/*) arguments[$number]=runs;; *compile=true) unset "arguments[$number]";; esac
done
exec {shlex.quote(sys.executable)} -m torch.distributed.run "${{arguments[@]}}" """


@pytest.mark.prove
def test_the_ranks_of_the_job_save(tiny_overrides: list[str], tmp_path: Path) -> None:
    more = [
        "name=r",
        "batch.replicas=2",
        "batch.micro_batch_size=1",
        "backend.options.device=cpu",
        "checkpoint.every_steps=0",
    ]
    more += [
        "schedule.steps=100000",
        "schedule.learning_rate=[{shape: constant, steps: 100000, start: 0.01}]",
        "log.every_steps=1",
    ]
    metrics = tmp_path / "runs" / "r" / "metrics.jsonl"
    with job(tmp_path, SMALL + shlex.join([*tiny_overrides, *more]), OMP_NUM_THREADS="1") as process:
        wait_for(lambda: metrics.exists() and metrics.read_text().count('"kind": "step"') > 3, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) != 0
        saved = list((tmp_path / "runs" / "r" / "checkpoints").glob("step_*/manifest.json"))
    assert len(saved) == 1
    assert (tmp_path / "log").read_text().splitlines() == ["scancel --signal=TERM 7", "scontrol requeue 7"]


# Kubernetes and SkyPilot

JOB = ["launch", "crystal_demo", "--nodes", "2", "--per-node", "2", "batch.replicas=4", "batch.micro_batch_size=4"]
# Goes on where it was, as weftrain does, and is done at step 6. A step takes a twentieth of a second.
RESUMES = """
step=$(cat saved 2>/dev/null || echo 0)
echo "starts at $step" >> log; echo "$*" > arguments
trap 'echo "$step" > saved; echo "saved at $step" >> log; exit 143' TERM
while [ "$step" -lt 6 ]; do sleep 0.05; step=$((step + 1)); [ "$step" = "$UNTIL" ] && { touch reached; while :; do sleep 0.02; done; }; done
echo done >> log
"""


def launched(kind: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(CliRunner().invoke(main, [*JOB, "--for", kind]).output))


class Machine:
    """Runs a job's command with `torchrun` standing for the ranks of a node, in a process group of its own."""

    def __init__(self, folder: Path, torchrun: str) -> None:
        self.folder, self.programs = folder, folder / "bin"
        self.programs.mkdir()
        (self.programs / "torchrun").write_text(f"#!/bin/bash\n{torchrun}\n")
        (self.programs / "torchrun").chmod(0o755)

    @contextmanager
    def runs(self, command: Sequence[str], **variables: str) -> Iterator[subprocess.Popen[bytes]]:
        environment = {**os.environ, "PATH": f"{self.programs}:{os.environ['PATH']}"} | variables
        process = subprocess.Popen(command, cwd=self.folder, env=environment, start_new_session=True)
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def log(self) -> list[str]:
        return (self.folder / "log").read_text().splitlines()


def kubelet_ends(process: subprocess.Popen[bytes], grace_s: float) -> int:
    """As a kubelet ends a pod: SIGTERM to the container's first process alone, and SIGKILL after the grace period."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout=grace_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def test_a_pod_that_is_evicted_saves_in_its_grace_period_and_is_made_again(tmp_path: Path) -> None:
    service, batch = launched("kubernetes")
    pod = batch["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    machine = Machine(tmp_path, RESUMES)
    with machine.runs(container["command"], UNTIL="4") as process:
        wait_for((tmp_path / "reached").exists, process)
        # it is torchrun itself: no shell is left in between, which would keep the signal to itself
        assert kubelet_ends(process, 10) == 143
    # an eviction is no failure that backoffLimit counts, and the pod is made again
    (rule,) = batch["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onPodConditions"]) == ("Ignore", [{"type": "DisruptionTarget"}])
    assert pod["restartPolicy"] == "Never"  # or the rule would be refused
    with machine.runs(container["command"]) as process:
        assert process.wait(timeout=60) == 0
    assert machine.log == ["starts at 0", "saved at 4", "starts at 4", "done"]
    words = (tmp_path / "arguments").read_text().split()
    assert int(words[words.index("--shutdown-timeout") + 1]) < pod["terminationGracePeriodSeconds"]
    assert (
        words[words.index("--rdzv-endpoint") + 1]
        == f"{batch['metadata']['name']}-0.{service['metadata']['name']}:29500"
    )
    assert (batch["spec"]["completions"], batch["spec"]["parallelism"]) == (2, 2)


def test_a_pod_that_does_not_end_is_killed_and_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    _, batch = launched("kubernetes")
    (container,) = batch["spec"]["template"]["spec"]["containers"]
    machine = Machine(tmp_path, RESUMES.replace("trap '", "trap 'exit_is_never; #"))
    (tmp_path / "saved").write_text("3")
    with machine.runs(container["command"], UNTIL="5") as process:
        wait_for((tmp_path / "reached").exists, process)
        assert kubelet_ends(process, 0.2) == -signal.SIGKILL
    with machine.runs(container["command"]) as process:
        assert process.wait(timeout=60) == 0
    assert machine.log == ["starts at 3", "starts at 3", "done"]


def test_a_task_whose_machines_are_gone_goes_on_on_others(tmp_path: Path) -> None:
    (task,) = launched("skypilot")
    given = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_TASK_ID": "sky-1_run_7-0"}
    machine = Machine(tmp_path, RESUMES)
    (tmp_path / "saved").write_text("2")
    with machine.runs(["bash", "-c", task["run"]], UNTIL="5", **given) as process:
        wait_for((tmp_path / "reached").exists, process)  # and then it is preempted: nothing is told, nothing saved
    moved = given | {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8"}
    with machine.runs(["bash", "-c", task["run"]], **moved) as process:
        assert process.wait(timeout=60) == 0
    assert machine.log == ["starts at 2", "starts at 2", "done"]
    words = (tmp_path / "arguments").read_text().split()
    assert words[words.index("--rdzv-endpoint") + 1] == "10.0.0.7:29500"
    assert words[words.index("--rdzv-id") + 1] == "sky-1_run_7-0"
    assert words[words.index("--nnodes") + 1] == str(task["num_nodes"]) == "2"


def test_a_task_that_is_cancelled_saves(tmp_path: Path) -> None:
    (task,) = launched("skypilot")
    machine = Machine(tmp_path, RESUMES)
    with machine.runs(["bash", "-c", task["run"]], UNTIL="4", SKYPILOT_NODE_IPS="10.0.0.1") as process:
        wait_for((tmp_path / "reached").exists, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    assert machine.log == ["starts at 0", "saved at 4"]
