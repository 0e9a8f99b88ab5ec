"""attention: causal flash attention for training, forward and a deterministic backward, with document boundaries.

The configuration is looked up, not tuned: _attention_tables.py has one line per kernel, target, element size and head
width, each proven by `weftrain kernels compile`. The kernels themselves are in _attention_kernels.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from weftrain.kernels.arguments import check_attention
from weftrain.kernels.contract import TARGETS, Compilation, Spec
from weftrain.kernels.derivatives import first_derivatives_only, outside_autocast
from weftrain.kernels.triton_ops import _attention_kernels as kernels
from weftrain.kernels.triton_ops._attention_tables import (
    CANDIDATES,
    DESCRIBED_FORWARD,
    Configuration,
    configuration,
    lines,
    one_kernel_backward,
)
from weftrain.kernels.triton_ops._launch import (
    compilation,
    implementation,
    interpreting,
    next_power_of_2,
    operator,
    target,
)
from weftrain.kernels.visible_keys import first_visible_keys

_MAX_HEAD_DIM = 256
_LOG2_E = 1 / math.log(2)
_ROW_SUMS_BLOCK = 32
_LARGEST_TILE = 128  # tokens
_LARGEST_TOKEN_STRIDE = 2**23  # of a tile of 256 rows the offsets are 32-bit


# ---- launches


def _block_d(head_dim: int) -> int:
    return max(16, next_power_of_2(head_dim))


def _grid(tokens: int, block: int, batch_heads: int) -> tuple[int]:
    return (-(-tokens // block) * batch_heads,)


def _common(head_dim: int, found: Configuration, documents: bool) -> dict[str, Any]:
    """The constants of a launch, as Compilations declare them too."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": _block_d(head_dim),
        "BLOCK_M": found.block_m,
        "BLOCK_N": found.block_n,
        "DOCUMENTS": documents,
        "PRECISION": "ieee",  # of fp32 products; bf16 and fp16 know no other
    }


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _fake_forward(q, k, v, document_start, scale)
    B, T, H, D = q.shape
    if out.numel():
        on = target(q.device)
        described = DESCRIBED_FORWARD.get(D, {}).get(on) if all(map(_describable, (q, k, v))) else None
        found = described or configuration("forward", on, q.element_size(), _block_d(D))
        inputs: list[Any] = [q, k, v]
        if described is not None:
            rows = (found.block_m, found.block_n, found.block_n)
            inputs = [_descriptor(x, n) for x, n in zip(inputs, rows, strict=True)]
        kernels.forward[_grid(T, found.block_m, B * H)](
            *inputs, document_start, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], T, H, H // k.shape[2],
            scale * _LOG2_E, **_common(D, found, document_start is not None), DESCRIPTORS=described is not None,
            num_warps=found.num_warps, num_stages=found.num_stages,
        )  # fmt: skip
    return out, lse


def _describable(x: Tensor) -> bool:
    """Whether a tensor descriptor (TMA) of x [B, T, H, D] can be made: 2-byte elements, heads side by side, and base
    and strides multiples of 16 bytes.
    """
    (_, _, H, D), (batch, token, head, last) = x.shape, x.stride()
    dense = x.element_size() == 2 and last == 1 and (head == D or H == 1)
    return dense and token > 0 and batch > 0 and token % 8 == 0 and batch % 8 == 0 and x.data_ptr() % 16 == 0


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    B, T, H, D = x.shape
    return TensorDescriptor(x, [B, T, H * D], [*x.stride()[:2], 1], [1, rows, D])


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(
        (B, H, T), dtype=torch.float32, device=q.device
    )


