"""Every file operation of the product that changes the disk, so that a test can make any one of them fail.

Each primitive (one system call) passes through `_perform`, which only calls it. A test replaces `_perform` to fail the
k-th operation with ENOSPC, EIO or EROFS, or to die before or after it. Clean-up stands in `except` clauses and never in
`finally`: a killed process does not clean up, and the tests simulate its death by an exception.

Errors are plain OSError; the caller knows what the file is for and adds that. Only TensorBoard writes files otherwise.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from weftrain.core.formats.distant_files import token_of
from weftrain.core.formats.plain_file import open_plain, real_path

T = TypeVar("T")
BytesLike = bytes | bytearray | memoryview

TEMPORARY_PREFIX = ".tmp-"
_HASH_BLOCK_BYTES = 4 << 20


def _perform(name: str, path: Path, action: Callable[[], T]) -> T:
    """The one point that every change passes. name: the kind of operation. path: its object."""
    return action()


def open_own(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file with a fixed name to change it in place, and return its descriptor. Raises OSError, at once, for
    anything but a plain file: in a run folder from elsewhere, the name may be a FIFO or a link to any file of the user.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise OSError(
                error.errno, "is a symbolic link or no plain file, and nothing is written through it", str(path)
            ) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no plain file, and nothing is written to it", str(path))
    return descriptor


class FileWriter:
    """A new file, written front to back; it must not exist. Durable once `sync` has returned."""

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._descriptor = _perform("create", path, lambda: os.open(path, flags, 0o666))

    def write(self, data: BytesLike) -> None:
        """Write all of `data`; the kernel takes at most 2 GiB a call."""
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[_perform("write", self.path, lambda part=rest: os.write(self._descriptor, part)) :]  # type: ignore[misc]

    def extend(self, size_bytes: int) -> None:
        """Make the file this large; what was not written reads as zeros and takes no disk."""
        _perform("truncate", self.path, lambda: os.ftruncate(self._descriptor, size_bytes))

    def sync(self) -> None:
        _perform("sync_file", self.path, lambda: os.fsync(self._descriptor))

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PositionedFile:
    """A file of fixed size that one process reads and writes in place, at byte offsets.

    direct: bypass the page cache (O_DIRECT); offsets, lengths and addresses must then be multiples of 4096 bytes. Data
    survives the death of the process once `write_at` has returned, and a power failure once `sync` has.
    """

    def __init__(self, path: Path, *, direct: bool = False) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0)
        self.descriptor = _perform("open", path, lambda: open_own(path, flags))

    def allocate(self, size_bytes: int) -> None:
        """Reserve all blocks now, so that no later write finds the disk full. What was never written reads as zeros."""
        _perform("allocate", self.path, lambda: os.posix_fallocate(self.descriptor, 0, size_bytes))

    def read_at(self, offset: int, *memory: memoryview) -> None:
        """Fill the pieces of memory one after the other, from `offset` on. Raises OSError if the file is too short."""
        for part, at in _consecutive(memory, offset):
            while part:
                count = _perform("read", self.path, lambda part=part, at=at: os.preadv(self.descriptor, [part], at))  # type: ignore[misc]
                if not count:
                    raise OSError(errno.EIO, "the file ends too early", str(self.path))
                part, at = part[count:], at + count

    def write_at(self, offset: int, *memory: memoryview) -> None:
        """Write the pieces of memory one after the other, from `offset` on."""
        for part, at in _consecutive(memory, offset):
            while part:
                count = _perform("write_at", self.path, lambda part=part, at=at: os.pwrite(self.descriptor, part, at))  # type: ignore[misc]
                part, at = part[count:], at + count

    def sync(self) -> None:
        _perform("sync_file", self.path, lambda: os.fdatasync(self.descriptor))

    def close(self) -> None:
        os.close(self.descriptor)


def _consecutive(memory: tuple[memoryview, ...], offset: int) -> Iterator[tuple[memoryview, int]]:
    for part in memory:
        yield part, offset
        offset += len(part)


def temporary_beside(path: Path) -> Path:
    """A unique name in the same folder, thus on the same file system; `remove_leftovers` knows such names."""
    return path.parent / f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{secrets.token_hex(4)}"


def write_bytes(path: Path, data: BytesLike) -> None:
    """Replace `path` atomically and durably: after a crash it holds the old bytes or all of the new ones."""
    write_blocks(path, [data])


def write_blocks(path: Path, blocks: Iterable[BytesLike]) -> None:
    """`write_bytes` of all blocks in order. An error from their iterator leaves the old file as it was."""
    temporary = temporary_beside(path)
    try:
        with FileWriter(temporary) as file:
            for block in blocks:
                file.write(block)
            file.sync()
        rename(temporary, path)
    except Exception:
        _unlink_if_possible(temporary)
        raise


def write_sparse(path: Path, head: BytesLike, size_bytes: int) -> None:
    """Replace `path` atomically by a file of that size that begins with `head` and takes no disk for the rest."""
    temporary = temporary_beside(path)
    try:
        with FileWriter(temporary) as file:
            file.write(head)
            file.extend(size_bytes)
            file.sync()
        rename(temporary, path)
    except Exception:
        _unlink_if_possible(temporary)
        raise


def append_line(path: Path, text: str, *, sync: bool = False) -> None:
    """Append one line in a single write. A line that was only partly written is removed again.

    Raises ValueError for a line break in `text`, OSError (ENOSPC) if the line does not fit on the disk.
    """
    if "\n" in text:
        raise ValueError("append_line: the text holds a line break")
    append_bytes(path, text.encode() + b"\n", sync=sync)


def append_bytes(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Append in a single write what is a whole record, or several. What was only partly written is removed again.

    Raises OSError (ENOSPC) if it does not fit on the disk.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    descriptor = _perform("open_append", path, lambda: open_own(path, flags))
    try:
        size_before = os.fstat(descriptor).st_size
        if _perform("write", path, lambda: os.write(descriptor, data)) != len(data):
            _perform("truncate", path, lambda: os.ftruncate(descriptor, size_before))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if sync:
            _perform("sync_file", path, lambda: os.fsync(descriptor))
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make a file that another library wrote durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _perform("sync_file", path, lambda: os.fsync(descriptor))
    finally:
        os.close(descriptor)


def sync_dir(path: Path) -> None:
    """Make a folder's entries durable: without it a crash can undo a rename."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _perform("sync_dir", path, lambda: os.fsync(descriptor))
    except OSError as error:
        # some network file systems cannot sync a folder; it is then durable when the server says so
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename within one file system and sync both parents. A file is replaced, a folder only if it is empty."""
    _perform("rename", target, lambda: os.replace(source, target))
    sync_dir(target.parent)
    if source.parent != target.parent:
        sync_dir(source.parent)


def make_dirs(path: Path) -> None:
    """Make a folder and its missing parents, durably. Raises FileExistsError if a file, or a link to what is not a
    folder, is in the way.
    """
    if path.is_dir():
        return
    if path.parent != path:
        make_dirs(path.parent)
    try:
        _perform("make_dir", path, lambda: os.mkdir(path))
    except FileExistsError:
        if path.is_symlink() and not path.exists():
            words = f"is a link to {os.readlink(path)}, which is not there"
            raise FileExistsError(errno.EEXIST, words, str(path)) from None
        if not path.is_dir():  # otherwise another process was faster
            raise
    sync_dir(path.parent)


def remove_file(path: Path) -> None:
    """Remove one file or symbolic link."""
    _perform("remove_file", path, lambda: os.unlink(path))


def remove_dir(path: Path) -> None:
    """Remove an empty folder."""
    _perform("remove_dir", path, lambda: os.rmdir(path))


def remove_tree(path: Path) -> None:
    """Remove a folder with all in it; symbolic links are removed, not followed. A missing folder is fine."""
    if not path.is_dir():
        return
    for folder, folder_names, file_names in os.walk(path, topdown=False):
        for name in file_names:
            remove_file(Path(folder, name))
        for name in folder_names:
            child = Path(folder, name)
            if child.is_symlink():
                remove_file(child)
        _perform("remove_dir", Path(folder), lambda folder=folder: os.rmdir(folder))  # type: ignore[misc]


def missing_folders(path: Path) -> list[Path]:
    """The folders that `make_dirs` would make, innermost first."""
    return [place for place in (path, *path.parents) if not place.exists()]


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove those of `folders` that are empty, innermost first. For clean-up: errors are ignored."""
    with contextlib.suppress(OSError):
        for folder in folders:
            if folder.is_dir():
                remove_dir(folder)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what dead processes left under temporary names, and return it. The caller holds the folder's lock."""
    leftovers = sorted(folder.glob(f"{TEMPORARY_PREFIX}*"))
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            remove_tree(path)
        else:
            remove_file(path)
    return leftovers


