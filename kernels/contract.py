"""The terms that kernels are described in: an op, a use of it by a module, an implementation, and the one error.

A Spec describes a *use*, not an op: the same op in two modules is two uses, and each may get another implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Arguments = dict[str, Any]  # one call's arguments by name
Attribute = Any  # of a use, static: a number, a text, or None
Change = Callable[[Arguments], Arguments]  # another call, made of an example's
Example = Callable[[str, torch.dtype], Arguments]  # (device, dtype) -> the arguments of a call, the same every time


class KernelError(ValueError):
    """A kernel choice that cannot be honoured. One line: what was asked, why not, and what there is instead."""


@dataclass(frozen=True)
class Size:
    """One way in which the calls of an op grow, with everything else small."""

    example: Callable[[int], Example]  # a call of that size
    grown: tuple[int, ...] = ()  # where `kernels check` looks for a path that no implementation declared
    thorough: tuple[int, ...] = ()  # the same, where it takes more than a second
    accumulates: bool = False  # results are sums over it: they must not stall in a narrow accumulator


@dataclass(frozen=True)
class Cost:
    """What a call of an implementation (not of the reference) may take of memory beyond arguments and results."""

    example: Example  # large enough that a larger order of growth shows, small enough for a second
    kept_bytes: Callable[[Arguments], int]  # from the forward to the backward
    peak_bytes: Callable[[Arguments], int]  # at any time of forward and backward; gradients are results


@dataclass(frozen=True)
class Op:
    """One op: its specification, example calls, and what a call must at least cost.

    Costs are of the *op*, whatever an implementation does: every input read once, every output written once, a
    multiply-add as two flops. An implementation that moves more bytes reaches a smaller share of the roofline.
    """

    function: Callable[..., Any]  # the specification: a function of kernels/reference.py
    exact: Callable[..., Any]  # the same in float64 on a CPU, written independently: the truth that errors refer to
    differentiable: tuple[str, ...]  # arguments that receive gradients
    examples: Mapping[str, Example]
    bytes_moved: Callable[[Arguments], int]  # forward alone
    flops: Callable[[Arguments], int]  # forward alone
    backward_cost: Callable[[Arguments], tuple[int, int]] | None = None  # (bytes, flops) of the backward alone
    outputs: tuple[str, ...] = ("output",)  # names of what it returns: of one tensor, or of those of a tuple
    in_place: tuple[str, ...] = ()  # arguments that the op overwrites
    inputs: tuple[str, ...] = ()  # of an op without gradients: the arguments that may hold any numbers, in any layout
    attributes: Mapping[str, Attribute] = field(default_factory=dict)  # of a typical use, for the table
    # of one call, as a Spec has them
    attributes_of: Callable[[Arguments], dict[str, Attribute]] = lambda arguments: {}
    wrong: Mapping[str, Change] = field(default_factory=dict)  # calls that every implementation refuses
    wrong_values: Mapping[str, Change] = field(default_factory=dict)  # the same, where values are looked at: on a CPU
    edges: Mapping[str, Change] = field(default_factory=dict)  # calls at the edge of what can be meant
    sizes: Mapping[str, Size] = field(default_factory=dict)  # by the names that Implementation.thresholds has
    ranges: Mapping[str, Change] = field(default_factory=dict)  # calls of numbers far from the usual
    steps: Sequence[Change] = ()  # of an op that works in place: how its numbers change from one call to the next
    cost: Cost | None = None
    # dtype of a result -> what the reference itself may err, where that is not what `kernels check` lets all others err
    caps: Mapping[torch.dtype, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.differentiable and self.backward_cost is None:
            raise KernelError(f"op {self.name}: has gradients and no backward_cost: state its bytes and flops")

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def data(self) -> tuple[str, ...]:
        """The arguments that may hold any numbers, in any layout."""
        return self.differentiable or self.inputs

    @property
    def small(self) -> tuple[str, ...]:
        """The examples that `kernels check` runs: odd sizes, and sizes at the edge of a block."""
        return tuple(name for name in self.examples if name.startswith(("odd", "edge")))

    @property
    def smallest(self) -> str:
        """The example for questions that are asked many times."""
        return "odd_small" if "odd_small" in self.examples else "odd"


@dataclass(frozen=True)
class Spec:
    """One use of one op by one module of the model, known when the model is built."""

    op: str
    module: str  # canonical module name: "layers.0.attention", "final_norm", "head", "optimizer"
    device: str  # torch device type: "cpu", "cuda"
    dtype: torch.dtype  # of the activations; for adamw and grad_norm, of the gradients
    # static: head_dim, scale, eps, vocab_size ...
    attributes: Mapping[str, Attribute] = field(default_factory=dict)


def available_everywhere(spec: Spec) -> str | None:
    """The `unavailable` of an implementation without conditions."""
    return None


# The GPUs that kernels are compiled for ahead of time; a Triton kernel is offered on these and on no other.
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx90a", "gfx942", "gfx950")
# target -> the one whose configurations it takes where it has none of its own: the same matrix instructions. sm_86,
# sm_89 and sm_120 hold 99 KiB of shared memory where sm_80 holds 163.
KIN = {
    "sm_86": "sm_80",
    "sm_89": "sm_80",
    "sm_120": "sm_80",
    "sm_103": "sm_100",
    "gfx90a": "gfx942",
    "gfx950": "gfx942",
}


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
    # of a kernel with matrix instructions: why one block a multiprocessor is enough; None: there must be two
    one_block: str | None = None


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
    # of grad_norm: what `function` gives for each tensor of a list alone, bit for bit, as one fp32 tensor [n]; None:
    # whoever wants that calls `function` for each
    of_each: Callable[[Sequence[torch.Tensor]], torch.Tensor] | None = None
    # size of a call -> the value past which another path of the code runs; `kernels check` crosses each. The names are
    # those of the op's `sizes` in kernels/ops/: {"tokens": 1024} says that 1,025 tokens take another path than 1,024.
    thresholds: Mapping[str, int] = field(default_factory=dict)
