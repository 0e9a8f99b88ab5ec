"""The tensor files of a checkpoint: hashed while they are written, and verified before anything read is used.

Writing: `split` divides tensors among files, `write_file` writes one of them. Reading: `read_structure` compares
manifest and files, `read_verified` also hashes every byte, and `read_tensor_verified` reads one tensor.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import torch

from weftrain.core.errors import CheckpointError, UnreadableError, file_problem
from weftrain.core.formats import fsops
from weftrain.core.formats.checkpoint_manifest import MANIFEST, read_checkpoint_manifest
from weftrain.core.formats.distant_files import token_of
from weftrain.core.formats.lazy_tensors import Progress
from weftrain.core.formats.one_pass import ByteRange, Scanned
from weftrain.core.formats.plain_file import UnreadableFileError
from weftrain.core.formats.tensor_file import (
    DTYPE_NAMES,
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
HASH_BACKLOG_BYTES = 512 << 20  # written and not yet hashed: bounds the memory of a lazy state
HEADER = ""  # the name of the part that is a file's header; no tensor has it
REMEDY = "move the folder away, or restore it from a copy"
_HASH_THREADS = max(2, min(8, os.cpu_count() or 1))
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)  # missing, or not a file

Spec = tuple[str, tuple[int, ...]]  # dtype as safetensors names it, shape
Part = Mapping[str, Spec]  # the tensors of one file
Layouts = dict[str, dict[str, TensorLayout]]  # file -> tensor -> its place
WrittenFile = tuple[dict[str, Any], dict[str, dict[str, Any]]]  # a file's entry in the manifest, and its tensors'
Written = Mapping[str, WrittenFile]  # by file name


@runtime_checkable
class WritesItself(Protocol):
    """Tensors that are spread over several processes, each of which writes its share of a checkpoint's files."""

    @property
    def writers(self) -> int: ...

    def begin_files(self, folder: Path, parts: Mapping[str, Part]) -> Callable[[], Written]:
        """Snapshot the tensors, and return a function that waits until all are written. parts: file name -> tensors."""
        ...


# Writing


def spec_of(name: str, tensor: torch.Tensor) -> Spec:
    """dtype and shape of a tensor to store. Raises ValueError for a name or dtype that cannot be stored."""
    check_name(name)
    if tensor.dtype not in DTYPE_NAMES:
        raise ValueError(f"dtype {tensor.dtype} cannot be stored")
    return DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)


def split(specs: Mapping[str, Spec], writers: int) -> dict[str, Part]:
    """Divide tensors among about `writers` files or more, each of at most MAX_FILE_BYTES. Deterministic."""
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


def write_file(path: Path, part: Part, tensors: Mapping[str, torch.Tensor]) -> WrittenFile:
    """Write and sync a tensor file. Returns its and its tensors' manifest entries. Raises CheckpointError, OSError."""
    with fsops.FileWriter(path) as file, _Hashes() as hashes:
        header = pack_header(part)
        file.write(header)
        for name, spec in part.items():
            tensor = tensors[name]
            if (DTYPE_NAMES.get(tensor.dtype), tuple(tensor.shape)) != spec:
                raise CheckpointError(
                    f"{path.parent}: tensor '{name}' is {tensor.dtype} {list(tensor.shape)}, announced as {spec[0]} "
                    f"{list(spec[1])}"
                )
            hashes.add(name, memory := tensor_memory(tensor))
            file.write(memory)
        file.sync()  # the hashes are still being computed meanwhile
        of_tensors = hashes.results()
    entries = {
        name: {"dtype": dtype, "shape": list(shape), "file": path.name, "sha256": of_tensors[name]}
        for name, (dtype, shape) in part.items()
    }
    return {"size": path.stat().st_size, "header_sha256": hashlib.sha256(header).hexdigest()}, entries


