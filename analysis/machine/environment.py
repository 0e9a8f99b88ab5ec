"""The conditions of a benchmark: version and commit, device, clocks, CPU, load.

Nothing is guessed: what cannot be read is 'not available', since a missing line would look like one that found nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

NOT_AVAILABLE = "not available"
_LIBRARIES = ("torch", "triton", "numpy", "h5py", "flash-attn", "torchao", "transformers")
_RAPL = Path("/sys/class/powercap")


def identity() -> dict[str, Any]:
    """Version, commit of the checkout, whether it was changed since, and the command."""
    return {
        "version": importlib.metadata.version("weftrain"),
        **commit_of(Path(__file__)),
        "command": shlex.join(sys.argv),
    }


def commit_of(file: Path) -> dict[str, Any]:
    """The commit of the checkout that tracks a file, and whether any that it tracks was changed since."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(file.parent), *arguments], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", file.name) is None:  # an installation in somebody's checkout is not of it
        return {"commit": NOT_AVAILABLE, "dirty": NOT_AVAILABLE}
    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit or NOT_AVAILABLE, "dirty": NOT_AVAILABLE if changes is None else bool(changes)}


def environment(device: torch.device) -> dict[str, Any]:
    """The machine as it is; values that cannot be read are 'not available'."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "device_count": torch.cuda.device_count() if device.type == "cuda" else 1,
        "gpu": _gpu() if device.type == "cuda" else NOT_AVAILABLE,
        "topology": _topology() if device.type == "cuda" else NOT_AVAILABLE,
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_mhz": _cpu_mhz(),
        "governor": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "memory_bytes": psutil.virtual_memory().total,
        "virtualisation": _virtualisation(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "cuda": torch.version.cuda or NOT_AVAILABLE,
    }


def load() -> float:
    """Load average of the last minute."""
    return os.getloadavg()[0]


def warnings(environment: dict[str, Any], load_before: float, threads: int) -> list[str]:
    """Conditions that make a figure less reliable."""
    found = []
    cores = os.cpu_count() or 1
    if load_before > 0.5 * cores:
        found.append(f"the machine was busy before the benchmark: load {load_before:.1f} on {cores} cores")
    if environment["virtualisation"] not in ("none", NOT_AVAILABLE):
        found.append(
            f"a virtual machine or container ({environment['virtualisation']}): its neighbours are not seen, and "
            "clocks may change"
        )
    if environment["governor"] not in ("performance", NOT_AVAILABLE):
        found.append(f"the CPU's governor is {environment['governor']}, not performance")
    if threads > cores:
        found.append(f"{threads} threads on {cores} cores")
    return found


class Energy:
    """Joules from start to stop: NVML for a CUDA device, RAPL for a CPU where the counters may be read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start: dict[Path, int] = {}
        self._handle: Any = None
        self._start_mj = 0

    def start(self) -> None:
        if self._device.type == "cuda":
            try:
                import pynvml

                pynvml.nvmlInit()
                self._handle = pynvml.nvmlDeviceGetHandleByIndex(self._device.index or 0)
                self._start_mj = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            except Exception:  # the library's errors have no common base that can be named without it
                self._handle = None
            return
        self._start = self._counters()

    def stop(self) -> dict[str, Any]:
        """`joules` and `source`; 'not available' and the reason where there is no counter."""
        if self._handle is not None:
            import pynvml

            used = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) - self._start_mj
            return {"joules": used / 1e3, "source": "NVML, this rank's device"}
        if self._device.type == "cuda":
            return {"joules": NOT_AVAILABLE, "source": "NVML cannot be asked: pip install nvidia-ml-py"}
        end = self._counters()
        if not self._start or self._start.keys() != end.keys():
            return {"joules": NOT_AVAILABLE, "source": f"no counter in {_RAPL} that may be read"}
        used = 0
        for path, before in self._start.items():
            wraps = int((path.parent / "max_energy_range_uj").read_text())
            used += (end[path] - before) % wraps
        return {"joules": used / 1e6, "source": "RAPL, all packages"}

    def _counters(self) -> dict[Path, int]:
        found = {}
        for path in sorted(_RAPL.glob("intel-rapl:?/energy_uj")):
            try:
                found[path] = int(path.read_text())
            except (OSError, ValueError):
                return {}
        return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return NOT_AVAILABLE


def _cpu_name() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_mhz() -> float | str:
    frequency = psutil.cpu_freq()
    return round(frequency.current, 1) if frequency is not None and frequency.current else NOT_AVAILABLE


def _virtualisation() -> str:
    tool = shutil.which("systemd-detect-virt")
    if tool is not None:
        done = subprocess.run([tool], capture_output=True, text=True, timeout=10, check=False)
        return done.stdout.strip() or NOT_AVAILABLE
    return "a hypervisor" if " hypervisor" in _read(Path("/proc/cpuinfo")) else NOT_AVAILABLE


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _nvidia_smi(*arguments: str) -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _gpu() -> Any:
    """Clocks, power limit, temperature and driver of every GPU, from nvidia-smi."""
    fields = (
        "index",
        "clocks.sm",
        "clocks.max.sm",
        "power.limit",
        "temperature.gpu",
        "driver_version",
        "mig.mode.current",
    )
    told = _nvidia_smi(f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    if told is None:
        return NOT_AVAILABLE
    return [dict(zip(fields, (item.strip() for item in line.split(",")), strict=False)) for line in told.splitlines()]


def _topology() -> str:
    return _nvidia_smi("topo", "-m") or NOT_AVAILABLE


def now() -> str:
    """UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
