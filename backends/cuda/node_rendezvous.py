"""torchrun's rendezvous `weftrain`: nodes with spares that meet in a folder of the shared file system.

    torchrun --nnodes 4 --rdzv-backend weftrain --rdzv-endpoint /shared/runs/.meetings --rdzv-id JOB .. train RECIPE ..

on more than 4 nodes: the first four train, the others stand by, and take the places of those that are lost
(node_meeting.py). It differs from torchrun's own c10d rendezvous in that no node hosts what the others need to go on,
that a node which trains keeps its place, that each round has a store of its own, and that a node which would run
another version or another command is refused before it takes part.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch.distributed.elastic.rendezvous.api import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from weftrain.backends.cuda.node_meeting import NEVER, ROUND_KEY, Meeting, Round
from weftrain.core.formats import fsops

_STOPPED_S = 3.0  # that a worker which was stopped may stay so after its round broke


def register() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """The entry point `torchrun.handlers`."""
    return create


def create(parameters: RendezvousParameters) -> NodeRendezvous:
    """Raises SystemExit, with one line, for settings that cannot be."""
    if parameters.min_nodes != parameters.max_nodes:
        _refuse(f"--nnodes {parameters.min_nodes}:{parameters.max_nodes}: the recipe fixes the number: name it alone")
    endpoint = Path(parameters.endpoint)
    if not endpoint.is_absolute():
        _refuse(f"--rdzv-endpoint {endpoint}: name a folder that all nodes share, from the root")
    folder = endpoint / re.sub(r"[^A-Za-z0-9_.-]", "_", parameters.run_id)
    try:
        meeting = Meeting(
            folder, identity(sys.argv[1:]), socket.gethostname(), float(parameters.get("lost_timeout", "10"))
        )
    except OSError as error:
        _refuse(f"{folder}: {error.strerror}: name a folder that all nodes may write to")
    return NodeRendezvous(
        meeting,
        parameters.run_id,
        parameters.max_nodes,
        parameters.local_addr or socket.getfqdn(),
        float(parameters.get("join_timeout", "600")),
    )


def _refuse(why: str) -> None:
    sys.stderr.write(f"weftrain: {why}\n")
    sys.stderr.flush()
    raise SystemExit(2)


def identity(arguments: list[str]) -> dict[str, str]:
    """What nodes of one run must have in common. arguments: torchrun's."""
    from torch.distributed.run import get_args_parser

    words = get_args_parser().parse_args(arguments).training_script_args
    recipes = [Path(word) for word in words if word.endswith((".yaml", ".yml")) and Path(word).is_file()]
    return {
        "weftrain": importlib.metadata.version("weftrain"),
        "weftrain's source": _source_hash(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(words),
        "recipe": hashlib.sha256(b"".join(fsops.sha256_file(path).encode() for path in recipes)).hexdigest()[:12],
    }


def _source_hash() -> str:
    """Of the modules that a rank runs, as they lie on this node."""
    package, digest = Path(__file__).parents[2], hashlib.sha256()
    for folder in ("core", "kernels", "backends", "cli"):
        for path in sorted((package / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(package)}\0{fsops.sha256_file(path)}\n".encode())
    return digest.hexdigest()[:12]


class NodeRendezvous(RendezvousHandler):
    """One node's part in it. torchrun calls it from one thread; another beats, and sees whether the round is broken."""

    def __init__(
        self, meeting: Meeting, run_id: str, size: int, address: str, join_s: float, beat_s: float = 1.0
    ) -> None:
        self._meeting, self._run_id, self._size, self._address = meeting, run_id, size, address
        self._join_s, self._beat_s = join_s, beat_s
        self._round = Round()  # the one that this node takes part in, or took part in last
        self._store: dist.Store | None = None
        self._lock, self._end = threading.Lock(), threading.Event()
        self._waits, self._broken_at = True, 0.0
        self._thread = threading.Thread(target=self._beat, name="weftrain-node", daemon=True)
        self._thread.start()

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return "weftrain"

    def get_run_id(self) -> str:
        return self._run_id

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until this node takes part in a round: a spare as long as the others train, anybody else for
        join_timeout (600 s). Raises SystemExit for a spare, when the run ends, and for a node that is refused.
        """
        self._waits = True
        deadline, closed_before = time.monotonic() + self._join_s, self._closed(self._meeting.newest())
        if self._round.number:
            self._meeting.mark(self._round.number, "broken")
        while True:
            with self._lock:
                newest = self._meeting.newest()
                joins = newest.number > self._round.number and self._meeting.own.number in newest.members
                if not joins:
                    self._wait_once(newest, closed_before)
                runs = any(not self._meeting.is_lost(number) for number in newest.members)
                count = len(newest.members)
            if joins and (found := self._join(newest)) is not None:
                return found
            if time.monotonic() > deadline and not (runs and self._meeting.own.number not in newest.members):
                raise RendezvousTimeoutError(f"{self._size} nodes did not come together within {self._join_s:.0f} s")
            time.sleep(min(self._beat_s, 0.3) + count / 100)

    def _wait_once(self, newest: Round, closed_before: bool) -> None:
        if self._meeting.own.left != newest.number:
            self._meeting.beat(left=newest.number)
        if self._closed(newest) and not closed_before:
            raise SystemExit(0)
        if (found := self._meeting.refusal()) is not None:
            node, key = found
            self._meeting.leave()
            mine = self._meeting.own
            _refuse(
                f"{mine.host} takes no part: {key} is {mine.identity.get(key)} here, and {node.identity.get(key)} on "
                f"{node.host}, which came first: install and start the same everywhere"
            )
        self._meeting.propose(newest, self._size)

    def _closed(self, newest: Round) -> bool:
        return newest.number != NEVER and self._meeting.is_marked(newest.number, "closed")

    def _join(self, newest: Round) -> RendezvousInfo | None:
        """None if the first of its nodes was lost before it gave the round a store."""
        own = self._meeting.own.number
        rank, leader = newest.members.index(own), newest.members[0]
        with self._lock:
            self._round, self._store = newest, None
            self._broken_at = 0.0
            self._meeting.beat(left=newest.number - 1)
        timeout = timedelta(seconds=self._join_s)
        if rank == 0:
            store = dist.TCPStore(self._address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            store.set(ROUND_KEY, str(newest.number))
            self._meeting.set_address(newest.number, self._address, store.port)
        while (found := self._meeting.address(newest.number)) is None:
            with self._lock:
                if self._meeting.is_lost(leader) or self._meeting.is_marked(newest.number, "broken"):
                    self._meeting.mark(newest.number, "broken")
                    return None
            time.sleep(min(self._beat_s, 0.3))
        if rank:
            store = dist.TCPStore(*found, is_master=False, timeout=timeout)
        self._store = store
        self._waits = False
        told = RendezvousStoreInfo(*found)
        return RendezvousInfo(dist.PrefixStore("nodes", store), rank, len(newest.members), told)

    def num_nodes_waiting(self) -> int:
        """More than 0: the round is broken, and torchrun ends this node's ranks and asks for the next one. Spares that
        wait do not count.
        """
        return int(self._broken_at > 0)

    def is_closed(self) -> bool:
        with self._lock:
            return self._closed(self._meeting.newest())

    def set_closed(self) -> None:
        if self._round.number:
            self._meeting.mark(self._round.number, "closed")

    def shutdown(self) -> bool:
        """The run has ended, or this node cannot go on."""
        if not self._waits:
            self.set_closed()
        self._end.set()
        self._thread.join()
        self._meeting.leave()
        return True

    def _beat(self) -> None:
        while not self._end.wait(self._beat_s):
            try:
                with self._lock:
                    self._meeting.beat()
                    if not self._waits and not self._broken_at and self._is_broken():
                        self._meeting.mark(self._round.number, "broken")
                        self._broken_at = time.monotonic()
            except OSError as error:  # the others may take this node for lost then
                sys.stderr.write(f"weftrain: {self._meeting.folder}: {error.strerror}: this node cannot be seen\n")
            if not self._waits and self._broken_at and time.monotonic() - self._broken_at > _STOPPED_S:
                _kill_stopped()

    def _is_broken(self) -> bool:
        """Whether a node of this one's round has left it, or the next one of the ring, which this node watches, is
        lost.
        """
        members = self._round.members
        after = members[(members.index(self._meeting.own.number) + 1) % len(members)]
        newer = self._meeting.newest().number > self._round.number
        return newer or self._meeting.is_marked(self._round.number, "broken") or self._meeting.is_lost(after)


def _kill_stopped() -> None:
    """End this process's children that were stopped, which a signal to end does not reach."""
    for child in psutil.Process(os.getpid()).children():
        try:
            if child.status() == psutil.STATUS_STOPPED:
                child.kill()
        except psutil.Error:
            continue
