"""Training at an address: a local staging folder, brought up to what lies there, and a thread that copies it there.

`staged` holds the lease, fetches what the staging folder lacks (ledger, metrics, recipe and the newest whole
checkpoint; the others become stand-ins), and gives the folder in which the run trains as in any other. `MirrorThread`
is the observer that copies what the run leaves (exchange/remote/mirror.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from weftrain.core import checkpoint
from weftrain.core.errors import CheckpointError, RemoteError, RunFolderError, WeftrainError
from weftrain.core.formats import distant_files, fsops
from weftrain.core.formats.checkpoint_manifest import MANIFEST, read_checkpoint_manifest
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.metrics import METRICS
from weftrain.core.run.observers import taken
from weftrain.exchange.remote.lease import Lease, LostError
from weftrain.exchange.remote.mirror import Mirror
from weftrain.exchange.remote.opening import LEASE, checkpoint_of, served, stand_in, visible, whole_checkpoints
from weftrain.exchange.remote.store import RefusedError, Store, Stored, checked_address, yield_to_training

KEEP = 4  # whole checkpoints in the staging folder
_LOOK_S, _RETRIES_S = 1.0, (2.0, 5.0, 15.0, 30.0, 60.0)
_LAST_TRIES = 3  # in a row, at the end of a run
Say = Callable[[str], None]


def staging_folder(address: str) -> Path:
    """Where runs for an address are staged: a fixed place in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "weftrain" / "runs" / hashlib.sha256(checked_address(address).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Staged:
    """A run at an address, open for training in `folder`."""

    folder: Path
    mirror: Mirror

    def observer(self, stopped: Callable[[], bool]) -> MirrorThread:
        return MirrorThread(self.mirror, stopped)


@contextlib.contextmanager
def staged(address: str, name: str, runs: Path, keep: int, say: Say) -> Iterator[Staged]:
    """The run `name` below an address, staged in the folder `runs`, until the block ends.

    keep: whole checkpoints that stay in the staging folder. say: gets a line for each thing the user should know.
    Raises RemoteError, RunFolderError: the address cannot be used, another process writes there, or the staging folder
    and the address went on differently.
    """
    if address.startswith("memory:"):
        raise RemoteError(f"{address}: is this process's memory, which forgets it: name an object store or a folder")
    store = Store(f"{checked_address(address)}/{name}")
    lease = Lease(store, say)
    lease.take()
    try:
        pull(store, runs / name, say)
        fsops.make_dirs(runs / name)
        mirror = Mirror(runs / name, store, lease, keep)
        mirror.adopt(store.list())
        yield Staged(runs / name, mirror)
        if mirror.is_whole:  # a run that was complete already trains nothing, and may not be there yet
            mirror.advance()
    finally:
        lease.release()


@contextlib.contextmanager
def changed(address: str, say: Say) -> Iterator[Path]:
    """A run at an address as a local folder that a verb may change as any run's; at the end the address follows.

    No state is fetched: checkpoints are stand-ins. Raises RemoteError.
    """
    store = Store(address)
    lease = Lease(store, say)
    lease.take()
    try:
        objects = visible(store)
        with (
            tempfile.TemporaryDirectory(prefix="weftrain-remote-") as temporary,
            served(store, objects, Path(temporary) / store.address.rpartition("/")[2], (LEDGER, METRICS)) as folder,
        ):
            yield folder
            mirror = Mirror(folder, store, lease, keep=sys.maxsize)
            mirror.adopt(store.list())
            mirror.advance()
    finally:
        lease.release()


def pull(store: Store, folder: Path, say: Say) -> None:
    """Bring the staging folder up to what lies at the address, if it is behind. Several processes may call it at once.

    The ledger comes last, so a crash leaves a folder that is still behind. Raises RemoteError, RunFolderError.
    """
    fsops.make_dirs(folder.parent)
    with (folder.parent / f".{folder.name}.pull").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = store.list()
        behind = LEDGER in objects and _is_behind(store, folder)
        if LEDGER not in objects or not (behind or not checkpoint.step_folders(folder / "checkpoints")):
            return
        say(f"{store.address}: {folder} is brought up to what is there")
        fsops.make_dirs(folder / "checkpoints")
        whole = sorted(whole_checkpoints(objects))
        _set_aside(store, folder, set(whole), say)
        _fetch_newest(store, folder, objects, [one for one in whole if one.startswith("checkpoints/")], say)
        for one in whole:
            _stand_for(store, folder, objects, one)
        if not behind:
            return
        small = [one for one in objects if one not in (LEASE, LEDGER) and checkpoint_of(one) is None]
        for one in [*sorted(small, key=lambda one: one == METRICS), LEDGER]:
            fsops.make_dirs((folder / one).parent)
            store.fetch(one, folder / one, objects[one].size)


def _is_behind(store: Store, folder: Path) -> bool:
    """Whether the ledger there has lines that the one here lacks. Raises RunFolderError where each has its own."""
    path = folder / LEDGER
    here = read_plain(path, "ledger") if path.exists() else b""
    here = here[: here.rfind(b"\n") + 1]  # a torn line is repaired by the start
    there = store.read(LEDGER)
    if here.startswith(there):
        return False
    if there.startswith(here):
        return True
    same = sum(1 for one, other in zip(here.splitlines(), there.splitlines(), strict=False) if one == other)
    raise RunFolderError(
        f"{folder} and {store.address} went on differently after line {same} of the ledger: to go on from the address, "
        "move the staging folder away; to keep what is here, copy the folder to another address"
    )


def _set_aside(store: Store, folder: Path, whole: set[str], say: Say) -> None:
    """Rename the checkpoints here that the address does not have: another process went on without them."""
    for step, path in sorted(checkpoint.step_folders(folder / "checkpoints").items()):
        name = f"checkpoints/{path.name}"
        try:
            root = read_checkpoint_manifest(path)["root"]
            if name in whole and (path / MANIFEST).read_bytes() == store.read(f"{name}/{MANIFEST}"):
                continue
        except (OSError, ValueError):
            root = "damaged"
        number = 1
        while (aside := path.with_name(f"{path.name}.superseded-{number}")).exists():
            number += 1
        fsops.rename(path, aside)
        say(f"warning: the checkpoint of step {step} here ({root[:12]}) is not the run's any more: now {aside.name}")


def _fetch_newest(store: Store, folder: Path, objects: dict[str, Stored], names: list[str], say: Say) -> None:
    """Fetch the newest whole checkpoint, every byte of it verified, if it is not here."""
    for name in reversed(names):
        target = folder / name
        if target.exists() and not any(distant_files.token_of(path) for path in target.iterdir()):
            return
        size = sum(one.size for key, one in objects.items() if key.startswith(f"{name}/"))
        if (free := fsops.free_bytes(folder)) < size:
            raise RunFolderError(f"{folder}: {size:,} bytes of {name} are to be fetched, {free:,} are free: make room")
        say(f"{store.address}/{name}: {size:,} bytes are fetched")
        with fsops.temporary_tree(target) as temporary:
            for key in sorted(key for key in objects if key.startswith(f"{name}/")):
                store.fetch(key, temporary / key.removeprefix(f"{name}/"), objects[key].size)
            try:
                checkpoint.verify(temporary)
            except CheckpointError as error:
                told = str(error).replace(str(temporary), f"{store.address}/{name}")
                say(f"warning: passed over a damaged checkpoint: {told}")
                fsops.remove_tree(temporary)
                continue
            if target.exists():  # its stand-ins
                fsops.remove_tree(target)
            fsops.rename(temporary, target)
        return


def _stand_for(store: Store, folder: Path, objects: dict[str, Stored], name: str) -> None:
    """A checkpoint at the address that is not here: its manifest, and stand-ins."""
    target = folder / name
    if target.exists():
        return
    with fsops.temporary_tree(target) as temporary:
        for key in sorted(key for key in objects if key.startswith(f"{name}/")):
            path = temporary / key.removeprefix(f"{name}/")
            if path.name == MANIFEST or objects[key].size < distant_files.MIN_BYTES:
                store.fetch(key, path, objects[key].size)
            else:
                stand_in(store, key, path, objects[key].size)
        fsops.rename(temporary, target)


class MirrorThread:
    """The observer that copies a run to its address in a thread of its own. A failure is told once, and tried again.

    Unlike other observers it makes the training wait in `recorded`, where more checkpoints lie here that are not sent
    than the staging folder may hold. stopped: ends that wait.
    """

    name = "remote run"

    def __init__(self, mirror: Mirror, stopped: Callable[[], bool] = lambda: False) -> None:
        self._mirror, self._stopped = mirror, stopped
        self._problems: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._new, self._closing, self._lost = threading.Event(), threading.Event(), False
        self._passed, self._looked_at = threading.Condition(), 0
        self.waited_s = 0.0  # how long the training waited for room
        self._thread = threading.Thread(target=self._follow, name=self.name, daemon=True)
        self._thread.start()

    def recorded(self, saves_next: bool) -> None:
        self._mirror.is_save_near = saves_next
        self._new.set()
        changed = _changed_at(self._mirror.folder / "checkpoints")
        if changed != self._looked_at and not self._wait_for_room():
            self._looked_at = changed

    def _wait_for_room(self) -> bool:
        began, told = time.monotonic(), False
        while self._mirror.waiting() > self._mirror.keep and not (self._lost or self._stopped()):
            if not told:
                told = True
                self._problems.put(
                    f"{self.name}: the training waits: {self._mirror.waiting()} checkpoints in {self._mirror.folder} "
                    f"are not at {self._mirror.store.address} yet"
                )
            with self._passed:
                self._passed.wait(_LOOK_S)
        self.waited_s += time.monotonic() - began if told else 0.0
        return told

    def problems(self) -> tuple[str, ...]:
        return taken(self._problems)

    def close(self, wait_s: float) -> None:
        self._closing.set()
        self._mirror.is_save_near = False
        self._new.set()
        self._thread.join(min(wait_s, threading.TIMEOUT_MAX))
        if self._thread.is_alive():
            self._mirror.is_whole = False
            self._problems.put(f"{self.name}: not all is uploaded yet: {_LATER}")

    def _follow(self) -> None:
        yield_to_training()
        failures, last = 0, ""
        while True:
            self._new.wait()
            self._new.clear()
            closing = self._closing.is_set()
            try:
                self._mirror.advance(all_files=closing)
                if failures:
                    self._problems.put(f"{self.name}: uploads go on")
                failures, last, self._mirror.is_whole = 0, "", True
                if closing:
                    return
            except LostError as error:
                self._lost, self._mirror.is_whole = True, False
                self._problems.put(f"{self.name}: {error}")
                return
            except (WeftrainError, OSError) as error:
                failures += 1
                if (words := str(error)) != last:
                    self._problems.put(f"{self.name}: {words}; {_LATER if closing else 'tried again'}")
                    last = words
                self._mirror.is_whole = False
                if isinstance(error, RefusedError):
                    self._mirror.store.renew()
                if closing and failures >= _LAST_TRIES:
                    return
                self._closing.wait(_RETRIES_S[min(failures, len(_RETRIES_S)) - 1]) if not closing else time.sleep(0.5)
                self._new.set()
            finally:
                with self._passed:
                    self._passed.notify_all()
            if not closing:
                self._closing.wait(_LOOK_S)  # a quick run records many steps a second


_LATER = "the next start of the run uploads what is missing"


def _changed_at(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
