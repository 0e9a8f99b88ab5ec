"""What a backend starts from: a base class with the protocol's defaults, its torch device, threads and fingerprint."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Literal

import torch

from weftrain.core.backend import Fingerprint, Job, StoredState
from weftrain.core.config import MAX_THREADS, Recipe
from weftrain.core.errors import BackendError
from weftrain.core.formats.strict_model import StrictModel
from weftrain.kernels.host_memory import use_huge_pages


def torch_device(wanted: str) -> torch.device:
    """'auto', 'cpu' or 'cuda' -> a device. Raises BackendError for cuda where there is none."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            "backend.options.device is cuda and torch sees no CUDA device: install a CUDA build of torch, or set "
            "device=cpu"
        )
    return torch.device(wanted)


def ask_for_huge_pages() -> None:
    """kernels/host_memory.py, and a warning where the system refuses."""
    if reason := use_huge_pages():
        warnings.warn(
            f"no huge pages, so steps are slower: {reason}; backend.options.huge_pages=false asks for none",
            stacklevel=3,
        )


def refuse_numerics(recipe: Recipe, backend: str, reason: str) -> None:
    """For a backend that has no dropout and no reduction in a fixed tree. Raises BackendError for a recipe that asks
    for one.
    """
    if recipe.precision.numerics == "replayable":
        raise BackendError(
            f"precision.numerics is replayable and the {backend} backend {reason}: use the local or cuda backend, or "
            "numerics=fast"
        )
    if recipe.model.dropout:
        raise BackendError(
            f"model.dropout is {recipe.model.dropout} and the {backend} backend has no dropout: use local or cuda, or "
            "dropout=0"
        )


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
    """The fingerprint of a run on a torch device: what of device and libraries can change a bit, and `more` of the
    backend's own.
    """
    cuda = device.type == "cuda"
    libraries = {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
    }
    name = torch.cuda.get_device_name(device) if cuda else platform.machine()
    threads = torch.get_num_threads()
    return Fingerprint(backend, device.type, name, threads, ranks, kernels, {**libraries, **more}, recomputes)


class PlainBackend:
    """The answers of a backend that runs anywhere and keeps no state of its own on disk."""

    portable_options: Set[str] = frozenset()

    def unavailable(self) -> str | None:
        return None

    def stored_state(self, recipe: Recipe, options: StrictModel, folder: Path) -> StoredState | None:
        return None
