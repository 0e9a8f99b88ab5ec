"""Nodes for tests: torchruns on this machine that meet by the rendezvous `weftrain`, each with a host name of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

# A rank whose node is what NODE says, slowly, and slower in a save; it does not measure the machine's peak, which takes
# a second.
RANK = """
import os, socket, time
socket.gethostname = lambda: os.environ["NODE"]
import weftrain.cli.assembly
from weftrain.core.run.speed import Peak
weftrain.cli.assembly.measured_peak = lambda *_, **__: Peak(1e11, "known in tests")
from weftrain.core.formats import checkpoint_files
from weftrain.core.order.synthetic import SyntheticSource
rows, write_file = SyntheticSource.rows, checkpoint_files.write_file
def slow_rows(self, step, first, count):
    time.sleep(float(os.environ.get("STEP_S", "0")))
    return rows(self, step, first, count)
def slow_write(path, *arguments):
    if "step_" in path.parent.name and ".tmp-" in path.parent.name and "part_" not in path.parent.name:
        time.sleep(float(os.environ.get("SAVE_S", "0")))
    return write_file(path, *arguments)
SyntheticSource.rows, checkpoint_files.write_file = slow_rows, slow_write
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
    """A torchrun with some ranks, and its output in a file."""

    def __init__(self, folder: Path, name: str, nodes: int, per_node: int, words: list[str], step_s: float) -> None:
        self.name, self.output, self._memory = name, folder / f"{name}.txt", folder / "memory"
        self._memory.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes)]
        command += ["--nproc-per-node", str(per_node), "--max-restarts", "5", "--local-addr", "127.0.0.1"]
        command += ["--rdzv-backend", "weftrain", "--rdzv-endpoint", str(folder / "meetings"), "--rdzv-id", "r"]
        variables = {"NODE": name, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder / "handler")}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--no-python", sys.executable, "-c", RANK, "train", *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "STEP_S": str(step_s), "SAVE_S": str(5 * step_s), **variables},
            )

    def ranks(self) -> dict[int, psutil.Process]:
        """Its ranks' processes; none while it stands by."""
        found = {}
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.Error):
                    if "RANK" in (variables := child.environ()):
                        found[int(variables["RANK"])] = child
        return found

    def lose(self) -> None:
        """As if the machine were gone: torchrun, ranks and what is in its memory."""
        self.end()
        self.forget()

    def forget(self) -> None:
        for copies in self._memory.glob(f"*/*/{self.name}"):
            shutil.rmtree(copies, ignore_errors=True)

    def end(self) -> None:
        ranks = self.ranks()
        self.process.kill()
        for one in ranks.values():
            with contextlib.suppress(psutil.Error):
                one.kill()
        self.process.wait()


@contextlib.contextmanager
def nodes(
    folder: Path, count: int, spares: int, per_node: int, words: list[str], step_s: float
) -> Iterator[list[Node]]:
    """step_s: what each step takes at least; a save takes five times as long."""
    install_handler(folder / "handler")
    started = [Node(folder, f"node{number}", count, per_node, words, step_s) for number in range(count + spares)]
    try:
        yield started
    finally:
        for node in started:
            node.end()
