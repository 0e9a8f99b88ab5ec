"""Reads every byte of a release once: the hash of each file, of each tensor of a checkpoint, and of each tensor that is
published for the hub come from one pass.

The tensors of a revision are those of its checkpoint where their hashes are equal: of the bytes as they are for
float32, of the bytes rounded for bfloat16. A layout that keeps several parameters in one tensor, or transposed, and
merged adapters have no such hash: verify.py reads these weights once more and compares them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftrain.core.errors import ReleaseError, file_problem
from weftrain.core.formats.checkpoint_files import check_scanned, ranges_of, read_structure
from weftrain.core.formats.one_pass import ByteRange, Scanned, scan
from weftrain.core.formats.tensor_file import open_regular, read_header
from weftrain.exchange.huggingface.folder import is_weight_file
from weftrain.exchange.release.notes import Notes
from weftrain.exchange.release.release import Release, ReleasedFile

_FILES_AT_ONCE = max(4, min(16, 2 * (os.cpu_count() or 1)))  # the disk or the network is asked for several at once
WEIGHTS = "weights/"  # how the names of a checkpoint's weights begin


@dataclass(frozen=True)
class WhatWasRead:
    """The manifests of the checkpoints by their roots, and what was found in each file."""

    manifests: Mapping[str, dict[str, Any]]
    files: Mapping[str, Scanned]

    def weight_hash(self, place: str, manifest: Mapping[str, Any], name: str, dtype: str) -> str | None:
        """The SHA-256 of a weight of the checkpoint in `place`, in this dtype; None where it was not computed."""
        entry = manifest["tensors"].get(f"{WEIGHTS}{name}")
        if entry is None or entry["dtype"] != "F32":
            return None
        if dtype == "float32":
            return str(entry["sha256"])
        return self.files[f"{place}/{entry['file']}"].rounded.get(f"{WEIGHTS}{name}")


def read_once(folder: Path, release: Release, progress: Callable[[int, int], None], notes: Notes | None) -> WhatWasRead:
    """Read every file that release.json names, and compare its hash, and those of the checkpoints' tensors.

    progress: called with the bytes read and those of all files. notes: what an interrupted reading has found already.
    Stops at the first file that is not as release.json says. Raises ReleaseError, CheckpointError.
    """
    for name, entry in release.files.items():
        check_size(folder / name, (folder / name).stat().st_size, entry)
    manifests, ranges = _ranges(folder, release)
    total, done = sum(entry.size for entry in release.files.values()), 0

    def read(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    found: dict[str, Scanned] = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as hashing, ThreadPoolExecutor(_FILES_AT_ONCE) as reading:
        jobs: dict[Future[Scanned], str] = {}
        for name in sorted(release.files, key=lambda name: -release.files[name].size):  # the largest must not be last
            parts = ranges.get(name, [])
            jobs[reading.submit(_read_file, folder, name, release.files[name], parts, hashing, read, notes)] = name
        try:
            for job in as_completed(jobs):
                found[jobs[job]] = job.result()
        except BaseException:
            reading.shutdown(wait=False, cancel_futures=True)
            raise
    for place, manifest in manifests.items():
        for file in manifest["files"]:
            check_scanned(folder / place, file, manifest, found[f"{place}/{file}"])
    return WhatWasRead({manifest["root"]: manifest for manifest in manifests.values()}, found)


def check_size(path: Path, size: int, entry: ReleasedFile) -> None:
    if size != entry.size:
        raise ReleaseError(f"{path}: holds {size:,} bytes, release.json says {entry.size:,}: fetch it again")


def _read_file(
    folder: Path,
    name: str,
    entry: ReleasedFile,
    parts: list[ByteRange],
    hashing: Executor,
    read: Callable[[int], None],
    notes: Notes | None,
) -> Scanned:
    path = folder / name
    try:
        found = None if notes is None else notes.found(name, path, parts)
        if found is not None:
            read(found.size)
        else:
            before = None if notes is None else notes.look(path)
            found = scan(path, parts, hashing, read, entry.size)
            if notes is not None and before is not None:
                notes.add(name, path, before, found, parts)
    except (OSError, ValueError) as error:
        raise ReleaseError(f"{path}: cannot be read: {file_problem(error)}: fetch it again") from error
    check_size(path, found.size, entry)
    if found.sha256 != entry.sha256:
        raise ReleaseError(f"{path}: has changed since the release was made (SHA-256 differs): fetch it again")
    return found


def _ranges(folder: Path, release: Release) -> tuple[dict[str, dict[str, Any]], dict[str, list[ByteRange]]]:
    """The checkpoints' manifests by their folders, and the parts of each file that are hashed by themselves."""
    manifests: dict[str, dict[str, Any]] = {}
    ranges: dict[str, list[ByteRange]] = {}
    for place in checkpoint_places(release):
        manifest, layouts = read_structure(folder / place)
        weights = {name for name in manifest["tensors"] if name.startswith(WEIGHTS)}
        rounded = weights if release.weights_dtype == "bfloat16" else frozenset[str]()
        manifests[place] = manifest
        for file, layout in layouts.items():
            ranges[f"{place}/{file}"] = ranges_of(manifest, file, layout, rounded)
    for name in release.files:
        top, _, file = name.rpartition("/")
        if top.startswith("revisions/") and is_weight_file(file) and file.endswith(".safetensors"):
            ranges[name] = _ranges_of_foreign(folder / name)
    return manifests, ranges


def _ranges_of_foreign(path: Path) -> list[ByteRange]:
    try:
        with open_regular(path) as file:
            layout = read_header(file, foreign=True)
    except (OSError, ValueError) as error:
        raise ReleaseError(f"{path}: {file_problem(error)}: fetch it again") from error
    places = sorted(layout.items(), key=lambda item: (item[1].begin, item[1].end))
    return [ByteRange(name, place.begin, place.end) for name, place in places]


def checkpoint_places(release: Release) -> list[str]:
    """The folders of the checkpoints, sorted."""
    ends = {
        name.rpartition("/")[0]
        for name in release.files
        if name.startswith("checkpoints/") and name.endswith("/manifest.json")
    }
    return sorted(ends)
