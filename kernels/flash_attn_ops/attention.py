"""attention by Dao-AILab's flash-attn: version 3 on Hopper where it is there, else version 2.

The backward of flash-attn adds into dq with float atomics unless it is told not to. Source `flash_attn` always passes
deterministic=True; source `flash_attn_atomic` is the faster backward whose bits differ from run to run, and nobody gets
it without naming it. Read in flash_attn/flash_attn_interface.py, commit 0053002, and hopper/flash_attn_interface.py,
commit 01afd16.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from weftrain.kernels.arguments import check_attention
from weftrain.kernels.contract import Implementation, KernelError, Spec
from weftrain.kernels.derivatives import without_second_derivatives

_MAX_HEAD_DIM = 256
_INSTALL = "pip install flash-attn --no-build-isolation"
_INSTALL_3 = "build the folder hopper/ of github.com/Dao-AILab/flash-attention"
_NO_DOCUMENTS = (
    "flash-attn takes documents as cumulative lengths, whose number depends on the data, so each call would wait for "
    "the device; "
    "use source triton or sdpa for document boundaries"
)


def attention_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    document_start: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal self-attention: q [B, T, H, D], k and v [B, T, H_kv, D] in bf16 or fp16 -> [B, T, H, D]
    (kernels/reference.py), layout and strides as they are.

    Scores and softmax in fp32, probabilities rounded to q.dtype before they meet v. Saves q, k, v, the output and the
    logsumexp. Deterministic. Where query heads share a key head, flash-attn's own backward writes dk and dv of every
    query head and adds them up. Raises KernelError for document_start, which flash-attn could only take as cumulative
    lengths.
    """
    return _version_2(q, k, v, scale, document_start, window, deterministic=True)


def attention_2_atomic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    document_start: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """attention_2 with the backward that adds dq with float atomics: faster, and its bits differ from run to run."""
    return _version_2(q, k, v, scale, document_start, window, deterministic=False)


def attention_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    document_start: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """attention_2 by version 3's kernels for Hopper; all else is the same. Deterministic."""
    return _version_3(q, k, v, scale, document_start, window, deterministic=True)


def attention_3_atomic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    document_start: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """attention_3 with the backward that adds dq with float atomics: faster, and its bits differ from run to run."""
    return _version_3(q, k, v, scale, document_start, window, deterministic=False)


def _version_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    document_start: Tensor | None,
    window: int | None,
    *,
    deterministic: bool,
) -> Tensor:
    _check(q, k, v, document_start, window)
    if q.numel() == 0:
        return q + 0 * (k.sum() + v.sum())  # as empty, and nothing is launched
    from flash_attn import flash_attn_func

    output = flash_attn_func(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=True,
        window_size=_sides(window),
        deterministic=deterministic,
    )
    return without_second_derivatives(output, "attention", "flash_attn" if deterministic else "flash_attn_atomic")


def _version_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    document_start: Tensor | None,
    window: int | None,
    *,
    deterministic: bool,
) -> Tensor:
    _check(q, k, v, document_start, window)
    if q.numel() == 0:
        return q + 0 * (k.sum() + v.sum())
    from flash_attn_interface import flash_attn_func

    output = flash_attn_func(
        q, k, v, softmax_scale=scale, causal=True, window_size=_sides(window), deterministic=deterministic
    )
    # early builds gave (output, logsumexp), whatever was asked
    output = output[0] if isinstance(output, tuple) else output
    return without_second_derivatives(output, "attention", "flash_attn" if deterministic else "flash_attn_atomic")


def _check(q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None, window: int | None) -> None:
    check_attention(q, k, v, document_start, window)
    if document_start is not None:
        raise KernelError(f"attention: {_NO_DOCUMENTS}")


def _sides(window: int | None) -> tuple[int, int]:
    """How many keys before and after its own a query sees, as flash-attn counts; -1: all of that side."""
    return (-1, -1) if window is None else (window - 1, 0)


def _unfit(spec: Spec) -> str | None:
    """What both versions ask of a use, before anybody looks for a package or a device."""
    if spec.device != "cuda":
        return f"needs an NVIDIA GPU, not {spec.device}"
    if spec.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {str(spec.dtype).removeprefix('torch.')}"
    head_dim = int(spec.attributes.get("head_dim", 8))
    if head_dim % 8 or not 8 <= head_dim <= _MAX_HEAD_DIM:
        return f"needs head_dim a multiple of 8 up to {_MAX_HEAD_DIM}, this is {head_dim}"
    return _NO_DOCUMENTS if spec.attributes.get("document_start") else None


def _needs_version_2(spec: Spec) -> str | None:
    reason = _unfit(spec)
    if reason is None and importlib.util.find_spec("flash_attn") is None:
        reason = f"flash_attn is not installed: {_INSTALL}"
    return reason or _needs_gpu("flash-attn 2", lambda major: major >= 8, "sm_80 or newer")


def _needs_version_3(spec: Spec) -> str | None:
    reason = _unfit(spec)
    if reason is None and importlib.util.find_spec("flash_attn_interface") is None:
        reason = f"flash_attn_interface (flash-attn 3) is not installed: {_INSTALL_3}"
    return reason or _needs_gpu("flash-attn 3", lambda major: major == 9, "Hopper, sm_90")


def _needs_gpu(name: str, fits: Callable[[int], bool], wanted: str) -> str | None:
    if torch.version.hip is not None:
        return (
            "on AMD, flash-attn chooses among kernels by an environment variable, one of them its old Triton kernel: "
            "not offered"
        )
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return None if fits(major) else f"{name} needs {wanted}; this is sm_{major}{minor}"


def _version(*distributions: str) -> str:
    for distribution in distributions:
        try:
            return f"{distribution} {importlib.metadata.version(distribution)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


_VERSION_2, _VERSION_3 = _version("flash-attn"), _version("flash-attn-3", "flashattn-hopper")

IMPLEMENTATION = [
    Implementation("attention", "flash_attn", attention_3, _needs_version_3, _VERSION_3),
    Implementation("attention", "flash_attn", attention_2, _needs_version_2, _VERSION_2),
    Implementation("attention", "flash_attn_atomic", attention_3_atomic, _needs_version_3, _VERSION_3),
    Implementation("attention", "flash_attn_atomic", attention_2_atomic, _needs_version_2, _VERSION_2),
]
