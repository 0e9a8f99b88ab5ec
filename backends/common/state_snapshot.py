"""A run's state as `export_state` hands it out: read tensor by tensor, and copied only if the run changes it while
something still holds it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Set
from typing import TypeVar

import torch

from weftrain.core.errors import CheckpointError
from weftrain.core.formats.lazy_tensors import LazyTensors, meta, meta_of


def check_state(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError for a missing, unknown or misshapen tensor. Nothing of a lazy state is read."""
    missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or unknown:
        raise CheckpointError(
            f"state does not fit the model: missing {missing[:3]}, unknown {unknown[:3]}; is it of another recipe?"
        )
    for name, shape in shapes.items():
        tensor = meta_of(tensors, name)
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            found, wanted = f"{tensor.dtype} {list(tensor.shape)}", f"torch.float32 {list(shape)}"
            raise CheckpointError(f"tensor {name} is {found}, the model's is {wanted}; is it of another recipe?")


class StateSnapshot(LazyTensors):
    """The state of a run at one step, fp32. Until it is detached each access reads the run's own tensor, so that saving
    it needs no second copy of the model.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], torch.Tensor],
        unchanging: Set[str] = frozenset(),
    ) -> None:
        """unchanging: names that `read` gives the same bits of for as long as the snapshot is held."""
        super().__init__({name: meta(shape) for name, shape in shapes.items()}, read)
        self._unchanging = unchanging

    def detach(self) -> None:
        """Copy every tensor that the run is about to change."""
        read = self._read
        copied = {name: read(name) for name in self if name not in self._unchanging}
        self._read = lambda name: copied[name] if name in copied else read(name)


_Snapshot = TypeVar("_Snapshot", bound=StateSnapshot)


class SnapshotOwner:
    """A run's side: remembers the last snapshot for as long as something holds it."""

    def __init__(self) -> None:
        self._last: Callable[[], StateSnapshot | None] = lambda: None

    def track(self, snapshot: _Snapshot) -> _Snapshot:
        self.detach()
        self._last = weakref.ref(snapshot)
        return snapshot

    def detach(self) -> None:
        """Call before the state changes."""
        if (snapshot := self._last()) is not None:
            snapshot.detach()
        self._last = lambda: None
