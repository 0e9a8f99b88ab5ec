"""The process of one tracker: `python -m weftrain.analysis.tracking.process RUN TRACKER`, started by `train`.

It follows the run's folder until its standard input ends, which it does however the run's process dies. What goes wrong
are lines on its standard output.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

from weftrain.analysis.tracking.follower import Follower
from weftrain.analysis.tracking.observer import follow
from weftrain.analysis.tracking.trackers import find_tracker


def main(folder: Path, name: str) -> None:
    """Follow the run. Its own output goes nowhere but into problems: libraries print, and may know secrets."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the run decides when it ends
    said = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    ended = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.buffer.read()
        ended.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()

    def tell(words: str) -> None:
        with contextlib.suppress(OSError):  # the run is gone
            print(words, file=said, flush=True)

    follow(lambda: Follower(folder, name, find_tracker(name)), ended.wait, tell)
    os._exit(0)  # what a library would still wait for has had its time


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
