"""Run one untrusted Python program, such as a model's completion, so that it can do no harm and leaves nothing behind.

sandbox_stage.py does the work in processes of its own: new user, PID, mount, network, IPC and UTS namespaces, a
read-only root with only the interpreter, one small tmpfs, a system-call filter, and limits on time, memory, files and
processes. Linux only. If the kernel refuses any part, nothing is run.

Exit status 0 is not a pass, as a program may leave before its tests. A pass is witnessed by a random token that lies in
no file, argument or environment and is written after the last line of the tests. But a program that shares its process
with its tests can read the token: `passed` of run_untrusted is no verdict on a program that wants to cheat.
sandbox_judge.py gives one, with the tests in a second sandbox.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import secrets
import select
import signal
import struct
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from weftrain.analysis.evaluation.sandbox_filter import ARCHITECTURES, filter_program
from weftrain.core.errors import WeftrainError
from weftrain.core.formats.canonical import parse_json

Status = Literal["passed", "failed", "timed_out", "killed"]
STATUSES: tuple[Status, ...] = ("passed", "failed", "timed_out", "killed")
# What becomes the program. The token is read from a pipe before any line of the program runs and lies in no file,
# argument or environment; it is written only where both parts ran to their end, in the process that began.
DRIVER = """
import sys
from importlib.machinery import SourceFileLoader
from os import _exit, getpid, read, write
def run():
    token, own = read(0, 64), getpid()
    flush = sys.stderr.flush
    sys.argv[:] = ["/program.py"]  # and standard input is a pipe that is empty for ever
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    for path in ("/program.py", "/tests.py"):
        module.__file__ = path
        SourceFileLoader("__main__", path).exec_module(module)
    flush()
    if getpid() == own:
        write(2, token)
    _exit(0)
run()
"""

_SMALLEST = {"memory_bytes": 32 << 20, "disk_bytes": 4096, "processes": 1}
# beyond a program's own time: on a busy machine the stage may take that long to start or to clean up
_GRACE_S = 60.0
_REMEDY = (
    "as root in a container give it CAP_SYS_ADMIN and a seccomp profile that allows unshare and mount; as a user allow "
    "user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone=1, "
    "kernel.apparmor_restrict_unprivileged_userns=0), or use a machine that has them: generated code is never run "
    "unconfined"
)


class SandboxError(WeftrainError):
    """A machine that cannot confine a program; says which part is missing and what to do."""


@dataclass(frozen=True)
class SandboxLimits:
    """memory_bytes: address space of each process, of which there may be `processes` (threads count)."""

    timeout_s: float = 5.0
    memory_bytes: int = 1 << 30
    disk_bytes: int = 16 << 20
    processes: int = 8


@dataclass(frozen=True)
class Outcome:
    """passed: ran to the end of its tests. failed: ended otherwise. timed_out: was stopped. killed: by a signal.

    stderr_tail: at most the last 4096 bytes of standard error; invalid UTF-8 is escaped. exit_status: None where a
    signal or this process ended it.
    """

    status: Status
    reason: str
    stderr_tail: str
    exit_status: int | None = field(default=None, compare=False)


def run_untrusted(
    program: str, *, timeout_s: float, memory_bytes: int, disk_bytes: int, processes: int, tests: str = ""
) -> Outcome:
    """Run `program`, then `tests` in the same namespace (both Python source). Blocks; safe to call from threads.

    tests is compiled separately, so a program that ends within a string or bracket does not swallow it. The program has
    the standard library, no installed package, no network, no environment, an empty standard input; standard output is
    discarded. All of its processes are dead on return. Raises SandboxError where it cannot be confined, ValueError for
    limits out of range.
    """
    limits = SandboxLimits(timeout_s, memory_bytes, disk_bytes, processes)
    return outcome_of(start_stage(program, tests, limits), limits)


def start_stage(
    program: str,
    tests: str,
    limits: SandboxLimits,
    *,
    driver: str = DRIVER,
    channel: tuple[int, int] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program as run_untrusted does; follow with `outcome_of`, which waits, or `end_stage`, which kills it.

    driver: Python source that becomes the program's process, instead of DRIVER. channel: two descriptors
    (to read, to write) that it sees as 3 and 4. Raises SandboxError, ValueError.
    """
    if not (math.isfinite(limits.timeout_s) and limits.timeout_s > 0):
        raise ValueError(f"run_untrusted: timeout_s={limits.timeout_s} must be above 0 and finite")
    for name, least in _SMALLEST.items():
        if getattr(limits, name) < least:
            raise ValueError(f"run_untrusted: {name}={getattr(limits, name)} must be at least {least}")
    missing = _unsupported()
    if missing is not None:
        raise SandboxError(f"sandbox: {missing}; {_REMEDY}")
    request = {
        **asdict(limits),
        "program": program,
        "tests": tests,
        "driver": driver,
        "filter": filter_program(platform.machine()).hex(),
        "parent": os.getpid(),
        "channel": list(channel or ()),
        "token": secrets.token_hex(24),
    }
    # not canonical: a completion may hold lone surrogates, which only an escape can carry
    body = json.dumps(request).encode()
    command = [sys.executable, "-I", "-S", "-B", str(Path(__file__).with_name("sandbox_stage.py"))]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        stderr=subprocess.STDOUT,
        env={},
        cwd="/",
        start_new_session=True,
        pass_fds=channel or (),
    )
    assert process.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # what it says on its other end tells more
            process.stdin.write(struct.pack("<Q", len(body)) + body)
            process.stdin.flush()
    except BaseException:
        end_stage(process)
        raise
    return process


