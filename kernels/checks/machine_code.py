"""What a compiled kernel needs of a GPU, read from its machine code: registers, stack, spills, matrix instructions.

Nothing here is taken from the compiler's own report. NVIDIA's figures come from disassembling the cubin with the
cuobjdump that Triton brings along; AMD's from the metadata and the instructions of the assembly that was assembled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftrain.kernels.contract import KernelError

# KiB of shared memory that one block may hold: CUDA programming guide, "technical specifications per compute
# capability"; LDS of a workgroup of CDNA 2, 3 and 4.
_SHARED_LIMIT_KIB = {
    "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227, "sm_120": 99,
    "gfx90a": 64, "gfx942": 64, "gfx950": 160,
}  # fmt: skip
SHARED_LIMIT_BYTES = {target: kib * 1024 for target, kib in _SHARED_LIMIT_KIB.items()}

# Per target, the matrix instructions in order of preference: the first that occurs is the one that is named.
_WARP = ("HMMA", "QMMA", "OMMA", "IMMA", "DMMA")
_MATRIX_INSTRUCTIONS = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), _WARP),
    "sm_90": ("HGMMA", "QGMMA", "IGMMA", *_WARP),
    **dict.fromkeys(("sm_100", "sm_103"), ("UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA", *_WARP)),
    **dict.fromkeys(("gfx90a", "gfx942", "gfx950"), ("v_mfma", "v_smfmac")),
}
_TIMEOUT_S = 120


@dataclass(frozen=True)
class MachineCode:
    """registers: of one thread. spill_bytes: of one thread, 0 without an instruction that touches them."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    spill_instructions: int
    matrix_instruction: str | None
    matrix_instruction_count: int
    binary_bytes: int


def read(assembly: Mapping[str, Any], target: str) -> MachineCode:
    """The figures of triton.compile's `asm`. Raises KernelError where a tool's output is not understood."""
    if "hsaco" in assembly:
        return _read_amd(assembly["amdgcn"], assembly["hsaco"], target)
    return _read_nvidia(assembly["cubin"], assembly["ptx"], target)


def _read_nvidia(cubin: bytes, ptx: str, target: str) -> MachineCode:
    with tempfile.TemporaryDirectory(prefix="weftrain-cubin-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _cuobjdump("-res-usage", path)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise KernelError(f"cuobjdump's answer for a {target} kernel has no register count: {usage.strip()[:200]}")
        registers, stack = int(found[1]), int(found[2])
        # nothing to spill to, no product to find; disassembling costs more than compiling did
        if stack == 0 and "mma" not in ptx:
            return MachineCode(registers, 0, 0, 0, None, 0, len(cubin))
        listing = _cuobjdump("-sass", path)
    opcodes = re.findall(
        r"^[ \t]*/\*[0-9a-f]{4,}\*/[ \t]+(?:\{[ \t]*)?(?:@!?U?P\w+[ \t]+)?([A-Z][A-Z0-9]*)", listing, re.MULTILINE
    )
    if not opcodes:
        raise KernelError(f"cuobjdump's listing of a {target} kernel has no instruction: {listing.strip()[:200]}")
    spills = sum(opcode in ("LDL", "STL") for opcode in opcodes)
    name, count = _first_of(opcodes, target)
    return MachineCode(registers, stack, stack if spills else 0, spills, name, count, len(cubin))


def _read_amd(listing: str, hsaco: bytes, target: str) -> MachineCode:
    def figure(key: str) -> int:
        found = re.search(rf"^\s*{re.escape(key)}:\s*(\d+)", listing, re.MULTILINE)
        if found is None:
            raise KernelError(f"the assembly of a {target} kernel has no {key} in its metadata")
        return int(found[1])

    opcodes = re.findall(r"^[ \t]+([a-z][a-z0-9]*_[a-z0-9_]+)", listing, re.MULTILINE)
    spills = sum(opcode.startswith(("scratch_load", "scratch_store")) for opcode in opcodes)
    name, count = _first_of(opcodes, target)
    spilled = 4 * figure(".vgpr_spill_count")
    return MachineCode(
        figure(".vgpr_count"), figure(".private_segment_fixed_size"), spilled, spills, name, count, len(hsaco)
    )


def _first_of(opcodes: list[str], target: str) -> tuple[str | None, int]:
    for name in _MATRIX_INSTRUCTIONS[target]:
        count = sum(opcode.startswith(name) for opcode in opcodes)
        if count:
            return name, count
    return None, 0


def _cuobjdump(option: str, path: Path) -> str:
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    done = subprocess.run([tool, option, str(path)], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise KernelError(f"{tool} {option} failed with status {done.returncode}: {done.stderr.strip()[:200]}")
    return done.stdout
