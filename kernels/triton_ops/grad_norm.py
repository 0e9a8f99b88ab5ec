"""grad_norm in two launches, of any number of tensors: a sum of squares for every 65,536 elements, then one program a
norm that adds those and takes the root.

No atomics, and for the norm of all tensors no norm of each on the way: the partial sums of all tensors lie in one list,
whose order is that of the gradients, so the bits depend on nothing else. Nothing waits for the device; a NaN or Inf
anywhere is in the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from weftrain.kernels.arguments import check_grad_norm
from weftrain.kernels.contract import Compilation
from weftrain.kernels.triton_ops._launch import TL_DTYPES, TRITON_DTYPES, compilation, implementation, operator
from weftrain.kernels.triton_ops._tensor_lists import aligned, integers, tensor_lists, typed

_BLOCK = 4096
_STEPS = 16  # blocks that one program adds, lane by lane, before the lanes are added
_PER_PROGRAM = _BLOCK * _STEPS
_FINISH_BLOCK = 1024
_NUM_WARPS = 8


@triton.jit
def _sums_of_squares(
    table, owner, partials, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of squares of STEPS x BLOCK elements of one tensor, in fp32, at its place among all partial sums."""
    program = tl.program_id(0)
    row = table + tl.load(owner + program) * 4
    within = program - tl.load(row + 1)
    first = within * (STEPS * BLOCK)
    left = tl.load(row) - first
    gradient = typed(tl.load(row + 3), DTYPE, ALIGNED) + first
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    whole = tl.minimum(left // BLOCK, STEPS).to(tl.int32)
    for step in range(whole):  # without a mask, whose edge would make accesses narrow
        values = tl.load(gradient + step * BLOCK + lane).to(tl.float32)
        sums += values * values
    if whole < STEPS:
        rest = whole * BLOCK + lane
        values = tl.load(gradient + rest, mask=rest < left, other=0.0).to(tl.float32)
        sums += values * values
    tl.store(partials + tl.load(row + 2) + within, tl.sum(sums, 0))


@triton.jit
def _roots_of_sums(partials, bounds, norms, BLOCK: tl.constexpr):
    """norms[program] = sqrt(sum of the partials from bounds[program] to bounds[program + 1])."""
    program = tl.program_id(0)
    first = tl.load(bounds + program)
    count = (tl.load(bounds + program + 1) - first).to(tl.int32)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, count, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        sums += tl.load(partials + first + lane, mask=lane < count, other=0.0)
    tl.store(norms + program, tl.sqrt_rn(tl.sum(sums, 0)))


def _launch(gradients: Sequence[Tensor], each: bool) -> Tensor:
    """The norm of all gradients, [1], or of each, [n]."""
    device = gradients[0].device
    counts = [triton.cdiv(gradient.numel(), _PER_PROGRAM) for gradient in gradients]
    bounds = list(itertools.accumulate(counts, initial=0))
    norms = _fake(gradients, each)
    if not bounds[-1]:
        return norms.zero_()
    partials = torch.empty(bounds[-1], dtype=torch.float32, device=device)
    kinds: dict[tuple[torch.dtype, bool], list[int]] = {}
    for index, gradient in enumerate(gradients):
        if counts[index]:
            kinds.setdefault((gradient.dtype, aligned(gradient)), []).append(index)
    for (dtype, wide), indices in kinds.items():
        lists = tensor_lists([[gradients[i] for i in indices]], _PER_PROGRAM, [bounds[i] for i in indices])
        _sums_of_squares[(lists.programs,)](
            lists.table, lists.owner, partials, DTYPE=TL_DTYPES[dtype], ALIGNED=wide, STEPS=_STEPS, BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
        )  # fmt: skip
    within = integers(bounds if each else [0, bounds[-1]], device)
    _roots_of_sums[(norms.numel(),)](partials, within, norms, BLOCK=_FINISH_BLOCK, num_warps=_NUM_WARPS)
    return norms


def _fake(gradients: Sequence[Tensor], each: bool) -> Tensor:
    return torch.empty(len(gradients) if each else 1, dtype=torch.float32, device=gradients[0].device)


_NORMS = operator("grad_norm_two_stages(Tensor[] gradients, bool each) -> Tensor", _launch, _fake)


@torch.no_grad()
def grad_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Global L2 norm, 0-dim fp32 (kernels/reference.py), the root of one sum of squares in fp32. Deterministic, no
    synchronisation.

    Raises KernelError (kernels/arguments.py).
    """
    check_grad_norm(gradients)
    return _NORMS([gradient.contiguous() for gradient in gradients], False).view(())


@torch.no_grad()
def grad_norm_of_each(gradients: Sequence[Tensor]) -> Tensor:
    """fp32 [n]: what grad_norm gives for each of the tensors alone, bit for bit, in the launches of one call."""
    check_grad_norm(gradients)
    return _NORMS([gradient.contiguous() for gradient in gradients], True)


def _compilations() -> list[Compilation]:
    found = []
    types = {"table": "*i64:16", "owner": "*i32:16", "partials": "*fp32:16", "bounds": "*i64:16", "norms": "*fp32:16"}
    for dtype, wide in (*((dtype, True) for dtype in TRITON_DTYPES), (torch.bfloat16, False)):
        constants = {"DTYPE": TL_DTYPES[dtype], "ALIGNED": wide, "STEPS": _STEPS, "BLOCK": _BLOCK}
        name = f"squares {TRITON_DTYPES[dtype]}{'' if wide else ' unaligned'}"
        found.append(compilation(name, _sums_of_squares, types, constants, _NUM_WARPS))
    return [*found, compilation("finish", _roots_of_sums, types, {"BLOCK": _FINISH_BLOCK}, _NUM_WARPS)]


IMPLEMENTATION = implementation(
    "grad_norm", grad_norm, _compilations, of_each=grad_norm_of_each, thresholds={"elements": _PER_PROGRAM}
)
