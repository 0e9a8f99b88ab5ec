"""`weftrain launch`: the batch script or job of a run over several nodes, for Slurm, Kubernetes or SkyPilot.

torchrun stays the engine: the job starts it once a node, passes a signal on to it once, gives the save its time, and
is queued again where it was preempted. Everything that can be refused (degrees that do not divide, unknown options) is
refused here, not on the cluster.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from weftrain.cli import arguments
from weftrain.cli.remote import RunsPath

_STALLED = "backend.options.stalled="
STEP_AND_EVALUATION_S = 100.0  # what one step with an evaluation takes at most, added to the save


class _Dumper(yaml.SafeDumper):
    """YAML in which a command of several lines stays legible."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


@dataclass(frozen=True)
class Job:
    """What every kind of job is made of. words: `train RECIPE ..`, as the shell takes them."""

    name: str
    nodes: int
    per_node: int
    cpus: int
    time: str
    restarts: int
    save_s: int  # from a signal to the end of the save
    words: tuple[str, ...]
    image: str
    accelerator: str
    spares: int = 0
    meetings: str = ""  # with spares: the folder in which the nodes meet

    @property
    def all_nodes(self) -> int:
        return self.nodes + self.spares

    @property
    def notice_s(self) -> int:
        """Seconds before its end at which a job is signalled: the save's, and one minute."""
        return self.save_s + 60

    def torchrun(self, endpoint: str, rdzv_id: str, nodes: str | None = None) -> str:
        """The command of one node; endpoint, rdzv_id and nodes are in shell syntax."""
        engine = f"torchrun --nnodes {self.nodes if self.spares else nodes or self.nodes}"
        engine += f" --nproc-per-node {self.per_node}"
        engine += f" --max-restarts {self.restarts} --shutdown-timeout {self.save_s}"
        meeting = f'--rdzv-backend c10d --rdzv-endpoint "{endpoint}" --rdzv-id "{rdzv_id}"'
        if self.spares:
            meeting = f'--rdzv-backend weftrain --rdzv-endpoint {shlex.quote(self.meetings)} --rdzv-id "{rdzv_id}"'
        return " \\\n    ".join([engine, meeting, f"-m weftrain.cli {shlex.join(self.words)}"])


def slurm(job: Job) -> str:
    """A batch script for `sbatch`. A trapped signal ends bash's `wait`, not the step, so it waits again."""
    alive = " --no-kill" if job.spares else ""  # the job outlives a node, whose place a spare takes
    return f"""#!/bin/bash
#SBATCH --job-name={job.name} --nodes={job.all_nodes} --ntasks-per-node=1 --gpus-per-node={job.per_node} \
--cpus-per-task={job.cpus} --time={job.time}
#SBATCH --signal=B:TERM@{job.notice_s} --requeue --open-mode=append{alive}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
stop() {{
    [ "$stopped" ] && return
    stopped=yes
    scancel --signal=TERM "$SLURM_JOB_ID"  # the step, once: it saves and exits; --full would signal this script, too
}}
trap stop TERM
srun{f"{alive} --kill-on-bad-exit=0" if job.spares else ""} {job.torchrun("$head:29500", "$SLURM_JOB_ID")} &
step=$!
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
[ -z "$stopped" ] || scontrol requeue "$SLURM_JOB_ID"  # it resumes; a complete or failed run is not queued again
exit "$code"
"""


