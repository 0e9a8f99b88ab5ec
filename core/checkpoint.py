"""Checkpoints: atomic, hashed, backend-neutral. A folder `step_00000100` of safetensors files and a manifest, written
last.

The manifest is canonical JSON and says what the state is, where it came from (parent, recipe, dataset, position,
fingerprint) and the SHA-256 of each tensor's bytes and of each file's header, which together are all of a file: each
byte is hashed once. `root` is the SHA-256 of all the rest of the manifest, so one hash names the whole checkpoint. What
a reader would get wrong: the number in the name counts *completed* steps; and the same state saved twice has the same
root, so nothing that differs between two equal runs (no clock, no host, no path) goes into a manifest except through
the fingerprint.

Nothing here overwrites or deletes a checkpoint. Nothing is believed that was not hashed, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from weftrain.core.backend import State
from weftrain.core.errors import CheckpointError, UnreadableError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, sha256_json
from weftrain.core.formats.checkpoint_manifest import (
    FORMAT,
    MANIFEST,
    STEP_FOLDER,
    VERSION,
    folder_name,
    read_manifest,
    root_of,
)
from weftrain.core.formats.plain_file import UnreadableFileError
from weftrain.core.formats.tensor_file import (
    DTYPE_NAMES,
    DTYPES,
    TensorLayout,
    check_name,
    file_order,
    header_bytes,
    open_regular,
    pack_header,
    read_header,
    read_tensor,
    tensor_bytes,
    tensor_memory,
)

MAX_FILE_BYTES = 4 << 30  # of tensors in one file; a single larger tensor has a file of its own
MANIFEST_ALLOWANCE_BYTES = 1 << 20  # manifest, headers and folder entries, in the estimate of what a save needs
HASH_BACKLOG_BYTES = 512 << 20  # written and not yet hashed: bounds what a lazy state keeps in memory
_HASH_THREADS = max(2, min(8, os.cpu_count() or 1))
REMEDY = "move the folder away, or restore it from a copy"

_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)  # the file is not there, or is no file

Spec = tuple[str, tuple[int, ...]]  # dtype as safetensors names it, shape
Layouts = dict[str, dict[str, TensorLayout]]  # file -> tensor -> its place
Part = Mapping[str, Spec]  # the tensors of one file
# file -> its entry and its tensors' in the manifest
Written = Mapping[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]]


@dataclass(frozen=True)
class CheckpointInfo:
    """A saved checkpoint. set_aside: where another or a damaged checkpoint of the same step was moved, which is worth a
    line.
    """

    path: Path
    step: int
    root: str
    size_bytes: int
    set_aside: Path | None = None


@dataclass(frozen=True)
class Saving:
    """A checkpoint on its way. in_background: `finish` may run in a thread while the run that gave the state trains
    on.
    """

    target: Path
    temporary: Path
    claims: dict[str, Any]
    needed_bytes: int
    written: Callable[[], Written]
    in_background: bool

    def finish(self) -> CheckpointInfo:
        """Wait until everything is written, then let the checkpoint appear. Raises CheckpointError."""
        with _or_nothing(self.target, self.temporary, self.needed_bytes):
            files = self.written()
            manifest = self.claims | {
                "files": {name: entry for name, (entry, _) in files.items()},
                "tensors": {tensor: entry for _, tensors in files.values() for tensor, entry in tensors.items()},
            }
            root = root_of(manifest)
            # Last, and its rename syncs the folder's entries.
            fsops.write_bytes(self.temporary / MANIFEST, canonical_json(manifest | {"root": root}) + b"\n")
            set_aside = _clear_way(self.target, self.temporary, root)
            if self.temporary.exists():
                fsops.rename(self.temporary, self.target)
            return CheckpointInfo(
                self.target, self.claims["step"], root, sum(entry["size"] for entry, _ in files.values()), set_aside
            )


def begin(
    folder: Path,
    state: State,
    *,
    recipe: dict[str, Any],
    dataset_id: str,
    fingerprint: dict[str, Any],
    tokens: int,
    position: int,
    parent: str | None,
    kernels: dict[str, Any],
    sources: dict[str, Any] | None = None,
) -> Saving:
    """Start to write `folder/step_NNNNNNNN`; it appears whole and durable, or not at all. All dicts hold JSON values
    only.

    position: number of the next sample. sources: how far each source has been read, where that is known. parent: root
    of the checkpoint that this run continued from. A mapping `state.tensors` that is lazy is read tensor by tensor; its
    method `meta(name)`, if it has one, gives a tensor's dtype and shape without reading it. One that lies in several
    processes writes itself: `writers` of them, and `begin_files(folder, parts)` copies what is to be written and
    returns what waits for it. A whole checkpoint of this step with the same root is kept as it is; any other is moved
    to `*.superseded-N` or `*.damaged-N`. Raises CheckpointError where the disk is full or fails (older checkpoints are
    untouched) or a name or dtype cannot be stored.
    """
    target = folder / folder_name(state.step)
    specs = {name: _spec(target, name, state.tensors) for name in state.tensors}
    needed = sum(tensor_bytes(*spec) for spec in specs.values()) + MANIFEST_ALLOWANCE_BYTES
    claims = {
        "format": FORMAT,
        "version": VERSION,
        "step": state.step,
        "optimizer_updates": state.optimizer_updates,
        "position": position,
        "tokens": tokens,
        "parent": parent,
        "recipe": recipe,
        "recipe_sha256": sha256_json(recipe),
        "dataset_id": dataset_id,
        "fingerprint": fingerprint,
        "kernels": kernels,
        **({} if sources is None else {"sources": sources}),
    }
    temporary = fsops.temporary_beside(target)
    with _or_nothing(target, temporary, needed):
        fsops.make_dirs(folder)
        if (free := fsops.free_bytes(folder)) < needed:
            raise CheckpointError(_no_space(target, needed, free))
        fsops.make_dirs(temporary)
        parts = _split(specs, getattr(state.tensors, "writers", 1))
        begin_files = getattr(state.tensors, "begin_files", None)
        written = (
            partial(_write_files, temporary, parts, state.tensors)
            if begin_files is None
            else begin_files(temporary, parts)
        )
    return Saving(target, temporary, claims, needed, written, begin_files is not None)


def save(folder: Path, state: State, **claims: Any) -> CheckpointInfo:
    """Write a checkpoint, and wait for it: see `begin`, whose arguments these are. Raises CheckpointError."""
    return begin(folder, state, **claims).finish()


def load(path: Path, *, verified: bool = False) -> tuple[State, dict[str, Any]]:
    """A checkpoint's state and manifest. Every byte is verified first, unless the caller has just done so
    (`verified=True`).

    The state's tensors are lazy: each is read when it is asked for, as new memory, and its hash is checked once more,
    so that nothing altered in between reaches a model. Raises CheckpointError.
    """
    manifest, layouts = _read_structure(path) if verified else _read_all(path)
    return State(
        manifest["step"], manifest["optimizer_updates"], _Tensors(path, manifest["tensors"], layouts)
    ), manifest


class Plane(Mapping[str, torch.Tensor]):
    """The tensors of one plane of a state, by their full names, each read when it is asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], plane: str) -> None:
        self._tensors, self._names = tensors, [name for name in tensors if name.startswith(f"{plane}/")]

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Weights(Mapping[str, torch.Tensor]):
    """The weights of a state by canonical name, each read when it is asked for: the state's optimizer tensors are left
    out.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[f"weights/{name}"]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix("weights/") for name in self._tensors if name.startswith("weights/"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def verify(path: Path) -> dict[str, Any]:
    """Read every byte of a checkpoint and return its manifest. Raises CheckpointError naming file, tensor and
    remedy.
    """
    return _read_all(path)[0]


def step_folders(folder: Path) -> dict[int, Path]:
    """The checkpoints of a `checkpoints` folder by step, whole or not. Raises UnreadableError."""
    return {int(match[1]): path for path in _entries(folder) if (match := STEP_FOLDER.fullmatch(path.name))}


def newest(folder: Path, report: Callable[[str], None], without: Set[Path] = frozenset()) -> Path | None:
    """The newest whole checkpoint in a `checkpoints` folder, every byte of it verified; None where there is none.

    `report` gets one line for each checkpoint passed over. Folders under temporary names, set aside, named otherwise,
    or in `without` do not count. Raises UnreadableError where the newest one cannot be read at all: then it is unknown
    whether it is damaged.
    """
    for _, path in sorted(step_folders(folder).items(), reverse=True):
        if path in without:
            continue
        try:
            verify(path)
        except UnreadableError:
            raise  # it may be whole: an older one in its place would silently lose what was trained since
        except CheckpointError as error:
            report(f"passed over a damaged checkpoint: {error}")
        else:
            return path
    return None


# Writing


def _spec(target: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> Spec:
    meta = getattr(tensors, "meta", None)
    tensor = tensors[name] if meta is None else meta(name)
    try:
        check_name(name)
        return DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
    except (ValueError, KeyError) as error:
        reason = f"dtype {tensor.dtype} cannot be stored" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{target}: tensor '{name[:80]}': {reason}: rename or convert it before saving"
        ) from error


def _split(specs: Mapping[str, Spec], writers: int) -> dict[str, Part]:
    """Deal tensors out to files of at most MAX_FILE_BYTES, about as many as there are writers, or a multiple.

    In an order that depends on names, dtypes and shapes alone.
    """
    limit = min(MAX_FILE_BYTES, -(-sum(tensor_bytes(*spec) for spec in specs.values()) // writers))
    files: list[dict[str, Spec]] = [{}]
    filled = 0
    for name in file_order(specs):
        size = tensor_bytes(*specs[name])
        if files[-1] and filled + size > limit:
            files.append({})
            filled = 0
        files[-1][name] = specs[name]
        filled += size
    return {f"state-{index:05d}-of-{len(files):05d}.safetensors": part for index, part in enumerate(files, 1)}


def _write_files(folder: Path, parts: Mapping[str, Part], tensors: Mapping[str, torch.Tensor]) -> Written:
    return {name: write_file(folder / name, part, tensors) for name, part in parts.items()}


def write_file(
    path: Path, part: Part, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Write and sync one tensor file; its entry and its tensors' in the manifest. Raises CheckpointError, OSError."""
    with fsops.FileWriter(path) as file, _Hashes() as hashes:
        header = pack_header(part)
        file.write(header)
        for tensor_name, (dtype, shape) in part.items():
            memory = tensor_memory(_as_announced(path.parent, tensor_name, tensors[tensor_name], (dtype, shape)))
            hashes.tensor(tensor_name, memory, file.write)
        file.sync()  # the hashes are still being computed meanwhile
        of_tensors = hashes.results()
    entries = {
        name: {"dtype": dtype, "shape": list(shape), "file": path.name, "sha256": of_tensors[name]}
        for name, (dtype, shape) in part.items()
    }
    return {"size": path.stat().st_size, "header_sha256": hashlib.sha256(header).hexdigest()}, entries


