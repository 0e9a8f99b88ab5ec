"""What the command line prints, and one progress bar for every verb that takes more than a few seconds.

A reason in a ledger, a tensor's name or a file's name may hold anything, terminal escape sequences included. Every verb
runs within `plain_output`, which makes such characters visible; tables, colours and bars come from the `Console` here,
which prints strings as text and never as markup. Without a terminal there is no bar: a plain line is printed every
QUIET_SECONDS instead.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO, cast

import click
import rich.console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from weftrain.core.errors import printable
from weftrain.core.formats.units import gb_done

_SHOWN: dict[str, str] = {}  # what stands in a message for a folder that the user named otherwise

LINES = "\n\t"  # control characters that shape text and stay
_BAR_COLUMNS = 60  # a narrower terminal gets the counts and the note without a bar
QUIET_SECONDS = 15.0  # between two plain lines where there is no terminal


class Console(rich.console.Console):
    """rich's console for text of any origin: no markup, emoji codes, highlighting or control characters, and lines
    that wrap where the terminal does. A style is an argument.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, "soft_wrap": True, **options})

    @property
    def file(self) -> Any:
        """The stream itself, behind PlainStream and behind the one that rich puts in front while a bar is shown."""
        stream = super().file
        while (behind := getattr(stream, "rich_proxied_file", None)) is not None:
            stream = behind
        return stream

    @file.setter
    def file(self, stream: Any) -> None:
        self._file = stream

    def on_broken_pipe(self) -> None:
        reader_left()

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        return super().render_str(printable(as_named(text), keep=LINES), **options)


def show_as(folder: str, name: str) -> None:
    """From now on, show a folder that this process made as what the user named."""
    _SHOWN[folder] = name


def as_named(text: str) -> str:
    """A text with each folder as the user named it (`show_as`)."""
    for folder, name in _SHOWN.items():
        text = text.replace(folder, name)
    return text


class PlainStream:
    """A text stream that passes what is written through `printable`. The Console above bypasses it, because the escape
    sequences that it writes are its own.
    """

    def __init__(self, stream: TextIO, keep: str) -> None:
        self.rich_proxied_file = stream  # where a rich Console looks for the stream behind another
        self._keep = keep

    def write(self, text: str) -> int:
        self.rich_proxied_file.write(printable(as_named(text), self._keep))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        if name in ("buffer", "detach"):  # these would bypass `printable`
            raise AttributeError(name)
        return getattr(self.rich_proxied_file, name)


def open_streams() -> None:
    """Open what a parent closed (`>&-`) on the null device, before a file that is opened gets that number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
    for name in ("stdout", "stderr"):  # that there is no stdin, `prep -` says
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 until the process ends


def os_problem(error: OSError) -> str:
    """What an operating system's error says, with the file that was meant and what to do."""
    remedy = {
        errno.ENOSPC: ": free space, or name another place",
        errno.EROFS: ": name another place",
        errno.EACCES: ": check its permissions, or name another place",
    }.get(error.errno or 0, "")
    file = None if error.filename is None else re.sub(r"\.tmp-(.+)-\d+-[0-9a-f]{8}$", r"\1", str(error.filename))
    if file is None and error.errno == errno.ENOSPC:
        try:
            print(flush=True)
        except OSError:  # what could not be written is what was printed
            _drop_output(sys.__stdout__)
            file = "standard output"
    return f"{'' if file is None else f'{file}: '}{error.strerror or error}{remedy}"


