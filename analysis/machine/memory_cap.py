"""Run a command under a memory limit in MiB: `python -m weftrain.analysis.machine.memory_cap 8192 -- COMMAND ...`.

A cgroup (version 2 or 1) counts resident memory and page cache, and the kernel kills a process that needs more. Without
the right to make a cgroup nothing is limited, and the last line says so; the peak resident memory of the largest
process is printed in either case.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

from weftrain.core.formats.units import gib

_V2, _V1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")


def make_group(limit_bytes: int) -> Path | str:
    """A new cgroup with that limit and no swap, or the reason why there is none."""
    base, name = (_V2, "memory.max") if (_V2 / "cgroup.controllers").exists() else (_V1, "memory.limit_in_bytes")
    group = base / f"weftrain-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        return f"no cgroup can be made in {base}: {error.strerror}"
    try:
        (group / name).write_text(str(limit_bytes))
        swap = group / ("memory.swap.max" if base == _V2 else "memory.memsw.limit_in_bytes")
        if swap.exists():
            swap.write_text("0" if base == _V2 else str(limit_bytes))
    except OSError as error:
        group.rmdir()
        return f"the limit of {group} cannot be set: {error.strerror}"
    return group


def peak_bytes(group: Path) -> int | None:
    """The group's peak, page cache included; None where the kernel does not record it."""
    for name in ("memory.peak", "memory.max_usage_in_bytes"):
        if (group / name).exists():
            return int((group / name).read_text())
    return None


def main(arguments: list[str]) -> int:
    """Run the command; its exit code, or 128 + signal."""
    if len(arguments) < 3 or not arguments[0].isdigit() or arguments[1] != "--":
        print("usage: python -m weftrain.analysis.machine.memory_cap MIB -- COMMAND ...", file=sys.stderr)
        return 2
    limit = int(arguments[0]) << 20
    group = make_group(limit)
    child = os.fork()
    if child == 0:
        if isinstance(group, Path):
            (group / "cgroup.procs").write_text(str(os.getpid()))
        try:
            os.execvp(arguments[2], arguments[2:])
        except OSError as error:
            print(f"{arguments[2]}: {error.strerror}", file=sys.stderr)
            os._exit(127)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command has it too, and decides
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(child, number))  # it comes to this process alone
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    resident = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    if isinstance(group, Path):
        peak = peak_bytes(group)
        group.rmdir()
        whole = "" if peak is None else f", {gib(peak)} with page cache"
        print(f"memory capped at {gib(limit)} by a cgroup; peak {gib(resident)} resident{whole}")
    else:
        print(f"memory NOT capped ({group}); peak {gib(resident)} resident")
    if code == -signal.SIGKILL:
        print("the command was killed: it needed more than the cap", file=sys.stderr)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