@contextlib.contextmanager
def _or_nothing(target: Path, temporary: Path, needed_bytes: int) -> Iterator[None]:
    """Around the writing of a checkpoint: what fails leaves nothing behind, and says why as a CheckpointError."""
    try:
        yield
    except CheckpointError:
        _remove_if_possible(temporary)
        raise
    except OSError as error:
        _remove_if_possible(temporary)
        raise CheckpointError(_why_not(target, needed_bytes, error)) from error


def _as_announced(folder: Path, name: str, tensor: torch.Tensor, spec: Spec) -> torch.Tensor:
    if (DTYPE_NAMES.get(tensor.dtype), tuple(tensor.shape)) != spec:
        raise CheckpointError(
            f"{folder}: tensor '{name}' is {tensor.dtype} {list(tensor.shape)}, announced as {spec[0]} {list(spec[1])}"
        )
    return tensor


class _Hashes:
    """SHA-256 of each tensor of a file, on threads, while the caller writes: each byte is hashed once, and touched
    while it is warm.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_HASH_THREADS)
        self._tensors: dict[str, Future[str]] = {}
        self._backlog: deque[tuple[int, Future[str]]] = deque()
        self._backlog_bytes = 0

    def tensor(self, name: str, memory: memoryview, write: Callable[[memoryview], None]) -> None:
        while self._backlog and self._backlog_bytes + len(memory) > HASH_BACKLOG_BYTES:
            size, under_way = self._backlog.popleft()
            under_way.result()
            self._backlog_bytes -= size
        self._tensors[name] = self._threads.submit(lambda: hashlib.sha256(memory).hexdigest())
        self._backlog.append((len(memory), self._tensors[name]))
        self._backlog_bytes += len(memory)
        write(memory)

    def results(self) -> dict[str, str]:
        return {name: job.result() for name, job in self._tensors.items()}

    def __enter__(self) -> _Hashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)


def _clear_way(target: Path, temporary: Path, root: str) -> Path | None:
    """Where `target` exists: drop the new copy if it is the same, else move the old one aside. Where the old one
    went.
    """
    if not target.exists() and not target.is_symlink():
        return None
    try:
        kind = "superseded"
        if verify(target)["root"] == root:
            fsops.remove_tree(temporary)
            return None
    except CheckpointError:
        kind = "damaged"
    number = 1
    while (aside := target.with_name(f"{target.name}.{kind}-{number}")).exists():
        number += 1
    fsops.rename(target, aside)
    return aside


def _remove_if_possible(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # what cannot be removed now is removed when the run is next opened
        fsops.remove_tree(temporary)


def _why_not(target: Path, needed: int, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _no_space(target, needed, fsops.free_bytes(target.parent))
    where = f" ({error.filename})" if error.filename else ""
    return (
        f"{target}: cannot be written: {error.strerror}{where}; older checkpoints are untouched: check the disk and "
        "its permissions"
    )


def _no_space(target: Path, needed: int, free: int) -> str:
    return (
        f"{target}: the disk is full: {needed:,} bytes needed, {free:,} free; older checkpoints are untouched: make "
        "room, then resume"
    )


# Reading


def _entries(folder: Path) -> list[Path]:
    try:
        return list(Path(folder).iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnreadableError(
            f"{folder}: cannot be listed: {error.strerror}: check the folder and its permissions"
        ) from error


@contextlib.contextmanager
def _blamed(path: Path, name: str) -> Iterator[None]:
    """Turn whatever is wrong with one file into a CheckpointError that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in _DAMAGE or isinstance(error, UnreadableFileError):
            raise CheckpointError(f"{path}: {name}: {error.strerror or error}: {REMEDY}") from error
        raise UnreadableError(
            f"{path}: {name}: cannot be read: {error.strerror or error}: check the disk and its permissions, or "
            f"{REMEDY} to go on from an "
            "older one"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {name}: {error}: {REMEDY}") from error


def _read_structure(path: Path) -> tuple[dict[str, Any], Layouts]:
    """Manifest and file layouts, all their claims checked against each other and the folder; tensor bytes not yet
    hashed.
    """
    with _blamed(path, MANIFEST):
        manifest = read_manifest(path)
    present = {entry.name for entry in _entries(path)} - {MANIFEST}
    for name in sorted(present ^ set(manifest["files"])):
        what = "is missing" if name in manifest["files"] else "does not belong there"
        raise CheckpointError(f"{path}: {name}: {what}: {REMEDY}")
    layouts: Layouts = {}
    for name, entry in manifest["files"].items():
        with _blamed(path, name), open_regular(path / name) as file:
            if (size := (path / name).stat().st_size) != entry["size"]:
                raise ValueError(f"holds {size} bytes, the manifest says {entry['size']}")
            layouts[name] = read_header(file)
            _compare_layout(
                layouts[name], {key: item for key, item in manifest["tensors"].items() if item["file"] == name}
            )
    for name, entry in manifest["tensors"].items():
        if entry["file"] not in layouts:
            raise CheckpointError(f"{path}: {MANIFEST}: tensor '{name[:80]}' lies in no file of the manifest: {REMEDY}")
    return manifest, layouts


def _read_all(path: Path) -> tuple[dict[str, Any], Layouts]:
    """What _read_structure gives, after every file and every tensor was hashed."""
    manifest, layouts = _read_structure(path)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:  # hashlib releases the GIL
        jobs = [pool.submit(_verify_head, path, name, entry) for name, entry in manifest["files"].items()]
        jobs += [
            pool.submit(_verify_tensors, path, name, share, manifest["tensors"])
            for name, layout in layouts.items()
            for share in _shares(layout, _HASH_THREADS)
        ]
    damage = [line for job in jobs if (line := job.result())]
    if damage:
        raise CheckpointError(f"{path}: {'; '.join(damage)}: {REMEDY}")
    return manifest, layouts


def _compare_layout(layout: Mapping[str, TensorLayout], claimed: Mapping[str, dict[str, Any]]) -> None:
    for name in sorted(set(layout) ^ set(claimed)):
        raise ValueError(f"tensor '{name[:80]}' is {'missing' if name in claimed else 'not in the manifest'}")
    for name, place in layout.items():
        found, said = (place.dtype, list(place.shape)), (claimed[name]["dtype"], claimed[name]["shape"])
        if found != said:
            raise ValueError(f"tensor '{name}' is {found[0]} {found[1]}, the manifest says {said[0]} {said[1]}")


def _verify_head(path: Path, name: str, entry: Mapping[str, Any]) -> str:
    """What of a file no tensor's hash covers: its header. A manifest of version 1 has the hash of the whole file
    instead.
    """
    with _blamed(path, name):
        if "sha256" in entry:
            found, wanted = fsops.sha256_file(path / name), entry["sha256"]
        else:
            with open_regular(path / name) as file:
                found, wanted = hashlib.sha256(header_bytes(file)).hexdigest(), entry["header_sha256"]
        return "" if found == wanted else f"{name} has changed since it was written (SHA-256 differs)"


def _shares(layout: Mapping[str, TensorLayout], count: int) -> list[dict[str, TensorLayout]]:
    """A file's tensors in `count` shares of about equal size, largest dealt first."""
    shares: list[dict[str, TensorLayout]] = [{} for _ in range(count)]
    sizes = [0] * count
    for name in sorted(layout, key=lambda name: layout[name].begin - layout[name].end):
        least = sizes.index(min(sizes))
        shares[least][name] = layout[name]
        sizes[least] += layout[name].end - layout[name].begin
    return shares


def _verify_tensors(
    path: Path, name: str, layout: Mapping[str, TensorLayout], claimed: Mapping[str, dict[str, Any]]
) -> str:
    with _blamed(path, name), open_regular(path / name) as file:
        damaged = [key for key, place in layout.items() if _sha256_part(file, place) != claimed[key]["sha256"]]
    return f"{name}: damaged tensor {_listed(damaged)}" if damaged else ""


def _sha256_part(file: Any, place: TensorLayout) -> str:
    digest = hashlib.sha256()
    file.seek(place.begin)
    left = place.end - place.begin
    while left and (block := file.read(min(left, 1 << 22))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()


def _listed(names: Iterable[str]) -> str:
    first, *rest = [f"'{name}'" for name in names]
    return first if not rest else f"{first} and {len(rest)} more"


class _Tensors(Mapping[str, torch.Tensor]):
    """A checkpoint's tensors by name, in sorted order; each access reads and hashes one."""

    def __init__(self, path: Path, claimed: dict[str, Any], layouts: Layouts) -> None:
        self._path = path
        self._claimed = claimed
        self._layouts = layouts

    def __getitem__(self, name: str) -> torch.Tensor:
        file_name = self._claimed[name]["file"]
        with _blamed(self._path, file_name), open_regular(self._path / file_name) as file:
            tensor = read_tensor(file, self._layouts[file_name][name])
            if hashlib.sha256(tensor_memory(tensor)).hexdigest() != self._claimed[name]["sha256"]:
                raise ValueError(f"tensor '{name}' has changed since it was written (SHA-256 differs)")
        return tensor

    def meta(self, name: str) -> torch.Tensor:
        """A tensor of the same dtype and shape without data."""
        return torch.empty(self._claimed[name]["shape"], dtype=DTYPES[self._claimed[name]["dtype"]], device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self._claimed)

    def __len__(self) -> int:
        return len(self._claimed)
