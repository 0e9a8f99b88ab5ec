"""Publishing a release: part by part, each sent only as far as it is not there yet, and compared when it has arrived.

An address in an object store, or a folder, gets the release as it is, release.json last, since a folder without one is
no release. A repository on the hub gets a branch for each revision and, on its main branch, the last revision with the
release's record beside it in `record/` (publish_hub.py). Who publishes again continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from weftrain.core.errors import RemoteError
from weftrain.core.formats import fsops
from weftrain.exchange.release.release import BUNDLE, RELEASE, SIGNATURE, Release
from weftrain.exchange.remote.store import Store, Stored


@dataclass(frozen=True)
class Outgoing:
    """A file of the release."""

    path: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """What is sent together: name in the target -> file."""

    name: str
    files: Mapping[str, Outgoing]


@dataclass(frozen=True)
class Sent:
    """What became of a part: its files, and those of them that were sent, or would be."""

    name: str
    files: int
    sent: int
    sent_bytes: int


class Target(Protocol):
    """Where a release is published. Both methods raise RemoteError."""

    def parts(self, files: Mapping[str, Outgoing]) -> list[Part]:
        """The release's files as parts, in the order in which they are sent."""
        ...

    def missing(self, part: Part) -> list[str]:
        """The files of a part that are not there with the same bytes."""
        ...

    def send(self, part: Part, names: list[str]) -> None:
        """Send these files of a part, and compare what arrived."""
        ...


def publish(folder: Path, release: Release, target: Target, *, dry_run: bool) -> Iterator[Sent]:
    """Publish a verified release, a part at each step. dry_run: only say what would be sent."""
    for part in target.parts(outgoing(folder, release)):
        names = target.missing(part)
        if names and not dry_run:
            target.send(part, names)
        yield Sent(part.name, len(part.files), len(names), sum(part.files[name].size for name in names))


def outgoing(folder: Path, release: Release) -> dict[str, Outgoing]:
    """Every file of a release by its name, release.json and its signatures too."""
    found = {name: Outgoing(folder / name, entry.size, entry.sha256) for name, entry in release.files.items()}
    for name in (SIGNATURE, BUNDLE, RELEASE):
        if (path := folder / name).exists():
            found[name] = Outgoing(path, path.stat().st_size, fsops.sha256_file(path))
    return found


class StoreTarget:
    """An address in an object store (`s3://…`), or a folder (`file://…`), which holds this release or nothing."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._there: dict[str, Stored] = {}

    def parts(self, files: Mapping[str, Outgoing]) -> list[Part]:
        """A part for each checkpoint, revision and dataset, then the record, and release.json at the end."""
        self._there = self._store.list()
        if other := sorted(self._there.keys() - files.keys()):
            raise RemoteError(
                f"{self._store.address}: holds {other[0][:120]}, which is no file of this release: name an empty place"
            )
        found: dict[str, dict[str, Outgoing]] = {}
        for name, file in sorted(files.items()):
            if name != RELEASE:
                found.setdefault("/".join(name.split("/")[:2]) if name.count("/") > 1 else "record", {})[name] = file
        if RELEASE in self._there and not self._store.holds(RELEASE, files[RELEASE].path):
            raise RemoteError(f"{self._store.address}: holds another release: name an empty place")
        record = found.pop("record", {})
        parts = [Part(name, some) for name, some in found.items()]
        return [*parts, Part("record", record), Part(RELEASE, {RELEASE: files[RELEASE]})]

    def missing(self, part: Part) -> list[str]:
        return [
            name
            for name, file in part.files.items()
            if (there := self._there.get(name)) is None
            or there.size != file.size
            or not self._store.holds(name, file.path)
        ]

    def send(self, part: Part, names: list[str]) -> None:
        for name in names:
            self._store.put_file(name, part.files[name].path)