class _Hashes:
    """SHA-256 of each tensor of a file, computed on threads while the caller writes the same, cached bytes."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_HASH_THREADS)
        self._tensors: dict[str, Future[str]] = {}
        self._backlog: deque[tuple[int, Future[str]]] = deque()
        self._backlog_bytes = 0

    def add(self, name: str, memory: memoryview) -> None:
        """Begin to hash `memory`, waiting first while more than HASH_BACKLOG_BYTES are unhashed."""
        while self._backlog and self._backlog_bytes + len(memory) > HASH_BACKLOG_BYTES:
            size, under_way = self._backlog.popleft()
            under_way.result()
            self._backlog_bytes -= size
        self._tensors[name] = self._threads.submit(lambda: hashlib.sha256(memory).hexdigest())
        self._backlog.append((len(memory), self._tensors[name]))
        self._backlog_bytes += len(memory)

    def results(self) -> dict[str, str]:
        return {name: job.result() for name, job in self._tensors.items()}

    def __enter__(self) -> _Hashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)


# Reading


def read_structure(path: Path) -> tuple[dict[str, Any], Layouts]:
    """Manifest and file layouts of a checkpoint folder, checked against each other and the folder; tensor bytes are not
    hashed yet. Raises CheckpointError.
    """
    with _file_errors(path, MANIFEST):
        manifest = read_checkpoint_manifest(path)
    present = {entry.name for entry in entries_of(path)} - {MANIFEST}
    for name in sorted(present ^ set(manifest["files"])):
        what = "is missing" if name in manifest["files"] else "does not belong there"
        raise CheckpointError(f"{path}: {name}: {what}: {REMEDY}")
    layouts: Layouts = {}
    for name, entry in manifest["files"].items():
        with _file_errors(path, name), open_regular(path / name) as file:
            if (size := (path / name).stat().st_size) != entry["size"]:
                raise ValueError(f"holds {size} bytes, the manifest says {entry['size']}")
            layouts[name] = read_header(file)
            claimed = {key: item for key, item in manifest["tensors"].items() if item["file"] == name}
            _compare_layout(layouts[name], claimed)
    for name, entry in manifest["tensors"].items():
        if entry["file"] not in layouts:
            raise CheckpointError(f"{path}: {MANIFEST}: tensor '{name[:80]}' lies in no file of the manifest: {REMEDY}")
    return manifest, layouts


def read_verified(path: Path, progress: Progress = lambda done, total: None) -> tuple[dict[str, Any], Layouts]:
    """`read_structure`, and every byte hashed. progress: is given the tensors' bytes hashed so far, and all of them.

    Raises CheckpointError.
    """
    manifest, layouts = read_structure(path)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:  # hashlib releases the GIL
        jobs = {pool.submit(_damage_outside_tensors, path, name, entry): 0 for name, entry in manifest["files"].items()}
        for name, layout in layouts.items():
            for share in _shares(layout, _HASH_THREADS):
                size = sum(place.end - place.begin for place in share.values())
                jobs[pool.submit(_damaged_tensors, path, name, share, manifest["tensors"])] = size
        done = 0
        for job in as_completed(jobs):
            done += jobs[job]
            progress(done, sum(jobs.values()))
    damage = [line for job in jobs if (line := job.result())]
    if damage:
        raise CheckpointError(f"{path}: {'; '.join(damage)}: {REMEDY}")
    return manifest, layouts


def ranges_of(
    manifest: Mapping[str, Any], name: str, layout: Mapping[str, TensorLayout], rounded: Container[str]
) -> list[ByteRange]:
    """The header and the tensors of a file of a checkpoint, to be hashed in one pass over it (one_pass.scan).

    rounded: names of fp32 tensors that are hashed in bfloat16 as well.
    """
    ordered = sorted(layout.items(), key=lambda item: (item[1].begin, item[1].end))
    header_end = ordered[0][1].begin if ordered else manifest["files"][name]["size"]
    tensors = (
        ByteRange(key, place.begin, place.end, key in rounded and place.dtype == "F32") for key, place in ordered
    )
    return [ByteRange(HEADER, 0, header_end), *tensors]


def check_scanned(path: Path, name: str, manifest: Mapping[str, Any], scanned: Scanned) -> None:
    """Whether a file that was read once is the manifest's, header and tensors. Raises CheckpointError."""
    entry, tensors = manifest["files"][name], manifest["tensors"]
    header = scanned.sha256 == entry["sha256"] if "sha256" in entry else scanned.parts[HEADER] == entry["header_sha256"]
    damaged = [key for key, found in scanned.parts.items() if key != HEADER and found != tensors[key]["sha256"]]
    if damaged:
        raise CheckpointError(f"{path}: {name}: damaged tensor {_listed(damaged)}: {REMEDY}")
    if not header:
        raise CheckpointError(f"{path}: {name} has changed since it was written (SHA-256 differs): {REMEDY}")


