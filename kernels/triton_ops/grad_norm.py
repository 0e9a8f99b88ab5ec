"""grad_norm in two stages: a sum of squares for every 65,536 elements, then one program that adds those and takes the
root.

No atomics, and no norm of each tensor on the way: the partial sums of all tensors lie in one list, whose order is that
of the gradients, so the bits depend on nothing else. Nothing waits for the device; a NaN or Inf anywhere is in the
result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from weftrain.kernels.arguments import check_grad_norm
from weftrain.kernels.contract import Compilation
from weftrain.kernels.triton_ops._launch import TRITON_DTYPES, compilation, implementation, operator

_BLOCK = 4096
_STEPS = 16  # blocks that one program adds, lane by lane, before the lanes are added
_PER_PROGRAM = _BLOCK * _STEPS
_FINISH_BLOCK = 1024
_NUM_WARPS = 8


@triton.jit
def _sums_of_squares(gradient, partials, elements, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """partials[program] = sum of squares of the program's STEPS x BLOCK elements, in fp32."""
    program = tl.program_id(0)
    first = program.to(tl.int64) * (STEPS * BLOCK)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(STEPS):
        offset = first + step * BLOCK + lane
        values = tl.load(gradient + offset, mask=offset < elements, other=0.0).to(tl.float32)
        sums += values * values
    tl.store(partials + program, tl.sum(sums, 0))


@triton.jit
def _root_of_sum(partials, norm, count, BLOCK: tl.constexpr):
    """One program: norm = sqrt(sum of partials)."""
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, count, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        sums += tl.load(partials + lane, mask=lane < count, other=0.0)
    tl.store(norm, tl.sqrt_rn(tl.sum(sums, 0)))


def _launch(gradients: Sequence[Tensor]) -> Tensor:
    counts = [triton.cdiv(gradient.numel(), _PER_PROGRAM) for gradient in gradients]
    partials = torch.empty(sum(counts), dtype=torch.float32, device=gradients[0].device)
    norm = torch.zeros((), dtype=torch.float32, device=gradients[0].device)
    for gradient, part, count in zip(gradients, partials.split(counts), counts, strict=True):
        if count:
            _sums_of_squares[(count,)](
                gradient, part, gradient.numel(), STEPS=_STEPS, BLOCK=_BLOCK, num_warps=_NUM_WARPS
            )
    if partials.numel():
        _root_of_sum[(1,)](partials, norm, partials.numel(), BLOCK=_FINISH_BLOCK, num_warps=_NUM_WARPS)
    return norm


def _fake(gradients: Sequence[Tensor]) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=gradients[0].device)


_NORM = operator("grad_norm_two_stages(Tensor[] gradients) -> Tensor", _launch, _fake)


@torch.no_grad()
def grad_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Global L2 norm, 0-dim fp32 (kernels/reference.py), the root of one sum of squares in fp32. Deterministic, no
    synchronisation.

    Raises KernelError (kernels/arguments.py).
    """
    check_grad_norm(gradients)
    return _NORM([gradient.contiguous() for gradient in gradients])


def _compilations() -> list[Compilation]:
    found = []
    sizes = [(dtype, "a multiple of 16", "i32:16") for dtype in TRITON_DTYPES.values()]
    for dtype, elements, size in (*sizes, ("fp32", "any count", "i32"), ("bf16", "2^31 and more", "i64:16")):
        types = {"gradient": f"*{dtype}:16", "partials": "*fp32", "elements": size}
        constants = {"STEPS": _STEPS, "BLOCK": _BLOCK}
        name = f"squares {dtype} {elements}"
        found.append(compilation(name, _sums_of_squares, types, constants, _NUM_WARPS))
    finish = {"partials": "*fp32:16", "norm": "*fp32:16", "count": "i32"}
    return [*found, compilation("finish", _root_of_sum, finish, {"BLOCK": _FINISH_BLOCK}, _NUM_WARPS)]


IMPLEMENTATION = implementation("grad_norm", grad_norm, _compilations)
