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
from weftrain.backends.common.sums import TreeSum, blocks_of

if TYPE_CHECKING:
    Group = dist.ProcessGroup | None  # None: all ranks

_PIECE_BYTES = 64 << 20


def tree_reduce_scatter(blocks: Sequence[Tensor], each: int, group: Group) -> Tensor:
    """[R * n] on each of R ranks -> [n] on each: the sum over ranks of this rank's part.

    blocks: what this rank's `each` contributions leave in the tree over those of all ranks: one where R is a power of
    two. They are changed.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return blocks[0]
    part = blocks[0].numel() // size
    counts = [len(blocks_of(size * each, rank * each, (rank + 1) * each)) for rank in range(size)]
    if max(counts) == 1:
        arrived = torch.empty_like(blocks[0])
        dist.all_to_all_single(arrived, blocks[0].contiguous(), group=group)
    else:
        sent = torch.stack([block.view(size, part) for block in blocks], 1).view(-1)  # [ranks, blocks, part]
        arrived = sent.new_empty(sum(counts) * part)
        splits = [count * part for count in counts], [len(blocks) * part] * size
        dist.all_to_all_single(arrived, sent, *splits, group=group)
    tree, found = TreeSum(size * each), list(arrived.split(part))
    for rank, count in enumerate(counts):
        tree.extend((rank + 1) * each, [{"": found.pop(0)} for _ in range(count)])
    return tree.totals()[""]


def tree_all_reduce(blocks: Sequence[Mapping[str, Tensor]], each: int, group: Group) -> dict[str, Tensor]:
    """The sums over ranks of tensors of one dtype, on every rank; exchanged in pieces, which bounds the copies. blocks,
    each: as `tree_reduce_scatter` has them, of every name.
    """
    size, first = dist.get_world_size(group), blocks[0]
    if size == 1:
        return dict(first)
    found: dict[str, Tensor] = {}
    for names in pieces(first):
        count = sum(first[name].numel() for name in names)
        flats = [first[names[0]].new_empty(count + -count % size) for _ in blocks]
        for flat, tensors in zip(flats, blocks, strict=True):
            torch.cat([tensors[name].reshape(-1) for name in names], out=flat[:count])
            flat[count:] = 0.0
        whole = flats[0]  # is sent before what is gathered comes in its place
        all_gather(whole, tree_reduce_scatter(flats, each, group), group=group)
        parts = whole[:count].split([first[name].numel() for name in names])
        found |= {name: part.view_as(first[name]) for name, part in zip(names, parts, strict=True)}
    return {name: found[name] for name in first}


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
    """Values of the rows of parameters that are cut into equally many rows a rank (but the last ranks, which have
    fewer), [rows here, n] -> [rows, n] on every rank. rows: of each whole parameter.
    """
    size = dist.get_world_size(group)
    if size == 1 or not own:
        return dict(own)
    each = {name: -(-rows[name] // size) for name in own}
    padded = [torch.nn.functional.pad(own[name], (0, 0, 0, each[name] - len(own[name]))) for name in own]
    flat = torch.cat([one.view(-1) for one in padded])
    gathered = flat.new_empty(size * flat.numel())
    all_gather(gathered, flat, group=group)
    pieces = gathered.view(size, -1).split([one.numel() for one in padded], 1)
    return {name: piece.reshape(-1, own[name].shape[1])[: rows[name]] for name, piece in zip(own, pieces, strict=True)}


def gather_cut(own: Mapping[str, Tensor], dimensions: Mapping[str, int], group: Group) -> dict[str, Tensor]:
    """Of tensors that are cut into equal parts, one for each rank, the whole ones on every rank. dimensions: in which
    each is cut.
    """
    if not own:
        return {}
    size, flat = dist.get_world_size(group), torch.cat([one.reshape(-1) for one in own.values()])
    gathered = flat.new_empty(size * flat.numel())
    all_gather(gathered, flat, group=group)
    pieces = gathered.view(size, -1).split([one.numel() for one in own.values()], 1)
    return {
        name: torch.cat([part.view(one.shape) for part in piece.unbind()], dimensions[name])
        for (name, one), piece in zip(own.items(), pieces, strict=True)
    }


class TreeReduceScatter:
    """In place of FSDP2's reduce-scatter (`set_custom_reduce_scatter`), for one group of its parameters.

    FSDP calls it once for each micro-batch. The first ones are only added up here, in the tree over this rank's
    micro-batches, and what FSDP then takes for their sum is to be dropped; with the `last` one the sums are exchanged.
    """

    def __init__(self, micro_batches: int, ranks: int, rank: int) -> None:
        """micro_batches: of each of the group's ranks."""
        self._each, self._sum = micro_batches, TreeSum(ranks * micro_batches, rank * micro_batches)
        self.last = True

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
        blocks = [sums[""] for sums in self._sum.partial_sums()]
        self._sum.clear()
        output_tensor.copy_(tree_reduce_scatter(blocks, self._each, group))

    def clear(self) -> None:
        self._sum.clear()