def kubernetes(job: Job) -> str:
    """A headless service and an indexed Job for `kubectl apply`. The kubelet signals torchrun itself; a pod that was
    evicted is made again, and all ranks meet anew.
    """
    endpoint = f"{job.name}-0.{job.name}:29500"
    command = f"exec {job.torchrun(endpoint, job.name)}"
    pod = {
        "subdomain": job.name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.notice_s,
        "containers": [
            {
                "name": "train",
                "image": job.image,
                "command": ["/bin/bash", "-c", command],
                "resources": {"limits": {"nvidia.com/gpu": job.per_node, "cpu": job.cpus}},
                "volumeMounts": [
                    {"name": "shared", "mountPath": "/shared"},
                    {"name": "memory", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    labels = {"weftrain": job.name}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name},
        "spec": {"clusterIP": "None", "selector": labels},
    }
    batch = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name},
        "spec": {
            "completionMode": "Indexed",
            "completions": job.all_nodes,
            "parallelism": job.all_nodes,
            "backoffLimit": job.restarts,
            "podFailurePolicy": {  # an eviction is no failure of the run
                "rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}]
            },
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    return _yaml(service, batch)


def skypilot(job: Job) -> str:
    """A task for `sky jobs launch`, which recovers it after a preemption."""
    run = 'head=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)\n'
    run += f"exec {job.torchrun('$head:29500', '$SKYPILOT_TASK_ID', nodes='$SKYPILOT_NUM_NODES')}\n"
    task: dict[str, Any] = {
        "name": job.name,
        "num_nodes": job.all_nodes,
        "resources": {"accelerators": f"{job.accelerator}:{job.per_node}", "use_spot": False},
        "run": run,
    }
    return _yaml(task)


def _yaml(*documents: dict[str, Any]) -> str:
    return str(yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1000))


KINDS = {
    "slurm": (slurm, ("sbatch",), ".sh"),
    "kubernetes": (kubernetes, ("kubectl", "apply", "-f"), ".yaml"),
    "skypilot": (skypilot, ("sky", "jobs", "launch", "--yes"), ".yaml"),
}


@click.command()
@arguments.recipe
@arguments.overrides
@click.option("--nodes", type=click.IntRange(min=1), required=True, help="Nodes of the job.")
@click.option(
    "--per-node", type=click.IntRange(min=1), default=8, show_default=True, help="GPUs of a node, a process each."
)
@click.option("--cpus", type=click.IntRange(min=1), default=32, show_default=True, help="CPU cores of a node.")
@click.option("--for", "kind", type=click.Choice([*KINDS]), default="slurm", show_default=True, help="Whose job it is.")
@click.option("--time", "limit", default="7-00:00:00", show_default=True, help="Time limit of a Slurm job.")
@click.option(
    "--restarts",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="How often the ranks are started again after a failure.",
)
@click.option(
    "--spares",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Nodes besides that stand by, and take the place of one that is lost.",
)
@click.option(
    "--storage",
    "storage_gb",
    type=click.FloatRange(min=0, min_open=True),
    default=0.5,
    show_default=True,
    metavar="GB/s",
    help="Speed at which all nodes together write a checkpoint: the save's time follows from it.",
)
@click.option(
    "--runs",
    type=RunsPath(path_type=Path),
    default=Path("/shared/runs"),
    show_default=True,
    metavar="FOLDER",
    help="Folder of runs, or an address such as s3://bucket/runs.",
)
@click.option("--image", default="weftrain:latest", show_default=True, help="Container image, for Kubernetes.")
@click.option("--accelerator", default="H100", show_default=True, help="Kind of GPU, for SkyPilot.")
@click.option("--to", "target", type=click.Path(path_type=Path, dir_okay=False), help="File instead of the terminal.")
@click.option("--submit", is_flag=True, help="Submit it, with sbatch, kubectl or sky; --to keeps the file.")
def launch(
    recipe: str,
    overrides: tuple[str, ...],
    nodes: int,
    per_node: int,
    cpus: int,
    kind: str,
    limit: str,
    restarts: int,
    spares: int,
    storage_gb: float,
    runs: Path | str,
    image: str,
    accelerator: str,
    target: Path | None,
    submit: bool,
) -> None:
    """Write the job that trains RECIPE on --nodes nodes, and with --submit hand it to the scheduler.

    Overrides mean what they mean for `train`; the backend is cuda. Degrees that do not fit the recipe are refused here.
    """
    from weftrain.backends.cuda.degrees import degrees
    from weftrain.backends.cuda.options import CudaOptions
    from weftrain.cli.resolve import resolve
    from weftrain.core.run.retention_rule import disk_need

    if not re.fullmatch(r"[0-9:-]{1,20}", limit):
        raise click.BadParameter(f"'{limit}' is no time of Slurm's, such as 7-00:00:00 or 90", param_hint="--time")
    if spares:
        if not Path(runs).is_absolute():
            raise click.BadParameter(
                f"'{runs}': with --spares name it from the root, as all nodes see it", param_hint="--runs"
            )
        overrides = (
            *overrides,
            *([] if any(word.startswith(_STALLED) for word in overrides) else [f"{_STALLED}replace"]),
        )
    found = resolve(recipe, overrides, "cuda")
    assert isinstance(found.options, CudaOptions)
    degrees(found.options, found.recipe, nodes * per_node, per_node)
    save_s = 2 * (disk_need(found.recipe).each_bytes / (storage_gb * 1e9) + STEP_AND_EVALUATION_S)
    words = ("train", recipe, "--backend", "cuda", "--runs", str(runs), *overrides)
    job = Job(
        _name(found.recipe.name),
        nodes,
        per_node,
        cpus,
        limit,
        restarts,
        60 * math.ceil(save_s / 60),
        words,
        image,
        accelerator,
        spares,
        str(Path(runs) / ".meetings"),
    )
    write, command, suffix = KINDS[kind]
    text = write(job)
    if target is not None:
        target.write_text(text)
    if submit:
        _submit(command, text, target, job.name + suffix)
    elif target is None:
        click.echo(text, nl=False)


def _name(recipe: str) -> str:
    """A recipe's name as Slurm, Kubernetes and SkyPilot all take one; it begins with a letter or digit."""
    return re.sub(r"[^a-z0-9]+", "-", recipe.lower())[:52].strip("-")


def _submit(command: Sequence[str], text: str, target: Path | None, name: str) -> None:
    """Raises click.ClickException where the scheduler's program is not there, or refuses."""
    program = shutil.which(command[0])
    if program is None:
        raise click.ClickException(
            f"{command[0]} is not on PATH: submit from a machine of the cluster, or leave --submit"
        )
    path = target or Path(name)
    if target is None:
        if path.exists():
            raise click.ClickException(f"{path} is there already: name another file with --to")
        path.write_text(text)
    done = subprocess.run([program, *command[1:], str(path)], check=False)
    if done.returncode:
        raise click.ClickException(f"{command[0]} refused {path} with exit code {done.returncode}")
