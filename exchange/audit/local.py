"""Series on this machine: a folder of revision folders, and a run or a release of weftrain.

Weights of a folder are compared by pieces first, and files whose pieces agree are then hashed to their end, since all
revisions of a series are equally large. Our checkpoints have the hash of every tensor in their manifests, which
`weftrain verify` compares with the bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from weftrain.core.errors import ReleaseError, file_problem
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.checkpoint_manifest import MANIFEST, STEP_FOLDER, read_checkpoint_manifest
from weftrain.core.formats.plain_file import open_plain, read_plain
from weftrain.core.run.metrics import run_has_ended
from weftrain.exchange.audit.series import (
    CONFIG,
    MAX_DEPTH,
    ListedFile,
    Revision,
    Series,
    VanishedError,
    is_wanted,
    is_weight_file,
    revision_folders,
    revision_of,
)

RELEASE = "release.json"
MAX_FILES = 200_000
_PIECES, _PIECE_BYTES = 16, 4096
_HASHES_AT_ONCE = 4
_MAX_RECORDS = 20_000  # of evaluations
_SKIPPED = (".git", ".cache", "analyses")


class FolderSeries(Series):
    """The folders below one folder whose names have a step, or else are a word and a number, and which hold a model."""

    kind = "folder of revisions"
    cheap = True

    def __init__(self, folder: Path) -> None:
        self.where, self._folder = str(folder), folder
        self._files: dict[str, list[str]] = {}  # revision -> its files

    def refs(self) -> Sequence[str]:
        self._files = revision_folders(_tree(self._folder))
        return list(self._files)

    def revision(self, name: str) -> Revision:
        return revision_of(name, name, (self._listed(name, file) for file in self._files[name]))

    def _listed(self, name: str, file: str) -> ListedFile:
        path = self._folder / name / file
        try:
            if not is_weight_file(file):
                return ListedFile(file, path.stat().st_size, _content(path) if file == CONFIG else "")
            return ListedFile(file, path.stat().st_size, _by_pieces(path))
        except FileNotFoundError:
            raise VanishedError(f"{path}: is not there any more") from None

    def folder_of(self, revision: Revision) -> Path:
        return self._folder / revision.name

    def settled(self, revisions: list[Revision]) -> list[Revision]:
        """The revisions, with the SHA-256 of every file of weights whose pieces another revision's file has too."""
        paths = {
            self._folder / revision.name / file.path: file.identity
            for revision in revisions
            for file in revision.weights
        }
        known = _settled(paths)
        return [
            replace(
                revision,
                weights=tuple(
                    replace(file, identity=known[self._folder / revision.name / file.path]) for file in revision.weights
                ),
            )
            for revision in revisions
        ]

    def read(self, revision: Revision, path: str, start: int, stop: int) -> bytes:
        return _read(self._folder / revision.name / path, start, stop)

    def probe(self, revision: Revision) -> dict[str, float]:
        return next(iter(_recorded(self._folder / revision.name).values()), {})


class CheckpointSeries(Series):
    """The checkpoints of a run or a release of weftrain, by their manifests."""

    kind = "run or release of weftrain"
    prefix = "weights/"
    cheap = True

    def __init__(self, folder: Path) -> None:
        self.where, self._folder = str(folder), folder
        self._losses: dict[str, dict[str, float]] | None = None

    def refs(self) -> Sequence[str]:
        return checkpoints_in(self._folder)

    def revision(self, name: str) -> Revision:
        folder = self._folder / "checkpoints" / name
        try:
            manifest = read_checkpoint_manifest(folder)
        except FileNotFoundError:
            raise VanishedError(f"{folder}: is not there any more") from None
        weights = {
            tensor: entry["sha256"] for tensor, entry in manifest["tensors"].items() if tensor.startswith(self.prefix)
        }
        whole = hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()
        files = [
            ListedFile(file, entry["size"], f"sha256:{whole}:{number}")
            for number, (file, entry) in enumerate(sorted(manifest["files"].items()))
        ]
        model = json.dumps(manifest["recipe"].get("model"), sort_keys=True)
        return Revision(
            name=name,
            commit=name,
            weights=tuple(files),
            pickled=False,
            config=ListedFile(MANIFEST, 0, f"sha256:{hashlib.sha256(model.encode()).hexdigest()}"),
            state=ListedFile(MANIFEST, 0, ""),
            optimizer=any("exp_avg" in tensor for tensor in manifest["tensors"]),
            data_order=True,
        )

    def mark(self, name: str) -> str:
        try:
            manifest = read_plain(self._folder / "checkpoints" / name / MANIFEST, "manifest", follow=False)
        except FileNotFoundError:
            raise VanishedError(f"{self._folder / 'checkpoints' / name}: has no {MANIFEST}") from None
        return hashlib.sha256(manifest).hexdigest()[:32]

    def has_ended(self) -> bool:
        """A release is whole; a run says it in its metrics."""
        return (self._folder / RELEASE).exists() or run_has_ended(self._folder)

    def folder_of(self, revision: Revision) -> Path:
        return self._folder / "checkpoints" / revision.name

    def read(self, revision: Revision, path: str, start: int, stop: int) -> bytes:
        return _read(self._folder / "checkpoints" / revision.name / path, start, stop)

    def config(self, revision: Revision) -> dict[str, Any] | None:
        model = self._manifest(revision)["recipe"].get("model")
        return model if isinstance(model, dict) else None

    def told_step(self, revision: Revision) -> int | None:
        return int(self._manifest(revision)["step"])

    def tensor_keys(self, revision: Revision) -> dict[str, str]:
        tensors = self._manifest(revision)["tensors"]
        return {name: entry["sha256"] for name, entry in tensors.items() if name.startswith(self.prefix)}

    def probe(self, revision: Revision) -> dict[str, float]:
        if self._losses is None:
            self._losses = _recorded(self._folder)
        return self._losses.get(self._manifest(revision)["root"], {})

    def _manifest(self, revision: Revision) -> dict[str, Any]:
        return read_checkpoint_manifest(self._folder / "checkpoints" / revision.name)


