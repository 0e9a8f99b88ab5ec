"""Notices that another rank has ended while this one waits: a collective only notices it where it talks to that rank.

A process of this node is looked up among the processes; of another node's it is known that they beat no more.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from weftrain.backends.cuda.world import World


def runs(process: int) -> bool:
    """Whether there is such a process that has not ended. One that nobody has waited for yet has."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


class Peers:
    """The ranks of this node, and the next rank, wherever it is. store: of the beats."""

    def __init__(self, world: World, store: Any) -> None:
        self._world, self._store = world, store
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        first = world.rank - int(os.environ.get("LOCAL_RANK", "0"))
        self._here = [rank for rank in range(first, first + local) if 0 <= rank < world.size and rank != world.rank]
        self._next = (world.rank + 1) % world.size
        self._processes: dict[int, int] = {}  # of ranks on this node
        self._beats: dict[int, tuple[float, str]] = {}  # of a rank: since when its last beat is there, and that beat

    def lost(self) -> str | None:
        """Which rank has ended, in words, or None."""
        for rank in self._here:
            if rank not in self._processes and (beat := self._newest(rank)):
                told = json.loads(beat)
                self._processes[rank] = told["process"] if told["host"] == self._world.host else os.getpid()
            process = self._processes.get(rank)
            # a process of the same number in another container would look ended, but it beats
            if process is not None and not runs(process) and self._silent_s(rank) > 3.0:
                return f"rank {rank} (process {process}) has ended"
        if (silent_s := self._silent_s(self._next)) > self._world.timeout_s:
            return f"rank {self._next} has not answered for {silent_s:.0f} s"
        return None

    def _newest(self, rank: int) -> str | None:
        key = f"beat/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _silent_s(self, rank: int) -> float:
        """Seconds since its beat was seen to change; 0 for a rank that has not begun to."""
        beat, now = self._newest(rank), time.monotonic()
        if beat is None:
            return 0.0
        if self._beats.get(rank, (0.0, ""))[1] != beat:
            self._beats[rank] = now, beat
        return now - self._beats[rank][0]
