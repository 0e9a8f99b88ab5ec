"""The batch script of `weftrain launch` under a real Slurm: slurmctld and slurmd on this machine, in a network of their
own. It is skipped where Debian's packages slurmctld, slurmd, slurm-client and munge are not installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from weftrain.cli.main import main

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare", "ip")
TORCHRUN = """#!/bin/bash
trap 'sleep 1; echo saved >> log; exit 1' TERM
echo started >> log
while :; do sleep 0.05; done
"""
CONFIGURATION = """ClusterName=here
SlurmctldHost={host}(10.9.9.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerParameters=batch_sched_delay=1,sched_interval=2
NodeName={host} NodeAddr=10.9.9.1 CPUs=64 RealMemory=100 Gres=gpu:2 State=UNKNOWN
PartitionName=p Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
# An address that is not 127.0.0.1, or the resolver refuses to look any up.
SESSION = """set -e
ip link set lo up; ip addr add 10.9.9.1/24 dev lo
munged --force --foreground --key-file=munge/key --socket="$PWD/munge/socket" --pid-file="$PWD/munge/pid" \
    --log-file="$PWD/munge/log" --seed-file="$PWD/munge/seed" & daemons=$!
until [ -S munge/socket ]; do sleep 0.1; done
slurmctld -D > slurmctld.log 2>&1 & daemons="$daemons $!"
slurmd -D > slurmd.log 2>&1 & daemons="$daemons $!"
trap 'kill $daemons; wait' EXIT
until [ "$(sinfo --noheader --format %t 2>/dev/null)" = idle ]; do sleep 0.2; done
sbatch --output=out job.sh
until [ -e log ]; do sleep 0.1; done
scancel --batch --signal=TERM 1
until scontrol show job 1 | grep -q Restarts=1; do sleep 0.2; done
scontrol show job 1
scancel 1
"""


@pytest.mark.prove
def test_slurm_signals_the_script_which_saves_and_queues_the_job_again(tmp_path: Path) -> None:
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"no real Slurm here: {', '.join(missing)} not installed")
    if os.getuid() or subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no real Slurm here: a network of its own takes root")
    for name in ("bin", "state", "spool", "munge", "devices"):
        (tmp_path / name).mkdir()
    (tmp_path / "munge" / "key").write_bytes(os.urandom(128))
    (tmp_path / "munge" / "key").chmod(0o600)
    (tmp_path / "munge").chmod(0o755)
    for number in range(2):
        (tmp_path / "devices" / f"gpu{number}").symlink_to("/dev/null")
    host = os.uname().nodename.partition(".")[0]
    (tmp_path / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=tmp_path))
    (tmp_path / "gres.conf").write_text(f"NodeName={host} Name=gpu Count=2 File={tmp_path}/devices/gpu[0-1]\n")
    (tmp_path / "bin" / "torchrun").write_text(TORCHRUN)
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    job = ["launch", "crystal_demo", "--nodes", "1", "--per-node", "2", "batch.replicas=2", "batch.micro_batch_size=8"]
    (tmp_path / "job.sh").write_text(CliRunner().invoke(main, job).output)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_CONF": str(tmp_path / "slurm.conf"),
    }
    found = subprocess.run(
        ["timeout", "90", "unshare", "--net", "bash", "-c", SESSION],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "Requeue=1 Restarts=1" in found.stdout
    assert (tmp_path / "log").read_text().splitlines()[:2] == ["started", "saved"]
