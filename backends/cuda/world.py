"""The ranks of one run: the commands of rank 0, small collectives, and the error message if a rank fails.

Rank 0 leads. It alone runs the core's training loop, and before each collective pass it sends a command (JSON, never a
pickle) that the others, who wait in worker.py, carry out. Worlds are made by `rendezvous.rendezvous`.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from weftrain.backends.cuda.copied_state import FoundState
from weftrain.core.errors import EverywhereError, WeftrainError, is_out_of_memory
from weftrain.core.formats.canonical import canonical_json
from weftrain.core.stop import StopRequest

IDLE = "idle"  # what `doing` says of a rank that nobody waits for
BETWEEN_STEPS = "log, evaluate and save between two steps"  # rank 0, for as long as that takes
_COMMAND_BYTES = 2048  # a command of this length is one broadcast, a longer one two
_LONGEST_MESSAGE = 600
_DTYPES = {
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
    "float32": torch.float32,
    "float64": torch.float64,
}


class World:
    """This process among the ranks of a run."""

    def __init__(
        self, device: torch.device, store: dist.Store, rank: int, size: int, timeout_s: float, stop: StopRequest
    ) -> None:
        self.device, self.store, self.rank, self.size, self.timeout_s = device, store, rank, size, timeout_s
        self.stop = stop  # this process's request to stop; the hang detector passes it on to rank 0
        self.host = socket.gethostname()
        # For the hang detector: what the main thread is doing, whether that is waiting for other ranks, and of the run
        # that was prepared last how long it may take, what becomes of a rank that takes longer, and the run's folder.
        self.doing, self.waiting, self.waits, self.step = IDLE, False, 0, 0
        self.stall_s, self.replace_stalled, self.folder = 60.0, False, Path()
        self.copies: FoundState | None = None  # of the run's state in memory, from which the next run may go on
        self._runs = 0
        self._broken = False

    def own_store(self) -> Any:
        """A connection of its own to the store, for a thread: a wait on a connection blocks its other users."""
        return self.store.clone()  # type: ignore[attr-defined]

    def next_run(self) -> int:
        """A number for a run, the same on every rank, since all prepare the same runs in the same order."""
        self._runs += 1
        return self._runs

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Around a collective: what torch.distributed raises if another rank has failed becomes one line.

        what: completes "this rank tried to ...". Raises EverywhereError.
        """
        before = self.doing, self.waiting
        self.doing, self.waiting, self.waits = what, True, self.waits + 1
        try:
            yield
        except WeftrainError:
            raise
        except (RuntimeError, dist.DistError) as error:
            self._broken = True
            if is_out_of_memory(error):  # this rank's own
                raise
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            why = "; ".join(filter(None, (self.reported_failure(), first)))
            raise EverywhereError(
                f"rank {self.rank} of {self.size}: another rank failed while this one tried to {what} ({why}): the "
                "last checkpoint is whole; start the run again, or let torchrun do it with --max-restarts"
            ) from error
        self.doing, self.waiting = before

    def abort(self, reason: str) -> None:
        """This rank failed, and sends no more commands: the others find the reason in the store."""
        self._broken = True
        self.report_failure(reason)

    def report_failure(self, reason: str) -> None:
        """Leave the reason why this rank ends for the others. The first reason stays: what fails after it follows."""
        with contextlib.suppress(RuntimeError, dist.DistError):  # the store may be gone first
            told = f"rank {self.rank} on {self.host}: {reason}"[:_LONGEST_MESSAGE]
            self.store.compare_set("failure", "", told)

    def reported_failure(self) -> str | None:
        """The reason that a rank left."""
        with contextlib.suppress(RuntimeError, dist.DistError):
            if self.store.check(["failure"]):
                return self.store.get("failure").decode()
        return None

    def command(self, **what: Any) -> None:
        """Rank 0: tell the others what to do next."""
        if self.size == 1 or self._broken:
            return
        data = json.dumps(what).encode()
        head = torch.zeros(_COMMAND_BYTES, dtype=torch.uint8)
        head[:8] = torch.frombuffer(bytearray(len(data).to_bytes(8, "little")), dtype=torch.uint8)
        short = data[: _COMMAND_BYTES - 8]
        head[8 : 8 + len(short)] = torch.frombuffer(bytearray(short), dtype=torch.uint8)
        with self.together("send a command"):
            dist.broadcast(head, 0)
            if len(data) > len(short):
                dist.broadcast(torch.frombuffer(bytearray(data[len(short) :]), dtype=torch.uint8), 0)

    def next_command(self) -> dict[str, Any]:
        """The others: receive what to do next."""
        head = torch.empty(_COMMAND_BYTES, dtype=torch.uint8)
        with self.together("receive a command"):
            dist.broadcast(head, 0)
            data = head.numpy().tobytes()
            length = int.from_bytes(data[:8], "little")
            data = data[8 : 8 + length]
            if len(data) < length:
                rest = torch.empty(length - len(data), dtype=torch.uint8)
                dist.broadcast(rest, 0)
                data += rest.numpy().tobytes()
        found: dict[str, Any] = json.loads(data)
        return found

    def agree(self, error: str | None = None) -> None:
        """A collective. Raises EverywhereError on every rank with the lowest rank's error, if any has one."""
        words = (error or "").encode()[:_LONGEST_MESSAGE]
        own = torch.zeros(_LONGEST_MESSAGE, dtype=torch.uint8)
        own[: len(words)] = torch.frombuffer(bytearray(words or b"\0"), dtype=torch.uint8)[: len(words)]
        found = [own]
        if self.size > 1:
            found = [torch.empty_like(own) for _ in range(self.size)]
            with self.together("agree"):
                dist.all_gather(found, own)
        for rank, said in enumerate(found):
            if text := said.numpy().tobytes().rstrip(b"\0").decode(errors="replace"):
                raise EverywhereError(text if self.size == 1 else f"rank {rank}: {text}")

    def same_everywhere(self, what: dict[str, Any]) -> None:
        """A collective: raises EverywhereError on every rank if some value of `what` (JSON) differs between ranks."""
        if self.size == 1:
            return
        own = canonical_json(what | {"host": self.host}).decode()
        told = [json.loads(words) for words in self.gathered(own, "compare versions and devices")]
        for rank, other in enumerate(told):
            for key in sorted(what):
                if other.get(key) != told[0].get(key):
                    raise EverywhereError(
                        f"the ranks are not alike: {key} is {told[0].get(key)} on rank 0 ({told[0].get('host')}) and "
                        f"{other.get(key)} on rank {rank} ({other.get('host')}): install and start the same everywhere"
                    )

    def gathered(self, own: str, what: str = "gather what ranks say") -> list[str]:
        """A collective: the text of every rank, in their order."""
        data = own.encode()
        longest = torch.tensor([len(data) + 1])
        with self.together(what):
            dist.all_reduce(longest, dist.ReduceOp.MAX)
            padded = torch.zeros(int(longest), dtype=torch.uint8)
            padded[: len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
            found = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(found, padded)
        return [one.numpy().tobytes().rstrip(b"\0").decode() for one in found]

    def total(self, number: int) -> int:
        """A collective: the sum of a number over all ranks."""
        if self.size == 1:
            return number
        found = torch.tensor(number, dtype=torch.int64)
        with self.together("count the tokens that bear a loss"):
            dist.all_reduce(found)
        return int(found)

    def broadcast_array(self, array: np.ndarray | None, source: int = 0) -> np.ndarray | None:
        """A collective: rank `source`'s array (of a dtype in _DTYPES) or None."""
        if self.size == 1:
            return array
        head = torch.zeros(6, dtype=torch.int64)
        if self.rank == source and array is not None:
            head[0] = 1 + list(_DTYPES).index(str(array.dtype))
            head[1] = array.ndim
            head[2 : 2 + array.ndim] = torch.tensor(array.shape)
        with self.together("send rows"):
            dist.broadcast(head, source)
            if not int(head[0]):
                return None
            shape = head[2 : 2 + int(head[1])].tolist()
            data = torch.empty(shape, dtype=list(_DTYPES.values())[int(head[0]) - 1])
            if self.rank == source and array is not None:
                data.copy_(torch.from_numpy(np.ascontiguousarray(array)))
            dist.broadcast(data, source)
        return data.numpy()
