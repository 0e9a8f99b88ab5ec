"""adamw: one launch for all tensors of a group; moments, weight and its compute copy are read once and written once.

Step, learning rate and betas become a few fp32 numbers, each rounded once after arithmetic in double on the host; they
are plain kernel arguments, so no step compiles anything anew. The clip coefficient stays on the device and is loaded
there. Where the tensors lie stands in a table (_tensor_lists.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from weftrain.kernels.adamw_scalars import adamw_scalars
from weftrain.kernels.arguments import check_adamw
from weftrain.kernels.contract import Compilation
from weftrain.kernels.triton_ops._launch import TL_DTYPES, TRITON_DTYPES, compilation, implementation, operator
from weftrain.kernels.triton_ops._tensor_lists import aligned, tensor_lists, typed

_BLOCK = 1024
_STEPS = 8  # blocks of one program
_NUM_WARPS = 4


@triton.jit
def _update(
    table, owner, gradient_scale, one_minus_beta1, beta2, one_minus_beta2, eps, correction, step_size, decay,
    GRADIENT: tl.constexpr, COPY: tl.constexpr, HAS_COPY: tl.constexpr, EPS_AFTER: tl.constexpr,
    ALIGNED: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some blocks of one tensor, in fp32. correction, step_size and decay are those of kernels/adamw_scalars.py."""
    program = tl.program_id(0)
    row = table + tl.load(owner + program) * 8
    first = (program - tl.load(row + 1)) * (STEPS * BLOCK)
    left = tl.load(row) - first
    p = typed(tl.load(row + 3), tl.float32, ALIGNED) + first
    g = typed(tl.load(row + 4), GRADIENT, ALIGNED) + first
    m = typed(tl.load(row + 5), tl.float32, ALIGNED) + first
    v = typed(tl.load(row + 6), tl.float32, ALIGNED) + first
    c = typed(tl.load(row + 7), COPY, ALIGNED) + first
    scale = tl.load(gradient_scale)
    whole = tl.minimum(left // BLOCK, STEPS).to(tl.int32)
    for step in range(whole):  # without a mask, whose edge would make accesses narrow
        lane = step * BLOCK + tl.arange(0, BLOCK)
        _update_block(
            p + lane, g + lane, m + lane, v + lane, c + lane, scale, None,
            one_minus_beta1, beta2, one_minus_beta2, eps, correction, step_size, decay, HAS_COPY, EPS_AFTER,
        )  # fmt: skip
    if whole < STEPS:
        lane = whole * BLOCK + tl.arange(0, BLOCK)
        _update_block(
            p + lane, g + lane, m + lane, v + lane, c + lane, scale, lane < left,
            one_minus_beta1, beta2, one_minus_beta2, eps, correction, step_size, decay, HAS_COPY, EPS_AFTER,
        )  # fmt: skip


@triton.jit
def _update_block(
    parameter, gradient, exp_avg, exp_avg_sq, copy, scale, inside,
    one_minus_beta1, beta2, one_minus_beta2, eps, correction, step_size, decay,
    HAS_COPY: tl.constexpr, EPS_AFTER: tl.constexpr,
):  # fmt: skip
    g = tl.load(gradient, mask=inside).to(tl.float32) * scale
    p = tl.load(parameter, mask=inside)
    m = tl.load(exp_avg, mask=inside)
    v = tl.load(exp_avg_sq, mask=inside)
    m = m + one_minus_beta1 * (g - m)
    v = v * beta2 + one_minus_beta2 * g * g
    if EPS_AFTER:
        p = p * decay - step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), correction) + eps)
    else:
        p = p - step_size * (tl.div_rn(m, tl.sqrt_rn(v) + eps) * correction + decay * p)
    tl.store(exp_avg, m, mask=inside)
    tl.store(exp_avg_sq, v, mask=inside)
    tl.store(parameter, p, mask=inside)
    if HAS_COPY:
        tl.store(copy, p.to(copy.dtype.element_ty), mask=inside)


