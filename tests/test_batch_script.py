"""The batch script that `weftrain launch` writes and docs/train-on-a-cluster.md shows, run as it stands, with stand-ins
for Slurm's programs.

`srun` starts one step on this machine. `scancel` signals the processes of the step and, as Slurm does where --full or
--batch is given, the batch shell. `scontrol requeue` is only noted.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
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
    (command,) = re.findall(r"^weftrain (launch .*)$", page, re.MULTILINE)
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
