"""A signal that asks a process to stop, or to save and go on, is remembered, so that the step is finished first.

A backend gets its process's request as `Job.stop`. A wait before there is anything to save must not ignore it: in
Python it calls `leave_if_requested`; in native code, where no Python handler runs, it stands in `ends_at_once`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

# What schedulers, terminals and people send. One that is ignored when the process starts (nohup) stays ignored.
_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_SAVE = signal.SIGUSR2


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
    """SIGTERM, SIGINT, SIGUSR1 or SIGHUP to stop, and SIGUSR2 to save and go on, remembered while this is entered (main
    thread only). A second Ctrl-C stops at once.

    number: the signal by which this process, or another one of its run, was asked to stop; 0: it was not. saves: how
    often it was asked to save. One that was never entered handles no signal.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.number = self.saves = 0
        self._clock, self._asked_at, self._saves_taken = clock, 0.0, 0
        self._interrupted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        heard = [number for number in (*_STOP, _SAVE) if number == signal.SIGINT or not _is_ignored(number)]
        self._before = {number: signal.signal(number, self._note) for number in heard}
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
        if number and not self.number:
            self.number, self._asked_at = number, self._clock()

    def asked_s(self) -> float:
        """Seconds since this process learnt that it is to stop; 0 if it is not."""
        return self._clock() - self._asked_at if self.number else 0.0

    def ask_save(self) -> None:
        """This process, or another one of the run, is asked to save and go on."""
        self.saves += 1

    def take_save(self) -> bool:
        """Whether it was asked to save since the last call."""
        asked, self._saves_taken = self.saves > self._saves_taken, self.saves
        return asked

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
        if number == _SAVE:
            return self.ask_save()
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.ask(number)


def _is_ignored(number: int) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN
