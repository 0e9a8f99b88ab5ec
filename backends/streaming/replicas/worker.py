"""Every rank but 0: joins a run, carries out rank 0's commands, and leaves between two steps."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from weftrain.backends.streaming.engine import StreamingRun
from weftrain.backends.streaming.options import StreamingOptions
from weftrain.backends.streaming.replicas import shards
from weftrain.backends.streaming.replicas.group import ReplicaGroup
from weftrain.backends.streaming.replicas.rendezvous import agreement, are_released, read_note
from weftrain.backends.streaming.state import StateReader
from weftrain.backends.streaming.store.base import Completed
from weftrain.core.backend import Job
from weftrain.core.errors import BackendError
from weftrain.core.order.batch import BatchSource
from weftrain.core.stop import StopRequest

_LOOK = datetime.timedelta(seconds=1)  # at the store, before this process is admitted


class ReplicaWorker(ReplicaGroup):
    """Takes a ticket at the rendezvous and waits until rank 0 admits it."""

    def __init__(self, rendezvous: Path, device: torch.device, sharded: bool, timeout_s: float) -> None:
        super().__init__(rendezvous, device, sharded, timeout_s)
        self._ticket, self._generation = int(self._store.add("tickets", 1)), 0

    def is_open(self) -> bool:
        """Whether the run may still admit this process. Its rank 0 removes the rendezvous where the run ends."""
        return self._rendezvous.exists()

    def join(self, stop: StopRequest) -> bool:
        """Join the group if rank 0 has admitted this process; False: not yet, or never."""
        if (generation := self._admitted_in()) is None:
            return False
        self._generation = generation
        with stop.ends_at_once():
            self._rejoin()
        return True

    def _admitted_in(self) -> int | None:
        """The generation in which this process is admitted first; None: it is not."""
        first = f"first/{self._ticket}"
        # torch waits for a file that was removed, as long as the timeout, in native code that hears no signal
        self._store.set_timeout(_LOOK)
        try:
            return int(self._store.get(first)) if self.is_open() and self._store.check([first]) else None
        except (RuntimeError, dist.DistError):
            if self.is_open():
                raise
            return None
        finally:
            self._store.set_timeout(self._timeout)

    def _rejoin(self) -> bool:
        """Take this generation's rank. False: rank 0 has let this process leave."""
        with self._reporting("get a rank"):
            assigned = self._store.get(f"rank/{self._ticket}/{self._generation}").decode()
        if assigned == "left":
            self._dissolve()
            return False
        rank, size = assigned.split()
        self._form(self._generation, int(rank), int(size))
        return True

    def ask_to_leave(self, signal_number: int) -> None:
        """After a signal. Rank 0 grants it between two steps; with a sharded store it stops the whole run."""
        self._store.set(f"leaving/{self._ticket}", str(signal_number))

    def next_command(self) -> dict[str, Any] | None:
        """Rank 0's next command; None if this rank has left or the run has ended."""
        while (command := self._receive_command())["do"] == "regroup":
            self._generation += 1
            if not self._rejoin():
                return None
        return None if command["do"] == "end" else command


def join_run(
    read: Callable[[], Job], device: Callable[[Job], torch.device], timeout_s: float
) -> tuple[Job, ReplicaWorker] | None:
    """Wait until a run admits this process. None: the process that was to lead found the run complete. read: the job as
    the run's folder describes it now. device: prepares this process for a job. Raises BackendError after timeout_s.

    A run that was killed leaves its note and recipe in the folder until the next run is started. So a ticket is taken
    only if note and recipe agree, and another one when the note changes.
    """
    deadline, job, worker, rendezvous = time.monotonic() + timeout_s, read(), None, None
    assert job.folder is not None
    folder, why = job.folder, "no run waits for replicas there"
    while worker is None or not worker.join(job.stop):
        job.stop.leave_if_requested()
        if worker is not None and not worker.is_open():
            worker, rendezvous, why = None, None, "its run ended before it admitted this replica"
        if are_released(folder, timeout_s):
            return None
        note = read_note(folder)
        if note is not None and note[0] != rendezvous:
            job = read()
            options = job.options
            assert isinstance(options, StreamingOptions)
            if note[1] == agreement(job):
                why = "its run has not admitted this replica: it may be computing a step, or have died"
                rendezvous = note[0]
                worker = ReplicaWorker(rendezvous, device(job), options.sharded, options.timeout_s)
            else:
                differing = "(fabric, tier, tile_elements, state_format)"
                why = f"its run has another recipe, or other backend.options {differing}, than this replica"
        if time.monotonic() > deadline:
            raise BackendError(
                f"{folder}: after {timeout_s:.0f} s {why}; a run is started with `weftrain train RECIPE --backend "
                "streaming batch.replicas=N`"
            )
        time.sleep(0.05)
    return job, worker


def carry_out_commands(run: StreamingRun, worker: ReplicaWorker, source: BatchSource) -> None:
    """Carry out rank 0's commands until the run ends or this rank has left. Raises BackendError if rank 0 fails."""
    store, stop = run.store, run.job.stop
    while (command := worker.next_command()) is not None:
        if stop.requested():
            worker.ask_to_leave(stop.number)
        if stop.take_save():
            sys.stderr.write("weftrain: a replica saves nothing: send SIGUSR2 to the process that leads the run\n")
        match command["do"]:
            case "step":
                run.own_share(source, command["step"])
                shards.wait_until_spooled(worker, store)
            case "complete":
                store.complete_step(Completed.from_json(command["completed"]))
            case "pass":
                name = command["name"]
                run.executor.carry_out(run.executor.schedule(name), None, shared=name != "flush")
                store.drain()
            case "compare":
                shards.compare(worker, store, command["commit"])
            case "fill":
                step, updates, aside = command["step"], command["updates"], command["set_aside"]
                shards.fill_from_rank_0(worker, store, None, step, updates, run.job.progress, aside)
            case "part":
                StateReader(store, worker).part(command["name"])
