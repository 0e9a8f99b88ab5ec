"""What a hostile program tries, one by one, and that none of it works or outlives the call."""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from weftrain.analysis.evaluation import sandbox, sandbox_filter, sandbox_stage
from weftrain.analysis.evaluation.sandbox import Outcome, SandboxError, reason_unavailable, run_untrusted

UNAVAILABLE = reason_unavailable()
confined = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))


def run(program: str, tests: str = "", **changes: Any) -> Outcome:
    limits = {"timeout_s": 20.0, "memory_bytes": 512 << 20, "disk_bytes": 1 << 20, "processes": 4} | changes
    return run_untrusted(textwrap.dedent(program), tests=textwrap.dedent(tests), **limits)


@pytest.fixture
def mark() -> Iterator[str]:
    """A process name of this test's own; no process may bear it at the end."""
    name = "wt" + secrets.token_hex(6)
    yield name
    assert not bearers(name)


def bearers(name: str) -> list[int]:
    """Processes of the machine with that name."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "comm").read_text().strip() == name:
                found.append(int(entry.name))
        except OSError:  # it ended meanwhile
            pass
    return found


def take_name(name: str) -> str:
    """A line of a program that gives its process, and those it forks, the name."""
    return f"import ctypes; ctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n"


ADD = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0\n"


@confined
def test_right_and_wrong() -> None:
    assert run(ADD, TESTS) == Outcome("passed", "ran to the end of its tests", "")
    wrong = run(ADD.replace("+", "-"), TESTS)
    assert (wrong.status, wrong.reason) == ("failed", "ended with exit status 1")
    assert wrong.stderr_tail.endswith("AssertionError\n")
    assert "/tests.py" in wrong.stderr_tail
    assert run("def add(a, b:", TESTS).status == "failed"
    assert "No module named 'numpy'" in run("import numpy").stderr_tail


@confined
def test_words_of_the_program_are_kept_and_the_token_is_not() -> None:
    said = run(
        "import sys; print('täglich', file=sys.stderr); sys.stderr.buffer.write(b'\\xff'); sys.stderr.write('no end of "
        "line')"
    )
    assert said.status == "passed"
    assert sorted(said.stderr_tail.replace("\n", "")) == sorted("täglich\\xffno end of line")


LEAVING = [
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "raise SystemExit",
    "import atexit, os; atexit.register(os._exit, 0); 1 / 0",
    # the child passes every test, and is not the process that was asked
    "import os\nif os.fork():\n    os.wait(); os._exit(0)",
    "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'pass'])",
    "import sys\ndef add(*_): sys.excepthook = lambda *_: sys.exit(0)",
    'x = """',
    "(",
]


@confined
def test_leaving_early_is_no_pass() -> None:
    with ThreadPoolExecutor(4) as pool:  # and the sandbox works from threads
        found = list(pool.map(lambda leave: run(leave, TESTS + 's = """ """\n').status, LEAVING))
    assert found == ["failed"] * len(LEAVING)


@confined
def test_the_token_lies_in_nothing_that_a_program_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    token = "cafe" * 12
    monkeypatch.setattr(secrets, "token_hex", lambda _: token)
    look = """
        import os, sys
        found = [str(part) for part in (sys.argv, sys.orig_argv, dict(os.environ), os.listdir("/work"), os.listdir("/tmp"))]
        found += [open(name).read() for name in ("/program.py", "/tests.py")] + [sys.stdin.read()]
        assert not any("".join(["cafe"] * 12) in text for text in found), found
        assert set(os.environ) <= {"LC_CTYPE"}, os.environ  # the interpreter's own, where the locale is C
        for descriptor in range(3, 4096):
            try: os.fstat(descriptor)
            except OSError: continue
            raise AssertionError(descriptor)
    """
    found = run(look)
    assert found.status == "passed", found.stderr_tail


@confined
def test_a_token_that_is_guessed_wrong_does_not_pass() -> None:
    forged = run("import os; os.write(2, b'" + "ab" * 24 + "'); os._exit(0)")
    assert (forged.status, forged.stderr_tail) == ("failed", "ab" * 24)


@confined
def test_infinite_loops_end() -> None:
    assert run("while True: pass", timeout_s=0.5) == Outcome("timed_out", "took more than 0.5 s", "")
    ignoring = (
        "import signal, time\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: "
        "pass\ntime.sleep(1000)"
    )
    assert run(ignoring, timeout_s=0.5).status == "timed_out"


@confined
def test_signals() -> None:
    assert run("import os; os.kill(os.getpid(), 9)") == Outcome("killed", "killed by SIGKILL", "")
    crashed = run("import ctypes; ctypes.string_at(0)")
    assert (crashed.status, crashed.reason) == ("killed", "killed by SIGSEGV")


