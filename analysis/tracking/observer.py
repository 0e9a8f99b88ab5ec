"""A tracker beside the training: an observer that follows the run in a thread, or in a process of its own.

TensorBoard writes files, and has a thread. The others speak to servers by libraries that may hang, take over signals or
wait at the end of the process: each has a process (`python -m weftrain.analysis.tracking.process`), which ends with its
standard input, whatever becomes of the run.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from weftrain.analysis.tracking.follower import Follower
from weftrain.analysis.tracking.tracker import one_line
from weftrain.core.errors import WeftrainError, printable
from weftrain.core.run.observers import taken

POLL_S = 1.0  # between two looks into the folder
RETRIES_S = (1.0, 5.0, 30.0, 120.0)  # after the first failures in a row; then always the last
CLOSE_S = 30.0  # how long the end of a run waits for a tracker at most
PROGRAM = "weftrain.analysis.tracking.process"


class TrackingThread:
    """Follows the run in a thread. later: how what is missing can be sent afterwards, for messages."""

    def __init__(self, name: str, make: Callable[[], Follower], later: str) -> None:
        self.name, self._later = f"tracker {name}", later
        self._problems: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._ended = threading.Event()
        # A daemon: a tracker that hangs does not keep the process from ending.
        arguments = (make, self._ended.wait, self._problems.put)
        self._thread = threading.Thread(target=follow, args=arguments, name=self.name, daemon=True)
        self._thread.start()

    def recorded(self, saves_next: bool) -> None:
        pass  # it looks by itself

    def problems(self) -> tuple[str, ...]:
        return tuple(f"{self.name}: {words}; {self._later}" for words in taken(self._problems))

    def close(self, wait_s: float) -> None:
        self._ended.set()
        self._thread.join(min(wait_s, CLOSE_S))
        if self._thread.is_alive():
            self._problems.put("it did not take everything before the end")


class TrackingProcess:
    """Follows the run in a process, which is killed if it does not finish in time. command: for tests."""

    def __init__(self, name: str, folder: Path, later: str, command: tuple[str, ...] = ()) -> None:
        self.name, self._later = f"tracker {name}", later
        self._problems: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            command or (sys.executable, "-m", PROGRAM, str(folder), name),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what a terminal or a batch system signals is the run's
        )
        self._reader = threading.Thread(target=self._read, name=self.name, daemon=True)
        self._reader.start()

    def recorded(self, saves_next: bool) -> None:
        pass  # it looks by itself

    def problems(self) -> tuple[str, ...]:
        return tuple(f"{self.name}: {words}; {self._later}" for words in taken(self._problems))

    def close(self, wait_s: float) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is dead already
            self._process.stdin.close()
        try:
            code = self._process.wait(min(wait_s, CLOSE_S))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._problems.put("it did not take everything before the end")
        else:
            self._reader.join(1.0)
            if code:
                self._problems.put(f"its process ended with code {code}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._problems.put(printable(line.decode(errors="replace").rstrip("\n")))


def follow(make: Callable[[], Follower], pause: Callable[[float], bool], tell: Callable[[str], object]) -> None:
    """Send what is new until `pause`, which waits so many seconds, says that the run ended; then the rest.

    What goes wrong is told once, and tried again ever more slowly.
    """
    follower: Follower | None = None
    failures, wait_s, ended = 0, 0.0, False
    while not ended:
        ended = pause(wait_s)
        try:
            follower = follower or make()
            follower.advance()
            if ended:
                follower.close()
            failures, wait_s = 0, POLL_S
        except Exception as error:  # of any library
            if ended or not failures:
                tell(words(error))
            failures += 1
            wait_s = RETRIES_S[min(failures, len(RETRIES_S)) - 1]


def words(error: Exception) -> str:
    """What went wrong, in a line."""
    return one_line(str(error) if isinstance(error, WeftrainError) else f"{type(error).__name__}: {error}")