def _launch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    document_start: Tensor | None,
    scale: float,
    reach: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _fake_backward(dout, q, k, v, out, lse, document_start, scale, reach)
    (B, T, H, D), key_heads = q.shape, k.shape[2]
    if dq.numel() == 0:
        return dq, dk, dv
    on, block_d, documents = target(q.device), _block_d(D), document_start is not None
    delta = torch.empty_like(lse)
    kernels.row_sums[_grid(T, _ROW_SUMS_BLOCK, B * H)](
        out, dout, delta, *dout.stride()[:3], T, H, HEAD_DIM=D, BLOCK_D=block_d, BLOCK_M=_ROW_SUMS_BLOCK, num_warps=4
    )
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    grouped = key_heads < H
    one = one_kernel_backward(on, q.element_size(), block_d, grouped)
    found = one or configuration("backward_keys", on, q.element_size(), block_d, grouped)
    sums = turn = None
    if one is not None:
        sums = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        turn = torch.zeros(B * H * -(-T // one.block_m), dtype=torch.int32, device=q.device)
    kernels.backward_keys[_grid(T, found.block_n, B * key_heads)](
        q, k, v, document_start, dout, lse, delta, dk, dv, sums, turn, *strides, T, H, H // key_heads, reach, scale,
        scale * _LOG2_E, **_common(D, found, documents), SCAN=kernels.SCAN, GROUPED=grouped, QUERIES=one is not None,
        INTERPRETED=interpreting(), num_warps=found.num_warps, num_stages=found.num_stages,
    )  # fmt: skip
    if sums is not None:
        torch.mul(sums, scale, out=dq)  # one pass: rounded as it is stored
        return dq, dk, dv
    found = configuration("backward_queries", on, q.element_size(), block_d)
    kernels.backward_queries[_grid(T, found.block_m, B * H)](
        q, k, v, document_start, dout, lse, delta, dq, *strides, T, H, H // key_heads, scale, scale * _LOG2_E,
        **_common(D, found, documents), num_warps=found.num_warps, num_stages=found.num_stages,
    )  # fmt: skip
    return dq, dk, dv


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    document_start: Tensor | None,
    scale: float,
    reach: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


_FORWARD = operator(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? document_start, float scale) -> (Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_BACKWARD = operator(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? document_start, "
    "float scale, int reach)"
    " -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


# ---- the op


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None, scale: float, reach: int
    ) -> Tensor:
        out, lse = _FORWARD(q, k, v, document_start, scale)
        ctx.save_for_backward(q, k, v, out, lse, document_start)
        ctx.scale, ctx.reach = scale, reach
        return out

    @staticmethod
    @first_derivatives_only("attention", "triton")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, document_start = ctx.saved_tensors
        return *_BACKWARD(_readable(dout), q, k, v, out, lse, document_start, ctx.scale, ctx.reach), None, None, None


def _readable(x: Tensor) -> Tensor:
    """x as it is where its rows are contiguous and its strides fit, else a copy."""
    return x if x.stride(3) == 1 and x.stride(1) < _LARGEST_TOKEN_STRIDE else x.contiguous()


@outside_autocast
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    document_start: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal self-attention: q [B, T, H, D], k and v [B, T, H_kv, D] -> contiguous [B, T, H, D] in q.dtype
    (kernels/reference.py). D <= 256.

    Products in q.dtype (fp32: without tf32), accumulated in fp32; softmax in fp32; probabilities are cast to q.dtype
    before they meet v. Saves q, k, v, the output, and the base-2 logarithm of each row's sum of exponentials, fp32 [B,
    H, T]. Tiles of keys that no query of a tile sees are not visited. Deterministic: every sum has one order. Where one
    kernel computes all three gradients (ONE_KERNEL_BACKWARD), it takes fp32 [B, T, H, D] for dq meanwhile. Strides are
    taken as they are where the last is 1. The probability of a query's only key is 1, so it moves neither q nor k.
    Raises KernelError (kernels/arguments.py).
    """
    check_attention(q, k, v, document_start, window)
    if scale <= 0:  # the kernels scale a row's maximum, and -inf where a key is hidden
        q, scale = (-q, -scale) if scale else (q * 0, 1.0)
    start = first_visible_keys(q, document_start, window)
    reach = q.shape[1] if window is None else min(window, q.shape[1])
    return _Attention.apply(_readable(q), _readable(k), _readable(v), start, float(scale), reach)


def _needs(spec: Spec) -> str | None:
    head_dim = int(spec.attributes["head_dim"])
    return None if head_dim <= _MAX_HEAD_DIM else f"needs head_dim <= {_MAX_HEAD_DIM}, this is {head_dim}"


# ---- for the compile gate

_ELEMENT_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Two blocks would need half the tile each, and so twice the reads of shared memory for each product.
_ONE_BLOCK = (
    "scores and accumulators of a tile fill the registers; the next tiles are on their way meanwhile (num_stages)"
)
_GATE_HEAD_DIMS = (64, 128, 256)


def _types(dtype: str) -> dict[str, str]:
    """Of every runtime argument of the kernels, at aligned strides."""
    types = dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), f"*{dtype}:16")
    types |= dict.fromkeys(("lse", "delta"), "*fp32:16") | dict.fromkeys(("document_start", "turn"), "*i32:16")
    types |= dict.fromkeys(("T", "H", "group", "reach"), "i32")
    strides = (f"{name}_{axis}" for name in ("q", "k", "v", "dout") for axis in ("batch", "token", "head"))
    return types | dict.fromkeys(strides, "i32:16") | dict.fromkeys(("scale", "scale_log2"), "fp32")


def _compilation(
    kernel: str, dtype: str, head_dim: int, found: Configuration, documents: bool, grouped: bool = False, **how: Any
) -> Compilation:
    described = kernel == "described"
    kernel = "forward" if described else kernel
    name = f"{kernel} {dtype} d{head_dim} {found.block_m}x{found.block_n}w{found.num_warps}s{found.num_stages}"
    name += " descriptors" * described + " documents" * documents + " grouped" * grouped
    name += " candidate" * (not how.get("default", True))
    constants = _common(head_dim, found, documents) | ({} if documents else {"document_start": None})
    types = _types(dtype)
    if kernel == "forward":
        constants["DESCRIPTORS"] = described
    if described:
        rows = {"q": found.block_m, "k": found.block_n, "v": found.block_n}
        types |= {name: f"tensordesc<{dtype}[1, {n}, {head_dim}]>" for name, n in rows.items()}
    if kernel in ("backward", "backward_keys"):
        one = kernel == "backward"
        constants |= {"SCAN": kernels.SCAN, "GROUPED": grouped, "QUERIES": one, "INTERPRETED": False}
        types, constants = (types | {"dq": "*fp32:16"}, constants) if one else (types, constants | _NO_QUERIES)
        kernel = "backward_keys"
    return compilation(
        name, getattr(kernels, kernel), types, constants, found.num_warps, found.num_stages,
        matrix_instructions=dtype != "fp32", one_block=_ONE_BLOCK, **how,
    )  # fmt: skip


_NO_QUERIES = {"dq": None, "turn": None}


def _compilations() -> list[Compilation]:
    """Every line of _attention_tables.py, with documents and without, and the candidates."""
    made = []
    for dtype, element_size in _ELEMENT_SIZES.items():
        for head_dim in _GATE_HEAD_DIMS:
            constants = {"HEAD_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_M": _ROW_SUMS_BLOCK}
            made.append(compilation(f"row_sums {dtype} d{head_dim}", kernels.row_sums, _types(dtype), constants, 4))
            for kernel, grouped in (
                ("forward", False),
                ("described", False),
                ("backward_keys", False),
                ("backward_keys", True),
                ("backward_queries", False),
                ("backward", False),
                ("backward", True),
            ):
                by_target = lines(kernel, element_size, head_dim, grouped)
                for found in dict.fromkeys(by_target.values()):
                    targets = tuple(on for on in TARGETS if by_target.get(on) == found)
                    made += [
                        _compilation(kernel, dtype, head_dim, found, documents, grouped, targets=targets)
                        for documents in (False, True)
                    ]
    for (kernel, found), excluded in CANDIDATES.items():
        usual = lines(kernel, 2, 128, False)
        targets = tuple(on for on in TARGETS if on in usual and usual[on] != found)
        made.append(_compilation(kernel, "bf16", 128, found, True, targets=targets, default=False, excluded=excluded))
    return made


# Past them document starts are looked at in a second turn, and heads take other lines of _attention_tables.py. So many
# tokens take the interpreter minutes: there a second tile has to do.
IMPLEMENTATION = implementation(
    "attention",
    attention,
    _compilations,
    _needs,
    thresholds={"tokens": _LARGEST_TILE if interpreting() else kernels.SCAN, "head_dim": 128},
)
