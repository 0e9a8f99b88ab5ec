"""Starts the worker process in the vendor's environment and exchanges messages with it, with a time limit.

The vendor's packages write to stdout and stderr, so both go to a log file, and events have a pipe of their own. A
worker that dies, or sends nothing for too long, is an error of one line that names the log.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from weftrain.backends.cerebras import environment
from weftrain.backends.cerebras.job import ENDS, WorkerJob, decode, encode
from weftrain.core.errors import BackendError, NonFiniteError
from weftrain.core.formats import fsops

ROOT = Path(__file__).resolve().parents[2]  # holds core/, kernels/ and backends/, in a checkout and installed
WORKER = Path(__file__).with_name("worker.py")
LOG = "vendor.log"


class WorkerError(BackendError):
    """A failure in the worker. frames: the lines of weftrain's source in its traceback, innermost first."""

    def __init__(self, message: str, kind: str = "", frames: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.kind, self.frames = kind, frames


class NoClusterError(WorkerError):
    """The job needs systems, and none could be reached."""


# Names of exceptions that mean it, from the vendor's configuration, its gRPC calls and name resolution.
_NO_CLUSTER = (
    "ClusterConfigError",
    "InactiveRpcError",
    "RpcError",
    "ApplianceClientException",
    "ConnectionError",
    "gaierror",
)


class WorkerProcess:
    """One job in one process. silence_s: longest time between two messages. root: folder of the source it imports."""

    def __init__(self, job: WorkerJob, silence_s: float, python: Path | None = None, root: Path = ROOT) -> None:
        self.folder, self.silence_s = Path(job.artifacts), silence_s
        self.log = self.folder / LOG
        self.seconds: dict[str, float] = {}  # phase -> when it began, counted from the start
        self.peak_bytes: int | None = None
        program = environment.python() if python is None else python
        self.folder.mkdir(parents=True, exist_ok=True)
        read, write = os.pipe()
        with open(self.log, "wb", opener=fsops.open_own) as log:
            self._process = subprocess.Popen(
                [str(program), "-I", str(WORKER), str(root), str(write), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(write,),
                cwd=self.folder,  # the vendor's packages write files into the working folder
                start_new_session=True,  # so that its child processes can be ended with it
            )
        os.close(write)
        os.set_blocking(read, False)
        self._events, self._pending, self._started = read, b"", time.monotonic()
        self._write(job.model_dump_json() + "\n")

    def ask(self, command: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Send a command and yield its events, the last of which ends it."""
        self._write(encode({"command": command, **fields}))
        yield from self.events()

    def one(self, command: str, **fields: Any) -> dict[str, Any]:
        """Send a command and return its last event."""
        *_, last = self.ask(command, **fields)
        return last

    def events(self) -> Iterator[dict[str, Any]]:
        """Events until one that ends a command. Raises WorkerError if the worker fails, dies or sends nothing for too
        long, and NonFiniteError if it reports that.
        """
        while True:
            event = decode(self._line(), "the worker")
            if event["event"] == "failed":
                self._fail(event)
            yield event
            if event["event"] in ENDS or event["event"] == "ready":
                return

    def close(self) -> None:
        """End the process by closing its input, and after 10 s by a signal."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._kill()
        if self._events >= 0:
            os.close(self._events)
            self._events = -1

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._kill()
        self.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except OSError:
            self._dead()

    def _line(self) -> str:
        deadline = time.monotonic() + self.silence_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._events, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self._kill()
                    raise WorkerError(
                        f"the worker sent nothing for {self.silence_s:g} s and was ended; its output is in {self.log}; "
                        "raise backend.options.silence_s if the machine is slow"
                    )
                part = os.read(self._events, 1 << 16)
                if not part:
                    self._dead()
                self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()

    def _dead(self) -> None:
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._kill()
            code = -signal.SIGKILL
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        out_of_memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        raise WorkerError(f"the worker {how}{out_of_memory}: {self.last_words()}; its output is in {self.log}")

    def _fail(self, event: dict[str, Any]) -> None:
        message, frames = str(event.get("message", "")), tuple(event.get("frames", ()))
        if event.get("kind") == "NonFiniteError":
            raise NonFiniteError(message)
        if any(name in str(event.get("kind")) for name in _NO_CLUSTER):
            raise NoClusterError(
                f"this needs a Cerebras cluster and none was reached ({_first_line(message)}): on a cluster's user "
                "node set backend.options.management_address, or use its configuration file; `weftrain lower` needs "
                "none"
            )
        raise WorkerError(message, str(event.get("kind", "")), frames)

    def last_words(self) -> str:
        """The last line that the worker printed."""
        try:
            lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        except OSError:
            return "it printed nothing"
        return lines[-1][:300] if lines else "it printed nothing"


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason was given")[:200]
