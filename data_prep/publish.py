"""Copying datasets to and from fsspec addresses (`s3://…`, `gs://…`, `memory://…`).

Training maps files, so a remote dataset is fetched to a local folder first. The manifest is copied last and read first:
an address without one holds no dataset.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.formats.croissant import CROISSANT, write_croissant
from weftrain.core.formats.dataset import (
    FAILURES,
    MANIFEST,
    TOKENIZER,
    described_by,
    read_dataset_manifest,
    verify_tables,
)
from weftrain.core.formats.dataset_manifest import DatasetManifest
from weftrain.core.formats.shard_set import ShardSet
from weftrain.data_prep.inputs.files import file_system
from weftrain.data_prep.inputs.remote import RemoteSystem
from weftrain.data_prep.stages.plan import Progress, no_progress

_BLOCK_BYTES = 1 << 24


def is_remote(address: str) -> bool:
    """Whether it is an address (`s3://…`, and `file://…` too) and not a path."""
    return "://" in address


def staging_folder(address: str) -> Path:
    """Where a dataset for an address is made before it is copied: a fixed place in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "weftrain" / "datasets" / hashlib.sha256(address.encode()).hexdigest()[:16]


def check_address(address: str) -> None:
    """Raises DataError where the address cannot be reached, before any work is done."""
    system, root = file_system(address.rstrip("/"))
    try:
        system.exists(f"{root}/{MANIFEST}")
    except OSError as error:
        raise DataError(
            f"{address}: cannot be reached: {error}; see that the address and the permissions are right"
        ) from error


def publish(folder: Path, manifest: DatasetManifest, address: str, progress: Progress = no_progress) -> None:
    """Copy a complete dataset to an address. If the same dataset is there, only missing files and files of another size
    are copied; without a manifest, all are. Another dataset's address is refused. Raises DataError.
    """
    system, root = file_system(address.rstrip("/"))
    optional = [name for name in (FAILURES, CROISSANT) if (folder / name).exists()]
    names = [*_files(manifest), *optional, MANIFEST]
    sizes = {name: (folder / name).stat().st_size for name in names}
    total, done = sum(sizes.values()), 0
    try:
        same = _is_there(system, root, address, (folder / MANIFEST).read_bytes())
        for name in names:
            target = f"{root}/{name}"
            if not (same and system.exists(target) and system.size(target) == sizes[name]):
                system.makedirs(target.rpartition("/")[0], exist_ok=True)
                system.put_file(str(folder / name), target)
                if system.size(target) != sizes[name]:
                    raise DataError(
                        f"{address}/{name}: {system.size(target)} bytes arrived of {sizes[name]}; run again"
                    )
            done += sizes[name]
            progress("copy", done, total, "bytes")
    except OSError as error:
        raise DataError(
            f"{address}: cannot be written: {error}; see that the address and the permissions are right"
        ) from error


def fetch(address: str, folder: Path, progress: Progress = no_progress) -> DatasetManifest:
    """Copy a dataset from an address into a new local folder, verified before it appears there. Raises DataError. File
    names come from the checked manifest, so nothing is written outside the folder.
    """
    if folder.exists():
        raise DataError(f"{folder}: exists already; name another folder, or remove it")
    system, root = file_system(address.rstrip("/"))
    partial = folder.parent / f".{folder.name}.partial"
    fsops.remove_tree(partial)
    for set_folder in ("train", "heldout"):
        fsops.make_dirs(partial / set_folder)
    try:
        for name in (MANIFEST, TOKENIZER):
            _fetch_file(system, f"{root}/{name}", partial / name)
        manifest = read_dataset_manifest(partial)
        sizes = {shard.file: shard.num_bytes for entry in manifest.sets.values() for shard in entry.shards}
        total, done = sum(sizes.values()), 0
        optional = [FAILURES] if system.exists(f"{root}/{FAILURES}") else []
        for name in (*described_by(manifest)[1:], *optional, *sizes):
            _fetch_file(system, f"{root}/{name}", partial / name)
            done += sizes.get(name, 0)
            progress("fetch", done, total, "bytes")
    except OSError as error:
        raise DataError(f"{address}: cannot be fetched: {error}; is it a dataset's address?") from error
    verify_tables(partial, manifest)
    write_croissant(partial, manifest)  # which follows from the manifest, whatever lies at the address
    for set_name in manifest.sets:
        ShardSet(partial, manifest, set_name).verify()
    if manifest.heldout is None:
        fsops.remove_tree(partial / "heldout")
    fsops.rename(partial, folder)
    return manifest


def _files(manifest: DatasetManifest) -> list[str]:
    return [*described_by(manifest), *(shard.file for entry in manifest.sets.values() for shard in entry.shards)]


def _is_there(system: RemoteSystem, root: str, address: str, manifest: bytes) -> bool:
    """Whether this dataset lies at the address. Raises DataError if another one does."""
    if not system.exists(f"{root}/{MANIFEST}"):
        return False
    if system.cat_file(f"{root}/{MANIFEST}") != manifest:
        raise DataError(f"{address}: holds another dataset; name another address, or remove that one")
    return True


def _fetch_file(system: RemoteSystem, source: str, target: Path) -> None:
    with system.open(source) as read, fsops.FileWriter(target) as file:
        while block := read.read(_BLOCK_BYTES):
            file.write(block)
        file.sync()
