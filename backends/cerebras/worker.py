"""Runs in the vendor's environment: `python -I worker.py ROOT EVENTS PARENT`, job and commands on stdin, events to file
descriptor EVENTS. It ends when process PARENT does.

weftrain is not installed in that environment. The source files that the main process runs are made importable from
ROOT, the folder that holds core/, kernels/ and backends/, so that a graph cannot come from another version.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
import types
from pathlib import Path
from typing import Any


def main(root: str, descriptor: int, parent: int) -> int:
    # process.py starts it in a process group of its own, which also holds the vendor's processes
    if os.getpgrp() == os.getpid():
        threading.Thread(target=_end_with, args=(parent,), name="weftrain-parent", daemon=True).start()
    package = types.ModuleType("weftrain")
    package.__path__ = [root]
    sys.modules["weftrain"] = package
    # The compiler front end starts `torch-cirh-opt`, which lies beside this Python.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with os.fdopen(descriptor, "w", buffering=1, encoding="utf-8") as events:
        from weftrain.backends.cerebras.job import decode, encode

        def send(event: str, **fields: Any) -> None:
            events.write(encode({"event": event, **fields}))

        try:
            from weftrain.backends.cerebras import program

            commands = (decode(line, "the main process") for line in sys.stdin)
            program.run(sys.stdin.readline(), commands, send)
        except BaseException as error:
            traceback.print_exc()
            send("failed", kind=type(error).__name__, message=str(error).strip(), frames=our_frames(error, root))
            return 1
    return 0


def _end_with(parent: int) -> None:
    """End this process group when the main process ends, which may be killed while the compiler works for an hour.

    parent: as the main process gave it; by now this process may already have been given to another parent.
    """
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def our_frames(error: BaseException, root: str) -> list[str]:
    """'core/model.py:219 in forward: the line', innermost first, of the frames that are weftrain's."""
    found = []
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(root + os.sep):
            found.append(f"{Path(frame.filename).relative_to(root)}:{frame.lineno} in {frame.name}: {frame.line}")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
