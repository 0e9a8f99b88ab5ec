"""`weftrain launch`: jobs for Slurm, Kubernetes and SkyPilot, checked before they are written. tests/test_batch_script.py
runs the Slurm script.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from torch.distributed.run import get_args_parser

Run = Callable[..., Result]
AMBER = ("launch", "amber_7b", "--nodes", "28")


def torchrun(command: str) -> list[str]:
    """The words of torchrun in a job's shell command, with the shell's variables as they are."""
    words = shlex.split(command[command.index("torchrun") :].replace("\\\n", " "))
    return words[1:]


def test_kubernetes_gives_every_rank_the_same_meeting_point_and_the_save_its_time(weftrain: Run) -> None:
    service, job = yaml.safe_load_all(weftrain(*AMBER, "--for", "kubernetes").output)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    asked = get_args_parser().parse_args(torchrun(container["command"][2]))
    assert (asked.nnodes, asked.nproc_per_node) == ("28", "8")
    assert asked.rdzv_endpoint == f"{job['metadata']['name']}-0.{service['metadata']['name']}:29500"
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert asked.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    assert (job["spec"]["completionMode"], job["spec"]["completions"], job["spec"]["parallelism"]) == (
        "Indexed",
        28,
        28,
    )
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert asked.training_script_args[:2] == ["train", "amber_7b"]


def test_skypilot(weftrain: Run) -> None:
    task = yaml.safe_load(weftrain(*AMBER, "--for", "skypilot", "--accelerator", "H200").output)
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (28, "H200:8")
    asked = get_args_parser().parse_args(torchrun(task["run"]))
    assert (asked.nnodes, asked.rdzv_endpoint) == ("$SKYPILOT_NUM_NODES", "$head:29500")


def test_words_of_the_user_stay_words_of_the_shell(weftrain: Run) -> None:
    override = "schedule.learning_rate=[{shape: constant, steps: 1000000, start: 0.1}]"
    script = weftrain(*AMBER, override, "name=My_Run").output
    line = script[script.index("torchrun") : script.index(" &\nstep=")]
    assert override in shlex.split(line.replace("\\\n", " "))
    assert "--job-name=my-run " in script


def test_a_slower_store_gives_the_save_more_time(weftrain: Run) -> None:
    found = [
        int(weftrain(*AMBER, "--storage", speed).output.split("--shutdown-timeout ")[1].split()[0])
        for speed in ("0.1", "0.5", "50")
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > 2 * 80.8 / 0.1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("launch", "amber_7b", "--nodes", "5"), "batch.replicas=40"),
        ((*AMBER, "backend.options.tensor_parallel=3"), "no multiple of"),
        ((*AMBER, "--time", "1;rm"), "is no time of Slurm's"),
        (("launch", "amber_7b"), "--nodes"),
    ],
)
def test_what_cannot_be_is_refused_here(weftrain: Run, words: tuple[str, ...], told: str) -> None:
    result = weftrain(*words)
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())


def test_it_submits_what_it_wrote_and_tells_what_the_scheduler_says(
    weftrain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)
    result = weftrain(*AMBER, "--submit")
    assert "sbatch is not on PATH" in result.output
    assert not list(tmp_path.glob("*.sh"))
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "sbatch"
    program.write_text('#!/bin/sh\n[ "$1" = amber-7b.sh ] && exit 0\nexit 3\n')
    program.chmod(0o755)
    assert weftrain(*AMBER, "--submit").exit_code == 0
    assert (tmp_path / "amber-7b.sh").read_text().startswith("#!/bin/bash")
    assert "is there already: name another file" in weftrain(*AMBER, "--submit").output
    assert "sbatch refused other.sh with exit code 3" in weftrain(*AMBER, "--submit", "--to", "other.sh").output


def test_spares_stand_by_in_every_kind_of_job(weftrain: Run) -> None:
    """All nodes run torchrun for the number that trains, meet in the folder of runs, and the job outlives a node."""
    words = (*AMBER, "--spares", "2")
    script = weftrain(*words).output
    assert "--nodes=30 " in script.splitlines()[1]
    assert script.splitlines()[2].endswith("--open-mode=append --no-kill")
    assert "srun --no-kill --kill-on-bad-exit=0 torchrun" in script
    _, job = yaml.safe_load_all(weftrain(*words, "--for", "kubernetes").output)
    task = yaml.safe_load(weftrain(*words, "--for", "skypilot").output)
    assert (job["spec"]["completions"], job["spec"]["parallelism"], task["num_nodes"]) == (30, 30, 30)
    pod = job["spec"]["template"]["spec"]["containers"][0]["command"][2]
    for command in (script[: script.index(" &\nstep=")], pod, task["run"]):
        asked = get_args_parser().parse_args(torchrun(command))
        assert (asked.nnodes, asked.rdzv_backend, asked.rdzv_endpoint) == ("28", "weftrain", "/shared/runs/.meetings")
        assert asked.training_script_args[-1] == "backend.options.stalled=replace"
    asked_for = weftrain(*words, "backend.options.stalled=report").output
    assert "stalled=replace" not in asked_for
    result = weftrain(*words, "--runs", "runs")
    assert result.exit_code == 2
    assert "with --spares name it from the root" in result.output
