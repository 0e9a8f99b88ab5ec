"""Detects a stalled rank: if nothing moves, rank 0 names the rank that the others wait for, with its Python stack.

Each rank has a thread that notes what its main thread is doing in the store by which the ranks met, so that it works
while every collective hangs. A rank that waits in a collective is not the stalled one. With `stalled: replace` rank 0
then ends that rank and itself, so that torchrun starts all of them again. A process that was stopped cannot end itself:
a rank on the same node kills it.

A rank that waits while another has ended tells so, and ends if its wait outlasts the timeout of every collective.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from weftrain.backends.cuda.peers import Peers
from weftrain.backends.cuda.world import BETWEEN_STEPS, IDLE, World
from weftrain.core.formats import fsops

_BEAT_S = 1.0
_GRACE_S = 5.0  # from the loss of the store to the end of a process that may hang in a collective
_LONGEST_STACK = 4000
_NO_ANSWER = "(no answer: the process is stopped or swapped out, or its machine is gone)"
_SILENCE_S = 3.0  # without a beat: the process is stopped
_LEADER_S = 15.0  # that rank 0 may take to name a stalled rank
_END_S = 3.0  # that a rank has to end itself when it is told to; then a rank on the same node kills it


class HangDetector:
    """Watches a world from its start to its end."""

    def __init__(self, world: World) -> None:
        if not faulthandler.is_enabled():
            faulthandler.enable()  # a rank that crashes in native code prints the stacks of its threads
        self._world = world
        self._main = threading.main_thread().ident
        self._end = threading.Event()
        self._stop_sent, self._saves_heard = False, 0
        self._told_at = 0.0  # when this process learnt that a rank is to end
        self._leader: tuple[float, Any] = time.monotonic(), None  # rank 1: since when rank 0 says the same
        self._store = world.own_store()
        self._peers, self._lost = Peers(world, self._store), False
        self._wait = time.monotonic(), -1  # since when the main thread waits, and in which wait; -1: it does not
        self._thread = threading.Thread(target=self._run, name="weftrain-hang-detector", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        last, since, named, beats = None, time.monotonic(), False, 0
        while not self._end.wait(_BEAT_S):
            now = (self._world.step, self._world.doing)
            if now != last or now[1] == IDLE:
                last, since, named = now, time.monotonic(), False
            held_s = time.monotonic() - since
            beat = {"step": now[0], "doing": now[1], "waiting": self._world.waiting}
            beat |= {"host": self._world.host, "process": os.getpid(), "beats": (beats := beats + 1)}
            try:
                self.pass_on_stop()
                self._store.set(f"beat/{self._world.rank}", json.dumps(beat))
                self._answer()
                self.end_if_told()
                if self._world.leads and held_s > self._world.stall_s and not named:
                    named = True
                    stalled = self._name_stalled(held_s)
                    if self._world.replace_stalled and stalled and not now[1].startswith(BETWEEN_STEPS):
                        self._replace(stalled)
                if self._world.rank == 1:
                    self._watch_leader()
                self.watch_peers()
            except (RuntimeError, dist.DistError):
                self._leave_if_alone()

    def _leave_if_alone(self) -> None:
        """The store, and so rank 0 or the launcher, is gone: end this process, which may hang in a collective."""
        if self._end.wait(_GRACE_S):
            return
        sys.stderr.write(
            f"weftrain: rank {self._world.rank}: rank 0 or its launcher has ended, so this process ends too\n"
        )
        sys.stderr.flush()
        os._exit(128 + self._world.stop.number if self._world.stop.number else 1)

    def pass_on_stop(self) -> None:
        """A signal may reach any rank, and rank 0 alone decides after which step the run stops or saves: tell it."""
        stop = self._world.stop
        if self._world.leads:
            if self._store.check(["stop"]):
                stop.ask(int(self._store.get("stop")))
            for _ in range(self._saves_heard, heard := self._store.add("saves", 0)):
                stop.ask_save()
            self._saves_heard = heard
            return
        if stop.number and not self._stop_sent:
            self._stop_sent = True
            self._store.set("stop", str(stop.number))
        if stop.take_save():
            self._store.add("saves", 1)

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._main or 0)
        return "" if frame is None else "".join(traceback.format_stack(frame))[-_LONGEST_STACK:]

    def _answer(self) -> None:
        """Send this rank's stack if rank 0 asked for it."""
        if self._store.check([f"ask/{self._world.rank}"]):
            self._store.delete_key(f"ask/{self._world.rank}")
            self._store.set(f"stack/{self._world.rank}", self._stack())

    def end_if_told(self) -> None:
        """End this process if rank 0 says that it stalls, or kill a rank on this node that does not end itself."""
        if not self._store.check(["end"]):
            return
        told = json.loads(self._store.get("end"))
        if self._world.rank in told["ranks"]:
            self._leave(f"rank {self._world.rank} stalls: rank 0 ends it, so that it is replaced")
        self._told_at = self._told_at or time.monotonic()
        if time.monotonic() - self._told_at >= _END_S:
            for rank in told["ranks"]:
                beat = self._beat(rank)
                if beat is not None and beat["host"] == self._world.host:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(beat["process"], signal.SIGKILL)

    def watch_peers(self) -> None:
        """Tell that a rank has ended while this one waits. End this process if it then waits longer than it should."""
        wait = self._world.waits if self._world.waiting else -1
        if wait != self._wait[1]:
            self._wait = time.monotonic(), wait
        waited_s = time.monotonic() - self._wait[0]
        if wait == -1 or waited_s < _SILENCE_S:  # ranks end one after the other at the regular end, too
            return
        if not self._lost and (lost := self._peers.lost()):
            self._lost = True
            self._world.report_failure(lost)
            sys.stderr.write(f"weftrain: rank {self._world.rank}, which should {self._world.doing}: {lost}\n")
            sys.stderr.flush()
        if waited_s > self._world.timeout_s + _GRACE_S and (reason := self._world.reported_failure()):
            self._leave(f"rank {self._world.rank} waited {waited_s:.0f} s to {self._world.doing}: {reason}")

    def _watch_leader(self) -> None:
        """Rank 1: if rank 0's process is stopped, which names the others, name it."""
        since, last = self._leader
        if (beat := self._beat(0)) != last:
            self._leader = time.monotonic(), beat
        elif last is not None and time.monotonic() - since > self._world.stall_s + _LEADER_S:
            self._leader = math.inf, last
            where = f"process {last['process']} on {last['host']}, which should {last['doing']}, step {last['step']}"
            sys.stderr.write(f"weftrain: rank 0 does not answer any more: {where}\n")
            sys.stderr.flush()
            self._dump_flights()
            if self._world.replace_stalled:
                self._replace([0])

    def _replace(self, stalled: list[int]) -> None:
        """End the stalled ranks and, once they had the time for it, this one, which ends the run's other ranks."""
        others = [rank for rank in stalled if rank != self._world.rank]
        self._store.set("end", json.dumps({"ranks": others}))
        deadline = time.monotonic() + _END_S + 2 * _BEAT_S
        while others and time.monotonic() < deadline:
            self.end_if_told()
            time.sleep(_BEAT_S / 4)
        self._leave("the run ends, so that the launcher starts all ranks again: with --max-restarts it goes on")

    def _leave(self, why: str) -> NoReturn:
        self._world.report_failure(why)
        sys.stderr.write(f"weftrain: {why}\n")
        sys.stderr.flush()
        os._exit(1)

    def _name_stalled(self, held_s: float) -> list[int]:
        """Tell which ranks the others wait for, and return them."""
        beats = {rank: self._beat(rank) for rank in range(self._world.size)}
        # a rank that was stopped while it waited in a collective still says that it waits, and beats no more
        time.sleep(_SILENCE_S)
        silent = {rank for rank, beat in beats.items() if rank != self._world.rank and self._beat(rank) == beat}
        stalled = [rank for rank, beat in beats.items() if rank in silent or beat is None or not beat["waiting"]]
        for rank in stalled:
            beat = beats[rank]
            what = (
                "which has not reported yet" if beat is None else f"which should {beat['doing']}, step {beat['step']}"
            )
            sys.stderr.write(
                f"weftrain: no progress for {held_s:.0f} s: the other ranks wait for rank {rank}, {what}; its stack:\n"
                f"{_NO_ANSWER if rank in silent else self._stack_of(rank)}\n"
            )
        if not stalled:
            told = ", ".join(f"rank {rank}: {beat['doing']}" for rank, beat in beats.items() if beat)
            sys.stderr.write(f"weftrain: no progress for {held_s:.0f} s: every rank waits in a collective ({told})\n")
        sys.stderr.flush()
        self._dump_flights()
        return stalled

    def _beat(self, rank: int) -> dict[str, Any] | None:
        key = f"beat/{rank}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _stack_of(self, rank: int) -> str:
        if rank == self._world.rank:
            return self._stack()
        self._store.set(f"ask/{rank}", "1")
        deadline = time.monotonic() + 5 * _BEAT_S
        while time.monotonic() < deadline:
            if self._store.check([f"stack/{rank}"]):
                return self._store.get(f"stack/{rank}").decode()
            time.sleep(_BEAT_S / 10)
        return _NO_ANSWER

    def _dump_flights(self) -> None:
        """torch's flight recorder of this rank, the last collectives and their states, into the run's folder."""
        import torch._C._distributed_c10d as c10d

        if self._world.folder == Path():
            return
        with contextlib.suppress(OSError, RuntimeError):
            path = self._world.folder / f"flight-recorder-rank{self._world.rank}.json"
            data = c10d._dump_fr_trace_json()  # type: ignore[attr-defined]
            fsops.write_bytes(path, data if isinstance(data, bytes) else data.encode())
            sys.stderr.write(f"weftrain: the last collectives of rank {self._world.rank} are in {path}\n")
