"""How the ranks of a run connect and disconnect: `rendezvous` makes this process's world, `leave` ends it.

torchrun (or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) starts the same command everywhere;
without these variables the world is this process alone.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import gc
import importlib.metadata
import os
import platform
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from weftrain.backends.common.device import torch_device
from weftrain.backends.cuda.hang_detector import HangDetector
from weftrain.backends.cuda.node_meeting import ROUND_KEY
from weftrain.backends.cuda.world import World
from weftrain.core.errors import BackendError
from weftrain.core.stop import StopRequest

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Of this process, at most one: torch.distributed has one default group a process. None: the world is one rank.
_joined: dict[str, tuple[World, HangDetector | None]] = {}


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def rendezvous(wanted_device: str, timeout_s: float, stop: StopRequest | None = None) -> World:
    """This process's world, made if there is none yet. Raises BackendError if the ranks do not find each other or are
    not alike.

    stop: this process's; a signal while it waits for the others ends it at once.
    """
    stop = StopRequest() if stop is None else stop
    if "world" in _joined and dist.is_initialized():
        world, _ = _joined["world"]
        world.stop = stop
        return world
    device = _own_device(wanted_device)
    store, rank, size = _join(device, datetime.timedelta(seconds=timeout_s), stop)
    world = World(device, store, rank, size, timeout_s, stop)
    _joined["world"] = world, None  # `leave` finds it from here on
    try:
        _joined["world"] = world, HangDetector(world) if size > 1 else None
        if size > 1 and world.leads:
            # Several runs may be prepared one after another: the world ends with the process, not with a run.
            atexit.register(_end)
        world.same_everywhere(identity(device))
    except BaseException:
        leave()
        raise
    return world


def _own_device(wanted: str) -> torch.device:
    """The device of this rank: on CUDA, that of its number within the node."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if wanted != "cpu" and torch.cuda.is_available() and local_rank >= torch.cuda.device_count():
        raise BackendError(
            f"local rank {local_rank} has no CUDA device: torch sees {torch.cuda.device_count()} here; start as many "
            "processes (--nproc-per-node)"
        )
    device = torch_device(wanted, local_rank)
    if device.type == "cpu":
        return device
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    # NCCL's flight recorder keeps the last collectives of each rank and writes them out if one times out.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    return device


def _join(device: torch.device, timeout: datetime.timedelta, stop: StopRequest) -> tuple[dist.Store, int, int]:
    """Start torch.distributed: a store for the run, this process's rank, the number of ranks. Raises BackendError."""
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if not launched():
        store: dist.Store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return store, 0, 1
    if missing := [name for name in _RANK_VARIABLES if name not in os.environ]:
        raise BackendError(
            f"{', '.join(missing)} is not set: start the ranks with torchrun, or set {', '.join(_RANK_VARIABLES)}"
        )
    rank = int(os.environ["RANK"])
    try:
        with stop.ends_at_once():
            store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
            store.set_timeout(timeout)
            # What ranks of an earlier attempt wrote to the store, such as their addresses, is no longer true. Each
            # torchrun counts its own restarts, so the count is no name for an attempt where nodes come and go.
            fresh = store.check([ROUND_KEY])
            attempt = "round" if fresh else os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"weftrain/{attempt}", store)
            group = dist.PrefixStore("group", store)
            dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise BackendError(f"rank {rank}: {_why_not(error)}") from error
    return dist.PrefixStore("run", store), rank, size


def _why_not(error: BaseException) -> str:
    where, port = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", os.environ["MASTER_PORT"]
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        remedy = f"port {port} is taken: end the program that holds it, or choose another port (--master-port)"
    else:
        remedy = (
            f"check that {where} can be reached from every node, that all {os.environ['WORLD_SIZE']} ranks were "
            "started, and that the right network interface is used (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
        )
    return f"the ranks could not meet at {where} ({first}): {remedy}"


def identity(device: torch.device) -> dict[str, Any]:
    """What all ranks must have in common before they share a model."""
    cuda = device.type == "cuda"
    return {
        "weftrain": importlib.metadata.version("weftrain"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads() if not cuda else None,
    }


def _end() -> None:
    """Rank 0, at the end of its process: release the others."""
    if "world" in _joined:
        world, _ = _joined["world"]
        with contextlib.suppress(BackendError):
            world.command(do="end", signal=world.stop.number)
        leave()


def leave() -> None:
    """End this process's world, so that another can be made."""
    _, detector = _joined.pop("world", (None, None))
    if detector is not None:
        detector.close()
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError, dist.DistError):
            dist.destroy_process_group()
        # DTensor keeps what it once derived by the shape of a mesh: an operation of the next world would be given a
        # mesh of this one, whose groups are gone.
        _clear_sharding_prop_cache()
        gc.collect()  # its threads end when the last reference goes
