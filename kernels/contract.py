"""The words that kernels are described in: what a use is, what an implementation is, and the one error.

What a reader would get wrong: a Spec describes a *use* and not an op. The same op in two modules is two uses, and each
may get another implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


class KernelError(ValueError):
    """A kernel choice that cannot be honoured. One line: what was asked, why not, and what there is instead."""


@dataclass(frozen=True)
class Spec:
    """One use of one op by one module of the model, known when the model is built."""

    op: str
    module: str  # canonical module name: "layers.0.attention", "final_norm", "head", "optimizer"
    device: str  # torch device type: "cpu", "cuda"
    dtype: torch.dtype  # of the activations; for adamw and grad_norm, of the gradients
    # static: head_dim, scale, eps, vocab_size ...
    attributes: Mapping[str, int | float | bool | str] = field(default_factory=dict)


def available_everywhere(spec: Spec) -> str | None:
    """The `unavailable` of an implementation without conditions."""
    return None


# The GPUs that kernels are compiled for ahead of time; a Triton kernel is offered on these and on no other.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Compilation:
    """One Triton kernel in one configuration, for `weftrain kernels compile`: what a launch would compile on a GPU.

    signature: runtime argument -> type in Triton's own notation, "*bf16:16" (pointer, 16-byte aligned), "i32:16" (a
    multiple of 16), "i32", "fp32"; an integer that is 1 at launch belongs to constexprs, as Triton specialises it.
    Every argument of the kernel is in exactly one of signature and constexprs.
    """

    name: str  # unique within the op: "forward bf16 d128", "backward_kv fp32 d64 64x32"
    kernel: Any  # what @triton.jit made
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    default: bool = True  # what a launch takes; False: a candidate that only `kernels bench` times
    excluded: Mapping[str, str] = field(default_factory=dict)  # target -> why this configuration is not for it
    targets: Sequence[str] = TARGETS  # where a launch may take it; elsewhere there is nothing to compile, and no row
    matrix_instructions: bool = False  # the machine code must contain tensor-core (matrix) instructions


@dataclass(frozen=True)
class Implementation:
    """One way to compute one op. `unavailable` gives None, or the reason, in words that a person can act on."""

    op: str
    source: str  # "reference", "torch", "cpp", "triton", "flash_attn", or a third party's own name
    function: Callable[..., Any]
    unavailable: Callable[[Spec], str | None] = available_everywhere
    version: str = f"torch {torch.__version__}"  # of the package that provides it
    compilations: Callable[[], Sequence[Compilation]] | None = None  # Triton kernels: what the compile gate compiles
    # that it is made of beside Python, such as C++ sources: they are part of its hash in the manifest
    files: Sequence[Path] = ()
