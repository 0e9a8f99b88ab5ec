"""Nodes for tests: torchruns on this machine that meet by the rendezvous `weftrain`, each with a host name of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

# A rank whose node is what NODE says; it does not measure the machine's peak, which takes a second.
RANK = """
import os, socket
socket.gethostname = lambda: os.environ["NODE"]
import weftrain.cli.assembly
from weftrain.core.run.speed import Peak
weftrain.cli.assembly.measured_peak = lambda *_, **__: Peak(1e11, "known in tests")
from weftrain.cli.main import main
main()
"""


def install_handler(folder: Path) -> None:
    """The package's entry point, for an environment that was made before it had one."""
    info = folder / "weftrain_nodes-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: weftrain-nodes\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[torchrun.handlers]\nweftrain = weftrain.backends.cuda.node_rendezvous:register\n"
    )


class Node:
    """A torchrun with one rank, and its output in a file."""

    def __init__(self, folder: Path, name: str, nodes: int, words: list[str], *more: str) -> None:
        self.name, self.output, self._memory = name, folder / f"{name}.txt", folder / "memory"
        self._memory.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node", "1"]
        command += ["--rdzv-backend", "weftrain", "--rdzv-endpoint", str(folder / "meetings"), "--rdzv-id", "r"]
        command += ["--max-restarts", "5", "--local-addr", "127.0.0.1", "--no-python", *more]
        variables = {"NODE": name, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder / "handler")}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*command, sys.executable, "-c", RANK, "train", *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables},
                start_new_session=True,
            )

    @property
    def rank(self) -> psutil.Process | None:
        """The process of its rank; None while it stands by."""
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                if "RANK" in child.environ():
                    return child
        return None

    def number(self) -> int | None:
        """Its rank."""
        with contextlib.suppress(psutil.Error):
            rank = self.rank
            return None if rank is None else int(rank.environ()["RANK"])
        return None

    def lose(self) -> None:
        """As if the machine were gone: torchrun, rank and what is in its memory."""
        ranks = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for one in ranks:
            with contextlib.suppress(psutil.Error):
                one.kill()
        for copies in self._memory.glob(f"*/*/{self.name}"):
            shutil.rmtree(copies)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(psutil.Error):
            for one in psutil.Process(self.process.pid).children(recursive=True):
                one.kill()
        self.process.wait()


@contextlib.contextmanager
def nodes(folder: Path, count: int, spares: int, words: list[str], *more: str) -> Iterator[list[Node]]:
    install_handler(folder / "handler")
    started = [Node(folder, f"node{number}", count, words, *more) for number in range(count + spares)]
    try:
        yield started
    finally:
        for node in started:
            node.end()
