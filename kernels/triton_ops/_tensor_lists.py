"""Many tensors in one launch: a table of their addresses on the device, and which tensor each program works on.

A program works on one chunk of one tensor. The table is made on the host, sent without waiting (from pinned memory) and
kept: a step whose tensors lie where those of an earlier step lay, as they do once the allocator is in its steady state,
sends nothing and makes no tensor. What is kept are addresses and sizes, so it is right for whatever lies there.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDE = 16  # bytes: the alignment that 128-bit accesses need
_KEPT = 128  # tables and lists of integers: a few bytes a tensor, or four bytes a program
_kept: OrderedDict[Hashable, Tensor] = OrderedDict()


@dataclass(frozen=True)
class TensorLists:
    """What a launch over lists of tensors is given.

    table: int64, a row a tensor: its elements, its first program, a number of the caller's, its address in each list.
    owner: int32, each program's row.
    """

    table: Tensor
    owner: Tensor
    programs: int


@triton.jit
def typed(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer of an address in a table. ALIGNED: it is a multiple of 16."""
    pointer = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


def aligned(*tensors: Tensor) -> bool:
    """Whether wide accesses to all of them are possible."""
    return all(tensor.data_ptr() % WIDE == 0 for tensor in tensors)


def tensor_lists(lists: Sequence[Sequence[Tensor]], chunk: int, numbers: Sequence[int] | None = None) -> TensorLists:
    """A program for each `chunk` elements of the tensors of one list.

    Lists of contiguous tensors on one device, which agree in their numbers of elements; none is empty.
    """
    device, elements = lists[0][0].device, [tensor.numel() for tensor in lists[0]]
    counts = tuple(triton.cdiv(number, chunk) for number in elements)
    *first_programs, programs = itertools.accumulate(counts, initial=0)
    columns = [elements, first_programs, numbers or [0] * len(elements)]
    columns += [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
    owner = _once(
        ("owner", counts),
        lambda: torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(counts)),
        device,
    )
    return TensorLists(integers([row for rows in zip(*columns, strict=True) for row in rows], device), owner, programs)


def integers(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int64 [n] on the device, made once for as long as it is remembered."""
    return _once(("integers", *numbers), lambda: torch.tensor(numbers, dtype=torch.int64), device)


def _once(key: Hashable, make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """What `make` gives on the host, on the device. Of one stream: memory that is forgotten is reused in its order."""
    cuda = device.type == "cuda"
    place = (key, device, torch.cuda.current_stream(device).cuda_stream if cuda else 0)
    if place in _kept:
        _kept.move_to_end(place)
        return _kept[place]
    made = make()
    _kept[place] = made.pin_memory().to(device, non_blocking=True) if cuda else made
    while len(_kept) > _KEPT:
        _kept.popitem(last=False)
    return _kept[place]
