"""Rank 0 of a group: waits for the others, admits later ones between two steps, and sends commands."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from weftrain.backends.streaming.replicas.group import ReplicaGroup
from weftrain.backends.streaming.replicas.rendezvous import open_rendezvous, remove_rendezvous
from weftrain.core.errors import BackendError
from weftrain.core.stop import StopRequest


class ReplicaLeader(ReplicaGroup):
    """Waits for `replicas - 1` workers; later ones are admitted between two steps, unless the store is sharded.

    Every worker takes a ticket, a number, at the rendezvous. Each change of the group is a new generation, in which the
    leader publishes the rank of each ticket.
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
        self._members: list[int] = []  # tickets of the admitted workers, in the order of their ranks
        self._seen = self._generation = 0
        deadline = time.monotonic() + timeout_s
        while self._tickets() < replicas - 1:
            stop.leave_if_requested()
            if time.monotonic() > deadline:
                raise BackendError(
                    f"{self._tickets() + 1} of {replicas} replicas are there after {timeout_s:.0f} s: start the others "
                    "with `weftrain replica RUN`, or set batch.replicas"
                )
            time.sleep(0.05)
        with stop.ends_at_once():
            self._admit()

    def _tickets(self) -> int:
        """How many tickets have been taken."""
        return int(self._store.add("tickets", 0))

    def regroup(self) -> None:
        leaving = [ticket for ticket in self._members if self._store.check([f"leaving/{ticket}"])]
        if self.sharded:
            # without a rank, its part of the state is missing: stop the run, and save while all parts are there
            for ticket in leaving:
                self._stop.ask(int(self._store.get(f"leaving/{ticket}")))
        elif leaving or self._tickets() > self._seen:
            self.command(do="regroup")
            self._members = [ticket for ticket in self._members if ticket not in leaving]
            for ticket in leaving:
                self._store.set(f"rank/{ticket}/{self._generation + 1}", "left")
            self._admit()

    def _admit(self) -> None:
        """Form the next generation, with all that have taken a ticket since the last one."""
        taken = self._tickets()
        self._members += range(self._seen + 1, taken + 1)
        self._seen = taken
        self._generation += 1
        size = len(self._members) + 1
        for rank, ticket in enumerate(self._members, 1):
            if not self._store.check([f"first/{ticket}"]):
                self._store.set(f"first/{ticket}", str(self._generation))
            self._store.set(f"rank/{ticket}/{self._generation}", f"{rank} {size}")
        self._form(self._generation, 0, size)

    def close(self) -> None:
        self.command(do="end")
        super().close()
        remove_rendezvous(self._rendezvous.parent)