@confined
@pytest.mark.parametrize("processes", [1, 4])
def test_processes_are_counted(processes: int, mark: str) -> None:
    """A fork bomb gets as far as the limit, and all of it is gone when the call returns."""
    bomb = """
        import os, sys, time
        made = 0
        for _ in range(1000):
            try:
                if os.fork() == 0:
                    time.sleep(1000)
                made += 1
            except BlockingIOError:
                break
        print(made, file=sys.stderr)
    """
    found = run(take_name(mark) + textwrap.dedent(bomb), processes=processes)
    assert (found.status, found.stderr_tail) == ("passed", f"{processes - 1}\n")


@confined
def test_fork_bomb_that_never_stops(mark: str) -> None:
    seen: list[int] = []
    done = threading.Event()

    def count() -> None:
        while not done.wait(0.02):
            seen.append(len(bearers(mark)))

    counter = threading.Thread(target=count)
    counter.start()
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    try:
        assert run(take_name(mark) + bomb, timeout_s=1.0).status == "timed_out"
    finally:
        done.set()
        counter.join()
    assert seen
    assert max(seen) <= 4


@pytest.mark.prove
@confined
def test_threads_count_as_processes() -> None:
    threads = (
        "import threading, time\nfor _ in range(50): threading.Thread(target=time.sleep, args=(1000,), "
        "daemon=True).start()"
    )
    assert "can't start new thread" in run(threads).stderr_tail


@confined
def test_daemons_die(mark: str) -> None:
    daemon = """
        import os, signal, sys, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
                os.closerange(0, 256)
                while True: time.sleep(1)
            os._exit(0)
        os.wait()
    """
    assert run(take_name(mark) + textwrap.dedent(daemon)).status == "passed"


@confined
def test_killing_everything_in_sight_harms_nobody() -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    killer = f"""
        import os, signal
        assert os.getppid() == 1
        for pid in (1, {bystander.pid}, {os.getpid()}):
            for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
                try: os.kill(pid, number)
                except OSError: pass
        try: os.kill(-1, signal.SIGKILL)
        except OSError: pass
    """
    try:
        assert run(killer, "assert True").status == "passed"
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@confined
def test_memory() -> None:
    assert run("x = bytearray(10 << 30)").stderr_tail.endswith("MemoryError\n")
    grown = run("x = []\nwhile True: x.append(bytearray(1 << 20))", memory_bytes=128 << 20)
    assert grown.stderr_tail.endswith("MemoryError\n")
    for unseen in ("os.memfd_create('x')", "ctypes.CDLL(None).shmget(0, 1 << 30, 0o1600)"):
        refused = f"import ctypes, os\ntry: assert {unseen} == -1\nexcept PermissionError: pass"
        assert run(refused).status == "passed", unseen


@confined
def test_disk() -> None:
    """One tmpfs for all places that can be written, so that they cannot each hold as much; and inodes are bounded
    too.
    """
    one = """
        import errno
        try:
            with open("/tmp/x", "wb") as file:
                while True: file.write(bytes(1 << 16))
        except OSError as error: assert error.errno in (errno.ENOSPC, errno.EFBIG)
    """
    assert run(one).status == "passed"
    many = """
        import errno, os, sys
        used, files = 0, 0
        for folder in ("/work", "/tmp", "/var/tmp", "/dev/shm"):
            try:
                for number in range(100_000):
                    with open(f"{folder}/{number}", "wb", buffering=0) as file:
                        used += file.write(bytes(4096))
                        files += 1
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
            else:
                raise AssertionError
        assert 0 < used <= 1 << 20, used
        for number in range(100_000):
            try: open(f"/tmp/empty-{number}", "wb").close()
            except OSError as error: break
        assert files + number <= 1024, number
    """
    assert run(many).status == "passed", run(many).stderr_tail


@confined
def test_network(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "socket"))
        local.listen()
        port = server.getsockname()[1]
        calls = f"""
            import ctypes, socket
            for family, address in ((socket.AF_INET, ("127.0.0.1", {port})), (socket.AF_INET, ("192.0.2.1", 80)),
                                    (socket.AF_INET6, ("::1", {port})), (socket.AF_UNIX, {str(tmp_path / "socket")!r}), (40, (2, 1))):
                try:
                    with socket.socket(family) as s:
                        s.connect(address)
                except PermissionError:
                    continue
                raise AssertionError(family)
            left, right = socket.socketpair()  # within one program; asyncio needs it
            import asyncio
            asyncio.run(asyncio.sleep(0))
        """
        found = run(calls)
        assert found.status == "passed", found.stderr_tail
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


