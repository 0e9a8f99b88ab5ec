"""Accelerators by name, for predictions: figures of their data sheets, each with its source.

These are the makers' figures; backends/cuda/planner.py applies the share that a program reaches. A figure without a
public source is None, and nothing is predicted from it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from weftrain.core.errors import WeftrainError
from weftrain.core.prediction import KernelShares, Speeds


class DeviceError(WeftrainError):
    """An unknown device, or an invalid number of devices."""


# For simulated steps. Large bf16 products at their best: cuBLAS reaches 87 % on an A100 (271 TFLOP/s at 8192 cubed)
# and 80 % on an H100 (795). In a run of hours the power limit lowers the clock, the H100's more: by 15 and by 27 %,
# which is the one thing here that was set by whole runs (fms-fsdp's 7B on A100, torchtitan's 8B on 8 H100).
# FlashAttention-2, causal, heads of 128, long rows: forward 335 TFLOP/s on an H100 (arXiv 2407.08608, figure 5) and 190
# on an A100 (arXiv 2307.08691), backward 290 and 165.
_AMPERE, _HOPPER = KernelShares(0.74, 0.61, 0.53, 108), KernelShares(0.58, 0.34, 0.29, 132)


@dataclass(frozen=True)
class Device:
    """One accelerator in its usual node. Rates are per second, each direction by itself."""

    name: str
    memory_bytes: int
    bf16_flops: float | None  # dense, fp32 accumulation
    memory_bandwidth: float
    devices_per_node: int
    node_link_bandwidth: float | None  # a device to the others of its node
    network_bandwidth: float | None  # a device to other nodes, in the maker's reference node
    source: str
    # of bf16_flops; calibrated where published runs of 7-8 B models allow it (docs/train-on-a-cluster.md)
    matmul_share: float = 0.50
    attention_share: float = 0.30
    host_link_bandwidth: float = 64e9  # each way: PCIe 5 with 16 lanes, 128 GB/s both ways on the data sheets
    kernels: KernelShares = _HOPPER  # of a device without figures of its own, those of an H100, with its processors


_GB = 10**9
_A100 = "NVIDIA A100 data sheet (SXM): 312 TFLOP/s dense, NVLink 600 GB/s both ways, 200 Gb/s of network a GPU (DGX)"
_H = "half of 1,979 TFLOP/s with sparsity, NVLink 900 GB/s both ways, 400 Gb/s of network a GPU (DGX)"
_B200 = "half of 36 PFLOP/s with sparsity, 64 TB/s, 1,440 GB; NVLink 1.8 TB/s; 400 Gb/s a GPU"
_MI300X = "1,307.4 TFLOP/s dense, 5.3 TB/s, 7 links of 128 GB/s both ways; 400 Gb/s of network a GPU"
_CS2 = "40 GB on the wafer, 20 PB/s, 1.2 Tb/s of network; it gives no dense 16-bit rate"
_ALL = (
    Device("A100-80GB", 80 * _GB, 312e12, 2039e9, 8, 300e9, 25e9, f"{_A100}, 2,039 GB/s", 0.65, 0.50, 32e9, _AMPERE),
    Device("A100-40GB", 40 * _GB, 312e12, 1555e9, 8, 300e9, 25e9, f"{_A100}, 1,555 GB/s", 0.65, 0.50, 32e9, _AMPERE),
    Device("H100", 80 * _GB, 989.4e12, 3350e9, 8, 450e9, 50e9, f"NVIDIA H100 data sheet (SXM): 3.35 TB/s, {_H}"),
    Device("H200", 141 * _GB, 989.4e12, 4800e9, 8, 450e9, 50e9, f"NVIDIA H200 data sheet (SXM): 4.8 TB/s, {_H}"),
    Device("B200", 180 * _GB, 2250e12, 8000e9, 8, 900e9, 50e9, f"NVIDIA DGX B200 data sheet, an eighth of it: {_B200}"),
    Device("MI300X", 192 * _GB, 1307.4e12, 5300e9, 8, 448e9, 50e9, f"AMD Instinct MI300X data sheet: {_MI300X}"),
    Device("CS-2", 40 * _GB, None, 20e15, 1, None, 150e9, f"Cerebras CS-2 data sheet: {_CS2}"),
)
MOST_DEVICES = 1_000_000
DEVICES = {device.name: device for device in _ALL}


def parse_devices(text: str) -> tuple[int, Device]:
    """'224xA100-80GB' -> (224, that device); 'H100' is one device. Raises DeviceError with the known names."""
    match = re.fullmatch(r"(?:([0-9]{1,7})[xX])?([A-Za-z][A-Za-z0-9-]*)", text)
    names = {name.lower(): device for name, device in DEVICES.items()}
    count = 0 if match is None else int(match[1] or 1)
    if match is None or match[2].lower() not in names or not 1 <= count <= MOST_DEVICES:
        raise DeviceError(
            f"--devices {text[:80]}: give COUNTxNAME, such as 224xA100-80GB, with 1 to {MOST_DEVICES:,} devices; "
            f"the names are {', '.join(DEVICES)}"
        )
    return count, names[match[2].lower()]


def speeds(count: int, device: Device, per_node: int | None = None) -> Speeds:
    """The speeds for a prediction. per_node: if not the maker's. Raises DeviceError without a FLOP rate."""
    if device.bf16_flops is None:
        raise DeviceError(f"{device.name}: no step can be predicted: {device.source}")
    node = min(count, per_node or device.devices_per_node)
    return Speeds(
        device.bf16_flops,
        device.memory_bandwidth,
        link_bandwidth=device.network_bandwidth,
        node_link_bandwidth=device.node_link_bandwidth,
        devices=count,
        devices_per_node=node,
        capacity_bytes=device.memory_bytes,
        matmul_share=device.matmul_share,
        attention_share=device.attention_share,
        host_link_bandwidth=device.host_link_bandwidth,
        kernels=device.kernels,
    )
