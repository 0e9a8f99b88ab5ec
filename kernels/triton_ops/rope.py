"""rope: one program turns a few heads of one token, read once and written once; the backward is the same kernel,
turning back.

cos and sin are rounded to x.dtype first, as the contract says, but the products are taken in fp32 and rounded once. x
may be a view (q of a fused q, k, v): its strides are taken as they are. What is returned is contiguous.
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
    x, cos, sin, y, batch_stride, token_stride, head_stride, tokens, heads, head_dim, half,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Heads block of one token: pairs (a, b) -> (a cos - b sin, b cos + a sin); INVERSE turns by the negative angle.
    The rest passes.
    """
    position = tl.program_id(0).to(tl.int64)  # batch * tokens + token
    token = position % tokens
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    x_head = x + position // tokens * batch_stride + token * token_stride + head.to(tl.int64) * head_stride
    y_head = y + (position * heads + head) * head_dim
    pair = tl.arange(0, BLOCK_HALF)
    here = (head < heads) & (pair < half)[None, :]
    c = tl.load(cos + token * half + pair, mask=pair < half, other=0.0).to(x.dtype.element_ty).to(tl.float32)[None, :]
    s = tl.load(sin + token * half + pair, mask=pair < half, other=0.0).to(x.dtype.element_ty).to(tl.float32)[None, :]
    if INVERSE:
        s = -s
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


def _blocks(heads: int, head_dim: int, rotary_dim: int) -> dict[str, int]:
    """Block sizes of a launch: the padded halves, the padded rest (0: none), and as many heads as fill a program."""
    half = next_power_of_2(rotary_dim // 2)
    rest = next_power_of_2(head_dim - rotary_dim) if rotary_dim < head_dim else 0
    fitting = max(_BLOCK_ELEMENTS // next_power_of_2(2 * half + rest), 1)
    return {"BLOCK_HEADS": min(next_power_of_2(heads), fitting), "BLOCK_HALF": half, "BLOCK_REST": rest}


def _launch(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, inverse: bool) -> Tensor:
    batch, tokens, heads, head_dim = x.shape
    y = _fake(x, cos, sin, rotary_dim, interleaved, inverse)
    if y.numel():
        blocks = _blocks(heads, head_dim, rotary_dim)
        _turn[(batch * tokens, triton.cdiv(heads, blocks["BLOCK_HEADS"]))](
            x, cos, sin, y, x.stride(0), x.stride(1), x.stride(2), tokens, heads, head_dim, rotary_dim // 2,
            INTERLEAVED=interleaved, INVERSE=inverse, **blocks, num_warps=_NUM_WARPS,
        )  # fmt: skip
    return y


def _fake(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, inverse: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_TURN = operator(
    "rope_turn(Tensor x, Tensor cos, Tensor sin, int rotary_dim, bool interleaved, bool inverse) -> Tensor",
    _launch,
    _fake,
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rotary_dim, ctx.interleaved = rotary_dim, interleaved
        return _TURN(x, cos, sin, rotary_dim, interleaved, False)

    @staticmethod
    @first_derivatives_only("rope", "triton")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _TURN(_heads(dy), cos, sin, ctx.rotary_dim, ctx.interleaved, True), None, None, None, None


def _heads(x: Tensor) -> Tensor:
    """[B, T, H, D] whose last stride is 1: as it is where the layout allows, else a copy."""
    return x if x.stride(3) == 1 else x.contiguous()


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, rotary_dim: int, interleaved: bool) -> Tensor:
    """As kernels/reference.py, contiguous, with products in fp32, rounded once. Saves cos and sin."""
    check_rope(x, cos, sin, rotary_dim)
    return _Rope.apply(_heads(x), cos.contiguous(), sin.contiguous(), rotary_dim, interleaved)


def _needs(spec: Spec) -> str | None:
    head_dim = int(spec.attributes["head_dim"])
    return None if head_dim <= _MAX_HEAD_DIM else f"needs head_dim <= {_MAX_HEAD_DIM}, this is {head_dim}"


def _compilations() -> list[Compilation]:
    found = []
    # Amber's, CrystalCoder's, and the largest that is offered
    shapes = [(dtype, *shape) for dtype in TRITON_DTYPES.values() for shape in ((128, 128, False), (128, 32, True))]
    for dtype, head_dim, rotary_dim, interleaved in (*shapes, ("fp32", _MAX_HEAD_DIM, _MAX_HEAD_DIM, True)):
        types = dict.fromkeys(("x", "y"), f"*{dtype}:16") | dict.fromkeys(("cos", "sin"), "*fp32:16")
        sizes = ("batch_stride", "token_stride", "head_stride", "tokens", "heads", "head_dim", "half")
        types |= dict.fromkeys(sizes, "i32:16")
        for inverse in (False, True):
            constants = {"INTERLEAVED": interleaved, "INVERSE": inverse, **_blocks(32, head_dim, rotary_dim)}
            pairs = "interleaved" if interleaved else "rotate-half"
            name = f"{'backward' if inverse else 'forward'} {dtype} d{head_dim} {pairs} {rotary_dim}"
            found.append(compilation(name, _turn, types, constants, _NUM_WARPS))
    return found


IMPLEMENTATION = implementation("rope", rope, _compilations, _needs)
