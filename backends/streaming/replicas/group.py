"""The communication of a group of replicas. Results are bitwise those of one process.

    central   rank 0 owns the store; the others hold no state and may join or leave between two steps
    sharded   every rank's store owns one part of N of every tile; the group is fixed

Gradients are summed along a chain: rank r adds its micro-batches, in order, to the sum that it receives from rank
r - 1. So the order of additions does not depend on the number of ranks, and each link carries every gradient once. With
`numerics: replayable` a link carries the tree's partial sums over all micro-batches before it: one for each bit that is
set in the number of complete runs, so one where the ranks before have a power of two of micro-batches together.
Only rank 0 counts steps, writes metrics and decides. Before each pass it sends a command (JSON, never a pickle), and
the others carry it out.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weftrain.backends.common.collectives import all_gather
from weftrain.backends.common.sums import TreeSum, blocks_of
from weftrain.backends.streaming.communicator import Communicator, Finish, Gradients
from weftrain.backends.streaming.store.layout import Record
from weftrain.core.errors import BackendError


class ReplicaGroup(Communicator):
    """What rank 0 and the others have in common. rendezvous: a file that all of them can open."""

    several = True

    def __init__(self, rendezvous: Path, device: torch.device, sharded: bool, timeout_s: float) -> None:
        self.sharded, self.device, self._rendezvous = sharded, device, rendezvous
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._store = dist.FileStore(str(rendezvous), -1)
        self._store.set_timeout(self._timeout)
        # sums that are being received, each with its record and what is called with it; tensors that are being sent
        self._receiving: list[tuple[Record, Gradients, Any, Finish]] = []
        self._sending: list[tuple[Any, Tensor]] = []

    def _form(self, generation: int, rank: int, size: int) -> None:
        self._dissolve()
        self.rank, self.size = rank, size
        if size > 1:
            store = dist.PrefixStore(f"group/{generation}", self._store)
            with self._reporting("form the group"):
                # weights and gradients are sent from the device, commands and losses from the host
                backend = "gloo" if self.device.type == "cpu" else "cpu:gloo,cuda:nccl"
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=self._timeout)

    def _dissolve(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
            # Its threads end with the last reference; a thread that runs at exit can abort the process.
            self._sending, self._receiving = [], []
            gc.collect()

    @contextlib.contextmanager
    def _reporting(self, what: str) -> Iterator[None]:
        """Turns an error of torch.distributed, raised when another rank has failed, into one line."""
        try:
            yield
        except BackendError:
            raise
        except (RuntimeError, dist.DistError) as error:
            who = "the leader" if self.rank > 0 else "a replica"
            rank, first = self.rank, str(error).strip().splitlines()[0][:160]
            self.abort()
            raise BackendError(
                f"rank {rank}: {who} failed while this process tried to {what} ({first}): the last completed step is "
                "intact; start the run again, with as many replicas as there are"
            ) from error

    def abort(self) -> None:
        self._dissolve()
        self.size = 1

    def close(self) -> None:
        self._dissolve()

    # -- commands

    def command(self, **what: Any) -> None:
        if self.size > 1:
            data = torch.frombuffer(bytearray(json.dumps(what).encode()), dtype=torch.uint8)
            self.broadcast(torch.tensor([data.numel()]))
            self.broadcast(data)

    def command_owners(self, **what: Any) -> None:
        if self.sharded and self.rank == 0:
            self.command(**what)

    def _receive_command(self) -> dict[str, Any]:
        length = self.broadcast(torch.zeros(1, dtype=torch.int64))
        data = self.broadcast(torch.zeros(int(length), dtype=torch.uint8))
        command: dict[str, Any] = json.loads(bytes(data.tolist()))
        return command

    # -- weights and gradients

    def broadcast_weights(self, record: Record, slot: Tensor | None) -> None:
        if self.size == 1 or slot is None:
            return
        with self._reporting(f"share the weights of {record.name}"):
            if not self.sharded:
                dist.broadcast(slot[: record.compute_bytes], 0)
                return
            for tile in record.tiles:
                whole = slot[tile.compute_offset : tile.compute_offset + tile.compute_bytes * self.size]
                own = whole[tile.compute_bytes * self.rank : tile.compute_bytes * (self.rank + 1)].clone()
                all_gather(whole, own)

    def reduce(self, record: Record, parts: list[Gradients], finish: Finish, tree: TreeSum | None) -> None:
        if self.size == 1:
            super().reduce(record, parts, finish, tree)
            return
        shapes = {name: part.shape for name, part in parts[0].items()}
        with self._reporting(f"reduce the gradients of {record.name}"):
            if tree is not None:
                self._pass_on(record, self._added_in_tree(parts, tree), shapes, finish)
                return
            if self.rank == 0:
                flat = torch.cat([parts[0][name].reshape(-1) for name in shapes])
                parts = parts[1:]
            else:
                flat = torch.empty(sum(shape.numel() for shape in shapes.values()), device=self.device)
                dist.recv(flat, self.rank - 1)
            sums = _views(flat, shapes)
            for part in parts:
                for name, total in sums.items():
                    total += part[name]
            self._pass_on(record, flat, shapes, finish)

    def _added_in_tree(self, parts: list[Gradients], tree: TreeSum) -> Tensor:
        """The partial sums over the micro-batches of all ranks up to this one, one after the other, flat and in fp32:
        on the last rank it is one, the sum. parts: this rank's partial sums.
        """
        flats = [torch.cat([value.reshape(-1) for value in part.values()]) for part in parts]
        if self.rank > 0:
            here, size = self.micro_batches(tree.count), flats[0].numel()
            arrived = torch.empty(len(blocks_of(tree.count, 0, here.start)) * size, device=self.device)
            dist.recv(arrived, self.rank - 1)
            both = TreeSum(tree.count)
            both.extend(here.start, [{"": piece} for piece in arrived.split(size)])
            both.extend(here.stop, [{"": flat} for flat in flats])
            flats = [sums[""] for sums in both.partial_sums()]
        return torch.cat(flats) if len(flats) > 1 else flats[0]

    def _pass_on(self, record: Record, flat: Tensor, shapes: dict[str, torch.Size], finish: Finish) -> None:
        """Send the sum to the next rank, or from the last rank to those that store it."""
        last = self.size - 1
        self._sending = [(work, kept) for work, kept in self._sending if not work.is_completed()]
        targets = [self.rank + 1] if self.rank < last else range(last) if self.sharded else [0]
        self._sending += [(dist.isend(flat, rank), flat) for rank in targets]
        if self.rank > 0 and not self.sharded:
            return
        # a copy, because `finish` changes it while flat is being sent
        size = sum(shape.numel() for shape in shapes.values())
        whole = flat.clone() if self.rank == last else flat.new_empty(size)
        arriving = None if self.rank == last else dist.irecv(whole, last)
        self._receiving.append((record, _views(whole, shapes), arriving, finish))
        while len(self._receiving) > 1:  # one record later, since the other ranks are still adding to the newest
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        record, sums, arriving, finish = self._receiving.pop(0)
        if arriving is not None:
            arriving.wait()
        finish(record, sums)

    def finish_reductions(self) -> None:
        with self._reporting("finish the step"):
            while self._receiving:
                self._finish_oldest()
            for work, _ in self._sending:
                work.wait()
        self._sending = []

    # -- losses, counts and parts of tensors

    def gather_losses(self, own: list[Tensor]) -> list[Tensor]:
        if self.size == 1:
            return own
        with self._reporting("gather the losses"):
            counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(counts, torch.tensor([len(own)]))
            most = int(max(counts))
            mine = torch.stack(own).cpu()
            found = [mine.new_zeros(most, *mine.shape[1:]) for _ in range(self.size)]
            dist.all_gather(found, torch.cat([mine, mine.new_zeros(most - len(own), *mine.shape[1:])]))
        return [loss for losses, count in zip(found, counts, strict=True) for loss in losses[: int(count)].unbind()]

    def sum(self, number: int) -> int:
        found = torch.tensor(number, dtype=torch.int64)
        self._collective("count the tokens that bear a loss", dist.all_reduce, found)
        return int(found)

    def broadcast(self, tensor: Tensor) -> Tensor:
        self._collective("send to all", dist.broadcast, tensor, 0)
        return tensor

    def join_parts(self, tensor: Tensor) -> Tensor:
        if self.sharded:  # bit patterns are added: adding 0.0 to -0.0 would change its sign
            self._collective("join a tensor", dist.reduce, tensor.view(torch.int32), 0)
        return tensor

    def barrier(self) -> None:
        self._collective("wait for all", dist.barrier)

    def _collective(self, what: str, operation: Callable[..., Any], *arguments: Any) -> None:
        if self.size > 1:
            with self._reporting(what):
                operation(*arguments)


def _views(flat: Tensor, shapes: dict[str, torch.Size]) -> Gradients:
    """Views of a flat tensor with these shapes, one after the other."""
    flats = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), flats, strict=True)}
