"""What a compiled kernel needs of a GPU, and what its code says of its speed: registers, spills, the blocks that a
multiprocessor holds at once, the share of wide memory accesses, the matrix instructions of the inner loop.

Nothing here is taken from the compiler's own report. NVIDIA's figures come from disassembling the cubin with the
cuobjdump that Triton brings along, and the widths of accesses from the PTX, which ptxas does not change; AMD's from the
metadata and the instructions of the assembly that was assembled.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
_WIDE_BYTES = 16  # of one thread's access


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks of one multiprocessor (AMD: compute unit) share."""

    warps: int
    blocks: int
    shared_kib: int


# CUDA programming guide, "technical specifications per compute capability"; AMD's of four SIMDs with eight waves each.
_MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164), "sm_86": Multiprocessor(48, 16, 100), "sm_89": Multiprocessor(48, 24, 100),
    "sm_90": Multiprocessor(64, 32, 228), "sm_100": Multiprocessor(64, 32, 228), "sm_103": Multiprocessor(64, 32, 228),
    "sm_120": Multiprocessor(48, 24, 100), "gfx90a": Multiprocessor(32, 32, 64), "gfx942": Multiprocessor(32, 32, 64),
    "gfx950": Multiprocessor(32, 32, 160),
}  # fmt: skip
_TENSOR_MEMORY_COLUMNS = 512  # of sm_100 and sm_103