def read_distant(path: Path) -> tuple[dict[str, Any], Layouts] | None:
    """`read_structure` of a checkpoint whose files lie elsewhere (core/formats/distant_files.py), with their headers
    hashed: its tensors are hashed as they are read, so that only what is used is fetched. None for one that lies here.

    Raises CheckpointError.
    """
    with _file_errors(path, MANIFEST):
        if not any(token_of(entry) is not None for entry in entries_of(path) if entry.name != MANIFEST):
            return None
    manifest, layouts = read_structure(path)
    for name, entry in manifest["files"].items():
        if "sha256" not in entry and (damage := _damage_outside_tensors(path, name, entry)):
            raise CheckpointError(f"{path}: {damage}: {REMEDY}")
    return manifest, layouts


def read_tensor_verified(path: Path, name: str, claimed: Mapping[str, Any], layouts: Layouts) -> torch.Tensor:
    """A tensor, read into new memory and hashed. claimed: its manifest entry. Raises CheckpointError."""
    file_name = claimed["file"]
    with _file_errors(path, file_name), open_regular(path / file_name) as file:
        tensor = read_tensor(file, layouts[file_name][name])
        if hashlib.sha256(tensor_memory(tensor)).hexdigest() != claimed["sha256"]:
            raise ValueError(f"tensor '{name}' has changed since it was written (SHA-256 differs)")
    return tensor


def entries_of(folder: Path) -> list[Path]:
    """The entries of a folder; none if it does not exist. Raises UnreadableError."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnreadableError(
            f"{folder}: cannot be listed: {file_problem(error)}: check the folder and its permissions"
        ) from error


@contextlib.contextmanager
def _file_errors(path: Path, name: str) -> Iterator[None]:
    """Raise an OSError or ValueError of the block as a CheckpointError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno in _DAMAGE or isinstance(error, UnreadableFileError):
            raise CheckpointError(f"{path}: {name}: {file_problem(error)}: {REMEDY}") from error
        raise UnreadableError(
            f"{path}: {name}: cannot be read: {file_problem(error)}: check the disk and its permissions, or "
            f"{REMEDY} to go on from an older one"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {name}: {error}: {REMEDY}") from error


def _compare_layout(layout: Mapping[str, TensorLayout], claimed: Mapping[str, dict[str, Any]]) -> None:
    for name in sorted(set(layout) ^ set(claimed)):
        raise ValueError(f"tensor '{name[:80]}' is {'missing' if name in claimed else 'not in the manifest'}")
    for name, place in layout.items():
        found, said = (place.dtype, list(place.shape)), (claimed[name]["dtype"], claimed[name]["shape"])
        if found != said:
            raise ValueError(f"tensor '{name}' is {found[0]} {found[1]}, the manifest says {said[0]} {said[1]}")


def _damage_outside_tensors(path: Path, name: str, entry: Mapping[str, Any]) -> str:
    """What is wrong with a file's header, which no tensor's hash covers; with version 1, with the whole file."""
    with _file_errors(path, name):
        if "sha256" in entry:
            found, wanted = fsops.sha256_file(path / name), entry["sha256"]
        else:
            with open_regular(path / name) as file:
                found, wanted = hashlib.sha256(header_bytes(file)).hexdigest(), entry["header_sha256"]
        return "" if found == wanted else f"{name} has changed since it was written (SHA-256 differs)"


def _damaged_tensors(
    path: Path, name: str, layout: Mapping[str, TensorLayout], claimed: Mapping[str, dict[str, Any]]
) -> str:
    with _file_errors(path, name), open_regular(path / name) as file:
        damaged = [key for key, place in layout.items() if _sha256_of(file, place) != claimed[key]["sha256"]]
    return f"{name}: damaged tensor {_listed(damaged)}" if damaged else ""


def _shares(layout: Mapping[str, TensorLayout], count: int) -> list[dict[str, TensorLayout]]:
    """A file's tensors in `count` shares of about equal size, the largest assigned first."""
    shares: list[dict[str, TensorLayout]] = [{} for _ in range(count)]
    sizes = [0] * count
    for name in sorted(layout, key=lambda name: layout[name].begin - layout[name].end):
        least = sizes.index(min(sizes))
        shares[least][name] = layout[name]
        sizes[least] += layout[name].end - layout[name].begin
    return shares


def _sha256_of(file: BinaryIO, place: TensorLayout) -> str:
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
