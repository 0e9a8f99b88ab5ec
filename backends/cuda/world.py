"""The ranks of one run: how they meet, who leads, and what is said when one of them is lost.

torchrun (or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) starts the same command everywhere;
without these variables the world is this process alone. What a reader would get wrong: rank 0 leads. It alone runs the
training loop of the core, and before each collective pass it sends an order (JSON, never a pickle) that the others, who
sit in `engine.follow`, carry out.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import gc
import json
import os
import platform
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from weftrain.backends.common.base import torch_device
from weftrain.core.errors import BackendError, EverywhereError, WeftrainError
from weftrain.core.formats.canonical import canonical_json
from weftrain.core.stop import StopRequest

if TYPE_CHECKING:
    from weftrain.backends.cuda.watch import Watch

_ORDER_BYTES = 2048  # an order of this length is one broadcast, a longer one two
_LONGEST_WORDS = 600
_DTYPES = {"int64": torch.int64, "int32": torch.int32, "bool": torch.bool}


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


class World:
    """This process among the ranks of a run. Made by `meet`, and ended by `leave`."""

    def __init__(
        self, device: torch.device, store: dist.Store, rank: int, size: int, timeout_s: float, stop: StopRequest
    ) -> None:
        self.stop = stop  # this process's; watch.py carries it from rank to rank
        self.device, self.store, self.rank, self.size, self.timeout_s = device, store, rank, size, timeout_s
        self.host = socket.gethostname()
        self.doing = RESTS  # what this rank's main thread is at, for whoever asks (watch.py)
        self.step = 0
        self.waiting = False  # whether that is waiting for the others
        self._runs = 0
        self._broken = False
        self.watch: Watch | None = None

    def own_store(self) -> Any:
        """A connection of its own to the store, for a thread: who waits on one connection keeps others from it."""
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
        """A collective, by name: what torch.distributed raises where a rank is gone becomes one line. Raises
        BackendError.
        """
        before = self.doing, self.waiting
        self.doing, self.waiting = what, True
        try:
            yield
        except WeftrainError:
            raise
        except (RuntimeError, dist.DistError) as error:
            raise self.lost(what, error) from error
        self.doing, self.waiting = before

    def lost(self, what: str, error: BaseException) -> EverywhereError:
        """What to raise where a collective failed: the last words of the rank that is gone, where it left any."""
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        self._broken = True
        words = self.last_words()
        why = f"{words}; " if words else ""
        return EverywhereError(
            f"rank {self.rank} of {self.size}: another rank was lost while this one was to {what} ({why}{first}): the "
            "last checkpoint is "
            "whole; start the run again, or let torchrun do it with --max-restarts"
        )

    def break_off(self, words: str) -> None:
        """This rank failed in the midst of something: there are no orders any more, and the others learn why when they
        miss it.
        """
        self._broken = True
        self.say_last_words(words)

    def say_last_words(self, words: str) -> None:
        """Leave the reason of one's own end for the others."""
        with contextlib.suppress(RuntimeError, dist.DistError):  # the store may be gone first
            self.store.set("last words", f"rank {self.rank} on {self.host}: {words}"[:_LONGEST_WORDS])

    def last_words(self) -> str | None:
        with contextlib.suppress(RuntimeError, dist.DistError):
            if self.store.check(["last words"]):
                return self.store.get("last words").decode()
        return None

    # -- what is sent between the hosts
    # -----------------------------------------------------------------------------------------------

    def order(self, **what: Any) -> None:
        """Rank 0: tell the others what comes."""
        if self.size == 1 or self._broken:
            return
        data = json.dumps(what).encode()
        head = torch.zeros(_ORDER_BYTES, dtype=torch.uint8)
        head[:8] = torch.frombuffer(bytearray(len(data).to_bytes(8, "little")), dtype=torch.uint8)
        short = data[: _ORDER_BYTES - 8]
        head[8 : 8 + len(short)] = torch.frombuffer(bytearray(short), dtype=torch.uint8)
        with self.together("send an order"):
            dist.broadcast(head, 0)
            if len(data) > len(short):
                dist.broadcast(torch.frombuffer(bytearray(data[len(short) :]), dtype=torch.uint8), 0)

    def next_order(self) -> dict[str, Any]:
        """The others: what comes."""
        head = torch.empty(_ORDER_BYTES, dtype=torch.uint8)
        with self.together("take an order"):
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
        """All ranks come here, with what went wrong on them or None. Raises BackendError on every rank, with the words
        of the lowest.
        """
        words = (error or "").encode()[:_LONGEST_WORDS]
        own = torch.zeros(_LONGEST_WORDS, dtype=torch.uint8)
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
        """Raises BackendError, on every rank, that names the first thing of `what` (JSON) in which a rank differs from
        rank 0.
        """
        if self.size == 1:
            return
        own = canonical_json(what | {"host": self.host})
        longest = torch.tensor([len(own)])
        with self.together("compare what the ranks are"):
            dist.all_reduce(longest, dist.ReduceOp.MAX)
            padded = torch.zeros(int(longest), dtype=torch.uint8)
            padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
            found = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(found, padded)
        told = [json.loads(data.numpy().tobytes().rstrip(b"\0")) for data in found]
        for rank, other in enumerate(told):
            for key in sorted(what):
                if other.get(key) != told[0].get(key):
                    raise EverywhereError(
                        f"the ranks are not alike: {key} is {told[0].get(key)} on rank 0 ({told[0].get('host')}) and "
                        f"{other.get(key)} on "
                        f"rank {rank} ({other.get('host')}): install and start the same everywhere"
                    )

    def total(self, number: int) -> int:
        """The sum of a number over all ranks, on every rank."""
        if self.size == 1:
            return number
        found = torch.tensor(number, dtype=torch.int64)
        with self.together("count the tokens that bear a loss"):
            dist.all_reduce(found)
        return int(found)

    def broadcast_array(self, array: np.ndarray | None, source: int = 0) -> np.ndarray | None:
        """An array of rank `source`, everywhere: int64, int32, bool, or None."""
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


