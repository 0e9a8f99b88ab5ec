"""What every Triton op here shares: when it can run, on which target, and how its launches become torch operators.

A launch is hidden from torch.compile behind an operator (`torch.ops.weftrain.*`), one for the forward and one for the
backward, joined by an autograd.Function. So graphs stay whole, fake tensors have shapes, and selective checkpointing
can name the operator. Nothing is tuned at run time: a configuration is a function of target, dtype and shape, so
results do not change from one run to the next, and `weftrain kernels compile` sees exactly what a launch takes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from weftrain.kernels.contract import TARGETS, Compilation, Implementation, Spec
from weftrain.kernels.operators import define_operator

VERSION = f"triton {triton.__version__}"
TRITON_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # as signatures spell them
TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}  # as constants
_LIBRARY = torch.library.Library("weftrain", "FRAGMENT")


def interpreting() -> bool:
    """True where Triton was imported with TRITON_INTERPRET=1: kernels are then run by numpy, on a CPU, slowly."""
    return bool(triton.knobs.runtime.interpret)


def unavailable(spec: Spec) -> str | None:
    """Why no op of this folder can run, or None: it takes a GPU among TARGETS, or the interpreter if it is on."""
    if spec.dtype not in TRITON_DTYPES:
        return f"takes float32, bfloat16 and float16, not {str(spec.dtype).removeprefix('torch.')}"
    if spec.device == "cpu":
        if not interpreting():
            return (
                "Triton has no CPU backend; `weftrain kernels check --source triton --interpret` runs it under "
                "Triton's interpreter"
            )
        return _interpreter_unfit(spec.dtype)
    if spec.device != "cuda":
        return f"Triton is driven on cuda devices (NVIDIA, or AMD under ROCm), not on {spec.device}"
    if interpreting():
        return "TRITON_INTERPRET is set, so kernels would be interpreted on the host: unset it"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    found = target(torch.device("cuda"))
    return (
        None if found in TARGETS else f"its configurations are proven for {', '.join(TARGETS)}; this device is {found}"
    )


def _interpreter_unfit(dtype: torch.dtype) -> str | None:
    from weftrain.kernels.checks.interpreter import computes_bfloat16

    if dtype == torch.bfloat16 and not computes_bfloat16():
        return (
            f"the interpreter of {VERSION} computes on the bit patterns of bfloat16; `weftrain kernels check "
            "--interpret` mends it"
        )
    return None


@functools.cache
def _cuda_target(index: int) -> str:
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def target(device: torch.device) -> str:
    """ "sm_90", "gfx942" ...; on a CPU (interpreted) the first of TARGETS, whose configurations are the smallest."""
    if device.type != "cuda":
        return TARGETS[0]
    return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)


def operator(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The torch operator that runs `launch` on tensors of a GPU, and on those of a CPU when interpreted."""
    return define_operator(_LIBRARY, schema, {"CPU": launch, "CUDA": _on_the_device_of_its_tensors(launch)}, fake)


def _on_the_device_of_its_tensors(launch: Callable[..., Any]) -> Callable[..., Any]:
    """`launch` with the GPU of its first argument (a tensor, or a list) current: Triton launches on that one."""

    def run(first: Tensor | Sequence[Tensor], *rest: Any) -> Any:
        with torch.cuda.device_of(first if isinstance(first, Tensor) else first[0]):
            return launch(first, *rest)

    return run


def implementation(
    op: str,
    function: Callable[..., Any],
    compilations: Callable[[], Any],
    unavailable_too: Callable[[Spec], str | None] | None = None,
    of_each: Callable[..., Tensor] | None = None,
    thresholds: Mapping[str, int] | None = None,
) -> Implementation:
    """The registry's entry of an op: the common conditions first, then its own."""

    def reason(spec: Spec) -> str | None:
        return unavailable(spec) or (unavailable_too(spec) if unavailable_too else None)

    version = f"{VERSION}, interpreted" if interpreting() else VERSION
    return Implementation(
        op, "triton", function, reason, version, compilations, of_each=of_each, thresholds=thresholds or {}
    )


def compilation(
    name: str,
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    num_warps: int,
    num_stages: int = 3,
    **more: Any,
) -> Compilation:
    """The Compilation of `kernel`, whose runtime arguments have the `types` of their names; other types are ignored."""
    signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
    return Compilation(name, kernel, signature, constants, num_warps, num_stages, **more)


def next_power_of_2(n: int) -> int:
    """The block width of a row that one program holds."""
    return triton.next_power_of_2(n)


def rows_of(x: Tensor) -> Tensor:
    """[..., n] -> [rows, n] whose last stride is 1: a view where the layout allows, else a copy."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1] if x.dim() else 1)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
