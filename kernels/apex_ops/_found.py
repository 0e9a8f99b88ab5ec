"""Whether NVIDIA's apex is here, with the CUDA extension that an op needs.

The `apex` of the package index is an unrelated web toolkit, and NVIDIA's own, built without `--cuda_ext`, imports well
and has no kernels. So the extension modules are looked for, and nothing is imported to find them out.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import torch

from weftrain.kernels.contract import Spec

_INSTALL = "build github.com/NVIDIA/apex with its CUDA extensions (APEX_CPP_EXT=1 APEX_CUDA_EXT=1)"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable(spec: Spec, folder: str, extension: str) -> str | None:
    """None on an NVIDIA GPU where apex has `folder` ("normalization") and the top-level extension module
    ("fused_layer_norm_cuda").
    """
    if spec.device != "cuda":
        return f"needs an NVIDIA GPU, not {spec.device}"
    if spec.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, not {str(spec.dtype).removeprefix('torch.')}"
    missing = _missing(folder, extension)
    if missing is not None:
        return missing
    if torch.version.hip is not None:
        return "wired for NVIDIA's apex; the fork for ROCm was not read"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _missing(folder: str, extension: str) -> str | None:
    apex = importlib.util.find_spec("apex")
    if apex is None:
        return f"apex is not installed: {_INSTALL}"
    places = [Path(place) / folder for place in apex.submodule_search_locations or ()]
    if not any((place / "__init__.py").exists() for place in places):
        return (
            f"the installed apex is not NVIDIA's (it has no apex.{folder}; the `apex` of the package index is a web "
            f"toolkit): {_INSTALL}"
        )
    if importlib.util.find_spec(extension) is None:
        return f"apex was built without its CUDA extension {extension}: {_INSTALL}"
    return None


def version() -> str:
    """Of whatever distribution is called apex."""
    try:
        return f"apex {importlib.metadata.version('apex')}"
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
