"""Makes the k-th file operation fail, or be the last that the process does. Stands in for `fsops._perform`.

Death is a BaseException that nothing catches, and after it no operation is carried out: a dead process does not clean
up.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from weftrain.core.formats import fsops

T = TypeVar("T")
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS}
DEATHS = ("dies before", "dies after", "dies torn")
KINDS = (*ERRORS, "disk stays full", *DEATHS)
_TAKES_SPACE = ("create", "write", "make_dir", "open_append", "sync_file")


class Death(BaseException):
    """The process ends here."""


class Faults:
    """Counts operations in `trace`; the one with number `at` fails or is the last, as `kind` says. at None: only
    counts.
    """

    def __init__(self, kind: str = "", at: int | None = None) -> None:
        self.kind, self.at = kind, at
        self.trace: list[tuple[str, Path]] = []
        self.dead = False

    def __call__(self, name: str, path: Path, action: Callable[[], T]) -> T:
        number = len(self.trace)
        self.trace.append((name, path))
        if self.dead:
            raise Death
        if self.at is not None and number >= self.at and self.kind == "disk stays full" and name in _TAKES_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if number != self.at or self.kind == "disk stays full":
            return action()
        if self.kind in ERRORS:
            raise OSError(ERRORS[self.kind], os.strerror(ERRORS[self.kind]), str(path))
        self.dead = True
        size_before = path.stat().st_size if name == "write" else 0
        if self.kind != "dies before":
            action()
        if self.kind == "dies torn" and name == "write":  # half of what this write added
            os.truncate(path, (size_before + path.stat().st_size) // 2)
        raise Death


@contextmanager
def injected(faults: Faults) -> Iterator[Faults]:
    """Put `faults` in the place that every file operation passes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsops, "_perform", faults)
        yield faults
