"""attention: causal flash attention for training, forward and a deterministic backward, with document boundaries.

The configuration is looked up, not tuned: CONFIGURATIONS has one line per kernel, target, element size and head width,
each proven by `weftrain kernels compile`. The kernels themselves are in _attention_kernels.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weftrain.kernels.arguments import check_attention
from weftrain.kernels.contract import KIN, TARGETS, Compilation, Spec
from weftrain.kernels.derivatives import first_derivatives_only, outside_autocast
from weftrain.kernels.triton_ops import _attention_kernels as kernels
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
_LARGEST_TOKEN_STRIDE = 2**23  # of a tile of 256 rows the offsets are 32-bit


class Configuration(NamedTuple):
    """What a launch is compiled with besides the shapes: queries and keys in a tile, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def _lines(**targets: tuple[int, int, int, int]) -> dict[str, Configuration]:
    """Of every target: one that is not named takes the line of its kin, if that is named."""
    given = targets | {target: targets[kin] for target, kin in KIN.items() if kin in targets and target not in targets}
    return {target: Configuration(*line) for target, line in given.items()}


# (kernel, bytes of an element, head width) -> target -> queries, keys, warps, stages. Heads narrower than 64 take the
# lines of 64. fp32 products are multiply-adds of single elements on NVIDIA, whole tiles unrolled: small tiles, or they
# spill.
CONFIGURATIONS: dict[tuple[str, int, int], dict[str, Configuration]] = {
    ("forward", 2, 64): _lines(
        sm_80=(128, 64, 8, 3), sm_90=(128, 128, 8, 3), sm_100=(128, 64, 8, 3), gfx942=(128, 64, 4, 2)
    ),
    ("forward", 2, 128): _lines(
        sm_80=(128, 32, 8, 3), sm_90=(128, 64, 8, 3), sm_100=(128, 64, 8, 3), gfx942=(128, 64, 4, 2)
    ),
    ("forward", 2, 256): _lines(
        sm_80=(64, 32, 8, 2),
        sm_90=(64, 32, 8, 2),
        sm_100=(64, 64, 8, 2),
        gfx942=(64, 32, 4, 2),
        gfx90a=(32, 32, 4, 1),
    ),
    ("forward", 4, 64): _lines(
        sm_80=(32, 32, 8, 1), sm_90=(32, 32, 8, 1), sm_100=(32, 32, 8, 1), gfx942=(64, 32, 4, 1)
    ),
    ("forward", 4, 128): _lines(
        sm_80=(32, 16, 4, 1),
        sm_90=(16, 16, 4, 1),
        sm_100=(16, 16, 4, 1),
        gfx942=(64, 32, 4, 1),
        sm_86=(16, 16, 4, 1),
        sm_89=(16, 16, 4, 1),
        sm_120=(16, 16, 4, 1),
    ),
    ("forward", 4, 256): _lines(
        sm_80=(16, 16, 4, 1), sm_90=(16, 16, 4, 1), sm_100=(16, 16, 4, 1), gfx942=(32, 16, 4, 1)
    ),
    ("backward_keys", 2, 64): _lines(
        sm_80=(32, 64, 4, 2), sm_90=(64, 128, 8, 2), sm_100=(64, 64, 8, 2), gfx942=(64, 64, 4, 1)
    ),
    ("backward_keys", 2, 128): _lines(
        sm_80=(64, 64, 8, 1), sm_90=(32, 128, 8, 2), sm_100=(64, 64, 8, 2), gfx942=(32, 64, 4, 1)
    ),
    ("backward_keys", 2, 256): _lines(
        sm_80=(32, 32, 8, 2), sm_90=(64, 32, 8, 1), sm_100=(32, 64, 8, 2), gfx942=(16, 32, 4, 1)
    ),
    ("backward_keys", 4, 64): _lines(
        sm_80=(32, 32, 8, 1), sm_90=(32, 32, 8, 1), sm_100=(32, 32, 8, 1), gfx942=(32, 32, 4, 1)
    ),
    ("backward_keys", 4, 128): _lines(
        sm_80=(16, 16, 4, 1), sm_90=(16, 16, 4, 1), sm_100=(16, 16, 4, 1), gfx942=(16, 32, 4, 1)
    ),
    ("backward_keys", 4, 256): _lines(
        sm_80=(16, 16, 4, 1),
        sm_90=(16, 16, 8, 1),
        sm_100=(16, 16, 8, 1),
        gfx942=(16, 16, 4, 1),
        sm_86=(16, 16, 8, 1),
        sm_89=(16, 16, 8, 1),
        sm_120=(16, 16, 8, 1),
    ),
    ("backward_queries", 2, 64): _lines(
        sm_80=(64, 64, 8, 2), sm_90=(128, 64, 8, 3), sm_100=(128, 64, 8, 2), gfx942=(128, 64, 4, 2)
    ),
    ("backward_queries", 2, 128): _lines(
        sm_80=(64, 64, 8, 2), sm_90=(128, 64, 8, 2), sm_100=(128, 64, 8, 2), gfx942=(64, 32, 4, 2)
    ),
    ("backward_queries", 2, 256): _lines(
        sm_80=(32, 32, 8, 2),
        sm_90=(64, 16, 8, 2),
        sm_100=(64, 64, 8, 1),
        gfx942=(64, 32, 4, 1),
        gfx90a=(64, 16, 4, 1),
    ),
    ("backward_queries", 4, 64): _lines(
        sm_80=(32, 32, 8, 1), sm_90=(32, 32, 8, 1), sm_100=(32, 32, 8, 1), gfx942=(32, 32, 4, 1)
    ),
    ("backward_queries", 4, 128): _lines(
        sm_80=(32, 16, 4, 1),
        sm_90=(16, 16, 4, 1),
        sm_100=(16, 16, 4, 1),
        gfx942=(32, 16, 4, 1),
        sm_120=(16, 16, 4, 1),
    ),
    ("backward_queries", 4, 256): _lines(
        sm_80=(16, 16, 8, 1), sm_90=(16, 16, 8, 1), sm_100=(16, 16, 8, 1), gfx942=(32, 16, 4, 1)
    ),
}

