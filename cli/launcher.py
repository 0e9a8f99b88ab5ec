"""Ends a process when the torchrun that started it ends, even while it imports or waits for other ranks.

A thread polls the parent's process id. The alternative, PR_SET_PDEATHSIG, is tied to the *thread* that forked, and a
signal can be ignored.
"""

from __future__ import annotations

import os
import sys
import threading
import time

_INTERVAL_S = 1.0


def end_with_launcher() -> None:
    """Watch the parent process if it is torchrun. Ranks started by hand may outlive their shell."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), name="weftrain-launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_INTERVAL_S)
    sys.stderr.write(
        f"weftrain: rank {os.environ.get('RANK', '?')}: the launcher, process {launcher}, has ended, so this process "
        "ends too\n"
    )
    sys.stderr.flush()
    os._exit(1)
