"""A process that computes on a torch device: its options, threads and memory, and what is recorded of them."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import os
import platform
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch

from weftrain.backends.common.base import options_of
from weftrain.core.backend import Fingerprint, Job
from weftrain.core.config import MAX_THREADS, Threads
from weftrain.core.errors import BackendError
from weftrain.core.formats.strict_model import StrictModel
from weftrain.kernels.cuda_devices import absence, computes_bfloat16
from weftrain.kernels.host_memory import huge_page_bytes, use_huge_pages

_CODE = (".py", ".cpp", ".h", ".cu", ".cuh")
# Environment variables with which a CPU's libraries choose instruction sets and modes of precision.
_CPU_SETTINGS = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE")


class DeviceOptions(StrictModel):
    """backend.options of every backend that computes with torch in processes of its own."""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if this machine has a CUDA device, else cpu
    threads: Threads = 0  # number of CPU threads of each process; 0: torch's default
    # on a CPU: allocate tensors in huge pages, which the process reuses; faster, and results are bitwise identical
    huge_pages: bool = True


Options = TypeVar("Options", bound=DeviceOptions)


def prepare_process(job: Job, wanted: type[Options]) -> tuple[Options, torch.device]:
    """The job's options and device, after this process was given its threads and allocator."""
    options = options_of(job, wanted)
    device = torch_device(options.device)
    use_threads(job, options.threads)
    keep_compiled_apart()
    if device.type == "cuda" and job.recipe.precision.compute == "bfloat16" and not computes_bfloat16():
        warnings.warn(
            f"{torch.cuda.get_device_name()} has no bf16 arithmetic (it came with sm_80), so steps are slow: set "
            "precision.compute=float32",
            stacklevel=3,
        )
    if device.type == "cuda" and job.recipe.precision.numerics == "replayable":
        ask_for_the_same_bits()
    if options.huge_pages and device.type == "cpu" and (reason := use_huge_pages()):
        warnings.warn(
            f"no huge pages, so steps are slower: {reason}; backend.options.huge_pages=false asks for none",
            stacklevel=3,
        )
    return options, device


def keep_compiled_apart() -> None:
    """From now on torch.compile takes from its cache only what was generated for this process's instruction set.

    By itself torch does not look (2.13): of loops that it generated for AVX-512, a process that
    ATEN_CPU_CAPABILITY=avx2 restricts compiles the same text for vectors of half the length, which reads and writes
    elsewhere: other results, or a fault.
    """
    tag = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    config = torch.compiler.config
    if hasattr(config, "cache_key_tag") and tag not in config.cache_key_tag:  # newer than the oldest torch
        config.cache_key_tag = " ".join(filter(None, (config.cache_key_tag, tag)))


def torch_device(wanted: str, index: int = 0) -> torch.device:
    """'auto', 'cpu' or 'cuda' -> a device. Raises BackendError where CUDA device `index` is asked for and cannot be
    used; auto then takes the CPU, and warns if there is a device that does not work.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    absent = absence(index)
    if absent is None:
        return torch.device("cuda")
    if wanted == "cuda":
        raise BackendError(f"backend.options.device is cuda, and {absent.reason}; or set device=cpu")
    if absent.broken:
        warnings.warn(f"computing on the CPU: {absent.reason}; device=cpu says that this is meant", stacklevel=2)
    return torch.device("cpu")


def ask_for_the_same_bits() -> None:
    """From now on torch takes deterministic algorithms on CUDA, and raises for an operation that has none.

    cuBLAS reads its setting when its first handle is made, so this comes before the first product.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # or every new tensor is written twice
    torch.backends.cudnn.benchmark = False


def use_threads(job: Job, option: int) -> None:
    """Give torch the CPU threads that the job asks for, or else the backend's option; 0 and None leave torch's own
    choice.

    Raises BackendError for more than any machine has: a replay's come from a fingerprint, which may be a stranger's.
    """
    if threads := job.threads or option:
        if threads > MAX_THREADS:
            raise BackendError(
                f"{threads:,} CPU threads are more than the {MAX_THREADS:,} that a process may have: set "
                "backend.options.threads"
            )
        torch.set_num_threads(threads)


