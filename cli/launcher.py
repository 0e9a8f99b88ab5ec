"""Ends a process when the torchrun that started it ends, even while it imports or waits for other ranks.

A thread polls the parent's process id. The alternative, PR_SET_PDEATHSIG, is tied to the *thread* that forked, and a
signal can be ignored.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import NoReturn

_INTERVAL_S = 1.0


def end_with_launcher() -> None:
    """Watch the parent process if it is torchrun. Ranks started by hand may outlive their shell."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if os.getppid() == 1 and not _runs_python(1):  # it ended while this process was started
            _leave("which started this process")
        threading.Thread(target=_watch, args=(os.getppid(),), name="weftrain-launcher", daemon=True).start()


def restarted_by_launcher() -> bool:
    """Whether torchrun started this process again after one of the run's processes failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_INTERVAL_S)
    _leave(f"process {launcher}")


def _runs_python(process: int) -> bool:
    """Whether a process runs Python, as torchrun does, which is process 1 of a container of its own."""
    try:
        return "python" in os.path.basename(os.readlink(f"/proc/{process}/exe"))
    except OSError:  # another user's
        return False


def _leave(launcher: str) -> NoReturn:
    sys.stderr.write(
        f"weftrain: rank {os.environ.get('RANK', '?')}: the launcher, {launcher}, has ended, so this process ends too\n"
    )
    sys.stderr.flush()
    os._exit(1)
