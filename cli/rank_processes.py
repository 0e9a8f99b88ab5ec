"""Starts the same program once for each rank on this machine, as torchrun does, for programs that measure."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping, Sequence


def run_ranks(command: Sequence[str], ranks: int, environment: Mapping[str, str]) -> str | None:
    """Run `ranks` processes to their end. Returns None, or the end of the output of the first that fails; the others
    are then killed. environment: beside this process's, and the ranks' own numbers.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = []
    try:
        for rank in range(ranks):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            own = {name: str(number) for name, number in (numbers | {"MASTER_PORT": port}).items()}
            told = {**os.environ, **environment, **own, "MASTER_ADDR": "127.0.0.1"}
            processes.append(
                subprocess.Popen(command, env=told, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        for process in processes:
            output = process.communicate()[0]
            if process.returncode:
                return output.strip()[-2000:] or f"exit status {process.returncode}"
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return None
