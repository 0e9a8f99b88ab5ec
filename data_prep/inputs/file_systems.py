"""Looking into folders: one interface for local folders and fsspec addresses, so that both follow the same rules.

Links are followed: a folder is entered once, however many links lead to it, and a link to a folder that contains the
link is reported as a loop.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from weftrain.core.errors import DataError
from weftrain.data_prep.inputs.files import file_system, is_local, local_path, read_head
from weftrain.data_prep.inputs.listing_rules import MANIFEST, MANIFEST_HEAD_BYTES, is_dataset
from weftrain.data_prep.inputs.remote import RemoteSystem

Kind = Literal["file", "folder", "special", "broken link", "link loop", "same folder", "dataset"]


@dataclass(frozen=True, slots=True)
class Entry:
    """Something in a folder. path: as the file system spells it. name: below the listed folder, with `/`.

    modified_ns: None if unknown. identity: equal for two paths of one file. linked: reached through a symbolic link.
    has_other_names: has several hard links.
    """

    path: str
    name: str
    kind: Kind
    num_bytes: int
    modified_ns: int | None
    identity: tuple[int, int] | str
    linked: bool
    has_other_names: bool = False


class FileSystem(Protocol):
    """The file system that an address belongs to. All methods raise OSError."""

    def look(self, path: str) -> Entry | None:
        """What is at a path, named by its last component, or None."""

    def scan(self, folder: str) -> Iterator[Entry]:
        """The contents of a folder, in any order; links are followed."""

    def below(self, folder: str, leave_out: Callable[[str], bool]) -> Iterator[Entry]:
        """All files below a folder, sorted by name, those behind links to folders last. Also yields folders that are
        not entered: datasets, and those for whose name `leave_out` is true.
        """

    def address(self, path: str) -> str:
        """The address at which the file is opened."""

    def heads(self, paths: Sequence[str], num_bytes: int) -> dict[str, bytes]:
        """The first bytes of files, if asking for many at once is faster; else nothing."""


def open_file_system(address: str) -> tuple[FileSystem, str]:
    """The file system of an address, and the path there. Raises DataError."""
    path = local_path(address)
    if is_local(path):
        return LocalFiles(), path
    system, root = file_system(address)
    return RemoteFiles(system, address), root


def identity_of(address: str) -> tuple[int, int] | str:
    """Equal for two addresses of one file. Raises OSError."""
    if not is_local(address):
        return address
    status = os.stat(address)
    return status.st_dev, status.st_ino


def holds_dataset(address: str) -> bool:
    """Whether a folder is a dataset that weftrain made."""
    try:
        return is_dataset(read_head(f"{address.rstrip('/')}/{MANIFEST}", MANIFEST_HEAD_BYTES))
    except DataError:  # none, or none that may be read
        return False


class LocalFiles:
    """This machine's folders."""

    def look(self, path: str) -> Entry | None:
        try:
            link = stat.S_ISLNK(os.lstat(path).st_mode)
            return _entry(path, os.path.basename(path.rstrip("/")), os.stat(path), link)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def scan(self, folder: str) -> Iterator[Entry]:
        with os.scandir(folder) as found:
            for item in found:
                yield _scanned(item, item.name)

    def below(self, folder: str, leave_out: Callable[[str], bool]) -> Iterator[Entry]:
        walk = _Walk(leave_out)
        status = os.stat(folder)
        walk.entered.add((status.st_dev, status.st_ino))
        waiting = [(folder, "")]
        while waiting:  # what is below the links of one round comes after all that is reached without them
            for path, name in waiting:
                yield from walk.real(path, name)
            waiting = []
            links, walk.links = sorted(walk.links, key=lambda link: link.name), []
            for link in links:
                assert isinstance(link.identity, tuple)
                if _leads_back(link.path):
                    yield _as(link, "link loop")
                elif link.identity in walk.entered:
                    yield _as(link, "same folder")
                elif holds_dataset(link.path):
                    yield _as(link, "dataset")
                else:
                    walk.entered.add(link.identity)
                    waiting.append((link.path, f"{link.name}/"))

    def address(self, path: str) -> str:
        return path

    def heads(self, paths: Sequence[str], num_bytes: int) -> dict[str, bytes]:
        return {}


@dataclass
class _Walk:
    """Folders that were entered, and links to folders that are still to be followed."""

    leave_out: Callable[[str], bool]
    entered: set[tuple[int, int]] = field(default_factory=set)
    links: list[Entry] = field(default_factory=list)
    linked: bool = False

    def real(self, folder: str, prefix: str) -> Iterator[Entry]:
        """Everything below a folder that is reached without another link. prefix: of names, empty or ending in `/`."""
        linked = self.linked
        stack = [_children(folder, prefix, linked)]
        while stack:
            if not stack[-1]:
                stack.pop()
                continue
            entry, is_link = stack[-1].pop()
            if entry.kind != "folder" or self.leave_out(entry.name.rpartition("/")[2]):
                yield entry
            elif is_link:
                self.links.append(entry)
            elif entry.identity in self.entered:
                yield _as(entry, "same folder")
            elif holds_dataset(entry.path):
                yield _as(entry, "dataset")
            else:
                assert isinstance(entry.identity, tuple)
                self.entered.add(entry.identity)
                stack.append(_children(entry.path, f"{entry.name}/", linked))
        self.linked = True  # all that comes later is reached through a link