def files_identity(revisions: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """Revision -> what is equal for equal files of weights. revisions: name -> its files. Raises OSError."""
    pieces = {path: _by_pieces(path) for files in revisions.values() for path in files}
    known = _settled(pieces)
    return {name: " ".join(sorted(known[path] for path in files)) for name, files in revisions.items()}


def _settled(files: Mapping[Path, str]) -> dict[Path, str]:
    """The files with what their pieces are known by, or with their SHA-256 where several have the same pieces."""
    counted = Counter(files.values())
    shared = [path for path, identity in files.items() if counted[identity] > 1]
    with ThreadPoolExecutor(_HASHES_AT_ONCE) as pool:
        hashed = zip(shared, pool.map(fsops.sha256_file, shared), strict=True)
        return {**files, **{path: f"sha256:{sha256}" for path, sha256 in hashed}}


def checkpoints_in(folder: Path) -> list[str]:
    """The names of a run's or a release's checkpoints."""
    place = folder / "checkpoints"
    if not place.is_dir():
        return []
    return sorted(path.name for path in place.iterdir() if STEP_FOLDER.fullmatch(path.name) and path.is_dir())


def _tree(folder: Path) -> list[str]:
    """The files below a folder that mean anything, by paths relative to it. Links are not followed. Raises
    ReleaseError.
    """
    found: list[str] = []
    seen, places = 0, [folder]
    try:
        while places:
            for path in sorted(places.pop().iterdir()):
                if (seen := seen + 1) > MAX_FILES:
                    raise ReleaseError(f"{folder}: holds more than {MAX_FILES:,} files: name one series' folder")
                name = path.relative_to(folder).as_posix()
                if path.is_dir() and not path.is_symlink():
                    if path.name not in _SKIPPED and name.count("/") < 2 * MAX_DEPTH:
                        places.append(path)
                elif is_wanted(name):
                    found.append(name)
    except OSError as error:
        raise ReleaseError(f"{error.filename or folder}: {file_problem(error)}: check its permissions") from error
    return sorted(found)


def _by_pieces(path: Path) -> str:
    """A file's size, and a hash of pieces spread over it."""
    with open_plain(path) as file:
        size = file.seek(0, 2)
        found = hashlib.sha256()
        for number in range(_PIECES):
            file.seek(max(0, size - _PIECE_BYTES) * number // (_PIECES - 1))
            found.update(file.read(_PIECE_BYTES))
    return f"pieces:{size}:{found.hexdigest()}"


def _content(path: Path) -> str:
    return f"sha256:{hashlib.sha256(read_plain(path, 'card')).hexdigest()}"


def _read(path: Path, start: int, stop: int) -> bytes:
    try:
        with open_plain(path, buffering=0) as file:
            file.seek(start)
            data = bytearray()
            while len(data) < stop - start and (block := file.read(stop - start - len(data))):
                data += block
            return bytes(data)
    except FileNotFoundError:
        raise VanishedError(f"{path}: is not there any more") from None


def _recorded(folder: Path) -> dict[str, dict[str, float]]:
    """Checkpoint -> what a loss is of -> that loss, as `weftrain eval` recorded them in a folder."""
    place = folder / "analyses" / "evaluations"
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for path in sorted(place.glob("*.json"))[:_MAX_RECORDS] if place.is_dir() else ():
        try:
            record = parse_json(read_plain(path, "record"))
        except (OSError, ValueError):
            continue  # no record of ours
        if isinstance(record, dict) and record.get("metric") == "loss" and isinstance(record.get("value"), float):
            found[str(record.get("checkpoint"))][str(record.get("task"))[:100]] = record["value"]
    return found