@contextlib.contextmanager
def temporary_tree(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, to be filled and renamed to it; an error in the block removes it.

    Folders that killed processes left for the same target are removed first: whoever fills one holds a lock on it
    (flock), which ends with the process.
    """
    make_dirs(target.parent)
    for path in sorted(target.parent.glob(f"{TEMPORARY_PREFIX}{glob.escape(target.name)}-*-*")):
        if path.is_dir() and not path.is_symlink() and _is_abandoned(path):
            remove_tree(path)
    path = temporary_beside(target)
    with contextlib.ExitStack() as stack:
        try:
            make_dirs(path)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            # without locks in the file system, a later process leaves the folder alone
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path
        except (Exception, KeyboardInterrupt, SystemExit):  # a simulated death is another BaseException
            with contextlib.suppress(OSError):
                remove_tree(path)
            raise


def _is_abandoned(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes; the target appears whole, durable, under its name, or not at all."""
    with open_plain(source) as file:
        write_blocks(target, iter(partial(file.read, 1 << 24), b""))


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link `target` to `source`, or copy it if that is impossible, as it is where the source is a stand-in
    (core/formats/distant_files.py); an existing target stays as it is.

    For files that nobody changes in place. A link is durable after `sync_dir` of its folder.
    """
    real = real_path(source)  # otherwise a symbolic link would itself be linked
    if token_of(real) is not None:
        if not target.exists():
            copy_file(real, target)
        return
    try:
        _perform("link", target, lambda: os.link(real, target))
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS):
            raise
        copy_file(real, target)


@contextlib.contextmanager
def held_lock(path: Path, contents: bytes) -> Iterator[None]:
    """Hold an exclusive advisory lock (flock) on `path`; the file's contents tell others who holds it.

    The lock ends with the process however it dies; the file stays, and its old contents mean nothing. A forked child
    that outlives its parent keeps the lock. Raises BlockingIOError, at once, if another process holds it.
    """
    descriptor = _perform("open_lock", path, lambda: open_own(path, os.O_RDWR | os.O_CREAT))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())):
            raise BlockingIOError(errno.EAGAIN, "its last holder has just removed the file", str(path))
        _perform("truncate", path, lambda: os.ftruncate(descriptor, 0))
        written = _perform("write", path, lambda: os.pwrite(descriptor, contents, 0))
        if written != len(contents):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        yield
    finally:
        os.close(descriptor)


def sha256_file(path: Path, progress: Callable[[int], None] = lambda num_bytes: None) -> str:
    """SHA-256 of a file's bytes in hexadecimal: what `sha256sum` prints. progress: is called with the bytes of each
    block that was hashed.
    """
    digest = hashlib.sha256()
    with open_plain(path) as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def free_bytes(path: Path) -> int:
    """Free bytes for an ordinary user on the file system of `path`, which need not exist yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _unlink_if_possible(path: Path) -> None:
    with contextlib.suppress(OSError):  # the error that led here is the one to report
        remove_file(path)