def outcome_of(process: subprocess.Popen[bytes], limits: SandboxLimits) -> Outcome:
    """Wait for the program of a stage. Raises SandboxError where the stage could not confine it."""
    assert process.stdout is not None
    said = b""
    try:
        said = _read_all(process.stdout.fileno(), limits.timeout_s + _GRACE_S)
    finally:
        end_stage(process)
    try:
        answer: dict[str, Any] = parse_json(said)
    except ValueError:
        shown = said[-300:].decode(errors="replace")
        answer = {"unavailable": f"the stage ended with status {process.returncode} and said {shown!r}"}
    if "unavailable" in answer:
        raise SandboxError(f"sandbox: {answer['unavailable']}; {_REMEDY}")
    return _outcome(answer, limits.timeout_s)


def end_stage(process: subprocess.Popen[bytes]) -> None:
    """Kill what a stage still runs, and reap the stage; closing its standard input tells it to stop."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()  # and its death signals take the rest
        process.wait()
    process.stdout.close()


def reason_unavailable() -> str | None:
    """None where programs can be confined here, otherwise what is missing and what to do. Tries it: about 0.1 s."""
    try:
        found = run_untrusted("pass", timeout_s=30.0, memory_bytes=256 << 20, disk_bytes=1 << 20, processes=1)
    except SandboxError as error:
        return str(error)
    return (
        None if found.status == "passed" else f"sandbox: an empty program {found.reason}: {found.stderr_tail[-200:]!r}"
    )


def _unsupported() -> str | None:
    if sys.platform != "linux":
        return f"needs Linux, and this is {sys.platform}"
    if platform.machine() not in ARCHITECTURES:
        return f"no table of system calls for {platform.machine()} (have {', '.join(ARCHITECTURES)})"
    release = platform.release().split(".")
    if [int("".join(filter(str.isdigit, part)) or 0) for part in release[:2]] < [5, 14]:
        return f"needs Linux 5.14 (processes counted per user namespace), and this is {platform.release()}"
    return None


def _outcome(answer: dict[str, Any], timeout_s: float) -> Outcome:
    tail = answer["tail"].encode("latin-1").decode("utf-8", "backslashreplace")
    result = answer["result"]
    if result is None:
        if answer["timed_out"]:
            return Outcome("timed_out", f"took more than {timeout_s:g} s", tail)
        return Outcome("killed", "killed from outside, as when the machine has no memory left", tail)
    code = os.waitstatus_to_exitcode(result)
    if code < 0:
        if -code == signal.SIGXCPU:
            return Outcome("timed_out", f"used more than {math.ceil(timeout_s) + 1} s of processor time", tail)
        return Outcome("killed", f"killed by {_signal_name(-code)}", tail)
    if code == 0 and answer["witnessed"]:
        return Outcome("passed", "ran to the end of its tests", tail, 0)
    if code == 0:
        return Outcome("failed", "left with exit status 0 before the end of its tests", tail, 0)
    return Outcome("failed", f"ended with exit status {code}", tail, code)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names
        return f"signal {number}"


def _read_all(descriptor: int, patience_s: float) -> bytes:
    """Read to the end of the pipe, or until patience_s is over."""
    waiting, end, said = select.poll(), time.monotonic() + patience_s, b""
    waiting.register(descriptor, select.POLLIN)
    while waiting.poll(max(0, math.ceil((end - time.monotonic()) * 1000))):
        part = os.read(descriptor, 1 << 16)
        if not part:
            break
        said += part
    return said
