"""Who holds all up: every rank tells now and then what it is at, and where nothing moves, rank 0 names the rank that is
not waiting.

A thread a rank, over the store by which the ranks met, so that it works while every collective hangs. What a reader
would get wrong: a rank that waits is not stalled. The one at fault is the one that is *not* in a collective, and its
Python stack says where it is.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist

from weftrain.backends.cuda.world import RESTS, World
from weftrain.core.formats import fsops

_BEAT_S = 1.0
_GRACE_S = 5.0  # from the loss of the store to the end of a process that may hang in a collective
_LONGEST_STACK = 4000


class Watch:
    """Of a world, from its start to its end. stall_s and folder: of the run that was prepared last."""

    def __init__(self, world: World) -> None:
        if not faulthandler.is_enabled():
            faulthandler.enable()  # a rank that crashes in native code says where its threads stood
        self._world = world
        self.stall_s, self.folder = 60.0, Path()
        self._main = threading.main_thread().ident
        self._end = threading.Event()
        self._told = False  # that this process was asked to stop
        self._store = world.own_store()
        self._thread = threading.Thread(target=self._run, name="weftrain-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        last, since, named = None, time.monotonic(), False
        while not self._end.wait(_BEAT_S):
            now = (self._world.step, self._world.doing)
            if now != last or now[1] == RESTS:
                last, since, named = now, time.monotonic(), False
            held_s = time.monotonic() - since
            beat = {"step": now[0], "doing": now[1], "waiting": self._world.waiting}
            try:
                self.pass_on_stop()
                self._store.set(f"beat/{self._world.rank}", json.dumps(beat))
                self._answer()
                if self._world.leads and held_s > self.stall_s and not named:
                    named = True
                    self._name_who_stalls(held_s)
            except (RuntimeError, dist.DistError):
                self._leave_if_alone()

    def _leave_if_alone(self) -> None:
        """End this process where the store, and so rank 0 or the launcher's agent, is gone: it may hang in a collective
        for ever.
        """
        if self._end.wait(_GRACE_S):
            return
        sys.stderr.write(
            f"weftrain: rank {self._world.rank}: rank 0 or its launcher has ended, so this process ends too\n"
        )
        sys.stderr.flush()
        os._exit(128 + self._world.stop.number if self._world.stop.number else 1)

    def pass_on_stop(self) -> None:
        """A signal may reach any one rank. Rank 0 alone decides after which step the run stops, so it has to know."""
        stop = self._world.stop
        if self._world.leads:
            if self._store.check(["stop"]):
                stop.ask(int(self._store.get("stop")))
        elif stop.number and not self._told:
            self._told = True
            self._store.set("stop", str(stop.number))

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._main or 0)
        return "" if frame is None else "".join(traceback.format_stack(frame))[-_LONGEST_STACK:]

    def _answer(self) -> None:
        """Another rank is asked for its stack through the store."""
        if self._store.check([f"ask/{self._world.rank}"]):
            self._store.delete_key(f"ask/{self._world.rank}")
            self._store.set(f"stack/{self._world.rank}", self._stack())

    def _name_who_stalls(self, held_s: float) -> None:
        beats = {rank: self._beat(rank) for rank in range(self._world.size)}
        for rank in sorted(beats):
            beat = beats[rank]
            if beat is not None and beat["waiting"]:
                continue
            what = "has said nothing yet" if beat is None else f"is to {beat['doing']}"
            sys.stderr.write(
                f"weftrain: nothing has moved for {held_s:.0f} s: rank {rank} {what} (step "
                f"{beat['step'] if beat else '?'}), the others "
                f"wait for it; its stack:\n{self._stack_of(rank)}\n"
            )
        if all(beat is not None and beat["waiting"] for beat in beats.values()):
            told = ", ".join(f"rank {rank}: {beat['doing']}" for rank, beat in beats.items() if beat)
            sys.stderr.write(
                f"weftrain: nothing has moved for {held_s:.0f} s and every rank waits in a collective ({told})\n"
            )
        sys.stderr.flush()
        self._dump_flights()

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
        return "(it does not answer: the process is stopped, swapped out, or its machine is gone)"

    def _dump_flights(self) -> None:
        """torch's flight recorder of this rank, the last collectives and their states, into the run's folder."""
        import torch._C._distributed_c10d as c10d

        if self.folder == Path():
            return
        with contextlib.suppress(OSError, RuntimeError):
            path = self.folder / f"flight-recorder-rank{self._world.rank}.json"
            data = c10d._dump_fr_trace_json()  # type: ignore[attr-defined]
            fsops.write_bytes(path, data if isinstance(data, bytes) else data.encode())
            sys.stderr.write(f"weftrain: the last collectives of rank {self._world.rank} are in {path}\n")
