"""A program of its own: pickled PyTorch weights (`.bin`) in, safetensors out. The one place in the product where
torch.load is called.

It is started by exchange/huggingface/pickled.py and imported by nobody. What a reader would get wrong:
`weights_only=True` alone is what keeps a pickle from running code, and before torch 2.6 it did not (CVE-2025-32434), so
an older torch is refused. Being a process of its own, with no way to start another or to reach the network and with
bounded memory, is the second line; nobody believes what it wrote unread. Standard input: JSON {"jobs": [[source,
target], ...], "parent": process}. A failure is one line on standard error and exit status 3.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from weftrain.core.formats import fsops
from weftrain.core.formats.child_process import end_with
from weftrain.core.formats.plain_file import open_plain
from weftrain.core.formats.tensor_file import DTYPE_NAMES, check_name, pack_header, tensor_memory

FAILED = 3
HEAP_BYTES = 4 << 30  # beyond the mapped file: torch itself, the names, one tensor made contiguous
_ZIP = b"PK\x03\x04"
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.",
    "pty.",
    "socket.",
    "urllib.",
    "ctypes.dlopen",
)


def _refuse(event: str, _: Any) -> None:
    if event.startswith(_FORBIDDEN):
        raise PermissionError(f"the file asked for {event}")


def convert(source: Path, target: Path) -> None:
    """One state dict to one safetensors file, tensor by tensor. Raises ValueError saying what is wrong with it."""
    size = source.stat().st_size
    with open_plain(source) as file:
        if file.read(4) != _ZIP:
            raise ValueError("is not a file of torch.save's form since release 1.6, which alone is read")
    state = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict) or not state:
        raise ValueError("is not a state dict, a name for each tensor")
    total = 0
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ValueError(f"has a name that is no text: {name!r:.80}")
        check_name(name)
        if (
            type(tensor) not in (torch.Tensor, torch.nn.Parameter)
            or tensor.layout is not torch.strided
            or tensor.device.type != "cpu"
        ):
            raise ValueError(f"'{name}' is not a plain tensor")
        if tensor.dtype not in DTYPE_NAMES or tensor.is_conj() or tensor.is_neg():
            raise ValueError(f"tensor '{name}' is {tensor.dtype}, which is not converted")
        # by shape: a stride of 0 shows a few bytes as any number
        total += math.prod(tensor.shape) * tensor.dtype.itemsize
    if total > 2 * size:  # twice, since tied weights lie in the file once
        raise ValueError(f"claims tensors of {total:,} bytes in a file of {size:,}")
    with fsops.FileWriter(target) as file:
        file.write(
            pack_header({name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in state.items()})
        )
        for tensor in state.values():
            file.write(tensor_memory(tensor))


def _reason(error: Exception) -> str:
    """In one line; of torch's page about a refused pickle what it was, without the advice to believe it after all."""
    refused = re.search(r"(unsupported GLOBAL|WeightsUnpickler error:)\s[^\n]*", str(error))
    text = " ".join((refused[0] if refused else str(error)).split()) or type(error).__name__
    return text[:300]


def main() -> int:
    """Convert what standard input names."""
    asked = json.load(sys.stdin)
    jobs = [(Path(source), Path(target)) for source, target in asked["jobs"]]
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 6):
        print(
            f"torch {torch.__version__} can be made to run code by a pickle (CVE-2025-32434); 2.6 is needed",
            file=sys.stderr,
        )
        return FAILED
    end_with(asked["parent"])
    torch.set_num_threads(1)
    limit = max(source.stat().st_size for source, _ in jobs) + HEAP_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_refuse)
    for source, target in jobs:
        try:
            convert(source, target)
        except Exception as error:  # a stranger's bytes: torch raises whatever comes, and each of it is a refusal
            print(f"{source.name}: {_reason(error)}", file=sys.stderr)
            return FAILED
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # nothing that a pickle left behind gets a turn
