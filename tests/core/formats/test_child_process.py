"""What a killed command leaves: nothing where it was asked to end, and what the next one removes where it was not."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from weftrain.core.formats import fsops


def started(program: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """A process that has said its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


MAKER = """
    import sys, time
    from pathlib import Path
    from weftrain.core.formats import fsops
    from weftrain.core.stop import sigterm_unwinds
    with sigterm_unwinds(), fsops.temporary_tree(Path(sys.argv[1])) as folder:
        fsops.write_bytes(folder / "file", b"x")
        print("made", flush=True)
        time.sleep(1000)
"""


def test_an_order_to_end_leaves_nothing(tmp_path: Path) -> None:
    process = started(MAKER, tmp_path / "target")
    assert len(list(tmp_path.iterdir())) == 1
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_what_sigkill_leaves_is_removed_by_the_next_and_what_is_being_made_is_not(tmp_path: Path) -> None:
    other = fsops.temporary_beside(tmp_path / "targets")  # of another target, whose name begins alike
    other.mkdir()
    dead, alive = started(MAKER, tmp_path / "target"), None
    (left,) = tmp_path.glob(".tmp-target-*")
    dead.kill()
    dead.wait()
    assert (left / "file").exists()
    try:
        alive = started(MAKER, tmp_path / "target")
        (making,) = tmp_path.glob(".tmp-target-*")
        assert making != left
        with fsops.temporary_tree(tmp_path / "target") as folder:
            assert sorted(tmp_path.iterdir()) == sorted([making, folder, other])
            fsops.rename(folder, tmp_path / "target")
    finally:
        if alive is not None:
            alive.kill()
            alive.wait()
    assert sorted(tmp_path.iterdir()) == sorted([making, tmp_path / "target", other])


def test_an_error_leaves_nothing_and_a_file_system_without_locks_keeps_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZeroDivisionError), fsops.temporary_tree(tmp_path / "a"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".tmp-a-1-00000000").mkdir()
    with fsops.temporary_tree(tmp_path / "a") as folder:
        assert len(list(tmp_path.iterdir())) == 2
        folder.rmdir()


HELPED = """
    import os, subprocess, sys, time
    helper = "import sys, time; from weftrain.core.formats.child_process import end_with; end_with(int(sys.argv[1])); "
    helper += "print(1, flush=True); time.sleep(1000)"
    subprocess.Popen([sys.executable, "-c", helper, str(os.getpid())])
    time.sleep(1000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends the helper")
def test_a_helper_ends_with_the_process_it_helps() -> None:
    process = started(HELPED)  # its first line is the helper's, which shares the pipe
    assert process.stdout is not None
    process.kill()
    assert process.stdout.read() == ""  # the pipe's end: the helper is gone too
    process.wait()


POOL = """
    import multiprocessing, os, time
    from concurrent.futures import ProcessPoolExecutor
    from weftrain.data_prep.stages.executors import _begin_worker
    if __name__ == "__main__":
        pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=_begin_worker, initargs=(os.getpid(),))
        assert [pool.submit(os.getpid).result() for _ in range(2)]
        [pool.submit(time.sleep, 1000) for _ in range(2)]
        print("working", flush=True)
        time.sleep(1000)
"""


@pytest.mark.prove
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends the workers")
def test_workers_of_prep_end_with_their_parent(tmp_path: Path) -> None:
    (tmp_path / "pool.py").write_text(textwrap.dedent(POOL))
    process = subprocess.Popen([sys.executable, tmp_path / "pool.py"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.kill()
    assert process.stdout.read() == ""
    process.wait()
