"""The confining stage of sandbox.py, run by path (`python -I -S`): reads one request, runs one program, answers.

Three processes: this one (the warden) stays outside and keeps the time; its child is process 1 of a new PID namespace
(the init), whose death kills everything within; the init's child becomes the untrusted program by execve. The program
sees a new root: the interpreter and its libraries, read-only, and one small tmpfs at /work, /tmp, /var/tmp and
/dev/shm. There is no /proc and no /home.

Order matters: mounts, then the unprivileged user, then (or first, if never root) the user namespace, because
RLIMIT_NPROC binds only a user that is not root and counts per user namespace. This file runs without site-packages and
cannot import weftrain, so the driver and the system-call filter come with the request; its standard output is the
answer, so it must not print.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import math
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
from typing import Any

NOBODY = 65534
TAIL_BYTES = 4096
_OPEN_FILES = 256
_LARGEST_REQUEST = 1 << 28

_CLONE = {
    "mount": 0x00020000,
    "UTS": 0x04000000,
    "IPC": 0x08000000,
    "user": 0x10000000,
    "PID": 0x20000000,
    "network": 0x40000000,
}
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_MOUNT_SETATTR = 442  # the same number on every architecture, as of all calls since 424
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000

# Descriptors of two pipes to another sandbox, where the request names some ("channel": [read, write]): the program has
# them as 3 and 4.
_CHANNEL = (3, 4)
_ABOVE_ALL = 512  # a number that none of our own descriptors has

_libc = ctypes.CDLL(None, use_errno=True)


class SetupError(Exception):
    """A step of the confinement that the kernel refused: its name and errno's message."""


def _checked(result: int, step: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise SetupError(f"{step}: {os.strerror(number)} ({errno.errorcode.get(number, number)})")
    return result


def _unshare(*names: str) -> None:
    _checked(
        _libc.unshare(sum(_CLONE[name] for name in names)),
        f"unshare of the {', '.join(names)} namespace{'s' * (len(names) > 1)}",
    )


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None, step: str) -> None:
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind, options)]
    _checked(_libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]), step)


def _prctl(option: int, value: Any, step: str, third: Any = 0) -> None:
    longs = [ctypes.c_ulong(item) if isinstance(item, int) else item for item in (value, third)]
    _checked(_libc.prctl(option, *longs, ctypes.c_ulong(0), ctypes.c_ulong(0)), step)


def _become_namespace_user(proc: int) -> None:
    """Enter a user namespace with one user and group: NOBODY inside, ours outside. proc: descriptor of /proc."""
    uid, gid = os.getuid(), os.getgid()
    _unshare("user")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        try:
            descriptor = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
            os.write(descriptor, text.encode())
            os.close(descriptor)
        except OSError as error:
            raise SetupError(f"write of /proc/self/{name}: {error.strerror}") from None


def interpreter_paths() -> tuple[str, list[str]]:
    """The interpreter's real path, and the folders and files that it and its libraries need, none nested."""
    executable = os.path.realpath("/proc/self/exe")
    wanted = {os.path.realpath(path) for path in (sys.base_prefix, sys.base_exec_prefix)}
    folder = os.path.dirname(executable)
    # the latter where a venv holds a copy of the interpreter
    wanted |= {folder, os.path.join(os.path.dirname(folder), "pyvenv.cfg")}
    wanted |= {"/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"}
    wanted |= {os.path.realpath(path) for path in ("/lib", "/lib32", "/lib64")}
    with open("/proc/self/maps") as file:
        fields = [line.rstrip("\n").split(None, 5) for line in file]
    wanted |= {
        os.path.dirname(row[5])
        for row in fields
        if len(row) == 6 and row[5].startswith("/") and ".so" in os.path.basename(row[5])
    }
    if executable.startswith("/nix/store/"):
        wanted.add("/nix/store")
    kept: list[str] = []
    for path in sorted(wanted):
        if os.path.exists(path) and not any(path.startswith(f"{other}/") for other in kept):
            kept.append(path)
    if "/" in kept:
        raise SetupError("the interpreter's prefix is /, so all files would be in sight")
    return executable, kept


