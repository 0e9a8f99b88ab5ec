"""Observers of a run: each reads the run's folder beside the training, in a thread or process of its own.

A run is a folder whose state is always complete, so an observer needs nothing else: a tracker or a copy in a bucket
reads metrics.jsonl, ledger.jsonl and checkpoints/, and finds its place from a state file of its own in the folder. None
of them can stop or slow the run: what goes wrong is a line for the user.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol


class Observer(Protocol):
    """Reads what a run leaves in its folder. None of its methods waits for anything but `close`."""

    @property
    def name(self) -> str:
        """What it is, for messages: such as "tracker tensorboard"."""

    def recorded(self, saves_next: bool) -> None:
        """A step was recorded: there may be something new in the folder. Returns at once.

        saves_next: whether the state after the next step is saved, so that what takes processor and disk can wait.
        """

    def problems(self) -> tuple[str, ...]:
        """Lines for the user since the last call, each with its remedy."""

    def close(self, wait_s: float) -> None:
        """The run ended. Finish what can be finished in `wait_s` seconds; give up earlier where nothing moves."""


def taken(problems: queue.SimpleQueue[str]) -> tuple[str, ...]:
    """What another thread has put into a queue since the last call."""
    found: list[str] = []
    while not problems.empty():
        found.append(problems.get_nowait())
    return tuple(found)


class Observers:
    """The observers of one start of a run, as a context manager that closes them. One that raises is let go.

    wait_s: asked at the end, how many seconds are left for all of them. say: told what went wrong then.
    """

    def __init__(self, observers: Sequence[Observer], wait_s: Callable[[], float], say: Callable[[str], None]) -> None:
        self._observers, self._wait_s, self._say = list(observers), wait_s, say

    def __enter__(self) -> Observers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for problem in self._each(lambda observer: observer.close(self._wait_s())):
            self._say(problem)

    def recorded(self, saves_next: bool) -> list[str]:
        """A step was recorded. Returns what went wrong since the last call, a line each."""
        return self._each(lambda observer: observer.recorded(saves_next))

    def _each(self, call: Callable[[Observer], None]) -> list[str]:
        found: list[str] = []
        for observer in tuple(self._observers):
            try:
                call(observer)
                found += observer.problems()
            except Exception as error:
                self._observers.remove(observer)
                found.append(f"{observer.name}: failed, and is left out from here on: {type(error).__name__}: {error}")
        return found
