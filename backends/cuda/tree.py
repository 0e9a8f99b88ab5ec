"""Sums over ranks in a fixed tree, for `numerics: replayable`.

Data is only moved between ranks, by all-to-all and all-gather, and added by the rank that owns it, in an order that is
written here. So the bits do not depend on the collective library, its algorithm, the order of its rings or of arrivals
(docs/same-bits.md), and a rank sends what a ring would: a reduce-scatter's (R - 1) / R of the data, an all-reduce's
twice that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from weftrain.backends.common.collectives import all_gather
from weftrain.backends.common.sums import TreeSum, tree_sum

if TYPE_CHECKING:
    Group = dist.ProcessGroup | None  # None: all ranks

_PIECE_BYTES = 64 << 20


def tree_reduce_scatter(whole: Tensor, group: Group) -> Tensor:
    """[R * n] on each of R ranks, a power of two -> [n] on each: the sum over ranks of this rank's part."""
    size = dist.get_world_size(group)
    if size == 1:
        return whole
    arrived = torch.empty_like(whole)
    dist.all_to_all_single(arrived, whole.contiguous(), group=group)
    return tree_sum(arrived.chunk(size))


def tree_all_reduce(tensors: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
    """The sums over ranks of tensors of one dtype, on every rank; exchanged in pieces, which bounds the copies."""
    size = dist.get_world_size(group)
    if size == 1:
        return dict(tensors)
    found: dict[str, Tensor] = {}
    for names in pieces(tensors):
        flat = torch.cat([tensors[name].reshape(-1) for name in names])
        count = flat.numel()
        padded = torch.nn.functional.pad(flat, (0, -count % size))
        whole = torch.empty_like(padded)
        all_gather(whole, tree_reduce_scatter(padded, group), group=group)
        parts = whole[:count].split([tensors[name].numel() for name in names])
        found |= {name: part.view_as(tensors[name]) for name, part in zip(names, parts, strict=True)}
    return {name: found[name] for name in tensors}


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of tensors that are exchanged together: of _PIECE_BYTES, or one larger one."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > _PIECE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    if names:
        yield names


def gather_row_values(own: Mapping[str, Tensor], rows: Mapping[str, int], group: Group) -> dict[str, Tensor]:
    """One value for each row of parameters that are cut into equally many rows a rank (but the last ranks, which have
    fewer), [rows here] -> [rows] on every rank. rows: of each whole parameter.
    """
    size = dist.get_world_size(group)
    if size == 1 or not own:
        return dict(own)
    each = {name: -(-rows[name] // size) for name in own}
    padded = [torch.nn.functional.pad(own[name], (0, each[name] - own[name].numel())) for name in own]
    flat = torch.cat(padded)
    gathered = flat.new_empty(size * flat.numel())
    all_gather(gathered, flat, group=group)
    pieces = gathered.view(size, -1).split(list(each.values()), 1)
    return {name: piece.reshape(-1)[: rows[name]] for name, piece in zip(own, pieces, strict=True)}


class TreeReduceScatter:
    """In place of FSDP2's reduce-scatter (`set_custom_reduce_scatter`), for one group of its parameters.

    FSDP calls it once for each micro-batch. The first ones are only added up here, in the tree over this rank's
    micro-batches, and what FSDP then takes for their sum is to be dropped; with the `last` one the sums are exchanged.
    """

    def __init__(self, micro_batches: int) -> None:
        self._sum, self.last = TreeSum(micro_batches), True

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(tuple(size), dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Group, op: Any, async_op: bool = False
    ) -> None:
        if input_tensor.is_cuda:  # it was allocated on the stream of the computation, and is freed on this one
            input_tensor.record_stream(torch.cuda.current_stream())
        self._sum.add("", input_tensor)
        if not self.last:
            output_tensor.zero_()
            return
        total = self._sum.totals()[""]
        self._sum.clear()
        output_tensor.copy_(tree_reduce_scatter(total, group))

    def clear(self) -> None:
        self._sum.clear()
