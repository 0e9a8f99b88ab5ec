"""Starts processes of `weftrain` by forking one that has imported everything: a start costs no import.

Run as a program it is that one: it reads lines of JSON, forks for each start, and answers with a line. What it forks ends
as any process does, with its exit handlers.

A start may have faults: at its k-th file operation, command to other ranks or collective, the process sends itself a
signal. SIGKILL there is a process that was killed at that moment.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Launchpad:
    """A program that forks starts of `weftrain`, for as long as the `with` block lasts."""

    def __init__(self) -> None:
        self._codes: dict[int, int] = {}
        self._program = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Launchpad:
        return self

    def __exit__(self, *_: object) -> None:
        self._program.communicate(timeout=60)

    def start(
        self, words: Sequence[str | Path], output: Path, environment: dict[str, str], faults: Sequence[tuple[int, int]]
    ) -> int:
        """Start `weftrain WORDS`. output: gets what it prints. faults: (signal, at the how-manieth moment)."""
        asked = {"words": [str(word) for word in words], "output": str(output), "environment": environment}
        return int(self._ask({**asked, "faults": list(faults)}))

    def codes(self) -> dict[int, int]:
        """Process -> exit code, negative for a signal, of those that ended so far."""
        self._codes |= {int(process): code for process, code in self._ask({}).items()}
        return self._codes

    def _ask(self, what: dict[str, Any]) -> Any:
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.write(json.dumps(what) + "\n")
        self._program.stdin.flush()
        return json.loads(self._program.stdout.readline())


class Moments:
    """Counts moments of a process, and sends it the signals that are due at them. marker: a file that then says so."""

    def __init__(self, faults: Sequence[tuple[int, int]], marker: Path) -> None:
        self._faults, self._marker, self._count = {at: number for number, at in faults}, marker, 0

    def pass_one(self) -> None:
        self._count += 1
        if (number := self._faults.pop(self._count, None)) is not None:
            with self._marker.open("a") as file:
                file.write(f"{number}\n")
            os.kill(os.getpid(), number)

    def around(self, action: Callable[..., T]) -> Callable[..., T]:
        """The action with a moment before it and one after it."""

        def run(*args: Any, **more: Any) -> T:
            self.pass_one()
            result = action(*args, **more)
            self.pass_one()
            return result

        return run


def plant(moments: Moments) -> None:
    from weftrain.backends.cuda.world import World
    from weftrain.backends.streaming.communicator import Communicator
    from weftrain.backends.streaming.replicas.leader import ReplicaLeader
    from weftrain.core.formats import fsops

    fsops._perform = moments.around(fsops._perform)
    together, commands = World.together, (Communicator, ReplicaLeader)

    def counted(world: World, what: str) -> Any:
        moments.pass_one()
        return together(world, what)

    World.together = counted  # type: ignore[method-assign]
    for one in commands:
        one.command = moments.around(one.command)  # type: ignore[method-assign]


def imported() -> None:
    """Everything that a start imports, and what takes long once."""
    import torch
    import torch._dynamo
    import torch.distributed.elastic.rendezvous  # loads weftrain's own, which cannot be while that is being imported
    import torch.distributed.fsdp
    import torch.distributed.tensor

    import weftrain.backends
    import weftrain.cli
    import weftrain.cli.assembly as assembly
    import weftrain.core
    from weftrain.backends.common.decoder import select_kernels
    from weftrain.backends.common.registry import find_backends
    from weftrain.core.recipe_file import load_recipe
    from weftrain.core.run.speed import Peak

    for package in (weftrain.core, weftrain.cli, weftrain.backends):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                with contextlib.suppress(ImportError):  # of a package that is not installed
                    importlib.import_module(module.name)
    find_backends()
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # these are deaths of processes: what was written is there
    importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)  # type: ignore[assignment]
    recipe = load_recipe(
        "crystal_demo", ["data.sources=[]", "data.synthetic_rows=4", "precision.compute=float32"]
    ).recipe
    select_kernels(recipe, "cpu", "cpu")  # reads every kernel there is
    assert len(os.listdir("/proc/self/task")) == 1, "a fork takes no threads along"
    assembly.measured_peak = lambda device, dtype: Peak(1e11, "known in tests")


def main() -> None:
    from weftrain.cli.main import main as weftrain

    imported()
    children: set[int] = set()
    for line in sys.stdin:
        asked = json.loads(line)
        answer: Any = {}
        if asked:
            sys.stdout.flush()
            if not (process := os.fork()):
                become(asked)
                sys.argv[0] = "weftrain"
                weftrain(asked["words"])
                sys.exit(0)
            children.add(process)
            answer = process
        else:
            for one in list(children):
                process, status = os.waitpid(one, os.WNOHANG)
                if process:
                    children.discard(one)
                    answer[process] = os.waitstatus_to_exitcode(status)
        print(json.dumps(answer), flush=True)


def become(asked: dict[str, Any]) -> None:
    """Give a forked process its own output, environment and faults."""
    os.environ.update(asked["environment"])
    output = Path(asked["output"])
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
        descriptor = os.open("/dev/null" if not number else output, flags, 0o666)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.dup2(1, 2)
    plant(Moments([(number, at) for number, at in asked["faults"]], output.with_suffix(".signals")))


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))
    main()
