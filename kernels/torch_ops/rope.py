"""rope by slices: what turns is read once and written once; a head that turns as a whole is not concatenated."""

from __future__ import annotations

import torch
from torch import Tensor

from weftrain.kernels.arguments import check_rope
from weftrain.kernels.contract import Implementation


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, rotary_dim: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """As kernels/reference.py. Saves cos and sin."""
    check_rope(q, k, cos, sin, rotary_dim)
    cos = cos.to(q.dtype)[..., None, :]  # [T, 1, rotary_dim / 2], or [B, T, 1, rotary_dim / 2]
    sin = sin.to(q.dtype)[..., None, :]
    return _turned(q, cos, sin, rotary_dim, interleaved), _turned(k, cos, sin, rotary_dim, interleaved)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    if interleaved:
        first, second = x[..., :rotary_dim].unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
        return turned if rotary_dim == x.shape[-1] else torch.cat((turned, x[..., rotary_dim:]), -1)
    first, second, rest = x.split((rotary_dim // 2, rotary_dim // 2, x.shape[-1] - rotary_dim), -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


IMPLEMENTATION = Implementation("rope", "torch", rope)
