"""How a GPU is while something is timed: its power, clocks and temperature once a second, by nvidia-smi."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
import time
from types import TracebackType
from typing import IO

_FIELDS = {
    "power.draw": "power, W",
    "clocks.sm": "clock of the multiprocessors, MHz",
    "clocks.mem": "clock of the memory, MHz",
    "temperature.gpu": "temperature, C",
    "utilization.gpu": "busy, %",
}


class ClockLog:
    """While it is open, a sample a second of every GPU. Without nvidia-smi there are none."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, tuple[float | None, ...]]] = []
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ClockLog:
        tool = shutil.which("nvidia-smi")
        if tool is not None:
            command = [tool, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits", "--loop=1"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            assert self._process.stdout is not None
            self._thread = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            values = tuple(_number(text) for text in line.split(","))
            if len(values) == len(_FIELDS):
                self._samples.append((time.monotonic(), values))

    def between(self, start: float, end: float) -> dict[str, dict[str, float]]:
        """Least, median and greatest of each quantity between two times of time.monotonic(), over all GPUs."""
        within = [values for at, values in list(self._samples) if start <= at <= end]
        found = {}
        for index, name in enumerate(_FIELDS.values()):
            known = [value for values in within if (value := values[index]) is not None]
            if known:
                found[name] = {"least": min(known), "median": statistics.median(known), "greatest": max(known)}
        return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None