def device_fingerprint(
    backend: str,
    device: torch.device,
    kernels: Mapping[str, Any],
    more: Mapping[str, Any],
    *,
    ranks: int | None = None,
    recomputes: Literal["none", "selective", "full"],
) -> Fingerprint:
    """The fingerprint of a run on a torch device: its libraries and device, and `more` of the backend."""
    cuda = device.type == "cuda"
    libraries: dict[str, Any] = {
        "code": code_hash(),
        "processor": _processor(),
        **_cpu_libraries(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),  # "highest": no TF32, no bf16
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
    }
    if cuda:
        libraries |= cuda_numerics(device)
    name = torch.cuda.get_device_name(device) if cuda else platform.machine()
    threads = torch.get_num_threads()
    return Fingerprint(backend, device.type, name, threads, ranks, kernels, {**libraries, **more}, recomputes)


def cuda_numerics(device: torch.device) -> dict[str, Any]:
    """What decides the bits of CUDA's libraries beside torch's version: their versions, the driver's, and modes."""
    matmul = torch.backends.cuda.matmul
    return {
        # of which there are partial sums of the gradients of norms (kernels/triton_ops/_norm_rows.py)
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
        "cublas": _installed("nvidia-cublas", "nvidia-cublas-cu13", "nvidia-cublas-cu12", "nvidia-cublas-cu11"),
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver_version(),
        "allow_bf16_reduced_precision_reduction": matmul.allow_bf16_reduced_precision_reduction,
        "allow_fp16_reduced_precision_reduction": matmul.allow_fp16_reduced_precision_reduction,
        "capability": list(torch.cuda.get_device_capability(device)),
        "allow_fp16_accumulation": getattr(matmul, "allow_fp16_accumulation", None),  # newer than the oldest torch
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "cublas_workspace_config": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }


@functools.cache
def code_hash() -> str:
    """SHA-256 over the names and bytes of all source files that compute: those of core, kernels and backends."""
    found = hashlib.sha256()
    for package in ("core", "kernels", "backends"):
        root = Path(next(iter(importlib.import_module(f"weftrain.{package}").__path__)))
        for path in sorted(root.rglob("*")):
            if path.suffix in _CODE and path.is_file():
                name = f"{package}/{path.relative_to(root).as_posix()}".encode()
                data = path.read_bytes()
                found.update(b"%d %d " % (len(name), len(data)) + name + data)
    return found.hexdigest()


def _processor(file: Path = Path("/proc/cpuinfo")) -> str | None:
    """The processor's model, as Linux tells it: name, family, model and stepping; None where it cannot be told."""
    try:
        lines = file.read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or None
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    keys = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU revision")
    words = (told[key] if key == "model name" else f"{key} {told[key]}" for key in keys if key in told)
    return ", ".join(words) or None


def _cpu_libraries() -> dict[str, Any]:
    """Versions of the libraries that multiply matrices on a CPU, and what the environment asks of them."""
    built = torch.__config__.show()
    onednn = re.search(r"MKL-DNN v(\S+)", built) or re.search(r"oneDNN v(\S+)", built)
    mkl = re.search(r"Math Kernel Library Version (\S+)", built)
    return {
        "onednn": None if onednn is None else onednn[1],
        "mkl": None if mkl is None else mkl[1],
        **{name.lower(): os.environ.get(name) for name in _CPU_SETTINGS},
    }


def _installed(*packages: str) -> str | None:
    """The version of the first of these packages; None: torch came with a library of its own, or the system's."""
    for name in packages:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Of the kernel's module; None where the system does not tell."""
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", file.read_text())
    except OSError:
        return None
    return None if found is None else found[1]


def memory_stats(device: torch.device) -> dict[str, float]:
    """Resident memory of this process now, and of it what lies in huge pages; on cuda the peak that torch allocated."""
    stats = {
        "memory_bytes": float(psutil.Process().memory_info().rss),
        "huge_page_bytes": float(huge_page_bytes()),
    }
    if device.type == "cuda":
        stats["device_peak_memory_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return stats
