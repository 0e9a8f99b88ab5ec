"""A time limit for code that may hang: Python is interrupted; in C++ or on a device, the process ends and says why.

An exception cannot be raised in native code. A run that does not come back from there within twice the limit ends with
the name of the case on standard error and exit code 1: nothing that follows could be measured in that process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from weftrain.kernels.contract import KernelError

LIMIT_S = 120.0  # for one case; the first use of a kernel may compile


@contextmanager
def time_limit(seconds: float, where: str) -> Iterator[None]:
    """Raises KernelError in the body after `seconds`. An alarm that was set before (a test runner's) stays set."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KernelError(f"took longer than {seconds:g} s")

    watchdog = threading.Timer(2 * seconds, _give_up, (seconds, where))
    watchdog.daemon = True
    handler = signal.signal(signal.SIGALRM, interrupt)
    start = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3), interval)


def _give_up(seconds: float, where: str) -> None:
    sys.stdout.flush()
    print(f"FAILED {where}: did not return within {2 * seconds:g} s; the run ends here", file=sys.stderr, flush=True)
    os._exit(1)
