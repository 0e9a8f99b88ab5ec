"""rope: one program turns a few heads of q or of k of one token, read once and written once; the backward is the same
kernel, turning back.

cos and sin are rounded to q.dtype first, as the contract says, but the products are taken in fp32 and rounded once. q
and k may be views (of a fused q, k, v): their strides are taken as they are. What is returned is contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weftrain.kernels.arguments import check_rope
from weftrain.kernels.contract import Compilation, Spec
from weftrain.kernels.derivatives import first_derivatives_only
from weftrain.kernels.triton_ops._launch import TRITON_DTYPES, compilation, implementation, next_power_of_2, operator

_BLOCK_ELEMENTS = 2048  # elements that one program turns, where the heads suffice: 16 a thread
_NUM_WARPS = 4
_MAX_HEAD_DIM = 1024


@triton.jit
def _turn(
    q, k, cos, sin, turned_q, turned_k, q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride,
    k_head_stride, table_stride, tokens, q_heads, k_heads, head_dim, half,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Blocks of q's heads come first, then those of k's. table_stride: from one row's cos to the next row's, or 0."""
    position = tl.program_id(0).to(tl.int64)  # batch * tokens + token
    row, token = position // tokens, position % tokens
    pair = tl.arange(0, BLOCK_HALF)
    table = row * table_stride + token * half + pair
    c = tl.load(cos + table, mask=pair < half, other=0.0).to(q.dtype.element_ty).to(tl.float32)[None, :]
    s = tl.load(sin + table, mask=pair < half, other=0.0).to(q.dtype.element_ty).to(tl.float32)[None, :]
    if INVERSE:
        s = -s
    block, q_blocks = tl.program_id(1), tl.cdiv(q_heads, Q_BLOCK)
    if block < q_blocks:
        _turn_heads(
            q + row * q_batch_stride + token * q_token_stride, turned_q + position * q_heads * head_dim, c, s,
            block * Q_BLOCK, q_head_stride, q_heads, head_dim, half, INTERLEAVED, Q_BLOCK, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        _turn_heads(
            k + row * k_batch_stride + token * k_token_stride, turned_k + position * k_heads * head_dim, c, s,
            (block - q_blocks) * K_BLOCK, k_head_stride, k_heads, head_dim, half, INTERLEAVED, K_BLOCK, BLOCK_HALF,
            BLOCK_REST,
        )  # fmt: skip


@triton.jit
def _turn_heads(
    x, y, c, s, first_head, head_stride, heads, head_dim, half,
    INTERLEAVED: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Some heads of one token: pairs (a, b) -> (a cos - b sin, b cos + a sin). The rest passes."""
    head = first_head + tl.arange(0, BLOCK_HEADS)[:, None]
    x_head = x + head.to(tl.int64) * head_stride
    y_head = y + head * head_dim
    pair = tl.arange(0, BLOCK_HALF)
    here = (head < heads) & (pair < half)[None, :]
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both_here = (head < heads) & (column < 2 * half)
        both = tl.load(x_head + column, mask=both_here, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, [BLOCK_HEADS, BLOCK_HALF, 2]))
        turned = tl.reshape(tl.join(first * c - second * s, second * c + first * s), [BLOCK_HEADS, 2 * BLOCK_HALF])
        tl.store(y_head + column, turned.to(y.dtype.element_ty), mask=both_here)
    else:
        first = tl.load(x_head + pair[None, :], mask=here, other=0.0).to(tl.float32)
        second = tl.load(x_head + half + pair[None, :], mask=here, other=0.0).to(tl.float32)
        tl.store(y_head + pair[None, :], (first * c - second * s).to(y.dtype.element_ty), mask=here)
        tl.store(y_head + half + pair[None, :], (second * c + first * s).to(y.dtype.element_ty), mask=here)
    if BLOCK_REST > 0:
        rest = 2 * half + tl.arange(0, BLOCK_REST)[None, :]
        rest_here = (head < heads) & (rest < head_dim)
        tl.store(y_head + rest, tl.load(x_head + rest, mask=rest_here, other=0.0), mask=rest_here)


def _blocks(q_heads: int, k_heads: int, head_dim: int, rotary_dim: int) -> dict[str, int]:
    """Block sizes of a launch: the padded halves, the padded rest (0: none), and as many heads as fill a program."""
    half = next_power_of_2(rotary_dim // 2)
    rest = next_power_of_2(head_dim - rotary_dim) if rotary_dim < head_dim else 0
    fitting = max(_BLOCK_ELEMENTS // next_power_of_2(2 * half + rest), 1)
    q_block, k_block = (min(next_power_of_2(max(heads, 1)), fitting) for heads in (q_heads, k_heads))
    return {"Q_BLOCK": q_block, "K_BLOCK": k_block, "BLOCK_HALF": half, "BLOCK_REST": rest}


def _launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    batch, tokens, q_heads, head_dim = q.shape
    k_heads = k.shape[2]
    turned_q, turned_k = _fake(q, k, cos, sin, rotary_dim, interleaved, inverse)
    blocks = _blocks(q_heads, k_heads, head_dim, rotary_dim)
    head_blocks = triton.cdiv(q_heads, blocks["Q_BLOCK"]) + triton.cdiv(k_heads, blocks["K_BLOCK"])
    if batch * tokens * head_blocks:
        table_stride = cos.stride(0) if cos.dim() == 3 else 0
        _turn[(batch * tokens, head_blocks)](
            q, k, cos, sin, turned_q, turned_k, *q.stride()[:3], *k.stride()[:3], table_stride, tokens, q_heads,
            k_heads, head_dim, rotary_dim // 2, INTERLEAVED=interleaved, INVERSE=inverse, **blocks,
            num_warps=_NUM_WARPS,
        )  # fmt: skip
    return turned_q, turned_k


def _fake(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)


_TURN = operator(
    "rope_turn(Tensor q, Tensor k, Tensor cos, Tensor sin, int rotary_dim, bool interleaved, bool inverse) -> (Tensor, "
    "Tensor)",
    _launch,
    _fake,
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.rotary_dim, ctx.interleaved = rotary_dim, interleaved
        turned: tuple[Tensor, Tensor] = _TURN(q, k, cos, sin, rotary_dim, interleaved, False)
        return turned

    @staticmethod
    @first_derivatives_only("rope", "triton")
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        turned_back = _TURN(_heads(dq), _heads(dk), cos, sin, ctx.rotary_dim, ctx.interleaved, True)
        return *turned_back, None, None, None, None


def _heads(x: Tensor) -> Tensor:
    """[B, T, H, D] whose last stride is 1: as it is where the layout allows, else a copy."""
    return x if x.stride(3) == 1 else x.contiguous()


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, rotary_dim: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """As kernels/reference.py, contiguous, with products in fp32, rounded once. Saves cos and sin."""
    check_rope(q, k, cos, sin, rotary_dim)
    turned: tuple[Tensor, Tensor] = _Rope.apply(
        _heads(q), _heads(k), cos.contiguous(), sin.contiguous(), rotary_dim, interleaved
    )
    return turned


def _needs(spec: Spec) -> str | None:
    head_dim = int(spec.attributes["head_dim"])
    return None if head_dim <= _MAX_HEAD_DIM else f"needs head_dim <= {_MAX_HEAD_DIM}, this is {head_dim}"


def _compilations() -> list[Compilation]:
    found = []
    # Amber's, CrystalCoder's, and the largest that is offered
    shapes = [(dtype, *shape) for dtype in TRITON_DTYPES.values() for shape in ((128, 128, False), (128, 32, True))]
    for dtype, head_dim, rotary_dim, interleaved in (*shapes, ("fp32", _MAX_HEAD_DIM, _MAX_HEAD_DIM, True)):
        types = dict.fromkeys(("q", "k", "turned_q", "turned_k"), f"*{dtype}:16")
        types |= dict.fromkeys(("cos", "sin"), "*fp32:16")
        types |= dict.fromkeys((f"{x}_{of}_stride" for x in "qk" for of in ("batch", "token", "head")), "i32:16")
        types |= dict.fromkeys(("table_stride", "tokens", "q_heads", "k_heads", "head_dim", "half"), "i32:16")
        for inverse in (False, True):
            constants = {"INTERLEAVED": interleaved, "INVERSE": inverse, **_blocks(32, 32, head_dim, rotary_dim)}
            pairs = "interleaved" if interleaved else "rotate-half"
            name = f"{'backward' if inverse else 'forward'} {dtype} d{head_dim} {pairs} {rotary_dim}"
            found.append(compilation(name, _turn, types, constants, _NUM_WARPS))
    return found


IMPLEMENTATION = implementation("rope", rope, _compilations, _needs)
