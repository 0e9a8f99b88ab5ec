"""Huge pages: what they change (page faults), what they must not (bits), and the reason where there are none. Each that
changes the allocator in its own process.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from weftrain.kernels import host_memory

PROGRAM = """
import resource, sys
import torch
from weftrain.kernels.host_memory import use_huge_pages

reason = use_huge_pages() if sys.argv[1] == "huge" else None
if reason:
    print("REASON", reason)
    raise SystemExit
def work():
    held = torch.full((24 << 20,), 0.5)  # 96 MiB: glibc would map it anew each time
    return float((held * 3).sum())
def is_advised(address):  # whether the mapping that holds it carries MADV_HUGEPAGE: "hg" in proc_pid_smaps(5)
    inside = False
    for line in open("/proc/self/smaps"):
        name, *words = line.split()
        if "-" in name and not name.endswith(":"):
            first, end = (int(word, 16) for word in name.split("-"))
            inside = first <= address < end
        elif inside and name == "VmFlags:":
            return "hg" in words
sums = {work() for _ in range(2)}
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
sums |= {work() for _ in range(3)}
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
held = torch.full((24 << 20,), 0.5)
print("FIGURES", faults, is_advised(held.data_ptr() + held.nbytes // 2), *sums)
"""


def run(mode: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.split(maxsplit=1)[0:1] + done.stdout.split()[1:]


@pytest.mark.prove
def test_freed_memory_is_kept_and_large_pages_are_asked_for() -> None:
    """That is ours. How many large pages the system then has to give is not: memory that is kept faults once, in
    whatever pages, and memory that is not kept six times.
    """
    word, *figures = run("huge")
    if word == "REASON":
        pytest.skip("this system gives no huge pages: " + " ".join(figures))
    _, *plain = run("plain")
    assert int(plain[0]) > 3 * 20_000  # 2 x 96 MiB in pages of 4 KiB, each time
    assert int(figures[0]) < int(plain[0]) / 4
    assert (figures[1], plain[1]) == ("True", "False")
    assert figures[2:] == plain[2:]  # one sum each, and the same


def test_bytes_in_huge_pages_are_counted_or_0_where_the_system_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "smaps_rollup"
    monkeypatch.setattr(host_memory, "_SMAPS_ROLLUP", path)
    assert host_memory.huge_page_bytes() == 0
    path.write_text("Rss:       300000 kB\nAnonHugePages:    196608 kB\nShmemPmdMapped:      2048 kB\n")
    assert host_memory.huge_page_bytes() == 192 << 20


@pytest.mark.parametrize(
    ("setting", "words"),
    [("always madvise [never]\n", "the system never gives huge pages"), (None, "cannot be read: No such file")],
)
def test_where_there_are_none_there_is_a_reason(
    setting: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "enabled"
    if setting is not None:
        path.write_text(setting)
    monkeypatch.setattr(host_memory, "_TRANSPARENT_HUGE_PAGES", path)
    assert words in str(host_memory.use_huge_pages.__wrapped__())


def test_address_space_that_is_not_lent_is_a_reason_and_changes_nothing() -> None:
    program = """
import resource, psutil
from weftrain.kernels.host_memory import use_huge_pages
used = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20),) * 2)
print(use_huge_pages())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert "bytes of address space" in done.stdout or "never gives" in done.stdout


@pytest.mark.prove
def test_the_peak_is_the_programs_own_and_not_its_parents() -> None:
    child = "from weftrain.kernels.host_memory import peak_resident_bytes; print(peak_resident_bytes())"
    parent = f"""
import subprocess, sys
held = bytearray(b'x') * (600 << 20)
print(subprocess.run([sys.executable, "-c", {child!r}], capture_output=True, text=True, check=True).stdout)
from weftrain.kernels.host_memory import peak_resident_bytes
print(peak_resident_bytes())
"""
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True, timeout=60)
    small, large = map(int, done.stdout.split())
    assert small < 400 << 20
    assert 600 << 20 < large < 1000 << 20