@confined
def test_namespaces_hold_without_the_filter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two walls: with the system-call filter away, the network is still a lone loopback that is down, and no mount can
    be altered.
    """
    source = Path(sandbox_stage.__file__).read_text()
    line = '    _refuse_system_calls(request["filter"])\n'
    assert source.count(line) == 1
    (tmp_path / "sandbox_stage.py").write_text(source.replace(line, ""))
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = run(f"""
            import ctypes, errno, os, socket
            assert [name for _, name in socket.if_nameindex()] == ["lo"]
            for address in (("127.0.0.1", {server.getsockname()[1]}), ("192.0.2.1", 80)):
                try: socket.create_connection(address, timeout=5)
                except OSError as error: assert error.errno == errno.ENETUNREACH, error
                else: raise AssertionError(address)
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.umount2(b"/work", 2) == -1 and ctypes.get_errno() == errno.EPERM
            assert libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None) == -1
            assert libc.mount(None, b"/", None, 32 | 4096, None) == -1
            assert os.getuid() == 65534 and os.getgid() == 65534 and set(os.getgroups()) <= {{65534}}
        """)
    assert found.status == "passed", found.stderr_tail


@confined
def test_nothing_of_the_machine_is_in_sight(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    paths = [
        str(tmp_path / "secret"),
        str(ROOT / "pyproject.toml"),
        "/etc/passwd",
        "/proc/self",
        "/sys/kernel",
        "/run",
        str(Path.home() / ".bashrc"),
    ]
    look = f"""
        import os
        assert not [path for path in {paths!r} if os.path.lexists(path)]
        assert not set(os.listdir("/")) & {{"home", "run", "proc", "sys", "mnt"}}
    """
    found = run(look)
    assert found.status == "passed", found.stderr_tail


@confined
def test_writing(tmp_path: Path) -> None:
    targets = [
        "/",
        str(ROOT),
        str(tmp_path),
        str(Path.home()),
        sys.base_prefix,
        os.path.dirname(os.__file__),
        "/usr/lib",
        "/dev",
        "/etc",
        "/var",
    ]
    name = f"sandbox-{secrets.token_hex(4)}"
    tries = f"""
        import os
        for folder in {targets!r}:
            try: open(os.path.join(folder, {name!r}), "w").close()
            except OSError: continue
            raise AssertionError(folder)
        for path in ("/program.py", "/tests.py", os.__file__):
            for harm in (lambda p: open(p, "a"), os.unlink, lambda p: os.chmod(p, 0o777), lambda p: os.rename(p, "/tmp/x")):
                try: harm(path)
                except OSError: continue
                raise AssertionError(path)
        for folder in ("/work", "/tmp", "/var/tmp", "/dev/shm"):
            open(os.path.join(folder, {name!r}), "w").close()
    """
    found = run(tries)
    assert found.status == "passed", found.stderr_tail
    # By name, not by listings: other programs may write to these folders meanwhile.
    assert not [folder for folder in (*targets, "/tmp", "/var/tmp", "/dev/shm") if Path(folder, name).exists()]


@pytest.mark.prove
@confined
def test_system_calls_that_reach_out_are_refused() -> None:
    calls = """
        import ctypes, errno
        libc = ctypes.CDLL(None, use_errno=True)
        def refused(result): assert result == -1 and ctypes.get_errno() == errno.EPERM, ctypes.get_errno()
        refused(libc.unshare(0x10000000))
        refused(libc.ptrace(16, 1, 0, 0))
        refused(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None))
        refused(libc.syscall(425, 8, None))
        refused(libc.syscall({"x86_64": 56, "aarch64": 220}[__import__("platform").machine()], 0x10000000 | 17, 0, 0, 0, 0))
    """
    found = run(calls)
    assert found.status == "passed", found.stderr_tail


@confined
@pytest.mark.parametrize("descriptor", [1, 2])
def test_endless_output_is_bounded(descriptor: int) -> None:
    found = run(f"import os\nwhile True: os.write({descriptor}, b'x' * 65536)", timeout_s=0.7)
    assert found.status == "timed_out"
    assert len(found.stderr_tail) <= 4096


@confined
def test_the_witness_is_found_behind_much_output() -> None:
    found = run("import sys\nfor _ in range(1000): sys.stderr.write('x' * 65537)")
    assert (found.status, found.stderr_tail.strip("x")) == ("passed", "")
    assert 4000 <= len(found.stderr_tail) <= 4096


@pytest.mark.prove
@confined
def test_odd_sources() -> None:
    assert run("x = '\ud800'").status == "failed"
    assert run("x = 1\0").status == "failed"
    assert run("x = '" + "y" * 3_000_000 + "'\nassert len(x) == 3_000_000").status == "passed"
    assert (
        run(
            "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\nassert __name__ == '__main__'",
            "assert A(1) == A(1)",
        ).status
        == "passed"
    )


@confined
def test_death_of_the_caller_is_death_of_the_program(mark: str) -> None:
    program = take_name(mark) + "import os, time; os.fork(); time.sleep(1000)"
    limits = "timeout_s=500, memory_bytes=1 << 29, disk_bytes=1 << 20, processes=4"
    # A suite that was started in the background ignores SIGINT, and its children inherit that.
    heeding = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    caller = (
        f"{heeding}from weftrain.analysis.evaluation.sandbox import run_untrusted\nrun_untrusted({program!r}, {limits})"
    )
    for number in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen([sys.executable, "-c", caller], stderr=subprocess.DEVNULL)
        wait_until(lambda: len(bearers(mark)) == 2)
        process.send_signal(number)
        process.wait()
        wait_until(lambda: not bearers(mark))


def wait_until(holds: Any) -> None:
    """Fails by pytest's own time limit."""
    while not holds():
        time.sleep(0.01)