RESTS = "rest"  # what a rank is at that nobody waits for
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_worlds: dict[str, World] = {}  # of this process, at most one: torch.distributed has one default group a process


def meet(wanted_device: str, timeout_s: float, stop: StopRequest | None = None) -> World:
    """This process's world, made where there is none yet. Raises BackendError, in one line, where the ranks cannot
    meet.

    stop: this process's; a signal while it waits for the others ends it at once.
    """
    stop = StopRequest() if stop is None else stop
    if "world" in _worlds and dist.is_initialized():
        _worlds["world"].stop = stop
        return _worlds["world"]
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch_device(wanted_device)
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise BackendError(
                f"local rank {local_rank} has no CUDA device: this machine has {torch.cuda.device_count()}; start as "
                "many processes "
                "(--nproc-per-node)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        _record_flights()
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if not launched():
        store: dist.Store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        world = World(device, store, 0, 1, timeout_s, stop)
    else:
        missing = [name for name in _RANK_VARIABLES if name not in os.environ]
        if missing:
            raise BackendError(
                f"{', '.join(missing)} is not set: start the ranks with torchrun, or set {', '.join(_RANK_VARIABLES)}"
            )
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        rank = int(os.environ["RANK"])
        try:
            with stop.ends_at_once():
                store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
                store.set_timeout(timeout)
                # What ranks of an earlier attempt wrote there, such as their addresses, is no longer true.
                store = dist.PrefixStore(f"weftrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
                dist.init_process_group(
                    backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=timeout
                )
        except (RuntimeError, ValueError, dist.DistError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            taken = "EADDRINUSE" in str(error) or "address already in use" in str(error).lower()
            remedy = (
                f"port {os.environ['MASTER_PORT']} is taken: end what holds it, or choose another (--master-port)"
                if taken
                else f"see that {where} can be reached from every node, that all {os.environ['WORLD_SIZE']} ranks were started, and which "
                "network interface is meant (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
            )
            raise BackendError(f"rank {rank}: the ranks could not meet at {where} ({first}): {remedy}") from error
        world = World(device, dist.PrefixStore("run", store), rank, size, timeout_s, stop)
    _worlds["world"] = world
    try:
        if world.size > 1:
            from weftrain.backends.cuda.watch import Watch

            world.watch = Watch(world)
        if world.size > 1 and world.leads:
            # runs may be prepared one after another, so the end of a run is not that of the world
            atexit.register(_end)
        world.same_everywhere(identity(device))
    except BaseException:
        leave()
        raise
    return world


def identity(device: torch.device) -> dict[str, Any]:
    """What all ranks must have in common before they share a model."""
    cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads() if not cuda else None,
    }


def _end() -> None:
    """Rank 0, at the end of its process: the others need not wait for orders any more."""
    if "world" in _worlds:
        with contextlib.suppress(BackendError):
            _worlds["world"].order(do="end", signal=_worlds["world"].stop.number)
        leave()


def leave() -> None:
    """End this process's world, so that another can be made."""
    world = _worlds.pop("world", None)
    if world is not None and world.watch is not None:
        world.watch.close()
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError, dist.DistError):
            dist.destroy_process_group()
        gc.collect()  # its threads end when the last reference goes


def _record_flights() -> None:
    """NCCL's flight recorder: the last collectives of each rank, dumped where one times out. Unless the user has set it
    otherwise.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
