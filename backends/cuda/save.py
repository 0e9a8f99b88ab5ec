"""Saves a checkpoint from many ranks: each copies whole tensors of its share of the state to host memory and writes
them to files.

The run waits for the copies only (`stall_ms`). A thread on every rank hashes, writes and syncs, and reports to rank 0
through the store. Each file of a checkpoint is written by one rank and each tensor lies in one file, so the ranks
together hold one copy of the state, and no rank holds all of it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from weftrain.backends.common.state_snapshot import SnapshotOwner, StateSnapshot
from weftrain.backends.cuda.world import World
from weftrain.core.errors import CheckpointError, WeftrainError
from weftrain.core.formats import checkpoint_files
from weftrain.core.formats.checkpoint_files import Part, Written

Parts = Mapping[str, Part]  # file -> tensor -> dtype, shape
_Copies = dict[str, dict[str, Tensor]]


class RankedTensors(StateSnapshot):
    """A run's state over many ranks, each of which writes its share (`checkpoint_files.WritesItself`)."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], Tensor],
        begin: Callable[[Path, Parts], Callable[[], Written]],
        writers: int,
    ) -> None:
        super().__init__(shapes, read)
        self._begin, self.writers = begin, writers

    def begin_files(self, folder: Path, parts: Parts) -> Callable[[], Written]:
        return self._begin(folder, parts)


class RankWriter:
    """One rank's side of every save of a run."""

    def __init__(self, world: World, run: int) -> None:
        self._world, self._run = world, run
        self._snapshots = SnapshotOwner()
        self._thread: threading.Thread | None = None
        self._number = 0
        self.stall_ms: float | None = None  # of the last save

    def track(self, tensors: RankedTensors) -> RankedTensors:
        return self._snapshots.track(tensors)

    def detach(self) -> None:
        """The state is about to change: whoever still holds a snapshot gets a copy."""
        self._snapshots.detach()

    def begin(self, folder: Path, files: Parts, whole: Callable[[str, bool], Tensor | None]) -> Callable[[], Written]:
        """Copy this rank's files' tensors and write them in a thread. whole(name, keep): a collective; the tensor where
        it is kept.

        What is returned waits for all ranks, on rank 0, and raises CheckpointError with the words of the one that
        failed.
        """
        self._join()
        start, size = time.perf_counter(), self._world.size
        self._number += 1
        copies: _Copies = {}
        for index, (file, part) in enumerate(files.items()):
            mine = index % size == self._world.rank
            for name in part:
                tensor = whole(name, mine)
                if tensor is not None and mine:
                    copies.setdefault(file, {})[name] = tensor
        self.stall_ms = (time.perf_counter() - start) * 1e3
        found: dict[int, dict[str, Any]] = {}
        write = partial(self._write, folder, files, copies, self._number, found)
        self._thread = threading.Thread(target=write, name="weftrain-save")
        self._thread.start()
        return partial(self._written, self._thread, self._number, min(size, len(files)), found)

    def _write(
        self, folder: Path, files: Parts, copies: _Copies, number: int, found: dict[int, dict[str, Any]]
    ) -> None:
        told: dict[str, Any] = {"files": {}}
        try:
            for file in list(copies):
                told["files"][file] = checkpoint_files.write_file(folder / file, files[file], copies.pop(file))
        except FileNotFoundError as error:
            told = {
                "error": f"{error.filename}: does not exist: the run's folder must be on a file system that all nodes "
                "share"
            }
        except OSError as error:
            told = {"error": f"{error.filename or folder}: {error.strerror}"}
        except WeftrainError as error:
            told = {"error": str(error)}
        found[self._world.rank] = told
        if not self._world.leads:
            self._world.own_store().set(f"saved/{self._run}/{number}/{self._world.rank}", json.dumps(told))

    def _written(self, thread: threading.Thread, number: int, ranks: int, found: dict[int, dict[str, Any]]) -> Written:
        thread.join()
        if ranks > 1:
            store = self._world.own_store()
            for rank in range(1, ranks):
                try:
                    found[rank] = json.loads(store.get(f"saved/{self._run}/{number}/{rank}"))
                except (RuntimeError, dist.DistError) as error:
                    raise CheckpointError(
                        f"rank {rank} did not report that its part of the checkpoint was written: {error}"
                    ) from error
        files: dict[str, Any] = {}
        for rank in range(ranks):
            if words := found[rank].get("error"):
                raise CheckpointError(
                    f"rank {rank} on its part of the checkpoint: {words}; older checkpoints are untouched"
                )
            files |= {name: (entry, tensors) for name, (entry, tensors) in found[rank]["files"].items()}
        return files

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        self._join()
