"""What a step will take, before anything is started: speeds of the machine, needs of the run, and the prediction.

A backend that can plan implements `Predictor`; `weftrain plan` prints the prediction, `weftrain show` the outline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from weftrain.core.config import Recipe
from weftrain.core.formats.strict_model import StrictModel


@dataclass(frozen=True)
class KernelShares:
    """What a device's kernels reach of its peak, each kernel alone on it and the device hot from hours of work."""

    matmul: float  # large products
    attention_forward: float  # causal, long rows, heads of 128, counting the products under the mask alone
    attention_backward: float
    processors: int  # that compute the tiles of a product at once


@dataclass(frozen=True)
class Speeds:
    """What a machine was measured at, or its data sheet says, for predictions. None: not measured, or not there."""

    matmul_flops: float  # FLOP/s of a matrix multiply in the compute dtype
    memory_bandwidth: float  # bytes/s of main memory; of a device's own memory, where it has one
    disk_bandwidth: float | None = None  # bytes/s of the disk, reading and writing at once
    link_bandwidth: float | None = None  # bytes/s that a device sends to one of another node, or a replica to another
    node_link_bandwidth: float | None = None  # bytes/s that a device sends to others of its node
    devices: int | None = None  # that the run is for; None: as many as the recipe asks for
    devices_per_node: int = 1
    capacity_bytes: float | None = None  # memory of a device; None: that of this machine, which the backend finds out
    # of matmul_flops that a long run's matrix multiplies reach; None: the backend's own assumption
    matmul_share: float | None = None
    attention_share: float | None = None  # of matmul_flops that attention reaches
    host_bandwidth: float | None = None  # bytes/s of the host's memory, beside that of a device
    host_link_bandwidth: float | None = None  # bytes/s between host and device, each direction by itself
    kernels: KernelShares | None = None  # for a simulation; None: not known


@dataclass(frozen=True)
class Needs:
    """Bytes of memory by part, and of disk, that a run takes on one machine.

    device_bytes: of a device's own memory, where `memory_bytes` are those of the host.
    """

    memory_bytes: Mapping[str, int]
    disk_bytes: int
    device_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def total_memory_bytes(self) -> int:
        return sum(self.memory_bytes.values())

    @property
    def total_device_bytes(self) -> int:
        return sum(self.device_bytes.values())


@dataclass(frozen=True)
class Prediction:
    """A step's time, predicted: `limit` names the slowest of what runs at once, `parts` seconds of each by itself."""

    step_s: float
    limit: str
    parts: Mapping[str, float]
    needs: Needs
    sent_bytes: Mapping[str, int] = field(default_factory=dict)  # by one device in a step, by what for
    capacity_bytes: float | None = None  # of the memory that `needs` is held against; None: unknown
    device_capacity_bytes: float | None = None  # the same for `needs.device_bytes`
    largest_micro_batch: int | None = None  # sequences that fit `capacity_bytes`, 0: none; None: not computed
    remedies: tuple[str, ...] = ()  # where it does not fit: settings with which it would, and what else helps
    notes: Mapping[str, str] = field(default_factory=dict)  # further rows of the plan: what, and its value in words

    @property
    def fits(self) -> bool | None:
        """Whether the memory holds what the run needs; None where the memory is unknown."""
        if self.capacity_bytes is None:
            return None
        return self.fits_device and self.needs.total_memory_bytes <= self.capacity_bytes

    @property
    def fits_device(self) -> bool:
        """Whether a device's own memory, where it is held apart, holds what the run needs of it."""
        return self.device_capacity_bytes is None or self.needs.total_device_bytes <= self.device_capacity_bytes


@runtime_checkable
class Predictor(Protocol):
    """What a backend also has if it can tell what a step will take."""

    def outline(self, recipe: Recipe, options: StrictModel) -> list[str]:
        """What a step will do, as lines for `weftrain show --backend`."""
        ...

    def predict(self, recipe: Recipe, options: StrictModel, speeds: Speeds) -> Prediction:
        """A step's time and needs, and what would fit if this does not. Raises BackendError where it cannot be told."""
        ...
