"""One check of arguments for each op. It is the first line of every implementation, so all refuse the same calls.

Values (labels, document starts) are checked only on a CPU outside compiled graphs; elsewhere it would cost a
synchronisation. There a label outside the vocabulary makes its token's loss NaN, and the step is skipped. No
implementation reads out of bounds for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weftrain.kernels.contract import KernelError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EPS_PLACEMENTS = ("after_bias_correction", "before_bias_correction")


def check_rms_norm(x: Tensor, weight: Tensor) -> None:
    """x [..., n], weight [n]; any of fp32, bf16, fp16, each its own."""
    _floating("rms_norm", x=x, weight=weight)
    _norm_shapes("rms_norm", x, weight=weight)


def check_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """x [..., n], weight and bias [n]; any of fp32, bf16, fp16, each its own."""
    _floating("layer_norm", x=x, weight=weight, bias=bias)
    _norm_shapes("layer_norm", x, weight=weight, bias=bias)


def check_add_rms_norm(residual: Tensor, branch: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    """residual and branch of one shape [..., n], branch in residual's dtype or a narrower one; weight [n]."""
    _add_norm("add_rms_norm", residual, branch, dtype, weight=weight)


def check_add_layer_norm(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
    """residual and branch of one shape [..., n], branch in residual's dtype or a narrower one; weight and bias [n]."""
    _add_norm("add_layer_norm", residual, branch, dtype, weight=weight, bias=bias)


def check_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> None:
    """q [B, T, H, D], k [B, T, H_kv, D] of one dtype; cos and sin [T, rotary_dim / 2] or [B, T, rotary_dim / 2], both
    alike; rotary_dim even, in 2..D.
    """
    _floating("rope", q=q, k=k, cos=cos, sin=sin)
    _rank("rope", 4, "[B, T, H, D]", q=q)
    _rank("rope", 4, "[B, T, H_kv, D]", k=k)
    batch, tokens, _, head_dim = q.shape
    if (*k.shape[:2], k.shape[3]) != (batch, tokens, head_dim) or k.dtype != q.dtype:
        found, wanted = f"{_dtype(k)} {list(k.shape)}", f"{_dtype(q)} {list(q.shape)}"
        raise KernelError(f"rope: q is {wanted} and k {found}; they may differ in the number of heads alone")
    if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
        raise KernelError(f"rope: rotary_dim {rotary_dim} must be even and in 2..{head_dim}, the head dimension")
    of_all = (tokens, rotary_dim // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) not in (of_all, (batch, *of_all)):
            raise KernelError(
                f"rope: {name} is {list(table.shape)}; it must be [T, rotary_dim / 2] = {list(of_all)}, or with B = "
                f"{batch} before it"
            )
    if cos.shape != sin.shape:
        raise KernelError(f"rope: cos is {list(cos.shape)} and sin {list(sin.shape)}; they must be alike")


def check_swiglu(gate: Tensor, up: Tensor) -> None:
    """gate and up of one shape, dtype and device."""
    _floating("swiglu", gate=gate, up=up)
    _alike("swiglu", gate=gate, up=up)


def check_grouped_gemm(x: Tensor, weight: Tensor, ends: Tensor) -> None:
    """x [N, K], weight [E, M, K] of one dtype; ends int32 [E], rising to at most N."""
    _floating("grouped_gemm", x=x, weight=weight)
    _same_device("grouped_gemm", x=x, ends=ends)
    _rank("grouped_gemm", 2, "[N, K]", x=x)
    _rank("grouped_gemm", 3, "[E, M, K]", weight=weight)
    if weight.shape[2] != x.shape[1] or weight.dtype != x.dtype or 0 in weight.shape:
        found, wanted = f"{_dtype(weight)} {list(weight.shape)}", f"{_dtype(x)} {list(x.shape)}"
        raise KernelError(
            f"grouped_gemm: x is {wanted} and weight {found}; weight must be {_dtype(x)} [E, M, K], of 1 "
            f"or more each, with K = {x.shape[1]}"
        )
    if ends.dtype != torch.int32 or tuple(ends.shape) != weight.shape[:1]:
        raise KernelError(
            f"grouped_gemm: ends are {_dtype(ends)} {list(ends.shape)}; they must be int32 [E] = [{len(weight)}]"
        )
    if _looking_is_free(ends):
        last = ends.tolist()
        if last[-1] > len(x) or any(end < before for before, end in zip([0, *last], last, strict=False)):
            raise KernelError(
                f"grouped_gemm: ends are {last!s:.60}; they must rise from 0 to at most {len(x)}, the number of rows"
            )


def check_attention(q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None, window: int | None) -> None:
    """q [B, T, H, D], k and v [B, T, H_kv, D] of one dtype and device, H a multiple of H_kv; document_start int32
    [B, T] or None, values in 0..t; window >= 1 or None.
    """
    _floating("attention", q=q, k=k, v=v)
    _rank("attention", 4, "[B, T, H, D]", q=q, k=k)
    _alike("attention", k=k, v=v)
    (B, T, H, D), kv_heads = q.shape, k.shape[2]
    if tuple(k.shape) != (B, T, kv_heads, D) or k.dtype != q.dtype:
        found, wanted = f"{_dtype(k)} {list(k.shape)}", f"{_dtype(q)} [{B}, {T}, H_kv, {D}]"
        raise KernelError(f"attention: k and v are {found}; beside q {list(q.shape)} they must be {wanted}")
    if H % max(kv_heads, 1) or bool(H) != bool(kv_heads):
        raise KernelError(
            f"attention: q has {H} heads and k and v {kv_heads}; the query heads must be a multiple of the key heads"
        )
    if window is not None and window < 1:
        raise KernelError(f"attention: window is {window}; it counts the query itself and must be at least 1, or None")
    if document_start is None:
        return
    if document_start.dtype != torch.int32 or tuple(document_start.shape) != tuple(q.shape[:2]):
        found = f"{_dtype(document_start)} {list(document_start.shape)}"
        raise KernelError(f"attention: document_start is {found}; it must be int32 [B, T] = {list(q.shape[:2])}")
    _same_device("attention", q=q, document_start=document_start)
    if _looking_is_free(document_start):
        wrong = (document_start < 0) | (document_start > torch.arange(q.shape[1], dtype=torch.int32))
        if bool(wrong.any()):
            row, query = wrong.nonzero()[0].tolist()
            start = int(document_start[row, query])
            raise KernelError(
                f"attention: document_start[{row}, {query}] is {start}; it must be in 0..{query}, at or before its "
                "query"
            )


def check_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    logits_softcap: float | None = None,
    label_smoothing: float = 0.0,
    token_weights: Tensor | None = None,
) -> None:
    """logits [N, V], labels int64 [N], each ignore_index or in 0..V-1; logits_softcap positive and finite, or None;
    label_smoothing in 0..1; token_weights fp32 [N] of any values, or None.
    """
    op = "cross_entropy"
    _floating(op, logits=logits)
    _softcap(op, logits_softcap)
    _rank(op, 2, "[N, V]", logits=logits)
    _labels(op, labels, logits, rows=logits.shape[0], vocab=logits.shape[1], ignore_index=ignore_index)
    _weighted_and_smoothed(op, logits, label_smoothing, token_weights)


def check_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    logits_softcap: float | None = None,
    label_smoothing: float = 0.0,
    token_weights: Tensor | None = None,
) -> None:
    """hidden [N, D], weight [V, D] of hidden's dtype, labels int64 [N], each ignore_index or in 0..V-1; logits_softcap
    positive and finite, or None; label_smoothing in 0..1; token_weights fp32 [N] of any values, or None.
    """
    op = "linear_cross_entropy"
    _floating(op, hidden=hidden, weight=weight)
    _softcap(op, logits_softcap)
    _rank(op, 2, "[N, D]", hidden=hidden)
    _rank(op, 2, "[V, D]", weight=weight)
    if hidden.shape[1] != weight.shape[1]:
        raise KernelError(
            f"{op}: hidden is {list(hidden.shape)} and weight {list(weight.shape)}; their last dimensions must agree"
        )
    if hidden.dtype != weight.dtype:
        raise KernelError(f"{op}: hidden is {_dtype(hidden)} and weight {_dtype(weight)}; they must agree")
    _labels(op, labels, hidden, rows=hidden.shape[0], vocab=weight.shape[0], ignore_index=ignore_index)
    _weighted_and_smoothed(op, hidden, label_smoothing, token_weights)


