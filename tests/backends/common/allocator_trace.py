"""What an allocator would hand out: the bytes of all storages alive, at each call of an op, while a run computes on
`meta`.

No number is computed, so that a model of any size takes a second. What a kernel allocates and frees within itself is
not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weftrain.kernels import Selection, Spec, load_catalog

_ROUNDED_TO = 512  # bytes, as the allocator of CUDA devices does


def as_on_a_gpu(specs: list[Spec], *_: object, **__: object) -> Selection:
    """The kernels that a GPU would have; their shapes can be traced anywhere."""
    catalog = load_catalog()
    sources = ("triton", "torch", "reference")
    return Selection(
        {
            (spec.op, spec.module): next(
                catalog[spec.op][name][0] for name in sources if name in catalog[spec.op]
            ).function
            for spec in specs
        },
        {},
    )


class AllocatorTrace(TorchDispatchMode):
    """live_bytes and peak_bytes of what is allocated while it is on, and by whom the peak was reached."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes, self.peak_bytes, self.peak_at = 0, 0, ""
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        found = function(*arguments, **(options or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._see(tensor, str(function))
        return found

    def count(self, *tensors: Tensor) -> None:
        """Also count what was allocated before."""
        for tensor in tensors:
            self._see(tensor, "before")

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage that was known has another size now: FSDP frees whole weights so, and allocates them again."""
        key = storage._cdata
        if key in self._known:
            self.live_bytes -= self._known[key]
            self._known[key] = -(-storage.nbytes() // _ROUNDED_TO) * _ROUNDED_TO
            self._grown(self._known[key], "resize_")
        elif storage.nbytes():
            self._add(storage, "resize_")

    def _see(self, tensor: Tensor, by: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._add(storage, by)

    def _add(self, storage: torch.UntypedStorage, by: str) -> None:
        key = storage._cdata
        size = -(-storage.nbytes() // _ROUNDED_TO) * _ROUNDED_TO
        self._known[key] = size
        self._grown(size, by)
        weakref.finalize(storage, self._freed, key)

    def _grown(self, size: int, by: str) -> None:
        self.live_bytes += size
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_at = self.live_bytes, by

    def _freed(self, key: int) -> None:
        self.live_bytes -= self._known.pop(key)
