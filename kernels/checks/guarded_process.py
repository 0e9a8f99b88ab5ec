"""The process that cases of kernels/checks/bounds.py are forked from: `python -m`, a line of JSON in for each case, a
line out.

No arithmetic on more than one thread may happen here before a fork. A forked child does not inherit the pool of
threads, and would wait for it for ever.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from typing import Any

import torch

from weftrain.kernels.checks.bounds import faults_of
from weftrain.kernels.triton_version import interpreting


def main() -> None:
    """Serve until standard input ends. What kernels print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    # code that torch generates is torch's, and would be generated again in every child
    torch.compiler.set_stance("force_eager")
    _import_sources()
    for line in sys.stdin:
        answers.write(json.dumps(_ask(json.loads(line))) + "\n")
        answers.flush()


def _import_sources() -> None:
    from weftrain.kernels.registry import load_catalog

    load_catalog()
    if interpreting():
        from weftrain.kernels.checks.interpreter import install

        install()


def _ask(job: dict[str, Any]) -> dict[str, Any]:
    """{"faults": [...]}, or {"ended_by": "SIGSEGV"} of a child that did not come to its answer."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _answer(job, writer)
    os.close(writer)
    try:
        answer = _read(reader, job["seconds"])
    finally:
        os.close(reader)
    if answer is None:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if answer is None:
        return {"ended_by": f"the limit of {job['seconds']} s"}
    if not answer:
        return {"ended_by": signal.Signals(-status).name if status < 0 else f"exit code {status}"}
    return {"faults": json.loads(answer)}


def _answer(job: dict[str, Any], writer: int) -> None:
    """In the child; never returns."""
    try:
        faults = faults_of(job)
    except Exception as error:  # of the code under test: it is the finding
        faults = [f"raised {type(error).__name__}: {error}"]
    with os.fdopen(writer, "w") as out:
        out.write(json.dumps(faults))
    os._exit(0)


def _read(reader: int, seconds: float) -> str | None:
    """Everything until the other side closes; None where that takes too long."""
    parts: list[bytes] = []
    end = time.monotonic() + seconds
    while select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
        part = os.read(reader, 1 << 16)
        if not part:
            return b"".join(parts).decode()
        parts.append(part)
    return None


if __name__ == "__main__":
    main()
