"""An order to end (SIGTERM, or SIGHUP of a terminal that closes) as an exception, for commands that must remove what they have begun.

Training has its own way to stop, which saves first: core/stop.py. What SIGKILL leaves, the next run of the same command removes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


class EndedError(KeyboardInterrupt):
    """As an interrupt from the keyboard, so that whatever cleans up for one does for the other. number: the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


@contextlib.contextmanager
def cleaned_up() -> Iterator[None]:
    """Within the block the signals raise EndedError, once; after the clean-up the process dies by that signal, as its caller expects.

    Elsewhere than in the main thread, and where somebody handles the signals already, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, _: Any) -> None:
        for one in taken:
            signal.signal(one, signal.SIG_IGN)  # a second one would interrupt the clean-up
        raise EndedError(number)

    for number in taken:
        signal.signal(number, end)
    try:
        yield
    except EndedError as error:
        signal.signal(error.number, signal.SIG_DFL)
        os.kill(os.getpid(), error.number)
        raise
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
