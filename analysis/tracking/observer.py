"""A tracker beside the training: `TrackingThread`, an observer that follows the run in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from weftrain.analysis.tracking.follower import Follower
from weftrain.core.errors import WeftrainError

_RETRIES_S = (1.0, 5.0, 30.0, 120.0)  # after the first failures in a row; then always the last
_CLOSE_S = 30.0  # how long the end of a run waits for a tracker at most


class TrackingThread:
    """Sends what is new each time the run recorded a step. A failure is told once, and tried again later."""

    def __init__(self, name: str, make: Callable[[], Follower], retry: str) -> None:
        self.name = f"tracker {name}"
        self._make, self._retry = make, retry
        self._problems: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._new, self._closing = threading.Event(), threading.Event()
        self._new.set()
        # A daemon: a tracker that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=self._follow, name=self.name, daemon=True)
        self._thread.start()

    def recorded(self) -> None:
        self._new.set()

    def problems(self) -> tuple[str, ...]:
        found: list[str] = []
        while not self._problems.empty():
            found.append(self._problems.get_nowait())
        return tuple(found)

    def close(self, wait_s: float) -> None:
        self._closing.set()
        self._new.set()
        self._thread.join(min(wait_s, _CLOSE_S))
        if self._thread.is_alive():
            self._problems.put(f"{self.name}: did not take everything before the end: {self._retry}")

    def _follow(self) -> None:
        follower: Follower | None = None
        failures = 0
        while True:
            self._new.wait()
            self._new.clear()
            closing = self._closing.is_set()
            try:
                follower = follower or self._make()
                follower.advance()
                if closing:
                    follower.close()
                failures = 0
            except Exception as error:
                if closing or not failures:
                    self._problems.put(f"{self.name}: {_words(error)}: {self._retry}")
                failures += 1
                if not closing:
                    self._closing.wait(_RETRIES_S[min(failures, len(_RETRIES_S)) - 1])
                    self._new.set()
            if closing:
                return


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, WeftrainError) else f"{type(error).__name__}: {error}"
