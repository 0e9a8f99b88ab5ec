"""How the command line shows work in progress: one rich progress bar for every verb that takes more than a few seconds.

What a reader would get wrong: without a terminal (a log file, CI) there is no bar, and a plain line is printed now and then instead.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 15.0  # between two plain lines where there is no terminal


class Bar:
    """`with Bar(console, total) as bar: bar.update(done, "loss 4.2")`; time left comes from the bar's own rate."""

    def __init__(self, console: Console, description: str, total: int, done: int = 0) -> None:
        self._console, self._description, self._total = console, description, total
        self._last_line_s = time.monotonic()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            self._progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
            self._task = self._progress.add_task(description, total=total, completed=done, note="")

    def __enter__(self) -> Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, done: int, note: str, description: str | None = None, total: int | None = None) -> None:
        """Show `done` of `total`."""
        self._description, self._total = description or self._description, total or self._total
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=note, description=self._description, total=self._total)
        elif time.monotonic() - self._last_line_s > QUIET_SECONDS:
            self._last_line_s = time.monotonic()
            self._console.print(f"{self._description} {done:,}/{self._total:,} {note}", markup=False)

    def note(self, words: str) -> None:
        """What is being done now, beside the bar; nothing without a terminal."""
        if self._progress is not None:
            self._progress.update(self._task, note=words)

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        (self._progress.console if self._progress is not None else self._console).print(line, markup=False)
