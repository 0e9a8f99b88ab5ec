"""Whether torch can compute on the CUDA device that is asked for; if not, why, and what to do about it, in one line.

`absence` is asked before the first step, so that a missing driver or a card that this torch has no code for is a
sentence with its remedy, and no traceback out of the first kernel.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Absence:
    """Why a device cannot be used. broken: there is one, or one was named, and it does not work, so that computing on
    the CPU instead is not what its owner expects.
    """

    reason: str
    broken: bool


def absence(index: int = 0) -> Absence | None:
    """None where CUDA (or ROCm) device `index` can allocate and compute. It makes a context there, as a run would."""
    if torch.version.cuda is None and torch.version.hip is None:
        return Absence(f"torch {torch.__version__} is a CPU build: install a CUDA build of torch", False)
    if not torch.cuda.is_available():
        return _not_initialized()
    if index >= (count := torch.cuda.device_count()):
        there = "one device" if count == 1 else f"{count} devices"
        return Absence(f"there is no CUDA device {index}: torch sees {there}{_visible()}", True)
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    built_for = torch.cuda.get_arch_list()
    # torch names AMD's architectures in words of its own, and says nothing where it does not know
    if torch.version.hip is None and built_for and not any(_runs_on(code, *capability) for code in built_for):
        return Absence(
            f"torch {torch.__version__} has no code for {name} (sm_{capability[0]}{capability[1]}; it was built for "
            f"{', '.join(built_for)}): install a torch that was built for this device",
            True,
        )
    try:
        torch.zeros(1, device=torch.device("cuda", index)).add_(1)
        torch.cuda.synchronize(index)
    except RuntimeError as error:
        return Absence(
            f"{name} does not answer ({_first_line(error)}): see `nvidia-smi` for a process that holds it, or a fault "
            "of the device",
            True,
        )
    return None


def computes_bfloat16(index: int = 0) -> bool:
    """Whether the device has arithmetic for bf16: NVIDIA's from sm_80 on; before that torch converts to fp32."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)


def _not_initialized() -> Absence:
    """Why torch.cuda.is_available() is False in a build for CUDA: what the initialisation itself says."""
    try:
        torch.cuda.init()
        said = "No CUDA GPUs are available"
    except (RuntimeError, AssertionError) as error:
        said = _first_line(error)
    if "too old" in said:
        found = re.search(r"found version (\d+)", said)
        has = f", which has CUDA {int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}" if found else ""
        return Absence(
            f"the NVIDIA driver{has}, is older than the CUDA {torch.version.cuda} of torch {torch.__version__}: "
            "update the driver, or install a torch that was built for an older CUDA",
            True,
        )
    if "no NVIDIA driver" in said:
        return Absence(
            "there is no NVIDIA driver: install one; a container needs the host's (docker run --gpus all)", False
        )
    if "No CUDA GPUs" in said:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is None:
            return Absence("the driver shows no GPU: see what `nvidia-smi -L` lists", False)
        return Absence(
            f"CUDA_VISIBLE_DEVICES={hidden} leaves no GPU: unset it, or name one that `nvidia-smi -L` lists",
            hidden not in ("", "-1"),
        )
    return Absence(
        f"CUDA cannot be initialised ({said}): `nvidia-smi` shows whether the driver works; one that was updated "
        "needs a restart",
        True,
    )


def _visible() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"


def _runs_on(code: str, major: int, minor: int) -> bool:
    """Machine code runs on its own major version from its minor on, PTX on everything newer, "sm_90a" on that alone."""
    if (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", code)) is None:
        return False
    kind, built, exact = found[1], (int(found[2]), int(found[3])), found[4] == "a"
    if exact:
        return built == (major, minor)
    return built <= (major, minor) and (kind == "compute" or built[0] == major)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
