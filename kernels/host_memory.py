"""Host memory for tensors: large pages, and kept by the process instead of given back after each step.

The default is slow in a way that no profile of kernels shows. glibc maps every block above 32 MiB anew and unmaps it
when it is freed, so a training step meets tens of thousands of page faults; and with pages of 4 KiB a pass over memory
is bound by address translation (in a virtual machine by two of them: AdamW ran at half its speed). Both concern the
allocator alone: results are bitwise identical.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import resource
from pathlib import Path

import psutil

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
_DEFAULTS = {_M_TRIM_THRESHOLD: 128 << 10, _M_MMAP_MAX: 65536}  # mallopt(3)
_MADV_HUGEPAGE = 14  # linux/mman.h
_HUGE_PAGE_BYTES = 2 << 20
_TRANSPARENT_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SMAPS_ROLLUP = Path("/proc/self/smaps_rollup")


@functools.cache
def use_huge_pages() -> str | None:
    """Have this process allocate from one heap that is backed by huge pages and never trimmed. Returns None, or why it
    cannot be.

    The heap is *advised*, not filled: as much address space as there is available memory, and a page becomes resident
    when it is first touched. Once for a process; what was allocated before stays where it is. The price: freed memory
    is not returned to the system.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return f"written for glibc under Linux, not for {platform.system()}"
    try:
        setting = _TRANSPARENT_HUGE_PAGES.read_text()
    except OSError as error:
        return f"{_TRANSPARENT_HUGE_PAGES} cannot be read: {error.strerror}"
    if "[never]" in setting:
        return f"the system never gives huge pages ({_TRANSPARENT_HUGE_PAGES}: {setting.strip()})"
    libc = ctypes.CDLL(None, use_errno=True)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # -1 turns trimming off: the threshold is an int, so no number of bytes would be large enough.
    if not libc.mallopt(_M_MMAP_MAX, 0) or not libc.mallopt(_M_TRIM_THRESHOLD, -1):
        return "mallopt refused: another allocator stands in for glibc's"
    reason = _advise(libc, psutil.virtual_memory().available // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES)
    if reason is not None:
        for name, value in _DEFAULTS.items():
            libc.mallopt(name, value)
    return reason


def return_freed_memory() -> None:
    """Have this process give every freed block of 256 KiB and more back to the system at once, where the allocator is
    glibc's.

    The opposite of huge pages: slower, and the resident set is what is in use. glibc raises the threshold by itself,
    and its heap then grows with the depth of a model, as freed blocks lie between kept ones.
    """
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 256 << 10)


def _advise(libc: ctypes.CDLL, size: int) -> str | None:
    """Grow the heap by `size` bytes of address space with huge pages. None, or why it cannot be."""
    block = libc.malloc(size)
    if not block:
        return (
            f"the system does not lend {size:,} bytes of address space (vm.overcommit_memory, or a limit of the "
            "process)"
        )
    first = -(-block // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    failed = libc.madvise(first, size - _HUGE_PAGE_BYTES, _MADV_HUGEPAGE)
    libc.free(block)
    return "madvise refused huge pages" if failed else None


def huge_page_bytes() -> int:
    """Resident bytes of this process in huge pages; 0 where the system does not tell."""
    try:
        lines = _SMAPS_ROLLUP.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages:"))


def peak_resident_bytes() -> int:
    """The largest resident set that this program had.

    Linux's ru_maxrss is not that: it survives exec, so a small program started by a large one would report its parent's
    peak.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if platform.system() == "Darwin" else used << 10
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
