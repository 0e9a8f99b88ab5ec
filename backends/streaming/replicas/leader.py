"""Rank 0 of a group: waits for the others, admits later ones between two steps, and sends commands."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from weftrain.backends.streaming.replicas.group import ProcessGroup
from weftrain.backends.streaming.replicas.rendezvous import open_rendezvous, remove_rendezvous
from weftrain.core.errors import BackendError
from weftrain.core.stop import StopRequest


class Leader(ProcessGroup):
    """Waits for `replicas - 1` workers; later ones are admitted between two steps, to a store that is not sharded.

    Every worker draws a number at the rendezvous. `members` are the numbers of the admitted ones, in the order of their
    ranks; each change of the group is a new generation, in which each number is told its rank.
    """

    def __init__(
        self,
        folder: Path,
        agreement: str,
        replicas: int,
        device: torch.device,
        sharded: bool,
        timeout_s: float,
        stop: StopRequest,
    ) -> None:
        super().__init__(open_rendezvous(folder, agreement), device, sharded, timeout_s)
        self._stop = stop
        self._members: list[int] = []
        self._known = self._generation = 0
        deadline = time.monotonic() + timeout_s
        while self._drawn() < replicas - 1:
            stop.leave_if_requested()
            if time.monotonic() > deadline:
                raise BackendError(
                    f"{self._drawn() + 1} of {replicas} replicas are there after {timeout_s:.0f} s: start the others "
                    "with `weftrain replica RUN`, or set batch.replicas"
                )
            time.sleep(0.05)
        with stop.ends_at_once():
            self._admit()

    def _drawn(self) -> int:
        """How many workers have drawn a number."""
        return int(self._store.add("drawn", 0))

    def regroup(self) -> None:
        leaving = [number for number in self._members if self._store.check([f"leaving/{number}"])]
        if self.sharded:
            # without a rank its part of the state would be missing: the run stops, and is saved while all are there
            for number in leaving:
                self._stop.ask(int(self._store.get(f"leaving/{number}")))
        elif leaving or self._drawn() > self._known:
            self.command(do="regroup")
            self._members = [number for number in self._members if number not in leaving]
            for number in leaving:
                self._store.set(f"seat/{number}/{self._generation + 1}", "left")
            self._admit()

    def _admit(self) -> None:
        drawn = self._drawn()
        self._members += range(self._known + 1, drawn + 1)
        self._known = drawn
        self._generation += 1
        size = len(self._members) + 1
        for rank, number in enumerate(self._members, 1):
            if not self._store.check([f"first/{number}"]):
                self._store.set(f"first/{number}", str(self._generation))
            self._store.set(f"seat/{number}/{self._generation}", f"{rank} {size}")
        self._form(self._generation, 0, size)

    def close(self) -> None:
        self.command(do="end")
        super().close()
        remove_rendezvous(self._rendezvous.parent)
