"""adamw: one launch a tensor; moments, weight and its compute copy are read once and written once.

Step, learning rate and betas become a few fp32 numbers, each rounded once after arithmetic in double on the host; they
are plain kernel arguments, so no step compiles anything anew. The clip coefficient stays on the device and is loaded
there.
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
from weftrain.kernels.triton_ops._launch import TRITON_DTYPES, compilation, implementation, operator

_BLOCK = 1024
_NUM_WARPS = 4


@triton.jit
def _step(
    parameter, gradient, exp_avg, exp_avg_sq, copy, gradient_scale, elements,
    one_minus_beta1, beta2, one_minus_beta2, eps, correction, step_size, decay,
    EPS_AFTER: tl.constexpr, HAS_COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block, in fp32. correction, step_size and decay are those of kernels/adamw_scalars.py."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < elements
    g = tl.load(gradient + offset, mask=inside, other=0.0).to(tl.float32) * tl.load(gradient_scale)
    p = tl.load(parameter + offset, mask=inside, other=0.0)
    m = tl.load(exp_avg + offset, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + offset, mask=inside, other=0.0)
    m = m + one_minus_beta1 * (g - m)
    v = v * beta2 + one_minus_beta2 * g * g
    if EPS_AFTER:
        p = p * decay - step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), correction) + eps)
    else:
        p = p - step_size * (tl.div_rn(m, tl.sqrt_rn(v) + eps) * correction + decay * p)
    tl.store(exp_avg + offset, m, mask=inside)
    tl.store(exp_avg_sq + offset, v, mask=inside)
    tl.store(parameter + offset, p, mask=inside)
    if HAS_COPY:
        tl.store(copy + offset, p.to(copy.dtype.element_ty), mask=inside)


def _launch(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    gradient_scale: Tensor,
    scalars: Sequence[float],
    eps_after: bool,
) -> None:
    elements = parameter.numel()
    if elements:
        _step[(triton.cdiv(elements, _BLOCK),)](
            parameter, gradient, exp_avg, exp_avg_sq, parameter if copy is None else copy, gradient_scale, elements,
            *scalars,
            EPS_AFTER=eps_after, HAS_COPY=copy is not None, BLOCK=_BLOCK, num_warps=_NUM_WARPS,
        )  # fmt: skip


def _fake(*_: object) -> None:
    """Nothing is returned."""


_STEP = operator(
    "adamw_step(Tensor(a!) parameter, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? copy, "
    "Tensor gradient_scale, float[] scalars, bool eps_after) -> ()",
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
    for index, parameter in enumerate(parameters):
        copy = None if copies is None else copies[index]
        gradient = gradients[index].contiguous()
        _STEP(parameter, gradient, exp_avgs[index], exp_avg_sqs[index], copy, gradient_scale, scalars, after)
    # a launch does not tell autograd; a backward through what was overwritten must be refused
    if not torch.compiler.is_compiling():
        written = (*parameters, *exp_avgs, *exp_avg_sqs, *(copies or ()))
        torch.autograd.graph.increment_version([tensor for tensor in written if not tensor.is_inference()])


def _compilations() -> list[Compilation]:
    found = []
    names = ("one_minus_beta1", "beta2", "one_minus_beta2", "eps", "correction", "step_size", "decay")
    cases: list[tuple[str, str | None, bool]] = [
        *((dtype, copy, True) for dtype in TRITON_DTYPES.values() for copy in (None, "bf16")),
        *((dtype, "bf16", False) for dtype in TRITON_DTYPES.values()),
        ("fp16", "fp16", True),
    ]
    for dtype, copy, after in cases:
        types = dict.fromkeys(("parameter", "exp_avg", "exp_avg_sq"), "*fp32:16") | dict.fromkeys(names, "fp32")
        types |= {"gradient": f"*{dtype}:16", "copy": f"*{copy or 'fp32'}:16"}
        types |= {"gradient_scale": "*fp32", "elements": "i32:16"}
        constants = {"EPS_AFTER": after, "HAS_COPY": copy is not None, "BLOCK": _BLOCK}
        name = f"{dtype} copy {copy or 'none'} eps {'after' if after else 'before'}"
        found.append(compilation(name, _step, types, constants, _NUM_WARPS))
    return found


IMPLEMENTATION = implementation("adamw", adamw, _compilations)
