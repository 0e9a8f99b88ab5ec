"""attention by Dao-AILab's flash-attn: version 3 on Hopper, version 4 on Hopper and Blackwell, else version 2.

The variants are tried in that order, and each says which compute capability it is for. The backward of flash-attn adds
into dq with float atomics unless it is told not to. Source `flash_attn` always passes deterministic=True; source
`flash_attn_atomic` is the faster backward whose bits differ from run to run, and nobody gets it without naming it. Read
in flash_attn/flash_attn_interface.py, commit 0053002, hopper/flash_attn_interface.py, commit 01afd16, and
flash_attn/cute/interface.py of flash-attn-4 4.0.0b36.

flash-attn-4 installs the folder flash_attn/cute and no flash_attn/__init__.py: that `flash_attn` can be found does not
mean that version 2 is there. Each version is therefore found by its own module, without importing a package.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weftrain.kernels.arguments import check_attention
from weftrain.kernels.contract import Implementation, KernelError, Spec
from weftrain.kernels.derivatives import without_second_derivatives
from weftrain.kernels.packages import installed

_MAX_HEAD_DIM = 256
_INSTALL = "pip install flash-attn --no-build-isolation"
_INSTALL_3 = "build the folder hopper/ of github.com/Dao-AILab/flash-attention"
_INSTALL_4 = "pip install flash-attn-4"
_NO_DOCUMENTS = (
    "flash-attn takes documents as cumulative lengths, whose number depends on the data, so each call would wait for "
    "the device; "
    "use source triton or sdpa for document boundaries"
)


Launch = Callable[[Tensor, Tensor, Tensor, float, int | None, bool], Any]  # q, k, v, scale, window, deterministic


def _launch_2(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, deterministic: bool) -> Any:
    from flash_attn.flash_attn_interface import flash_attn_func

    return flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=scale, causal=True, window_size=_sides(window, -1),
        deterministic=deterministic,
    )  # fmt: skip


def _launch_3(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, deterministic: bool) -> Any:
    from flash_attn_interface import flash_attn_func

    return flash_attn_func(
        q, k, v, softmax_scale=scale, causal=True, window_size=_sides(window, -1), deterministic=deterministic
    )


def _launch_4(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, deterministic: bool) -> Any:
    from flash_attn.cute import flash_attn_func

    return flash_attn_func(
        q, k, v, softmax_scale=scale, causal=True, window_size=_sides(window, None), deterministic=deterministic
    )


def _adapter(name: str, launch: Launch, *, deterministic: bool, doc: str) -> Callable[..., Tensor]:
    """The op by one version, a function of that name: the checks, nothing launched for nothing, one tensor, and no
    second derivatives.
    """
    source = "flash_attn" if deterministic else "flash_attn_atomic"

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        document_start: Tensor | None = None,
        window: int | None = None,
    ) -> Tensor:
        _check(q, k, v, document_start, window)
        if q.numel() == 0:
            return q + 0 * (k.sum() + v.sum())
        output = launch(q, k, v, scale, window, deterministic)
        # version 4 and early builds of version 3 give (output, logsumexp), whatever was asked
        output = output[0] if isinstance(output, tuple) else output
        return without_second_derivatives(output, "attention", source)

    attention.__name__ = attention.__qualname__ = name
    attention.__doc__ = doc
    return attention


_ATOMIC = "The same with the backward that adds dq with float atomics: faster, and its bits differ from run to run."

attention_2 = _adapter(
    "attention_2",
    _launch_2,
    deterministic=True,
    doc="""Causal self-attention: q [B, T, H, D], k and v [B, T, H_kv, D] in bf16 or fp16 -> [B, T, H, D]
    (kernels/reference.py), layout and strides as they are.

    Scores and softmax in fp32, probabilities rounded to q.dtype before they meet v. Saves q, k, v, the output and the
    logsumexp. Deterministic. Where query heads share a key head, flash-attn's own backward writes dk and dv of every
    query head and adds them up. Raises KernelError for document_start, which flash-attn could only take as cumulative
    lengths.
    """,
)
attention_2_atomic = _adapter("attention_2_atomic", _launch_2, deterministic=False, doc=_ATOMIC)
attention_3 = _adapter(
    "attention_3",
    _launch_3,
    deterministic=True,
    doc="attention_2 by version 3's kernels for Hopper. Deterministic, for head_dim up to 192.",
)
attention_3_atomic = _adapter("attention_3_atomic", _launch_3, deterministic=False, doc=_ATOMIC)
attention_4 = _adapter(
    "attention_4",
    _launch_4,
    deterministic=True,
    doc="attention_2 by version 4's kernels for Hopper and Blackwell, compiled on their first call. Deterministic.",
)
attention_4_atomic = _adapter("attention_4_atomic", _launch_4, deterministic=False, doc=_ATOMIC)


def _check(q: Tensor, k: Tensor, v: Tensor, document_start: Tensor | None, window: int | None) -> None:
    check_attention(q, k, v, document_start, window)
    if document_start is not None:
        raise KernelError(f"attention: {_NO_DOCUMENTS}")


def _sides(window: int | None, everything: int | None) -> tuple[int | None, int | None]:
    """How many keys before and after its own a query sees, as flash-attn counts; `everything`: all of that side."""
    return (everything, everything) if window is None else (window - 1, 0)


# ---- which version is there, and for which device


def _unfit(spec: Spec) -> str | None:
    """What all versions ask of a use, before anybody looks for a package or a device."""
    if spec.device != "cuda":
        return f"needs an NVIDIA GPU, not {spec.device}"
    if spec.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {str(spec.dtype).removeprefix('torch.')}"
    head_dim = _head_dim(spec)
    if head_dim % 8 or not 8 <= head_dim <= _MAX_HEAD_DIM:
        return f"needs head_dim a multiple of 8 up to {_MAX_HEAD_DIM}, this is {head_dim}"
    return _NO_DOCUMENTS if spec.attributes.get("document_start") else None


def _head_dim(spec: Spec) -> int:
    return int(spec.attributes.get("head_dim", 8))


def _needs_version_2(spec: Spec) -> str | None:
    reason = _unfit(spec)
    if reason is None and not installed("flash_attn.flash_attn_interface"):
        only = " (flash-attn-4 is, which is another package)" if installed("flash_attn.cute") else ""
        reason = f"flash_attn is not installed{only}: {_INSTALL}"
    if reason is None and not installed("flash_attn_2_cuda"):
        reason = f"flash_attn is installed without its extension flash_attn_2_cuda: {_INSTALL}"
    return reason or _needs_gpu("flash-attn 2", lambda major, minor: major >= 8, "sm_80 or newer")


def _needs_version_3(spec: Spec, *, deterministic: bool) -> str | None:
    reason = _unfit(spec)
    if reason is None and not installed("flash_attn_interface"):
        reason = f"flash_attn_interface (flash-attn 3) is not installed: {_INSTALL_3}"
    reason = reason or _needs_gpu("flash-attn 3", lambda major, minor: (major, minor) == (9, 0), "Hopper, sm_90")
    if reason is None and deterministic and _head_dim(spec) > 192:
        reason = f"flash-attn 3 has no deterministic backward for head_dim above 192, this is {_head_dim(spec)}"
    return reason


def _needs_version_4(spec: Spec, *, deterministic: bool) -> str | None:
    reason = _unfit(spec)
    if reason is None and not installed("flash_attn.cute"):
        reason = f"flash_attn.cute (flash-attn 4) is not installed: {_INSTALL_4}"
    if reason is None and not installed("cutlass"):
        reason = "flash-attn 4 is installed without cutlass, with which it compiles: pip install nvidia-cutlass-dsl"
    reason = reason or _needs_gpu(
        "flash-attn 4", lambda major, minor: major in (9, 10), "Hopper or Blackwell, sm_90 or sm_10x"
    )
    if reason is None and torch.cuda.get_device_capability()[0] == 10:
        head_dim = _head_dim(spec)
        if head_dim > 128 and head_dim != _MAX_HEAD_DIM:
            reason = f"flash-attn 4 needs head_dim <= 128 or {_MAX_HEAD_DIM} on Blackwell, this is {head_dim}"
        elif deterministic and head_dim == _MAX_HEAD_DIM:
            reason = "not every flash-attn 4 has a deterministic backward for head_dim 256 on Blackwell"
    return reason


def _needs_gpu(name: str, fits: Callable[[int, int], bool], wanted: str) -> str | None:
    if torch.version.hip is not None:
        return (
            "on AMD, flash-attn chooses among kernels by an environment variable, one of them its old Triton kernel: "
            "not offered"
        )
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return None if fits(major, minor) else f"{name} needs {wanted}; this is sm_{major}{minor}"


def _version(*distributions: str) -> str:
    for distribution in distributions:
        try:
            return f"{distribution} {importlib.metadata.version(distribution)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


_VERSION_3, _VERSION_4, _VERSION_2 = (
    _version("flash-attn-3", "flashattn-hopper"), _version("flash-attn-4"), _version("flash-attn"),
)  # fmt: skip

# Tried in this order: the versions written for one generation of devices before the one for all.
IMPLEMENTATION = [
    Implementation(
        "attention", "flash_attn", attention_3, functools.partial(_needs_version_3, deterministic=True), _VERSION_3
    ),
    Implementation(
        "attention", "flash_attn", attention_4, functools.partial(_needs_version_4, deterministic=True), _VERSION_4
    ),
    Implementation("attention", "flash_attn", attention_2, _needs_version_2, _VERSION_2),
    Implementation(
        "attention", "flash_attn_atomic", attention_3_atomic,
        functools.partial(_needs_version_3, deterministic=False), _VERSION_3,
    ),
    Implementation(
        "attention", "flash_attn_atomic", attention_4_atomic,
        functools.partial(_needs_version_4, deterministic=False), _VERSION_4,
    ),
    Implementation("attention", "flash_attn_atomic", attention_2_atomic, _needs_version_2, _VERSION_2),
]  # fmt: skip
