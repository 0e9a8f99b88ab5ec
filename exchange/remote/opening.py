"""Opening a run, a checkpoint or a release by its address, as a local folder.

The folder is a temporary one with the names of the objects. What verbs open through core/formats/plain_file.py, which
are checkpoints, metrics and ledger, stands there as stand-ins (core/formats/distant_files.py), of which only what is
read is fetched; everything else is small, or read by other libraries, and is fetched whole. A checkpoint without a
manifest is one whose upload has not ended, or whose removal has begun: it is not there.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from weftrain.core.errors import RemoteError, os_errors_as
from weftrain.core.formats import distant_files, fsops
from weftrain.core.formats.checkpoint_manifest import MANIFEST, STEP_FOLDER
from weftrain.core.formats.safe_names import checked_segment
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.metrics import METRICS
from weftrain.core.run.run_folder import RECIPE
from weftrain.exchange.remote.store import Store, Stored

LEASE = "lease.json"
ANALYSES = "analyses"
_FETCHES_AT_ONCE = 8
_UNREAD = ("tensorboard",)  # what no verb reads


def checkpoint_of(name: str) -> str | None:
    """The checkpoint that an object belongs to: `checkpoints/step_00000010`, or one below archive or branches."""
    parent = PurePosixPath(name).parent
    return str(parent) if STEP_FOLDER.fullmatch(parent.name) else None


def whole_checkpoints(objects: Mapping[str, Stored]) -> set[str]:
    """The checkpoint folders whose manifest is there."""
    return {folder for name in objects if (folder := checkpoint_of(name)) and name == f"{folder}/{MANIFEST}"}


def stand_in(store: Store, name: str, target: Path, size: int) -> bytes:
    """Make a stand-in at `target` for an object, and serve it; its token."""
    token = distant_files.new_token()
    distant_files.serve(token, store.reader(name))
    fsops.make_dirs(target.parent)
    fsops.write_sparse(target, distant_files.MAGIC + token, size)
    return token


@contextlib.contextmanager
def opened(address: str) -> Iterator[Path]:
    """A local folder of what is at an address, until the block ends; new analyses in it are then written there.

    Raises RemoteError.
    """
    store = Store(address)
    objects = visible(store)
    with (
        tempfile.TemporaryDirectory(prefix="weftrain-remote-") as temporary,
        os_errors_as(RemoteError, f"{address}: its local folder cannot be made", "make room where TMPDIR is"),
        served(store, objects, Path(temporary) / checked_segment(address.rstrip("/").rpartition("/")[2])) as folder,
    ):
        before = _analyses(folder)
        yield folder
        for name, path in _analyses(folder).items():
            if name not in before:
                store.put_file(name, path)


@contextlib.contextmanager
def served(store: Store, objects: Mapping[str, Stored], folder: Path, whole: Collection[str] = ()) -> Iterator[Path]:
    """Fill a new local folder with the objects, fetched or as stand-ins, which are served until the block ends.

    whole: those that are fetched in any case.
    """
    fsops.make_dirs(folder)
    tokens, fetched = [], []
    try:
        for name, stored in objects.items():
            if stored.size >= distant_files.MIN_BYTES and name not in whole and _is_read_by_ranges(name):
                tokens.append(stand_in(store, name, folder / name, stored.size))
            else:
                fsops.make_dirs((folder / name).parent)
                fetched.append((name, stored.size))
        with ThreadPoolExecutor(_FETCHES_AT_ONCE) as pool:
            list(pool.map(lambda one: store.fetch(one[0], folder / one[0], one[1]), fetched))
        if RECIPE in objects:  # no checkpoint is visible yet
            fsops.make_dirs(folder / "checkpoints")
        yield folder
    finally:
        for token in tokens:
            distant_files.forget(token)


def visible(store: Store) -> dict[str, Stored]:
    """The objects at an address that make up something whole. Raises RemoteError where nothing is."""
    objects = store.list()
    if not objects:
        store.stat(RECIPE)  # says it where the bucket is not there
        raise RemoteError(f"{store.address}: there is nothing: name the address of a run, a checkpoint or a release")
    own = STEP_FOLDER.fullmatch(store.address.rpartition("/")[2]) is not None
    if own and MANIFEST not in objects:
        raise RemoteError(f"{store.address}: has no {MANIFEST}: its upload has not ended, or its removal has begun")
    whole = whole_checkpoints(objects)
    return {
        name: stored
        for name, stored in objects.items()
        if name != LEASE
        and name.partition("/")[0] not in _UNREAD
        and ((folder := checkpoint_of(name)) is None or folder in whole)
    }


def _is_read_by_ranges(name: str) -> bool:
    path = PurePosixPath(name)
    if path.parts[0] == "revisions":  # of a release: weights that only `verify` reads
        return path.suffix == ".safetensors"
    in_checkpoint = "/" not in name or checkpoint_of(name) is not None  # the address may be a checkpoint's own
    return name in (LEDGER, METRICS) or (in_checkpoint and (path.name == MANIFEST or path.suffix == ".safetensors"))


def _analyses(folder: Path) -> dict[str, Path]:
    found = (folder / ANALYSES).rglob("*") if (folder / ANALYSES).is_dir() else ()
    return {
        path.relative_to(folder).as_posix(): path
        for path in found
        if path.is_file() and not path.is_symlink() and not path.name.startswith(".")
    }
