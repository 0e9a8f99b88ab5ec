"""How long kernels and collectives take: peaks of a data sheet or of a measurement, and the shares of them that kernels
are known to reach. One set of constants for all runs; each with its source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from weftrain.core.errors import BackendError
from weftrain.core.prediction import KernelShares, Speeds

_ATTENTION_RAMP_KEYS = 250  # keys at which attention has half its rate: 298, 319, 333 TFLOP/s at 2, 4 and 8 thousand
BANDWIDTH_SHARE = 0.80  # of the memory bandwidth that an elementwise kernel of torch reaches
_TILE = (128, 256)  # of a product's result that one processor computes at a time
_RAMP = 128  # inner elements that a tile costs beside its products: its prologue and epilogue
_SHARES_HERE = KernelShares(0.75, 0.40, 0.40, 1)  # of a matrix multiply that was measured on this machine
COLLECTIVE_PROCESSORS = 16  # that NCCL takes while a collective runs (its channels)
NODE_SHARE, NETWORK_SHARE = 0.75, 0.85  # of NVLink and InfiniBand that NCCL's rings reach (nccl-tests' bus bandwidth)
NODE_HOP_S, NETWORK_HOP_S = 3e-6, 8e-6  # a step of a ring, with nothing to send
KERNEL_S = 3e-6  # the least that a kernel takes


@dataclass(frozen=True)
class Rates:
    """One device and its links. Bandwidths are bytes/s, each direction by itself, before their shares."""

    matmul_flops: float
    kernels: KernelShares
    memory_bandwidth: float
    node_bandwidth: float | None
    network_bandwidth: float | None
    devices_per_node: int
    bandwidth_share: float = BANDWIDTH_SHARE
    node_share: float = NODE_SHARE
    network_share: float = NETWORK_SHARE
    node_hop_s: float = NODE_HOP_S
    network_hop_s: float = NETWORK_HOP_S
    kernel_s: float = KERNEL_S

    @classmethod
    def of(cls, speeds: Speeds) -> Rates:
        return cls(
            speeds.matmul_flops,
            speeds.kernels or _SHARES_HERE,
            speeds.memory_bandwidth,
            speeds.node_link_bandwidth,
            speeds.link_bandwidth,
            speeds.devices_per_node,
        )

    @property
    def slowdown(self) -> float:
        """The share of its rate that computation loses while a collective runs."""
        processors = self.kernels.processors
        return COLLECTIVE_PROCESSORS / processors if processors > COLLECTIVE_PROCESSORS else 0.0

    def matmul_s(self, rows: float, columns: float, inner: float, item: int) -> float:
        """Of a product [rows, inner] x [inner, columns]."""
        return self.grouped_s(1, rows, columns, inner, item)

    def grouped_s(self, groups: int, rows: float, columns: float, inner: float, item: int) -> float:
        """Of so many products of one shape in one kernel."""
        flops = 2.0 * groups * rows * columns * inner
        moved = item * groups * (rows * inner + inner * columns + rows * columns)
        rate, processors = self.matmul_flops * self.kernels.matmul, self.kernels.processors
        if processors > 1:
            tiles = groups * math.ceil(rows / _TILE[0]) * math.ceil(columns / _TILE[1])
            rate *= tiles / processors / math.ceil(tiles / processors) * inner / (inner + _RAMP)
        return max(flops / rate, moved / (self.memory_bandwidth * self.bandwidth_share), self.kernel_s)

    def attention_s(self, flops: float, keys: float, backward: bool) -> float:
        """flops: of the products under the mask. keys: of the longest query."""
        shares = self.kernels.attention_forward, self.kernels.attention_backward
        rate = self.matmul_flops * shares[backward]
        if self.kernels.processors > 1:
            rate *= keys / (keys + _ATTENTION_RAMP_KEYS)
        return max(flops / rate, self.kernel_s)

    def passes_s(self, moved: float) -> float:
        """Of elementwise kernels that read and write so many bytes together."""
        return moved / (self.memory_bandwidth * self.bandwidth_share)

    def ring_s(self, size: float, ranks: int, stride: int = 1) -> float:
        """Of an all-gather or a reduce-scatter of `size` bytes, the whole of it, over ranks that are `stride` apart. A
        ring over whole nodes enters and leaves each by all of its network cards at once; ranks of different nodes that
        are alone there have one each.
        """
        if ranks <= 1 or not size:
            return 0.0
        within = max(1, min(ranks, self.devices_per_node // stride))
        nodes = math.ceil(ranks / within)
        rate = math.inf if within == 1 else self._node() * self.node_share
        if nodes > 1:
            rate = min(rate, self._network() * self.network_share * within)
        hops = (ranks - nodes if within > 1 else 0) * self.node_hop_s + (nodes if nodes > 1 else 0) * self.network_hop_s
        return size * (ranks - 1) / ranks / rate + hops

    def all_reduce_s(self, size: float, ranks: int, stride: int = 1) -> float:
        return 2 * self.ring_s(size, ranks, stride)

    def all_to_all_s(self, size: float, ranks: int, stride: int = 1) -> float:
        """size: what a rank has; a part of it stays."""
        return self.ring_s(size, ranks, stride)

    def send_s(self, size: float, across_nodes: bool) -> float:
        if across_nodes:
            return size / (self._network() * self.network_share) + self.network_hop_s
        return size / (self._node() * self.node_share) + self.node_hop_s

    def _node(self) -> float:
        if (found := self.node_bandwidth or self.network_bandwidth) is None:
            raise BackendError("a simulation of several devices needs the speed of the links between them")
        return found

    def _network(self) -> float:
        if (found := self.network_bandwidth or self.node_bandwidth) is None:
            raise BackendError("a simulation of several devices needs the speed of the links between them")
        return found