# (bytes of an element, head width) -> target -> what the backward in one kernel takes: backward_keys that adds dq, too,
# in turn. Elsewhere dq has a kernel of its own, which computes two of the products and the probabilities again: 7
# products and 2 exponentials a score where one kernel needs 5 and 1. It pays with traffic to the L2 cache: 4 D /
# block_n bytes a score for dq, where both forms read 4 D / block_n for q and dout. In cycles a score of one
# multiprocessor (products: 2 D / its flops a cycle; exponentials: 1/16; L2: its share of the device's bandwidth):
#
# | device, D, form                  | products + exponentials       | L2                | one kernel instead of two |
# |----------------------------------|-------------------------------|-------------------|---------------------------|
# | sm_90, 64: one, 128 keys         | 5 x 0.03 + 0.06 = 0.21        | 4 / 24 = 0.17     | 0.34 -> 0.21: taken       |
# | sm_90, 128: one, 128 keys        | 5 x 0.06 + 0.06 = 0.36 (0.46) | 8 / 24 = 0.33     | 0.55 (0.61) -> 0.46: taken |
# | sm_90, 256: 32 keys fit          | 5 x 0.12 + 0.06 = 0.66        | 64 / 24 = 2.7     | 0.97 -> 2.7: not taken    |
# | sm_100, 64: one, 128 keys        | 5 x 0.016 + 0.06 = 0.14       | 4 / 36 = 0.11     | 0.23 -> 0.14: taken       |
# | sm_100, 128: 64 keys fit         | 5 x 0.03 + 0.06 = 0.22        | 16 / 36 = 0.44    | 0.34 -> 0.44: not taken   |
# | sm_120, 128: one, 64 keys        | 5 x 0.5 + 0.06 = 2.6          | 16 / 13 = 1.2     | 3.6 -> 2.6: taken         |
#
# In parentheses with what the tile costs: 32 queries use two thirds of HGMMA's rate, and dq of 32 rows is HMMA. Not on
# sm_80, sm_86 and sm_89, which have no float atomics of 16 bytes; not on AMD, whose L2 caches are several and not
# coherent; not in fp32, where tiles are 16 keys wide. No GPU has confirmed this: `weftrain kernels bench` does.
ONE_KERNEL_BACKWARD: dict[tuple[int, int], dict[str, Configuration]] = {
    (2, 64): _lines(sm_90=(64, 128, 8, 2), sm_100=(64, 128, 8, 2), sm_120=(32, 64, 4, 2)),
    (2, 128): _lines(sm_90=(32, 128, 8, 2), sm_120=(32, 64, 8, 2)),
}

