"""The words that kernels are described in: what a use is, what an implementation is, and the one error.

What a reader would get wrong: a Spec describes a *use* and not an op. The same op in two modules is two uses, and each may get another
implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    attributes: Mapping[str, int | float | bool | str] = field(default_factory=dict)  # static: head_dim, scale, eps, vocab_size ...


def available_everywhere(spec: Spec) -> str | None:
    """The `unavailable` of an implementation without conditions."""
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute one op. `unavailable` gives None, or the reason, in words that a person can act on."""

    op: str
    source: str  # "reference", "torch", "triton", "flash_attn", or a third party's own name
    function: Callable[..., Any]
    unavailable: Callable[[Spec], str | None] = available_everywhere
    version: str = f"torch {torch.__version__}"  # of the package that provides it
