"""The copy of a run's folder at an address: `Mirror.advance` makes it what the folder is.

A checkpoint's tensor files go first, each compared after its upload, and its manifest last: without one there is no
checkpoint at the address. Metrics, ledger and the small files go whole, after each checkpoint and every
`FILES_EVERY_S`; what a lost machine loses of them lies beyond its newest checkpoint there, and a resume would make it
again. What the ledger says is removed is removed there after the ledger is there, manifest first. So each moment is one
that a reader may see, and the next `advance` finishes what a crash left. `mirror.json` in the folder keeps what was
sent; it only saves requests.

Local checkpoints that are at the address become stand-ins (core/formats/distant_files.py) but for the newest few.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weftrain.core.errors import RemoteError, RunFolderError
from weftrain.core.formats import distant_files, fsops
from weftrain.core.formats.canonical import canonical_json, parse_json
from weftrain.core.formats.checkpoint_manifest import MANIFEST, STEP_FOLDER, read_checkpoint_manifest
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.run.ledger import BRANCHES, read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.metrics import METRICS
from weftrain.core.run.retention import removed_roots
from weftrain.core.run.retention_rule import ARCHIVE
from weftrain.core.run.run_folder import LOCK
from weftrain.exchange.remote.lease import Lease, LostError
from weftrain.exchange.remote.opening import ANALYSES, checkpoint_of, stand_in, whole_checkpoints
from weftrain.exchange.remote.store import ChangedError, Store, Stored

STATE = "mirror.json"
FILES_EVERY_S = 60.0
_SHARE_OF_TIME = 0.05  # for files between two checkpoints: a large metrics.jsonl goes less often
_IN_MEMORY_BYTES = 64 << 20
_LOOK_S, _MOST_PAUSE_S = 0.1, 30.0  # of the wait for a save, for each part that is sent
_ALSO = (f"{ANALYSES}/**/*", "tracking/*.json")  # what goes with the files of the run's folder itself
_OWN = (LOCK, STATE, "save-now")


class Mirror:
    """The copy of the run in `folder` at the store's address. keep: whole checkpoints that stay here. The run's lock
    need not be held: a checkpoint appears in the folder whole, and lines are only appended.
    """

    def __init__(self, folder: Path, store: Store, lease: Lease, keep: int) -> None:
        self.folder, self.store, self.keep, self._lease = folder, store, keep, lease
        self._state = read_state(folder, store.address)
        self.is_whole = True  # for the caller: whether the last pass ended
        self.is_save_near = False  # from the caller: the step that is being made ends with a save
        self._roots: dict[str, tuple[int, str]] = {}  # checkpoint -> its manifest's time, and root
        self._files_at, self._files_s = -FILES_EVERY_S, 0.0
        store.pause = self._pause
        for name, path in _stand_ins(folder):
            token = distant_files.token_of(path)
            assert token is not None
            distant_files.serve(token, store.reader(name))

    # -- what is where

    def adopt(self, objects: dict[str, Stored]) -> None:
        """Take over what is at the address. What a crash left there of a checkpoint that never became whole, and is not
        here to be sent again, is removed.
        """
        whole, here = whole_checkpoints(objects), self._local()
        known = self._state["checkpoints"]
        for name in set(known) - whole:
            del known[name]
        for name in sorted(whole):
            if name not in known:
                known[name] = _root_of(self.store.read(f"{name}/{MANIFEST}"))
        for name in objects:
            if (folder := checkpoint_of(name)) is not None and folder not in whole and folder not in here:
                self.store.delete(name)
        self._save()

    def _local(self) -> dict[str, Path]:
        """The checkpoints in the folder by name, of each kind the oldest first."""
        found: dict[str, Path] = {}
        branches = (f"{BRANCHES}/{one.name}" for one in _entries(self.folder / BRANCHES))
        for parent in (*branches, ARCHIVE, "checkpoints"):  # what a rollback moved is copied before it is replaced
            steps = [one for one in _entries(self.folder / parent) if STEP_FOLDER.fullmatch(one.name)]
            found |= {f"{parent}/{one.name}": Path(one.path) for one in sorted(steps, key=lambda one: one.name)}
        return found

    def _root(self, name: str, path: Path) -> str | None:
        """The root of a checkpoint here; None where it has just been moved away, or is no whole one."""
        try:
            changed = (path / MANIFEST).stat().st_mtime_ns
            if self._roots.get(name, (0, ""))[0] != changed:
                self._roots[name] = changed, read_checkpoint_manifest(path)["root"]
        except (OSError, ValueError):
            return None
        return self._roots[name][1]

    def waiting(self) -> int:
        """How many whole checkpoints lie here that cannot become stand-ins: the newest, and what is not sent yet."""
        sent, here = self._state["checkpoints"], self._local()
        newest = max((name for name in here if name.startswith("checkpoints/")), default="")
        return sum(
            name == newest or sent.get(name) != self._root(name, path)
            for name, path in here.items()
            if name.startswith("checkpoints/")
        )

    def _pause(self) -> None:
        """Wait while a save is under way here, for which an upload would take processor and disk, and in the step
        before it, so that the parts under way have arrived when the training copies its state; but not once half of the
        checkpoints that the folder may hold wait to be sent, or the training would soon wait for them.
        """
        until = time.monotonic() + _MOST_PAUSE_S
        while (self.is_save_near or self._is_saving()) and self._has_room() and time.monotonic() < until:
            time.sleep(_LOOK_S)

    def _has_room(self) -> bool:
        return self.waiting() <= self.keep // 2

    def _is_saving(self) -> bool:
        return any(one.name.startswith(fsops.TEMPORARY_PREFIX) for one in _entries(self.folder / "checkpoints"))

    # -- one pass

    def advance(self, *, all_files: bool = True) -> int:
        """Send what is new, remove what is removed, make room here. How many checkpoints were sent.

        all_files: also metrics and ledger, though no checkpoint is new. Raises RemoteError; the next call goes on.
        """
        count = 0
        for name, path in self._local().items():
            root = self._root(name, path)
            if root is not None and self._state["checkpoints"].get(name) != root:
                count += self._send(name, path, root)
        took = max(FILES_EVERY_S, self._files_s / _SHARE_OF_TIME)
        if count or all_files or time.monotonic() - self._files_at > took:
            self._send_files()
            self._remove()
        self._make_room()
        return count

    def _send(self, name: str, path: Path, root: str) -> int:
        """Send one checkpoint. How many were: none where it was removed here meanwhile."""
        sending = self._state["sending"]
        if sending.get("root") != root or sending.get("name") != name:
            sending = self._state["sending"] = {"name": name, "root": root, "tags": {}}
        try:
            manifest, data = read_checkpoint_manifest(path), read_plain(path / MANIFEST, "manifest")
            self._withdraw(name, data)
            elsewhere = next((old for old, one in self._state["checkpoints"].items() if one == root), None)
            for file in manifest["files"]:
                there = self.store.stat(f"{name}/{file}") if file in sending["tags"] else None
                if there is None or there.tag != sending["tags"][file]:
                    sending["tags"][file] = self._send_file(elsewhere, name, file, path)
                    self._save()
        except (OSError, ValueError):
            if path.exists():
                raise
            return 0
        self._lease.check()
        self.store.put(f"{name}/{MANIFEST}", data, create=True)
        self._state["checkpoints"][name], self._state["sending"] = root, {}
        self._save()
        return 1

    def _withdraw(self, name: str, data: bytes) -> None:
        """Make another checkpoint of this name disappear from the address, before its files are replaced."""
        if self.store.stat(f"{name}/{MANIFEST}") is not None and self.store.read(f"{name}/{MANIFEST}") != data:
            self._lease.check()
            self.store.delete(f"{name}/{MANIFEST}")
        self._state["checkpoints"].pop(name, None)

    def _send_file(self, elsewhere: str | None, name: str, file: str, path: Path) -> str:
        """Send a tensor file, or copy it there if it lies there under the name of before a rollback; its tag."""
        if elsewhere is not None and (old := self.store.stat(f"{elsewhere}/{file}")) is not None:
            self.store.copy(f"{elsewhere}/{file}", f"{name}/{file}")
            copied = self.store.stat(f"{name}/{file}")
            if copied is not None and copied.size == old.size:
                if (token := distant_files.token_of(path / file)) is not None:
                    distant_files.serve(token, self.store.reader(f"{name}/{file}"))
                return copied.tag
        return self.store.put_file(f"{name}/{file}", path / file)

    def _send_files(self) -> None:
        began, known = time.monotonic(), self._state["files"]
        for name, path in sorted(self._files().items(), key=lambda one: one[0] == LEDGER):  # it speaks of the others
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            stamp = [status.st_size, status.st_mtime_ns]
            if known.get(name, [None, None])[:2] != stamp:
                known[name] = [*stamp, self._send_lines(name, path)]
                self._save()
        self._files_at = time.monotonic()
        self._files_s = self._files_at - began

    def _files(self) -> dict[str, Path]:
        top = {one.name: Path(one.path) for one in _entries(self.folder) if one.is_file(follow_symlinks=False)}
        for pattern in _ALSO:
            plain = (path for path in self.folder.glob(pattern) if path.is_file() and not path.is_symlink())
            top |= {path.relative_to(self.folder).as_posix(): path for path in plain}
        hidden = (name for name in top if name in _OWN or name.rpartition("/")[2].startswith("."))
        return {name: top[name] for name in top.keys() - set(hidden)}

    def _send_lines(self, name: str, path: Path) -> str:
        """Send a small file, or the whole lines of one that grows; its tag."""
        size = path.stat().st_size
        if name not in (LEDGER, METRICS):
            return self.store.put(name, path.read_bytes())
        if size > _IN_MEMORY_BYTES and name == METRICS:
            snapshot = fsops.temporary_beside(path)
            fsops.copy_file(path, snapshot)
            try:
                return self.store.put_file(name, snapshot)
            finally:
                fsops.remove_file(snapshot)
        with path.open("rb") as file:
            data = file.read(size)
        data = data[: data.rfind(b"\n") + 1]
        return self._send_ledger(data) if name == LEDGER else self.store.put(name, data)

    def _send_ledger(self, data: bytes) -> str:
        """Replace the ledger there by a longer one, and no other."""
        tag = self._state["files"].get(LEDGER, [0, 0, None])[2]
        self._lease.check()
        for _ in range(2):
            try:
                return self.store.put(LEDGER, data, **({"create": True} if tag is None else {"match": tag}))
            except ChangedError:
                there = self.store.stat(LEDGER)
                if there is not None and not data.startswith(self.store.read(LEDGER)):
                    raise LostError(
                        f"{self.store.address}/{LEDGER}: has lines that this run lacks: another process went on there; "
                        "nothing more is uploaded from here"
                    ) from None
                tag = None if there is None else there.tag
        raise RemoteError(f"{self.store.address}/{LEDGER}: changes while it is written: see who writes there")

    def _remove(self) -> None:
        """Remove there what the ledger, which is there, says is removed, and what lies under another name now."""
        known, here = self._state["checkpoints"], self._local()
        gone = [name for name in known if name not in here]
        if not gone:
            return
        try:
            removed = removed_roots(read_ledger(self.folder / LEDGER))
        except RunFolderError:
            return  # the next start says what is wrong with it
        moved = {root for name, root in known.items() if name in here}
        for name in gone:
            if known[name] in removed or known[name] in moved:
                self._lease.check()
                self.remove(name)

    def remove(self, name: str) -> None:
        """Remove a checkpoint there, its manifest first."""
        self.store.delete(f"{name}/{MANIFEST}")
        for object_name in self.store.below(name).list():
            self.store.delete(f"{name}/{object_name}")
        del self._state["checkpoints"][name]
        self._save()

    def _make_room(self) -> None:
        """Make stand-ins of the oldest checkpoints here that are there, until `keep` are whole here."""
        sent = self._state["checkpoints"]
        whole = [
            (name, path)
            for name, path in self._local().items()
            if name.startswith("checkpoints/")
            and not any(distant_files.token_of(Path(one.path)) for one in _entries(path))
        ]
        for name, path in whole[: max(0, len(whole) - self.keep)]:
            if (root := self._root(name, path)) is not None and sent.get(name) == root:
                make_stand_ins(self.store, name, path)

    def _save(self) -> None:
        fsops.write_bytes(self.folder / STATE, canonical_json(self._state) + b"\n")


def _root_of(manifest: bytes) -> str:
    """The root that a manifest claims; "" for a damaged one, which is replaced if the checkpoint is here."""
    try:
        found = parse_json(manifest)
    except ValueError:
        return ""
    return str(found.get("root", "")) if isinstance(found, dict) else ""


def make_stand_ins(store: Store, name: str, path: Path) -> None:
    """Replace a checkpoint's tensor files, which are at the address, by stand-ins."""
    for entry in _entries(path):
        size = entry.stat().st_size
        if entry.name != MANIFEST and size >= distant_files.MIN_BYTES:
            try:
                stand_in(store, f"{name}/{entry.name}", Path(entry.path), size)
            except FileNotFoundError:
                return  # it is removed at this moment


def read_state(folder: Path, address: str) -> dict[str, Any]:
    """What the folder's mirror.json says was sent. Raises RunFolderError for another address's."""
    state: dict[str, Any] = {"address": address, "checkpoints": {}, "files": {}, "sending": {}}
    try:
        found = parse_json(read_plain(folder / STATE, "record"))
    except (OSError, ValueError):
        return state
    if isinstance(found, dict) and found.keys() == state.keys():
        if found["address"] != address:
            raise RunFolderError(
                f"{folder}: is the staging folder of {found['address']}, not of {address}: name another --staging, or "
                f"remove {folder / STATE} to copy this run to the other address as well"
            )
        state = found
    return state


def _stand_ins(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.glob("**/step_*/*.safetensors")):
        if distant_files.token_of(path) is not None:
            yield path.relative_to(folder).as_posix(), path


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []
