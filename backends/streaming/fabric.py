"""Between replicas: weights go out, gradients come in, in an order that gives the bits of one process.

    central   rank 0 owns the store; the others hold nothing and may join or leave between two steps
    sharded   every rank's store owns one part of N of every tile; the group is fixed

A gradient travels down the ranks: rank r adds its micro-batches, in order, to the sum that rank r - 1 passed on. So the
sum is the one that a single process makes, whatever the number of ranks, and each link carries every gradient once.
What a reader would get wrong: rank 0 leads. It alone counts steps, writes metrics and decides; before each pass it
sends an order (JSON, never a pickle), and the others follow.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weftrain.backends.streaming.store.layout import Record
from weftrain.core.backend import Job
from weftrain.core.errors import BackendError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.stop import StopRequest

Gradients = dict[str, Tensor]
Finish = Callable[[Record, Gradients], None]

_NOTE = "replicas.json"
# the new name, and the one before it
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _open_meeting(folder: Path, agreement: str) -> Path:
    """For rank 0: a new file in the run's folder through which the ranks find each other, and the note that names
    it.
    """
    meeting = f"meeting-{secrets.token_hex(8)}"
    note = {"meeting": meeting, "agreement": agreement}
    fsops.write_bytes(folder / _NOTE, canonical_json(note) + b"\n")
    return folder / meeting


def _read_note(folder: Path) -> dict[str, str] | None:
    """For the others: what rank 0 wrote; None where there is nothing. A name from a file is a name of ours, or is
    refused.
    """
    try:
        note = parse_json(read_plain(folder / _NOTE, "record"))
    except FileNotFoundError:
        return None
    if (
        not isinstance(note, dict)
        or not re.fullmatch(r"meeting-[0-9a-f]{16}", str(note.get("meeting")))
        or "agreement" not in note
    ):
        raise BackendError(f"{folder / _NOTE}: names no meeting: remove it and start the run again")
    return note


def join_run(
    read: Callable[[], Job], agreement: Callable[[Job], str], seat: Callable[[Job, Path], Follower], timeout_s: float
) -> tuple[Job, Follower]:
    """Wait for a run to let this process in. `read` gives the job as its folder tells it now; `seat` draws a number at
    a meeting.

    The note of a run that was killed stays behind until the next one is started, and the folder's recipe with it: so a
    number is drawn only where both agree, and again where the note changes. Raises BackendError after timeout_s.
    """
    deadline, meeting, follower, job, why = (
        time.monotonic() + timeout_s,
        "",
        None,
        read(),
        "no run waits for replicas there",
    )
    assert job.folder is not None
    folder = job.folder
    while follower is None or not follower.let_in(job.stop):
        job.stop.leave_if_requested()
        note = _read_note(folder)
        if note is not None and note["meeting"] != meeting:
            job = read()
            why = (
                "its run has another recipe, or other backend.options (fabric, tier, tile_elements, state_format), "
                "than this replica"
            )
            if note["agreement"] == agreement(job):
                why = "its run did not let this replica in: it may be computing a step, or be dead"
                meeting, follower = note["meeting"], seat(job, folder / note["meeting"])
        if time.monotonic() > deadline:
            raise BackendError(
                f"{folder}: after {timeout_s:.0f} s {why}; a run is started with `weftrain train RECIPE --backend "
                "streaming "
                "batch.replicas=N`"
            )
        time.sleep(0.05)
    return job, follower


class Alone:
    """One process: every micro-batch is its own, and nothing is sent."""

    rank, size, sharded = 0, 1, False

    def micro_batches(self, count: int) -> range:
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def order(self, **what: Any) -> None:
        """Rank 0: tell the others what comes."""

    def regroup(self) -> None:
        """Rank 0, between two steps: let those in who wait, and those go who asked."""

    def share(self, record: Record, slot: Tensor | None) -> None:
        """Bring a record's weights into every rank's slot."""

    def reduce(self, record: Record, parts: list[Gradients], finish: Finish) -> None:
        """Add the gradients of this rank's micro-batches (`parts`, in order); `finish` gets the sum of all where it is
        wanted.
        """
        sums = parts[0]
        if len(parts) > 1:
            raise BackendError("one process adds its micro-batches as they come")
        finish(record, sums)

    def settle(self) -> None:
        """Finish every reduction that is under way."""

    def losses(self, own: list[Tensor]) -> list[Tensor]:
        """Of all micro-batches, in order."""
        return own

    def total(self, number: int) -> int:
        """The sum of a number over all ranks, on every rank."""
        return number

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, everywhere."""
        return tensor

    def join_parts(self, tensor: Tensor) -> Tensor:
        """Rank 0: a tensor of which each rank has a part, and zeros elsewhere. fp32, bit for bit."""
        return tensor

    def barrier(self) -> None:
        """Wait for all."""

    def abandon(self) -> None:
        """Go at once, without a word: whoever waits for this rank learns that it is gone."""

    def close(self) -> None:
        """Leave the group."""


