"""Tensors by name that are read one at a time, with dtypes and shapes known beforehand.

Checkpoints, a run's state and foreign files are passed as `LazyTensors`, so that copying a model never holds all of it
in memory. Other lazy mappings derive from it, or come from `select`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

Progress = Callable[[int, int], None]  # is called with the bytes done and the bytes of all


class LazyTensors(Mapping[str, torch.Tensor]):
    """Name -> tensor, read as new memory at each access.

    metas: name -> the dtype and shape that `read` returns, as a tensor on the device `meta`.
    """

    def __init__(self, metas: Mapping[str, torch.Tensor], read: Callable[[str], torch.Tensor]) -> None:
        self._metas, self._read = metas, read

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._metas:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._metas  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._metas)

    def __len__(self) -> int:
        return len(self._metas)

    def meta(self, name: str) -> torch.Tensor:
        """A tensor's dtype and shape, without reading it."""
        return self._metas[name]


def meta(shape: Iterable[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of this dtype and shape without data."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def meta_of(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A tensor's dtype and shape, on the device `meta`; nothing is read."""
    return tensors.meta(name) if isinstance(tensors, LazyTensors) else tensors[name].to("meta")


def select(tensors: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> LazyTensors:
    """Some tensors under other names. names: new name -> name in `tensors`."""
    return LazyTensors({new: meta_of(tensors, name) for new, name in names.items()}, lambda new: tensors[names[new]])


def counted(tensors: Mapping[str, torch.Tensor], progress: Progress) -> LazyTensors:
    """The same tensors; after each that is read, `progress` is called with the bytes read so far and those of all."""
    metas = {name: meta_of(tensors, name) for name in tensors}
    total, done = sum(one.nbytes for one in metas.values()), 0

    def read(name: str) -> torch.Tensor:
        nonlocal done
        tensor = tensors[name]
        done += metas[name].nbytes
        progress(done, total)
        return tensor

    return LazyTensors(metas, read)