def _children(folder: str, prefix: str, linked: bool) -> list[tuple[Entry, bool]]:
    """A folder's entries and whether each is a link, in reverse order; a folder sorts as the names below it."""
    with os.scandir(folder) as found:
        entries = [(_scanned(item, prefix + item.name, linked), item.is_symlink()) for item in found]
    return sorted(
        entries, key=lambda item: f"{item[0].name}/" if item[0].kind == "folder" else item[0].name, reverse=True
    )


def _leads_back(link: str) -> bool:
    """Whether a link leads to a folder that contains it."""
    target, place = os.path.realpath(link), os.path.realpath(os.path.dirname(link))
    return os.path.commonpath((target, place)) == target


def _scanned(item: os.DirEntry[str], name: str, linked: bool = False) -> Entry:
    link = item.is_symlink()
    try:
        return _entry(item.path, name, item.stat(), linked or link)
    except OSError:
        if not link:
            raise
        return Entry(item.path, name, "broken link", 0, None, item.path, linked=True)


def _entry(path: str, name: str, status: os.stat_result, linked: bool) -> Entry:
    kind: Kind = "folder" if stat.S_ISDIR(status.st_mode) else "file" if stat.S_ISREG(status.st_mode) else "special"
    several = kind == "file" and status.st_nlink > 1
    return Entry(path, name, kind, status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino), linked, several)


def _as(entry: Entry, kind: Kind) -> Entry:
    return Entry(entry.path, entry.name, kind, 0, None, entry.identity, entry.linked)


class RemoteFiles:
    """An fsspec file system. Object stores have no links, and one flat listing is far cheaper than a request per
    folder.
    """

    def __init__(self, system: RemoteSystem, address: str) -> None:
        self._system, self._address = system, address

    def look(self, path: str) -> Entry | None:
        try:
            return self._entry(path, path.rstrip("/").rpartition("/")[2], self._system.info(path))
        except FileNotFoundError:
            return None

    def scan(self, folder: str) -> Iterator[Entry]:
        for info in self._system.ls(folder, detail=True):
            path = info["name"].rstrip("/")
            if path != folder.rstrip("/"):
                yield self._entry(path, path.rpartition("/")[2], info)

    def below(self, folder: str, leave_out: Callable[[str], bool]) -> Iterator[Entry]:
        root, left_out = f"{folder.rstrip('/')}/", set()
        found = self._system.find(folder, detail=True)
        manifests = [path for path in found if path.endswith(f"/{MANIFEST}")]
        heads = self.heads(manifests, MANIFEST_HEAD_BYTES) if manifests else {}
        datasets = {path.rpartition("/")[0] for path, head in heads.items() if is_dataset(head)}
        for path, info in sorted(found.items()):
            name = path.removeprefix(root).lstrip("/")
            if not name or name.endswith("/"):
                continue  # the marker by which some object stores remember an empty folder
            *folders, _ = name.split("/")
            above = ["/".join(folders[: index + 1]) for index in range(len(folders))]
            apart = next(
                (
                    one
                    for part, one in zip(folders, above, strict=True)
                    if leave_out(part) or f"{root}{one}" in datasets
                ),
                None,
            )
            if apart is None:
                yield self._entry(path, name, info)
            elif apart not in left_out:
                left_out.add(apart)
                kind: Kind = "dataset" if f"{root}{apart}" in datasets else "folder"
                yield Entry(f"{root}{apart}", apart, kind, 0, None, f"{root}{apart}", linked=False)

    def address(self, path: str) -> str:
        return str(self._system.unstrip_protocol(path))

    def heads(self, paths: Sequence[str], num_bytes: int) -> dict[str, bytes]:
        count = len(paths)
        found = self._system.cat_ranges(list(paths), [0] * count, [num_bytes] * count, on_error="return")
        # an error is met again
        return {path: head for path, head in zip(paths, found, strict=True) if isinstance(head, bytes)}

    def _entry(self, path: str, name: str, info: dict[str, Any]) -> Entry:
        kind: Kind = "folder" if info["type"] == "directory" else "file" if info["type"] == "file" else "special"
        if kind == "file" and info.get("size") is None:
            raise DataError(
                f"{self._address}: {name}: the server does not say how large it is; copy it to a local folder first"
            )
        return Entry(
            path,
            name,
            kind,
            int(info.get("size") or 0),
            None,
            f"{self._address.partition('://')[0]}://{path}",
            linked=False,
        )