@contextlib.contextmanager
def plain_output() -> Iterator[None]:
    """Make standard output and error PlainStreams. Libraries' progress bars need carriage returns on standard error."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale that lacks a character must not end the verb
    sys.stdout = cast(TextIO, PlainStream(sys.stdout, LINES))
    sys.stderr = cast(TextIO, PlainStream(sys.stderr, LINES + "\r"))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def program() -> str:
    """How a command that a verb prints begins: `weftrain`, or what the shell needs where that is not found on PATH.

    Terminal output begins commands with this, or passes text that names some through `as_called`, as every error does.
    What others read elsewhere says plain `weftrain`: HTML pages, model cards, releases and the openness table, --help
    and the documentation made from it, and JSON.
    """
    called = Path(sys.argv[0])
    if called.name == "weftrain":
        found = shutil.which("weftrain")
        return "weftrain" if found and os.path.realpath(found) == os.path.realpath(called) else shlex.quote(str(called))
    if called.parts[-2:] == ("cli", "__main__.py") and shutil.which("weftrain") is None:
        return f"{shlex.quote(sys.executable)} -m weftrain.cli"
    return "weftrain"


def as_called(text: str) -> str:
    """The text with each command between backticks as it works here: `weftrain log` begins with `program()`."""
    begin = f"{program()} "
    return re.sub(r"`[^`\n]+`", lambda quoted: re.sub(r"\bweftrain (?=[a-z-])", lambda _: begin, quoted[0]), text)


def follows() -> bool:
    """Whether a launcher started this process as a rank other than 0: it prints nothing that rank 0 prints."""
    return os.environ.get("RANK", "0") != "0" and "WORLD_SIZE" in os.environ


def reader_left() -> NoReturn:
    """End as other tools do when the reader of their output has gone, as in `weftrain show amber_7b | head -1`."""
    _drop_output(sys.__stdout__, sys.__stderr__)
    raise SystemExit(128 + signal.SIGPIPE)


def _drop_output(*streams: TextIO | None) -> None:
    """Let what these streams still buffer, which has nowhere to go, end in the null device."""
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(silent, stream.fileno())  # type: ignore[union-attr]


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw plots within, after all other work is kept: without matplotlib there is a warning in their place."""
    from weftrain.analysis.figure import NoMatplotlibError

    try:
        yield
    except NoMatplotlibError as error:
        click.echo(f"warning: {error}", err=True)


def this_program(*words: str) -> list[str]:
    """The command that runs `weftrain WORDS` in another process of this Python."""
    return [sys.executable, "-m", "weftrain.cli", *words]


class _Note(TextColumn):
    """The one column that gives way where the line is too long: it ends in an ellipsis, never in a second line."""

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class Bar:
    """`with Bar(console, "train", total) as bar: bar.update(done, "loss 4.2")`; the bar estimates the time left."""

    def __init__(self, console: Console, description: str, total: int, done: int = 0) -> None:
        self._console, self._description, self._total = console, printable(description), total
        self._last_line_s = time.monotonic()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            name = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
            count = TextColumn("{task.fields[count]}", markup=False, table_column=Column(no_wrap=True))
            columns: list[ProgressColumn] = [
                name,
                count,
                _Note("{task.fields[note]}", markup=False, table_column=Column()),
            ]
            if console.width >= _BAR_COLUMNS:
                columns[1:1] = [BarColumn(bar_width=min(40, console.width // 6))]
                columns.append(TimeRemainingColumn(table_column=Column(no_wrap=True)))
            self._progress = Progress(*columns, console=console, transient=True)
            start = f"{done}/{total}"
            self._task = self._progress.add_task(self._description, total=total, completed=done, note="", count=start)

    def __enter__(self) -> Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(
        self, done: int, note: str, description: str | None = None, total: int | None = None, *, sizes: bool = False
    ) -> None:
        """Show `done` of `total`. sizes: these are bytes, shown in GB."""
        self._description, self._total = printable(description or self._description), total or self._total
        if self._progress is not None:
            self._progress.update(
                self._task,
                completed=done,
                note=printable(note),
                description=self._description,
                total=self._total,
                count=gb_done(done, self._total) if sizes else f"{done}/{self._total}",
            )
        elif time.monotonic() - self._last_line_s > QUIET_SECONDS:
            self._last_line_s = time.monotonic()
            count = gb_done(done, self._total) if sizes else f"{done:,}/{self._total:,}"
            self._console.print(f"{self._description} {count} {note}".rstrip())

    def sizes(self, done: int, total: int) -> None:
        """Show `done` of `total` bytes."""
        self.update(done, "", None, total, sizes=True)

    def note(self, words: str) -> None:
        """Show what is being done now, beside the bar; without a terminal, nothing."""
        if self._progress is not None:
            self._progress.update(self._task, note=printable(words))

    def say(self, line: str) -> None:
        """Print a line that stays, above the bar."""
        (self._progress.console if self._progress is not None else self._console).print(line)


class PreparationBar:
    """What a backend says it is doing: on the bar of its own before step 0, and beside the step on the run's."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._own: Bar | None = None
        self.bar: Bar | None = None
        self._last_s = 0.0

    def __call__(self, words: str, share: float) -> None:
        if (now := time.monotonic()) - self._last_s < 0.5:
            return
        self._last_s = now
        if self.bar is not None:
            self.bar.note(words)
            return
        if self._own is None:
            self._own = Bar(self._console, "preparing", 1000).__enter__()
        self._own.update(int(share * 1000), words)

    def __enter__(self) -> PreparationBar:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._own is not None:
            self._own.__exit__(*error)
        self._own = None
