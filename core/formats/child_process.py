"""Child processes: they end with their parent, however it dies, and leave Ctrl-C to it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Have Linux kill this process when its parent process dies; elsewhere nothing happens.

    The kernel watches the thread that started the process: that thread must live as long as the child is needed.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


@contextlib.contextmanager
def on_interrupt(action: signal.Handlers) -> Iterator[None]:
    """In this block Ctrl-C is ignored (SIG_IGN; processes that are started in it ignore it for good), or ends the
    process at once (SIG_DFL; for native code that runs long and leaves nothing half made).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, action)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