class Group(Alone):
    """What rank 0 and the others have in common. `meeting`: a file that all can open, through which they find each
    other.
    """

    def __init__(self, meeting: Path, device: torch.device, sharded: bool, timeout_s: float) -> None:
        self.sharded, self._device, self._timeout_s, self._meeting = sharded, device, timeout_s, meeting
        self._store = dist.FileStore(str(meeting), -1)
        self._store.set_timeout(datetime.timedelta(seconds=timeout_s))
        self._waiting: list[tuple[Record, Gradients, Tensor, Any, Finish]] = []
        self._sent: list[tuple[Any, Tensor]] = []
        self.rank, self.size = 0, 1

    def _form(self, generation: int, rank: int, size: int) -> None:
        self._dissolve()
        self.rank, self.size = rank, size
        if size > 1:
            store = dist.PrefixStore(f"group/{generation}", self._store)
            timeout = datetime.timedelta(seconds=self._timeout_s)
            with self._reaching("form the group"):
                # Weights and gradients travel where they are, orders and losses between the hosts.
                backend = "gloo" if self._device.type == "cpu" else "cpu:gloo,cuda:nccl"
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)

    @contextlib.contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        """Turns what torch.distributed raises when a peer is gone into one line."""
        try:
            yield
        except BackendError:
            raise
        except (RuntimeError, dist.DistError) as error:
            who = "the leader" if self.rank > 0 else "a replica"
            rank, first = self.rank, str(error).strip().splitlines()[0][:160]
            self.abandon()
            raise BackendError(
                f"rank {rank}: {who} was lost while this process tried to {what} ({first}): the last completed step is "
                "intact; start the "
                "run again, with as many replicas as there are"
            ) from error

    def abandon(self) -> None:
        self._dissolve()
        self.size = 1

    def _dissolve(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
            # Its threads end when the last reference goes; one that is left to the interpreter's own end can abort the
            # process.
            self._sent, self._waiting = [], []
            gc.collect()

    def _send_order(self, what: dict[str, Any]) -> None:
        data = torch.frombuffer(bytearray(json.dumps(what).encode()), dtype=torch.uint8)
        self.broadcast(torch.tensor([data.numel()]))
        self.broadcast(data)

    def share(self, record: Record, slot: Tensor | None) -> None:
        if self.size == 1 or slot is None:
            return
        with self._reaching(f"share the weights of {record.name}"):
            if not self.sharded:
                dist.broadcast(slot[: record.compute_bytes], 0)
                return
            for tile in record.tiles:
                whole = slot[tile.compute_offset : tile.compute_offset + tile.compute_bytes * self.size]
                own = whole[tile.compute_bytes * self.rank : tile.compute_bytes * (self.rank + 1)].clone()
                _all_gather(whole, own)

    def reduce(self, record: Record, parts: list[Gradients], finish: Finish) -> None:
        if self.size == 1:
            super().reduce(record, parts, finish)
            return
        names = list(parts[0])
        shapes = [parts[0][name].shape for name in names]
        with self._reaching(f"reduce the gradients of {record.name}"):
            if self.rank == 0:
                flat = torch.cat([parts[0][name].reshape(-1) for name in names])
                remaining = parts[1:]
            else:
                flat = torch.empty(sum(shape.numel() for shape in shapes), dtype=torch.float32, device=self._device)
                dist.recv(flat, self.rank - 1)
                remaining = parts
            pieces = flat.split([shape.numel() for shape in shapes])
            sums = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
            for part in remaining:
                for name in names:
                    sums[name] += part[name]
            self._pass_on(record, sums, flat, finish)

    def _pass_on(self, record: Record, sums: Gradients, flat: Tensor, finish: Finish) -> None:
        last = self.size - 1
        self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]
        if self.rank < last:
            self._sent.append((dist.isend(flat, self.rank + 1), flat))
        if self.sharded:  # the whole sum goes to all: each keeps its part
            # flat is being sent while `finish` adds to its own
            whole = flat.clone() if self.rank == last else torch.empty_like(flat)
            arriving = None
            if self.rank == last:
                self._sent += [(dist.isend(flat, rank), flat) for rank in range(last)]
            else:
                arriving = dist.irecv(whole, last)
        else:
            if self.rank == last:
                self._sent.append((dist.isend(flat, 0), flat))
            whole = torch.empty_like(flat)
            arriving = dist.irecv(whole, last) if self.rank == 0 else None
        if self.rank == 0 or self.sharded:
            views = whole.split([tensor.numel() for tensor in sums.values()])
            arrived = {name: part.view(sums[name].shape) for name, part in zip(sums, views, strict=True)}
            self._waiting.append((record, arrived, whole, arriving, finish))
            while len(self._waiting) > 1:  # one record later: the others are still adding to the newest
                self._finish_oldest()

    def _finish_oldest(self) -> None:
        record, sums, _, arriving, finish = self._waiting.pop(0)
        if arriving is not None:
            arriving.wait()
        finish(record, sums)

    def settle(self) -> None:
        with self._reaching("finish the step"):
            while self._waiting:
                self._finish_oldest()
            for work, _ in self._sent:
                work.wait()
        self._sent = []

    def losses(self, own: list[Tensor]) -> list[Tensor]:
        if self.size == 1:
            return own
        with self._reaching("gather the losses"):
            counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(counts, torch.tensor([len(own)]))
            most = int(max(counts))
            found = [torch.zeros(most) for _ in range(self.size)]
            dist.all_gather(found, torch.cat([torch.stack(own).cpu(), torch.zeros(most - len(own))]))
        return [loss for losses, count in zip(found, counts, strict=True) for loss in losses[: int(count)].unbind()]

    def total(self, number: int) -> int:
        if self.size == 1:
            return number
        found = torch.tensor(number, dtype=torch.int64)
        with self._reaching("count the tokens that bear a loss"):
            dist.all_reduce(found)
        return int(found)

    def broadcast(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            with self._reaching("send to all"):
                dist.broadcast(tensor, 0)
        return tensor

    def join_parts(self, tensor: Tensor) -> Tensor:
        with self._reaching("join a tensor"):
            dist.reduce(tensor.view(torch.int32), 0)  # bit patterns: to add 0.0 to -0.0 would change its sign
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            with self._reaching("wait for all"):
                dist.barrier()

    def close(self) -> None:
        self._dissolve()


class Leader(Group):
    """Rank 0. Waits for `replicas - 1` others; later ones are let in between two steps."""

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
        super().__init__(_open_meeting(folder, agreement), device, sharded, timeout_s)
        self._stop = stop
        self._members: list[int] = []  # numbers that followers drew, in the order of their ranks
        self._known = self._generation = 0
        deadline = time.monotonic() + timeout_s
        while int(self._store.add("drawn", 0)) < replicas - 1:
            stop.leave_if_requested()
            if time.monotonic() > deadline:
                here = int(self._store.add("drawn", 0))
                raise BackendError(
                    f"{here + 1} of {replicas} replicas are there after {timeout_s:.0f} s: start the others with "
                    "`weftrain replica RUN`, "
                    "or set batch.replicas"
                )
            time.sleep(0.05)
        with stop.ends_at_once():
            self._admit()

    def regroup(self) -> None:
        gone = [number for number in self._members if self._store.check([f"leaving/{number}"])]
        # without a rank its part of the state would be missing: the run stops, and is saved while all are there
        if self.sharded:
            for number in gone:
                self._stop.ask(int(self._store.get(f"leaving/{number}")))
            return
        if gone or int(self._store.add("drawn", 0)) > self._known:
            self.order(do="regroup")
            self._members = [number for number in self._members if number not in gone]
            for number in gone:
                self._store.set(f"seat/{number}/{self._generation + 1}", "left")
            self._admit()

    def _admit(self) -> None:
        drawn = int(self._store.add("drawn", 0))
        self._members += range(self._known + 1, drawn + 1)
        self._known = drawn
        self._generation += 1
        size = len(self._members) + 1
        for rank, number in enumerate(self._members, 1):
            if not self._store.check([f"first/{number}"]):
                self._store.set(f"first/{number}", str(self._generation))
            self._store.set(f"seat/{number}/{self._generation}", f"{rank} {size}")
        self._form(self._generation, 0, size)

    def order(self, **what: Any) -> None:
        if self.size > 1:
            self._send_order(what)

    def close(self) -> None:
        self.order(do="end")
        super().close()
        # Also those of runs that were killed, and only now: who waits at one would wait for a file that is gone, not
        # for the next note.
        for path in (self._meeting.parent / _NOTE, *self._meeting.parent.glob("meeting-*")):
            if path.exists():
                fsops.remove_file(path)


class Follower(Group):
    """Any other rank: draws a number, waits for its seat, and takes orders."""

    def __init__(self, meeting: Path, device: torch.device, sharded: bool, timeout_s: float) -> None:
        super().__init__(meeting, device, sharded, timeout_s)
        self._number, self._generation = int(self._store.add("drawn", 1)), 0
        self.left = False

    def let_in(self, stop: StopRequest) -> bool:
        """Whether rank 0 has given this one a seat; it then sits."""
        first = f"first/{self._number}"
        if not self._store.check([first]):
            return False
        self._generation = int(self._store.get(first))
        with stop.ends_at_once():
            self.left = not self._sit()
        return True

    def _sit(self) -> bool:
        with self._reaching("get a seat"):
            seat = self._store.get(f"seat/{self._number}/{self._generation}").decode()
        if seat == "left":
            self._dissolve()
            return False
        rank, size = seat.split()
        self._form(self._generation, int(rank), int(size))
        return True

    def leave(self, signal_number: int) -> None:
        """Ask rank 0 to leave after a signal, which it grants between two steps. With a sharded store the whole run
        stops instead.
        """
        self._store.set(f"leaving/{self._number}", str(signal_number))

    def next_order(self) -> dict[str, Any] | None:
        """What rank 0 says comes next; None where this rank has left or the run ended."""
        while True:
            length = self.broadcast(torch.zeros(1, dtype=torch.int64))
            what: dict[str, Any] = json.loads(
                bytes(self.broadcast(torch.zeros(int(length), dtype=torch.uint8)).tolist())
            )
            if what["do"] == "end":
                return None
            if what["do"] != "regroup":
                return what
            self._generation += 1
            if not self._sit():
                self.left = True
                return None