def check_adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    update_index: int,
    eps_placement: str,
    gradient_scale: Tensor,
) -> None:
    """Lists of equal length, tensors of equal shape; fp32 state, contiguous but for the gradients."""
    if eps_placement not in EPS_PLACEMENTS:
        raise KernelError(
            f"adamw: eps_placement '{eps_placement}' is neither {' nor '.join(repr(name) for name in EPS_PLACEMENTS)}"
        )
    if update_index < 1:
        raise KernelError(f"adamw: update_index is {update_index}; it counts from 1")
    if gradient_scale.dim() != 0 or gradient_scale.dtype != torch.float32:
        raise KernelError(
            f"adamw: gradient_scale is {_dtype(gradient_scale)} {list(gradient_scale.shape)}; it must be a 0-dim fp32 "
            "tensor"
        )
    lists = {
        "gradients": gradients,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        **({"copies": copies} if copies is not None else {}),
    }
    for name, tensors in lists.items():
        if len(tensors) != len(parameters):
            raise KernelError(
                f"adamw: {len(parameters)} parameters and {len(tensors)} {name}; the lists must have one length"
            )
    for index, parameter in enumerate(parameters):
        for name, tensors in {"parameters": parameters, **lists}.items():
            tensor = tensors[index]
            if tensor.shape != parameter.shape or tensor.device != parameter.device:
                found, wanted = (
                    f"{list(tensor.shape)} on {tensor.device}",
                    f"{list(parameter.shape)} on {parameter.device}",
                )
                raise KernelError(f"adamw: {name}[{index}] is {found}; its parameter is {wanted}")
            state = name in ("parameters", "exp_avgs", "exp_avg_sqs")
            allowed = (torch.float32,) if state else FLOATS[1:] if name == "copies" else FLOATS
            if tensor.dtype not in allowed:
                raise KernelError(f"adamw: {name}[{index}] is {_dtype(tensor)}; it must be {_names(allowed)}")
            if name != "gradients" and not tensor.is_contiguous():
                raise KernelError(
                    f"adamw: {name}[{index}] is not contiguous, and it is updated in place; pass a contiguous tensor"
                )
    if parameters:
        _same_device("adamw", parameter=parameters[0], gradient_scale=gradient_scale)