@dataclass(frozen=True)
class MachineCode:
    """registers: of one thread. spill_bytes: of one thread, 0 without an instruction that touches them."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    spill_instructions: int
    matrix_instruction: str | None  # with its shape where it has one: "HGMMA.64x128x16"; of several, the most frequent
    matrix_instruction_count: int
    loop_matrix_instructions: int  # in the innermost loop that has most of them; 0 without such a loop
    loop_instructions: int  # all, in that loop
    wide_share: float | None  # of the bytes of global accesses, as they stand in the code; None without any
    blocks_per_multiprocessor: int
    binary_bytes: int


def read(assembly: Mapping[str, Any], target: str, *, warps: int, shared_bytes: int, tensor_memory: int) -> MachineCode:
    """The figures of triton.compile's `asm`. warps of a block; tensor_memory: columns of it. Raises KernelError where a
    tool's output is not understood.
    """
    if "hsaco" in assembly:
        code = _read_amd(assembly["amdgcn"], assembly["hsaco"], target)
    else:
        code = _read_nvidia(assembly["cubin"], assembly["ptx"], assembly["ttgir"], target)
        found = re.search(r"\.reqntid (\d+)", assembly["ptx"])  # with the warps that were specialised
        warps = int(found[1]) // 32 if found else warps
    blocks = blocks_per_multiprocessor(target, code.registers, warps, shared_bytes, tensor_memory)
    return replace(code, blocks_per_multiprocessor=blocks)


def blocks_per_multiprocessor(
    target: str, registers: int, warps: int, shared_bytes: int, tensor_memory: int = 0
) -> int:
    """How many blocks run there at once: the least of what warps, registers, shared and tensor memory allow."""
    there = _MULTIPROCESSORS[target]
    if target.startswith("sm_"):
        # a quarter of 65,536 registers for each of four schedulers, given to warps in units of 256
        warps_of_registers = 16384 // max(_up(registers * 32, 256), 256) * 4
        shared = _up(shared_bytes + 1024, 128)  # a block's own, and the system's
    else:
        # 512 registers of a lane in each of four SIMDs, in units of 8
        warps_of_registers = 512 // max(_up(registers, 8), 8) * 4
        shared = shared_bytes
    limits = [there.blocks, there.warps // warps, warps_of_registers // warps]
    limits += [there.shared_kib * 1024 // shared] if shared else []
    limits += [_TENSOR_MEMORY_COLUMNS // tensor_memory] if tensor_memory else []
    return min(limits)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _read_nvidia(cubin: bytes, ptx: str, ttgir: str, target: str) -> MachineCode:
    with tempfile.TemporaryDirectory(prefix="weftrain-cubin-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _cuobjdump("-res-usage", path)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise KernelError(f"cuobjdump's answer for a {target} kernel has no register count: {usage.strip()[:200]}")
        registers, stack = int(found[1]), int(found[2])
        # nothing to spill to, no product to find; disassembling costs more than compiling did
        wide = _wide_share(_ptx_accesses(ptx, ttgir))
        if stack == 0 and "mma" not in ptx:
            return MachineCode(registers, 0, 0, 0, None, 0, 0, 0, wide, 0, len(cubin))
        listing = _cuobjdump("-sass", path)
    found_code = _SASS.findall(listing)
    if not found_code:
        raise KernelError(f"cuobjdump's listing of a {target} kernel has no instruction: {listing.strip()[:200]}")
    index = {int(address, 16): at for at, (address, _, _) in enumerate(found_code)}
    opcodes = [opcode for _, opcode, _ in found_code]
    jumps = [
        (at, index.get(int(to[1], 16), at))
        for at, (_, opcode, rest) in enumerate(found_code)
        if opcode.startswith("BRA") and (to := re.search(r"0x([0-9a-f]+)", rest))
    ]
    spills = sum(opcode.split(".")[0] in ("LDL", "STL") for opcode in opcodes)
    matrix = _matrix(opcodes, jumps, target)
    return MachineCode(registers, stack, stack if spills else 0, spills, *matrix, wide, 0, len(cubin))


_SASS = re.compile(
    r"^[ \t]*/\*([0-9a-f]{4,})\*/[ \t]+(?:\{[ \t]*)?(?:@!?U?P\w+[ \t]+)?([A-Z][A-Z0-9]*(?:\.\w+)*)([^;\n]*)",
    re.MULTILINE,
)


def _ptx_accesses(ptx: str, ttgir: str) -> list[tuple[int, int]]:
    """(bytes that count, bytes of one thread's access) of each access of global memory. What the tensor memory
    accelerator copies for all threads at once counts as much as if each of them had copied its part.
    """
    found = [
        (size, size)
        for vector, bits in re.findall(r"\b(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx)
        for size in (int(vector or 1) * int(bits) // 8,)
    ]
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+|\d+)", ptx)
    found += [(int(size, 0), int(size, 0)) for size in copies]
    reqntid = re.search(r"\.reqntid (\d+)", ptx)
    threads = int(reqntid[1]) if reqntid else 128
    for shape, bits in re.findall(r"async_tma_\w+[^\n]*memdesc<((?:\d+x)+)[a-z]+(\d+)", ttgir):
        size = int(bits) // 8
        for extent in shape.strip("x").split("x"):
            size *= int(extent)
        found.append((max(size // threads, 1), _WIDE_BYTES))
    return found


def _wide_share(accesses: Sequence[tuple[int, int]]) -> float | None:
    total = sum(size for size, _ in accesses)
    return round(sum(size for size, width in accesses if width >= _WIDE_BYTES) / total, 4) if total else None


_AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}


def _read_amd(listing: str, hsaco: bytes, target: str) -> MachineCode:
    def figure(key: str) -> int:
        found = re.search(rf"^\s*{re.escape(key)}:\s*(\d+)", listing, re.MULTILINE)
        if found is None:
            raise KernelError(f"the assembly of a {target} kernel has no {key} in its metadata")
        return int(found[1])

    labels: dict[str, int] = {}
    opcodes: list[str] = []
    jumped: list[tuple[int, str]] = []
    for label, opcode, rest in re.findall(
        r"^(?:(\.L\w+):|[ \t]+([a-z][a-z0-9]*_[a-z0-9_]+)([^\n]*))", listing, re.MULTILINE
    ):
        if label:
            labels[label] = len(opcodes)
            continue
        if opcode.startswith(("s_branch", "s_cbranch")):
            jumped.append((len(opcodes), rest.split(";")[0].strip()))
        opcodes.append(opcode)
    jumps = [(at, labels.get(label, at)) for at, label in jumped]
    spills = sum(opcode.startswith(("scratch_load", "scratch_store")) for opcode in opcodes)
    sizes = [
        _AMD_BYTES.get(opcode.split("_")[2], 4)
        for opcode in opcodes
        if re.match(r"(global|buffer|flat)_(load|store)_", opcode)
    ]
    spilled = 4 * figure(".vgpr_spill_count")
    return MachineCode(
        figure(".vgpr_count"), figure(".private_segment_fixed_size"), spilled, spills,
        *_matrix(opcodes, jumps, target), _wide_share([(size, size) for size in sizes]), 0, len(hsaco),
    )  # fmt: skip


def _matrix(opcodes: Sequence[str], jumps: Sequence[tuple[int, int]], target: str) -> tuple[str | None, int, int, int]:
    """The kind of matrix instruction that is named, how many of them there are, and of the innermost loop with most of
    them, their number and that of all its instructions. A jump backwards is a loop.
    """
    for name in _MATRIX_INSTRUCTIONS[target]:
        here = [opcode.startswith(name) for opcode in opcodes]
        if not any(here):
            continue
        before = list(itertools.accumulate(here, initial=0))
        loops = [(first, last + 1, before[last + 1] - before[first]) for last, first in jumps if first < last]
        loops = [loop for loop in loops if loop[2]]
        inner = [loop for loop in loops if not any(o != loop and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)]
        first, past, count = max(inner, key=lambda loop: loop[2], default=(0, 0, 0))
        kinds = Counter(opcode for opcode, is_one in zip(opcodes, here, strict=True) if is_one)
        shape = re.search(r"\d+x\d+x\d+\w*|\b\d{4,}\b", kinds.most_common(1)[0][0])
        return (f"{name}.{shape[0]}" if shape else name), sum(here), count, past - first
    return None, 0, 0, 0


def _cuobjdump(option: str, path: Path) -> str:
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    done = subprocess.run([tool, option, str(path)], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise KernelError(f"{tool} {option} failed with status {done.returncode}: {done.stderr.strip()[:200]}")
    return done.stdout