def _place(path: str, root: str) -> str:
    """Create `path` below `root`, as a folder or an empty file, and bind the original there."""
    target = root + path
    if os.path.isdir(path):
        os.makedirs(target, 0o755, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(path, target, None, _MS_BIND | _MS_REC, None, f"bind of {path}")
    return target


def build_root(request: dict[str, Any]) -> str:
    """Build the new root of this mount namespace with the program in it. Returns the interpreter's path."""
    executable, paths = interpreter_paths()
    sources = [text.encode("utf-8", "surrogatepass") for text in (request["program"], request["tests"])]
    root = next(
        (
            path
            for path in ("/sys", "/srv", "/media", "/mnt")
            if os.path.isdir(path) and not any(p.startswith(path) for p in paths)
        ),
        "",
    )
    if not root:
        raise SetupError("no folder of /sys, /srv, /media, /mnt to mount on")
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE, None, "private mounts")
    size = sum(map(len, sources)) + (1 << 20)
    _mount(
        "tmpfs",
        root,
        "tmpfs",
        _MS_NOSUID | _MS_NODEV,
        f"size={size},nr_inodes=4096,mode=755",
        "mount of the root's tmpfs",
    )
    for name in ("/lib", "/lib32", "/lib64"):
        if os.path.islink(name):
            os.symlink(os.readlink(name), root + name)
    for path in (*paths, "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"):
        _place(path, root)
    for name, source in zip(("program.py", "tests.py"), sources, strict=True):
        with open(f"{root}/{name}", "wb") as file:
            file.write(source)
        os.chmod(f"{root}/{name}", 0o644)
    writable = ("/work", "/tmp", "/var/tmp", "/dev/shm")
    for name in writable:
        os.makedirs(root + name, 0o755, exist_ok=True)
    attributes = struct.pack("=QQQQ", _MS_RDONLY | _MS_NOSUID, 0, 0, 0)
    step = "read-only mounts (mount_setattr)"
    _checked(
        _libc.syscall(
            _MOUNT_SETATTR, _AT_FDCWD, os.fsencode(root), _AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes))
        ),
        step,
    )
    inodes = max(64, min(65536, request["disk_bytes"] // 1024))  # an inode costs memory that the size does not count
    options = f"size={request['disk_bytes']},nr_inodes={inodes},mode=1777"
    _mount("tmpfs", root + "/work", "tmpfs", _MS_NOSUID | _MS_NODEV, options, "mount of the work folder's tmpfs")
    for name in writable[1:]:
        folder = f"{root}/work/.{name[1:].replace('/', '-')}"
        os.mkdir(folder)
        os.chmod(folder, 0o1777)
        _mount(folder, root + name, None, _MS_BIND, None, f"bind of the tmpfs to {name}")
    os.chdir(root)
    pivot = {"x86_64": 155, "aarch64": 41}[platform.machine()]
    _checked(_libc.syscall(pivot, b".", b"."), "pivot_root")  # the old root is now stacked on the new one, and goes
    _checked(_libc.umount2(b".", _MNT_DETACH), "unmount of the old root")
    os.chdir("/work")
    return executable


def _refuse_system_calls(filter_hex: str) -> None:
    """filter_hex: sandbox_filter.filter_program, in hexadecimal."""
    if not filter_hex:
        raise SetupError("seccomp filter: the request has none")
    program = ctypes.create_string_buffer(bytes.fromhex(filter_hex))
    header = struct.pack("@HP", len(program.raw[:-1]) // 8, ctypes.addressof(program))
    _prctl(_PR_SET_SECCOMP, 2, "seccomp filter", header)


def _become_program(request: dict[str, Any], executable: str, token: int, errors: int) -> None:
    """In the init's child: apply every limit and become the interpreter. Returns only by an exception."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "no_new_privs")
    os.setsid()
    nothing = os.open("/dev/null", os.O_RDWR)
    for source, target in ((token, 0), (nothing, 1), (errors, 2)):
        os.dup2(source, target)
    channel = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _ABOVE_ALL) for descriptor in request["channel"]]
    for source, target in zip(channel, _CHANNEL, strict=False):
        os.dup2(source, target)
    os.closerange(3 + len(channel), 4096)
    cpu = math.ceil(request["timeout_s"]) + 1
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: request["disk_bytes"],
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_NPROC: request["processes"] + 2,  # the warden and the init are of the same user and count
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_AS: request["memory_bytes"],
    }
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    for which, value in limits.items():
        resource.setrlimit(which, (value, value))
    _refuse_system_calls(request["filter"])
    os.execve(executable, [executable, "-I", "-S", "-B", "-c", request["driver"]], {})


def _init(request: dict[str, Any], executable: str, alive: int, status: int, errors: int) -> None:
    """Process 1: starts the program, reaps orphans, and ends with the program, whereupon the kernel kills the rest."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, "death signal of the init")
    watch = select.poll()
    watch.register(alive, 0)
    if watch.poll(0):  # the warden died before the line above
        return
    read, write = os.pipe()
    os.write(write, request["token"].encode())
    os.close(write)
    program = os.fork()
    if program == 0:
        try:
            _become_program(request, executable, read, errors)
        except BaseException as error:
            os.write(status, json.dumps({"unavailable": f"start of the program: {error}"}).encode() + b"\n")
        finally:
            os._exit(127)
    # or the other side would not see that the program has closed them
    for descriptor in (read, errors, *request["channel"]):
        os.close(descriptor)
    while True:
        pid, result = os.waitpid(-1, 0)
        if pid == program:
            os.write(status, json.dumps({"result": result}).encode() + b"\n")
            return


class _Errors:
    """The program's standard error as it comes: its last bytes, and whether the token was among them."""

    def __init__(self, descriptor: int, token: bytes) -> None:
        self.descriptor, self.token = descriptor, token
        self.tail, self.witnessed = b"", False
        os.set_blocking(descriptor, False)

    def take(self) -> bool:
        """One read. False where there is nothing, now or ever."""
        try:
            new = os.read(self.descriptor, 1 << 16)
        except BlockingIOError:
            return False
        whole = self.tail + new
        self.witnessed = self.witnessed or self.token in whole
        self.tail = whole[-TAIL_BYTES:]
        return bool(new)


def _watch(init: int, errors: _Errors, timeout_s: float) -> bool:
    """Wait until the init is dead; kill it when time is up or the caller is gone. True: time was up."""
    handle = os.pidfd_open(init)
    waiting = select.poll()
    for descriptor in (handle, errors.descriptor):
        waiting.register(descriptor, select.POLLIN)
    waiting.register(0, 0)  # only that it hangs up
    end, timed_out = time.monotonic() + timeout_s, False
    while True:
        rest = end - time.monotonic()
        if rest <= 0 and not timed_out:
            timed_out = True
            os.kill(init, signal.SIGKILL)
        ready = dict(waiting.poll(None if timed_out else math.ceil(max(0.0, rest) * 1000)))
        if 0 in ready:
            os.kill(init, signal.SIGKILL)
            waiting.unregister(0)
        if errors.descriptor in ready and not errors.take() and ready[errors.descriptor] & select.POLLHUP:
            waiting.unregister(errors.descriptor)  # all its writers have closed it
        if handle in ready:
            os.waitpid(init, 0)
            while errors.take():
                pass
            os.close(handle)
            return timed_out


def confine_and_run(request: dict[str, Any]) -> dict[str, Any]:
    """{"unavailable": words}, or {"result": wait status or null, "timed_out", "witnessed", "tail": latin-1 text}."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, "death signal")
    if os.getppid() != request["parent"]:
        raise SetupError("the process that asked has gone")
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    if os.getuid() != 0:
        _become_namespace_user(proc)
    _unshare("mount", "PID", "network", "IPC", "UTS")
    executable = build_root(request)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        # else the files of /proc/self are root's, and the maps cannot be written
        _prctl(_PR_SET_DUMPABLE, 1, "dumpable")
        _become_namespace_user(proc)
    try:
        descriptor = os.open("self/oom_score_adj", os.O_WRONLY, dir_fd=proc)
        os.write(descriptor, b"1000")  # the machine that runs out of memory takes this first
        os.close(descriptor)
    except OSError:
        pass  # nothing that confines
    _prctl(_PR_SET_DUMPABLE, 0, "not dumpable")
    os.close(proc)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, "death signal")  # a change of user clears it
    alive, kept = os.pipe()
    status_read, status_write = os.pipe()
    errors_read, errors_write = os.pipe()
    init = os.fork()
    if init == 0:
        try:
            for descriptor in (kept, status_read, errors_read):
                os.close(descriptor)
            nothing = os.open("/dev/null", os.O_RDWR)
            for descriptor in (0, 1, 2):  # not closed: a number below 3 that is free is the next pipe's
                os.dup2(nothing, descriptor)
            _init(request, executable, alive, status_write, errors_write)
        finally:
            os._exit(0)
    for descriptor in (alive, status_write, errors_write, *request["channel"]):
        os.close(descriptor)
    errors = _Errors(errors_read, request["token"].encode())
    timed_out = _watch(init, errors, request["timeout_s"])
    said = os.read(status_read, 4096)
    answer: dict[str, Any] = json.loads(said.splitlines()[0]) if said else {"result": None}
    tail = errors.tail.replace(errors.token, b"").decode("latin-1")
    return {**answer, "timed_out": timed_out, "witnessed": errors.witnessed, "tail": tail}


def _read_request() -> dict[str, Any]:
    """Read eight bytes of length and as many of JSON; standard input stays open and hangs up when the caller dies."""

    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = os.read(0, count - len(data))
            if not part:
                raise SetupError("the request ended too early")
            data += part
        return data

    (length,) = struct.unpack("<Q", exactly(8))
    if length > _LARGEST_REQUEST:
        raise SetupError("the request is too long")
    request: dict[str, Any] = json.loads(exactly(length))
    return request


def main() -> None:
    try:
        answer = confine_and_run(_read_request())
    except (SetupError, OSError) as error:
        answer = {"unavailable": str(error)}
    os.write(1, json.dumps(answer).encode())


if __name__ == "__main__":
    main()