@confined
def test_as_a_user_who_is_not_root() -> None:
    """The other way in: a user namespace first. Needs root to become that user, and an interpreter that the user can
    read.
    """
    interpreter = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if os.getuid() != 0 or interpreter is None:
        pytest.skip("needs root and a system interpreter")
    program = textwrap.dedent("""
        import os, time
        assert os.getuid() == 65534
        # A child that went on could fork once this process has ended and is no longer counted: it sleeps until killed.
        for refused in (lambda: open("/x", "w"), lambda: [os.fork() or time.sleep(1000) for _ in range(2)]):
            try: refused()
            except OSError: continue
            raise AssertionError
    """)
    source = Path(sandbox_stage.__file__).read_text()  # by -c: the user may not be able to read this folder
    request = {
        "timeout_s": 20.0,
        "memory_bytes": 1 << 29,
        "disk_bytes": 1 << 20,
        "processes": 2,
        "token": "ab" * 24,
        "program": program,
        "tests": "",
        "driver": sandbox.DRIVER,
        "filter": sandbox_filter.filter_program(platform.machine()).hex(),
        "channel": [],
        "parent": os.getpid(),
    }
    body = json.dumps(request).encode()
    process = subprocess.Popen(
        [interpreter, "-I", "-S", "-c", source],
        stdin=-1,
        stdout=-1,
        stderr=-1,
        user=54321,
        group=54321,
        extra_groups=[],
        env={},
        cwd="/",
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(struct.pack("<Q", len(body)) + body)
    process.stdin.flush()
    said = process.stdout.read()
    process.stdin.close()
    process.wait()
    answer = json.loads(said)
    assert answer == {"result": 0, "timed_out": False, "witnessed": True, "tail": ""}, answer


@confined
def test_where_the_kernel_refuses_nothing_is_run(tmp_path: Path) -> None:
    """In a process that may not unshare: the reason in advance, and an error instead of a run."""
    program = f"""
import platform
from weftrain.analysis.evaluation import sandbox, sandbox_filter, sandbox_stage
sandbox_stage._prctl(38, 1, "")
sandbox_stage._refuse_system_calls(sandbox_filter.filter_program(platform.machine()).hex())
print(sandbox.reason_unavailable())
try:
    sandbox.run_untrusted("open({str(tmp_path / "ran")!r}, 'w')", timeout_s=5, memory_bytes=1 << 29, disk_bytes=1 << 20, processes=1)
except sandbox.SandboxError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("sandbox: unshare of the ")
        assert "(EPERM)" in line
        assert "CAP_SYS_ADMIN" in line
        assert "max_user_namespaces" in line
    assert not (tmp_path / "ran").exists()


@confined
def test_without_a_system_call_filter_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "filter_program", lambda machine: b"")
    found = run("pass")
    assert (found.status, found.exit_status) == ("failed", 127)


def test_other_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, words in (
        ({"system": "darwin"}, "needs Linux, and this is darwin"),
        ({"machine": "riscv64"}, "no table of system calls for riscv64"),
        ({"release": "5.4.0-1-generic"}, "needs Linux 5.14"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sandbox.sys, "platform", changes.get("system", "linux"))
            patch.setattr(sandbox.platform, "machine", lambda changes=changes: changes.get("machine", "x86_64"))
            patch.setattr(sandbox.platform, "release", lambda changes=changes: changes.get("release", "6.1.0+"))
            patch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("something was started"))
            assert words in str(reason_unavailable())
            with pytest.raises(SandboxError, match=words):
                run("pass")


def test_a_stage_that_breaks_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sandbox_stage.py").write_text("raise RuntimeError('broken')")
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    monkeypatch.setattr(sandbox, "_unsupported", lambda: None)
    with pytest.raises(SandboxError, match=r"status 1 and said .*RuntimeError: broken"):
        run("pass")


@pytest.mark.parametrize(
    "changes",
    [
        {"timeout_s": 0.0},
        {"timeout_s": float("inf")},
        {"timeout_s": float("nan")},
        {"memory_bytes": 1},
        {"disk_bytes": 0},
        {"processes": 0},
    ],
)
def test_limits_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        run("pass", **changes)