# (kernel, bytes of an element, head width) -> target -> what is taken instead where query heads share a key head; None:
# not this kernel.
GROUPED: dict[tuple[str, int, int], dict[str, Configuration | None]] = {
    ("backward_keys", 2, 64): {"sm_90": Configuration(32, 128, 8, 2)},  # 64 queries spill 8 bytes
    ("backward", 2, 64): {"sm_90": Configuration(32, 128, 8, 2)},  # 64 queries spill 32 bytes
    ("backward", 2, 128): {"sm_90": None},  # 32 queries spill 56 bytes, and 16 leave HGMMA at a third of its rate
}

# In bf16 with head width 128 and documents: what a launch could take on a target besides its line, and why some targets
# could not.
CANDIDATES: dict[tuple[str, Configuration], dict[str, str]] = {
    ("forward", Configuration(128, 32, 8, 3)): {},
    ("forward", Configuration(128, 64, 8, 3)): {
        "sm_80": "spills 8 bytes",
        "gfx942": "needs 80 KiB of 64 KiB shared memory",
    },
    ("backward_keys", Configuration(32, 64, 8, 2)): {"gfx942": "spills 1320 bytes"},
    ("backward_queries", Configuration(64, 64, 8, 2)): {"sm_100": "spills 16 bytes", "gfx942": "spills 640 bytes"},
    ("backward_queries", Configuration(64, 32, 4, 2)): {},
}


def configuration(kernel: str, on: str, element_size: int, block_d: int, grouped: bool = False) -> Configuration:
    """What a launch of `kernel` takes on target `on`, for elements of 2 or 4 bytes in heads padded to block_d."""
    return lines(kernel, element_size, max(64, block_d), grouped)[on]


def one_kernel_backward(on: str, element_size: int, block_d: int, grouped: bool) -> Configuration | None:
    """What the backward in one kernel takes; None: there are two, which is also right for every call."""
    return lines("backward", element_size, max(64, block_d), grouped).get(on)


def lines(kernel: str, element_size: int, head_width: int, grouped: bool) -> dict[str, Configuration]:
    """The configurations of one kernel by target; "backward" is backward_keys with dq, on some targets."""
    key = kernel, element_size, head_width
    usual = ONE_KERNEL_BACKWARD.get(key[1:], {}) if kernel == "backward" else CONFIGURATIONS[key]
    taken = usual | (GROUPED.get(key, {}) if grouped else {})
    return {target: found for target, found in taken.items() if found is not None}


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
        found = configuration("forward", target(q.device), q.element_size(), _block_d(D))
        kernels.forward[_grid(T, found.block_m, B * H)](
            q, k, v, document_start, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], T, H, H // k.shape[2],
            scale * _LOG2_E,
            **_common(D, found, document_start is not None), num_warps=found.num_warps, num_stages=found.num_stages,
        )  # fmt: skip
    return out, lse


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
    name = f"{kernel} {dtype} d{head_dim} {found.block_m}x{found.block_n}w{found.num_warps}s{found.num_stages}"
    name += " documents" * documents + " grouped" * grouped + " candidate" * (not how.get("default", True))
    constants = _common(head_dim, found, documents) | ({} if documents else {"document_start": None})
    types = _types(dtype)
    if kernel in ("backward", "backward_keys"):
        one = kernel == "backward"
        constants |= {"SCAN": kernels.SCAN, "GROUPED": grouped, "QUERIES": one, "INTERPRETED": False}
        types, constants = (types | {"dq": "*fp32:16"}, constants) if one else (types, constants | _NO_QUERIES)
        kernel = "backward_keys"
    return compilation(
        name, getattr(kernels, kernel), types, constants, found.num_warps, found.num_stages,
        matrix_instructions=dtype != "fp32", **how,
    )  # fmt: skip


_NO_QUERIES = {"dq": None, "turn": None}


def _compilations() -> list[Compilation]:
    """Every line of CONFIGURATIONS, with documents and without, and the candidates."""
    made = []
    for dtype, element_size in _ELEMENT_SIZES.items():
        for head_dim in _GATE_HEAD_DIMS:
            constants = {"HEAD_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_M": _ROW_SUMS_BLOCK}
            made.append(compilation(f"row_sums {dtype} d{head_dim}", kernels.row_sums, _types(dtype), constants, 4))
            for kernel, grouped in (
                ("forward", False),
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
        targets = tuple(on for on in TARGETS if CONFIGURATIONS[kernel, 2, 128][on] != found)
        made.append(_compilation(kernel, "bf16", 128, found, True, targets=targets, default=False, excluded=excluded))
    return made


IMPLEMENTATION = implementation("attention", attention, _compilations, _needs)
