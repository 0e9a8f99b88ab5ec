"""A signal that asks a process to stop is remembered, so that the step is finished and saved first.

A backend gets its process's request as `Job.stop`. A wait before there is anything to save must not ignore it: in
Python it calls `leave_if_requested`; in native code, where no Python handler runs, it stands in `ends_at_once`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """In this block SIGTERM raises SystemExit (143), so that `with` and `finally` remove temporary files and end child
    processes.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _unwind(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


class StopRequest:
    """SIGTERM or SIGINT, remembered while this is entered (main thread only). A second Ctrl-C stops at once.

    number: the signal by which this process, or another one of its run, was asked to stop; 0: it was not. One that was
    never entered handles no signal.
    """

    def __init__(self) -> None:
        self.number = 0
        self._interrupted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def requested(self) -> bool:
        return self.number != 0

    def ask(self, number: int) -> None:
        """Another process of the run was asked to stop by signal `number`; 0: it was not."""
        self.number = self.number or number

    def leave_if_requested(self) -> None:
        """Before there is anything to save. Raises SystemExit with 128 + the signal's number."""
        if self.number:
            raise SystemExit(128 + self.number)

    @contextlib.contextmanager
    def ends_at_once(self) -> Iterator[None]:
        """In this block a signal ends the process at once: around native code, before there is anything to save."""
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)
        try:
            self.leave_if_requested()  # one that came before the line above
            yield
        finally:
            for number in self._before:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.number = self.number or number