def check_grad_norm(gradients: Sequence[Tensor]) -> None:
    """At least one gradient, each fp32, bf16 or fp16, on one device."""
    if not gradients:
        raise KernelError("grad_norm: there are no gradients; give at least one")
    for index, gradient in enumerate(gradients):
        if gradient.dtype not in FLOATS:
            raise KernelError(f"grad_norm: gradients[{index}] is {_dtype(gradient)}; it must be {_names(FLOATS)}")
        if gradient.device != gradients[0].device:
            raise KernelError(
                f"grad_norm: gradients[{index}] is on {gradient.device}, gradients[0] on {gradients[0].device}"
            )


# ---- the parts


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _floating(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        # float64: the reference itself, where truth is computed
        if tensor.dtype not in FLOATS and tensor.dtype != torch.float64:
            raise KernelError(f"{op}: {name} is {_dtype(tensor)}; it must be {_names(FLOATS)}")
    _same_device(op, **tensors)


def _same_device(op: str, **tensors: Tensor) -> None:
    (first, reference), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.device != reference.device:
            raise KernelError(
                f"{op}: {first} is on {reference.device} and {name} on {tensor.device}; move them to one device"
            )


def _rank(op: str, rank: int, layout: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() != rank:
            raise KernelError(f"{op}: {name} is {list(tensor.shape)}; it must be {layout}")


def _alike(op: str, **tensors: Tensor) -> None:
    (first, reference), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.shape != reference.shape or tensor.dtype != reference.dtype:
            found, wanted = f"{_dtype(tensor)} {list(tensor.shape)}", f"{_dtype(reference)} {list(reference.shape)}"
            raise KernelError(f"{op}: {first} is {wanted} and {name} {found}; they must be alike")


def _norm_shapes(op: str, x: Tensor, what: str = "x", **affine: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise KernelError(f"{op}: {what} is {list(x.shape)}; its last dimension must hold at least one element")
    for name, tensor in affine.items():
        if tuple(tensor.shape) != (x.shape[-1],):
            raise KernelError(
                f"{op}: {name} is {list(tensor.shape)}; it must be [{x.shape[-1]}], the last dimension of {what}"
            )


def _add_norm(op: str, residual: Tensor, branch: Tensor, dtype: torch.dtype, **affine: Tensor) -> None:
    _floating(op, residual=residual, branch=branch, **affine)
    _norm_shapes(op, residual, "residual", **affine)
    narrower = residual.dtype == torch.float32 and branch.dtype in FLOATS
    if residual.shape != branch.shape or not (branch.dtype == residual.dtype or narrower):
        found, wanted = f"{_dtype(branch)} {list(branch.shape)}", f"{_dtype(residual)} {list(residual.shape)}"
        raise KernelError(
            f"{op}: residual is {wanted} and branch {found}; they must have one shape, and one dtype unless residual "
            "is float32"
        )
    if dtype not in (*FLOATS, torch.float64):
        raise KernelError(f"{op}: dtype is {str(dtype).removeprefix('torch.')}; it must be {_names(FLOATS)}")


def _labels(op: str, labels: Tensor, beside: Tensor, *, rows: int, vocab: int, ignore_index: int) -> None:
    if vocab == 0:
        raise KernelError(f"{op}: the vocabulary is empty")
    if labels.dtype != torch.int64 or tuple(labels.shape) != (rows,):
        raise KernelError(f"{op}: labels are {_dtype(labels)} {list(labels.shape)}; they must be int64 [N] = [{rows}]")
    _same_device(op, **{"labels": labels, "the logits' side": beside})
    if _looking_is_free(labels):
        wrong = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise KernelError(
                f"{op}: labels[{row}] is {int(labels[row])}; it must be in 0..{vocab - 1}, or {ignore_index} to be "
                "ignored"
            )


def _softcap(op: str, logits_softcap: float | None) -> None:
    if logits_softcap is not None and not 0 < logits_softcap < float("inf"):
        raise KernelError(f"{op}: logits_softcap is {logits_softcap}; it must be a positive number, or None")


def _weighted_and_smoothed(op: str, beside: Tensor, label_smoothing: float, token_weights: Tensor | None) -> None:
    if not 0 <= label_smoothing <= 1:
        raise KernelError(f"{op}: label_smoothing is {label_smoothing}; it must be in 0..1")
    if token_weights is None:
        return
    wanted = torch.float64 if beside.dtype == torch.float64 else torch.float32
    if token_weights.dtype != wanted or tuple(token_weights.shape) != (beside.shape[0],):
        found = f"{_dtype(token_weights)} {list(token_weights.shape)}"
        raise KernelError(f"{op}: token_weights are {found}; they must be float32 [N] = [{beside.shape[0]}]")
    _same_device(op, **{"token_weights": token_weights, "the logits' side": beside})


def _looking_is_free(tensor: Tensor) -> bool:
    """On a CPU, with real data: not while a graph is traced, where there are no values to look at."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
    )


def check_newton_schulz(x: Tensor, iterations: int, eps: float) -> None:
    """x [..., m, n], fp32, bf16 or fp16."""
    if x.dim() < 2:
        raise KernelError(f"newton_schulz: x is {list(x.shape)}; it must be [..., m, n], a matrix or a stack of them")
    if x.dtype not in FLOATS:
        raise KernelError(f"newton_schulz: x is {_dtype(x)}; it must be {_names(FLOATS)}")
    if iterations < 1:
        raise KernelError(f"newton_schulz: iterations is {iterations}; it must be at least 1")
    if not eps > 0:
        raise KernelError(f"newton_schulz: eps is {eps}; it must be above 0")