def _launch(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor],
    gradient_scale: Tensor,
    scalars: Sequence[float],
    eps_after: bool,
) -> None:
    """A launch for each combination of dtypes, of tensors that wide accesses can reach and of others."""
    kinds: dict[tuple[torch.dtype, torch.dtype, bool], list[tuple[Tensor, ...]]] = {}
    for tensors in zip(parameters, gradients, exp_avgs, exp_avg_sqs, copies or parameters, strict=True):
        if tensors[0].numel():
            kind = (tensors[1].dtype, tensors[4].dtype, aligned(*tensors))
            kinds.setdefault(kind, []).append(tensors)
    for (gradient_dtype, copy_dtype, wide), of_kind in kinds.items():
        lists = tensor_lists(list(zip(*of_kind, strict=True)), _BLOCK * _STEPS)
        _update[(lists.programs,)](
            lists.table, lists.owner, gradient_scale, *scalars, GRADIENT=TL_DTYPES[gradient_dtype],
            COPY=TL_DTYPES[copy_dtype], HAS_COPY=len(copies) > 0, EPS_AFTER=eps_after, ALIGNED=wide, STEPS=_STEPS,
            BLOCK=_BLOCK, num_warps=_NUM_WARPS,
        )  # fmt: skip


def _fake(*_: object) -> None:
    """Nothing is returned."""


_UPDATE = operator(
    "adamw_update(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] copies, Tensor gradient_scale, float[] scalars, bool eps_after) -> ()",
    _launch,
    _fake,
)


@torch.no_grad()
def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    update_index: int,
    eps_placement: str,
    gradient_scale: Tensor,
) -> None:
    """One AdamW update in place, arguments as in kernels/reference.py; all but the gradients contiguous. No
    synchronisation.

    28 bytes a parameter are moved with bf16 gradients and copies. Raises KernelError (kernels/arguments.py) before
    anything is written.
    """
    check_adamw(parameters, gradients, exp_avgs, exp_avg_sqs, copies, update_index, eps_placement, gradient_scale)
    after = eps_placement == "after_bias_correction"
    scalars = adamw_scalars(
        eps_placement,
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        update_index=update_index,
    )
    if parameters:
        whole = [gradient.contiguous() for gradient in gradients]
        _UPDATE(parameters, whole, exp_avgs, exp_avg_sqs, copies or [], gradient_scale, scalars, after)
    # a launch does not tell autograd; a backward through what was overwritten must be refused
    if not torch.compiler.is_compiling():
        written = (*parameters, *exp_avgs, *exp_avg_sqs, *(copies or ()))
        torch.autograd.graph.increment_version([tensor for tensor in written if not tensor.is_inference()])


def _compilations() -> list[Compilation]:
    found = []
    names = ("one_minus_beta1", "beta2", "one_minus_beta2", "eps", "correction", "step_size", "decay")
    types = dict.fromkeys(names, "fp32") | {"table": "*i64:16", "owner": "*i32:16", "gradient_scale": "*fp32:16"}
    cases: list[tuple[torch.dtype, torch.dtype, bool, bool]] = [
        *((dtype, copy, True, True) for dtype in TRITON_DTYPES for copy in (torch.float32, torch.bfloat16)),
        *((dtype, torch.bfloat16, False, True) for dtype in TRITON_DTYPES),
        (torch.float16, torch.float16, True, True),
        (torch.bfloat16, torch.bfloat16, True, False),
    ]
    for dtype, copy, after, wide in cases:
        has_copy = copy != torch.float32
        constants = {"GRADIENT": TL_DTYPES[dtype], "COPY": TL_DTYPES[copy], "HAS_COPY": has_copy, "EPS_AFTER": after}
        constants |= {"ALIGNED": wide, "STEPS": _STEPS, "BLOCK": _BLOCK}
        name = f"{TRITON_DTYPES[dtype]} copy {TRITON_DTYPES[copy] if has_copy else 'none'}"
        name += f" eps {'after' if after else 'before'}{'' if wide else ' unaligned'}"
        found.append(compilation(name, _update, types, constants, _NUM_WARPS))
    return found


IMPLEMENTATION = implementation("adamw", adamw, _compilations, thresholds={"elements": _BLOCK * _STEPS})
