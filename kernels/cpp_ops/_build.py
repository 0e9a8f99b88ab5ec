"""Compiles the C++ of this folder once for each source, compiler and set of flags, and loads it.

This is no torch extension. The code sees pointers and sizes alone, so it compiles in seconds, without torch's headers,
and one library serves every torch version. It is written aside and renamed, so an interrupted build leaves nothing
behind (torch.utils.cpp_extension waits for ever on the lock file of a build that was killed). OpenMP is torch's own:
the library asks for libgomp.so.1, and that name is already loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from weftrain.kernels.arguments import FLOATS
from weftrain.kernels.contract import KernelError, Spec

SOURCES = ("attention.cpp", "grouped.cpp", "loss.cpp", "newton.cpp", "optimizer.cpp")
HEADERS = ("tiles.h", "vector.h")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-march=x86-64-v4",
    "-mavx512bf16",
    "-mtune=native",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
)
_FOLDER = Path(__file__).resolve().parent
FILES = tuple(_FOLDER / name for name in (*SOURCES, *HEADERS))  # one library of all of them serves every op


def unavailable(spec: Spec) -> str | None:
    """Why no op of this folder can run here, or None.

    The first call on a suitable machine compiles, which takes some seconds; a failing compiler is a reason too.
    """
    if spec.device != "cpu":
        return f"written for a CPU, not for {spec.device}"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"written for x86-64 under Linux, not for {platform.machine()} under {platform.system()}"
    if not _has_bf16_instructions():
        return "needs AVX-512 with bfloat16 instructions, which this CPU lacks"
    if spec.dtype not in FLOATS:
        return f"takes float32, bfloat16 and float16, not {str(spec.dtype).removeprefix('torch.')}"
    try:
        library()
    except KernelError as error:
        return str(error)
    return None


def needs_bfloat16(spec: Spec) -> str | None:
    """The further condition of the ops that are matrix products."""
    return (
        None
        if spec.dtype == torch.bfloat16
        else "written for bfloat16, the matrix products of fp32 are at peak in torch"
    )


@functools.cache
def _has_bf16_instructions() -> bool:
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
        flags = next((line for line in lines if line.startswith("flags")), "").split()
    return {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"} <= set(flags)


def library() -> ctypes.CDLL:
    """The loaded library, compiled first where the cache has none. Raises KernelError: no compiler, or what it said."""
    loaded = _attempt(os.environ.get("CXX", "g++"))  # the variable that every build tool, torch.compile too, takes
    if isinstance(loaded, KernelError):
        raise loaded
    return loaded


@functools.cache
def _attempt(name: str) -> ctypes.CDLL | KernelError:
    """Once for a compiler, also where it fails: `select` asks for every use of every op."""
    try:
        return _load(name)
    except KernelError as error:
        return error


def _load(name: str) -> ctypes.CDLL:
    compiler = shutil.which(name)
    if compiler is None:
        raise KernelError(f"the C++ compiler '{name}' is not on PATH: install g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256("\0".join((version, _cpu_name(), *FLAGS)).encode())
    for path in FILES:
        digest.update(path.read_bytes())
    path = _cache_folder() / f"cpp_ops-{digest.hexdigest()[:20]}.so"
    if not path.exists():
        _compile(compiler, path)
    loaded = ctypes.CDLL(str(path))
    loaded.weftrain_sum_of_squares.restype = ctypes.c_double
    loaded.weftrain_block.restype = ctypes.c_int64
    return loaded


@functools.cache
def has_tiles() -> bool:
    """Whether this CPU has AMX for bfloat16, and the system lets the process use it."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
        flags = next((line for line in lines if line.startswith("flags")), "").split()
    return {"amx_tile", "amx_bf16"} <= set(flags) and bool(library().weftrain_has_tiles())


def _cpu_name() -> str:
    """Part of the key: -mtune=native is another program on another CPU, and a home folder may be shared by several."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
        return next((line for line in lines if line.startswith("model name")), platform.machine())


def _cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weftrain" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise KernelError(f"{folder} cannot be made to keep compiled kernels in: {error.strerror}") from error
    return folder


def _compile(compiler: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:
        built = Path(aside) / path.name
        command = [compiler, *FLAGS, *(str(_FOLDER / name) for name in SOURCES), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            errors = (
                [line for line in done.stderr.splitlines() if "error" in line]
                or done.stderr.splitlines()
                or ["it said nothing"]
            )
            raise KernelError(f"{compiler} cannot compile kernels/cpp_ops: {errors[0]}")
        os.replace(built, path)  # two processes that compile at once write the same library


def refuse_unless(op: str, condition: bool, wanted: str, tensor: torch.Tensor) -> None:
    """Raises KernelError before addresses are handed over for what `unavailable` refuses."""
    if tensor.device.type != "cpu" or not condition:
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
        raise KernelError(
            f"{op}: source 'cpp' takes {wanted} on a CPU, not {found}; `select` would have chosen another source"
        )


def version() -> str:
    """What stands in the manifest; the sources are hashed there besides."""
    return f"weftrain C++, torch {torch.__version__}"


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor's first element; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def strides(*tensors: torch.Tensor) -> ctypes.Array[ctypes.c_int64]:
    """The first three strides of each [B, T, H, D] tensor, in elements."""
    values = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    return (ctypes.c_int64 * len(values))(*values)


def threads() -> ctypes.c_int:
    """How many threads torch would take."""
    return ctypes.c_int(torch.get_num_threads())
