"""A process that computes on a torch device: its options, threads and memory, and what is recorded of them."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping
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
    if device.type == "cuda" and job.recipe.precision.compute == "bfloat16" and not computes_bfloat16():
        warnings.warn(
            f"{torch.cuda.get_device_name()} has no bf16 arithmetic (it came with sm_80), so steps are slow: set "
            "precision.compute=float32",
            stacklevel=3,
        )
    if options.huge_pages and device.type == "cpu" and (reason := use_huge_pages()):
        warnings.warn(
            f"no huge pages, so steps are slower: {reason}; backend.options.huge_pages=false asks for none",
            stacklevel=3,
        )
    return options, device


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
    libraries = {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
    }
    if cuda:  # of which there are partial sums of the gradients of norms (kernels/triton_ops/_norm_rows.py)
        libraries["multiprocessors"] = torch.cuda.get_device_properties(device).multi_processor_count
    name = torch.cuda.get_device_name(device) if cuda else platform.machine()
    threads = torch.get_num_threads()
    return Fingerprint(backend, device.type, name, threads, ranks, kernels, {**libraries, **more}, recomputes)


def memory_stats(device: torch.device) -> dict[str, float]:
    """Resident memory of this process now, and of it what lies in huge pages; on cuda the peak that torch allocated."""
    stats = {
        "memory_bytes": float(psutil.Process().memory_info().rss),
        "huge_page_bytes": float(huge_page_bytes()),
    }
    if device.type == "cuda":
        stats["device_peak_memory_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return stats
