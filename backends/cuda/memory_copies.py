"""Copies of a run's state in the memory of its nodes, from which ranks go on after the loss of one without reading the
disk.

    FOLDER/weftrain-UID/RUN/HOST/step_00000040-part_00003/   copy.json, pieces.safetensors

Every `memory_copies_every_steps` each rank copies its part of the state, as it is sharded, and gives it to the rank
that has its place on the next node; both write it to a folder of a file system in memory, in a thread. So each part is
in the memory of two nodes. The two newest states are kept: the newer one may not be complete everywhere.

After a restart `find` has every rank verify what its node holds, and all choose the newest state of which every part is
whole, at a rank that holds it; `restore` then gives each rank its part. A copy names the segment of the run that made
it, so core/resume.py decides by the ledger whether the run goes on from it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weftrain.backends.cuda.copied_state import Claims, FoundState
from weftrain.backends.cuda.degrees import Degrees, ranks_per_node
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.world import World
from weftrain.core.backend import Job
from weftrain.core.errors import WeftrainError
from weftrain.core.formats import checkpoint_files, fsops
from weftrain.core.formats.canonical import canonical_json, parse_sealed, sealed, sha256_json
from weftrain.core.formats.plain_file import read_plain, real_path
from weftrain.core.formats.tensor_file import open_regular, read_header
from weftrain.core.model_config import ModelConfig
from weftrain.core.parameters import parameter_specs

FORMAT, VERSION = "weftrain memory copy", 1
_RECORD, _PIECES = "copy.json", "pieces.safetensors"
_NAME = re.compile(r"step_(\d{8})-part_(\d{5})")
_PIECE_ELEMENTS = 32 << 20  # of a part: each piece is hashed by itself


@dataclass(frozen=True)
class Spread:
    """How the parts of a state lie on nodes: `parts` different ones, of which a rank has part rank % parts."""

    ranks: int
    parts: int
    per_node: int

    @staticmethod
    def of(ranks: int, degrees: Degrees) -> Spread:
        return Spread(ranks, ranks // degrees.replicate, ranks_per_node(ranks))

    def node(self, rank: int) -> int:
        return rank // self.per_node

    def writes(self, rank: int) -> bool:
        """Whether no rank before it on its node has the same part."""
        return all(other % self.parts != rank % self.parts for other in range(self.node(rank) * self.per_node, rank))

    def gives(self, rank: int) -> bool:
        """Whether a rank's part lies on its node alone, so that the next node gets a copy."""
        holders = {self.node(other) for other in range(rank % self.parts, self.ranks, self.parts)}
        return len(holders) == 1 and self.ranks > self.per_node

    def after(self, rank: int) -> int:
        """The rank with the same place on the next node."""
        return (rank + self.per_node) % self.ranks

    def before(self, rank: int) -> int:
        return (rank - self.per_node) % self.ranks


def layout_of(model: ModelConfig, degrees: Degrees, parallel: str) -> str:
    """Hash of what two starts must have in common to hold the same parts."""
    shapes = {spec.name: list(spec.shape) for spec in parameter_specs(model)}
    return sha256_json({"shapes": shapes, "degrees": vars(degrees), "parallel": parallel})


def run_folder(options: CudaOptions, run: Path) -> Path:
    """Where all nodes keep the copies of the run in folder `run`."""
    return Path(options.memory_copies_folder) / f"weftrain-{os.getuid()}" / sha256_json(str(real_path(run)))[:16]


def is_own(folder: Path) -> bool:
    """Whether it and the two above are folders of this user: everybody may write to a file system in memory."""
    try:
        found = [os.lstat(path) for path in (folder.parent.parent, folder.parent, folder)]
    except OSError:
        return False
    return all(stat.S_ISDIR(one.st_mode) and one.st_uid == os.getuid() for one in found)


def _make_own(folder: Path) -> Path:
    """Make a folder for this user alone. Raises OSError for another's."""
    for path in (folder.parent.parent, folder.parent, folder):
        path.mkdir(mode=0o700, exist_ok=True)
    if not is_own(folder):
        raise PermissionError(1, "belongs to another user, or is no folder", str(folder))
    return folder


class MemoryCopies:
    """One rank's side of every copy of a run. held: what this rank holds of the state, in the same order everywhere."""

    def __init__(self, world: World, degrees: Degrees, options: CudaOptions, job: Job, held: Sequence[Tensor]) -> None:
        self._world, self._every = world, options.memory_copies_every_steps if world.size > 1 else 0
        self._spread = Spread.of(world.size, degrees)
        self._layout = layout_of(job.recipe.model, degrees, options.parallel)
        self._folder = run_folder(options, job.folder or Path()) / world.host
        self._held, self._segment = held, job.segment
        self._thread: threading.Thread | None = None
        self._flat: Tensor | None = None
        self._error, self._off = "", False
        self._newest = 0  # steps of the newest state that all ranks were given to write
        self.stall_ms: float | None = None  # of the last copy: how long the run waited

    def due(self, completed: int, last: int) -> bool:
        return self._every > 0 and completed % self._every == 0 and completed < last and not self._off

    def claims(self, step: int, updates: int, dataset_id: str, result: Mapping[str, Any]) -> Claims:
        """What rank 0 tells the others of a state. result: of its last step, JSON values."""
        return Claims(step, updates, self._segment, dataset_id, self._layout, self._spread.parts, result)

    def copy(self, claims: Claims) -> None:
        """Copy this rank's part, and get the other node's. A collective.

        A thread writes them, and is waited for at the next call. If that failed anywhere, no more copies are made, and
        rank 0 says why.
        """
        start = time.perf_counter()
        self._join()
        problems = [words for words in self._world.gathered(self._error) if words]
        if problems:
            self._off = True
            self._remove()
            if self._world.leads:
                tell([f"no more copies of the state are made in memory: {problems[0]}"])
            return
        self._remove(keep={self._newest, claims.step})
        own, spread, rank = self._flatten(), self._spread, self._world.rank
        writes = {rank % spread.parts: own} if spread.writes(rank) else {}
        with self._world.together("copy the state to another node's memory"):
            other = _swap(own, rank, spread)
        if other is not None:
            writes[spread.before(rank) % spread.parts] = other
        self._newest = claims.step
        self._thread = threading.Thread(target=partial(self._write, claims, writes), name="weftrain-memory-copy")
        self._thread.start()
        self.stall_ms = (time.perf_counter() - start) * 1e3

    def restore(self) -> tuple[int, int]:
        """Fill what this rank holds from world.copies. The state's completed steps and updates. A collective."""
        assert self._world.copies is not None
        restore(self._world, self._world.copies, self._spread, self._held)
        found, self._world.copies = self._world.copies.claims, None
        self._newest = found.step
        return found.step, found.optimizer_updates

    def close(self, complete: bool) -> None:
        """complete: the run needs no copies any more."""
        self._join()
        if complete and self._every:
            self._remove()

    def _flatten(self) -> Tensor:
        if self._flat is None:
            self._flat = torch.empty(sum(tensor.numel() for tensor in self._held))
        offset = 0
        for tensor in self._held:
            self._flat[offset : offset + tensor.numel()].copy_(tensor.detach().reshape(-1))
            offset += tensor.numel()
        return self._flat

    def _write(self, claims: Claims, parts: Mapping[int, Tensor]) -> None:
        try:
            folder = _make_own(self._folder)
            needed = sum(flat.nbytes for flat in parts.values())
            if (free := fsops.free_bytes(folder)) < needed + (64 << 20):
                raise OSError(28, f"{needed:,} bytes needed, {free:,} free", str(folder))
            for part, flat in parts.items():
                _write_copy(folder, part, claims, flat)
        except (OSError, WeftrainError) as error:
            where = getattr(error, "filename", None) or self._folder
            self._error = f"rank {self._world.rank} on {self._world.host}: {where}: {getattr(error, 'strerror', error)}"

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _remove(self, keep: Collection[int] = ()) -> None:
        """Remove what this node holds of the run, also half written, but for states of some numbers of steps. The first
        rank of a node does.
        """
        if self._world.rank % self._spread.per_node == 0 and is_own(self._folder):
            for path in self._folder.iterdir():
                if (match := _NAME.search(path.name)) is None or int(match[1]) not in keep:
                    shutil.rmtree(path, ignore_errors=True)


def _swap(own: Tensor, rank: int, spread: Spread) -> Tensor | None:
    """Send one's part to the next node if it needs it, and return the part that one gets. A collective."""
    after, before, requests = spread.after(rank), spread.before(rank), []
    sent, size = torch.tensor([own.numel()]), torch.zeros(1, dtype=torch.int64)
    other = None
    if spread.gives(rank):
        requests.append(dist.isend(sent, after))
    if spread.gives(before):
        dist.recv(size, before)
        other = torch.empty(int(size))
    if spread.gives(rank):
        requests.append(dist.isend(own, after))
    if other is not None:
        dist.recv(other, before)
    for request in requests:
        if request is not None:
            request.wait()
    return other


def _write_copy(folder: Path, part: int, claims: Claims, flat: Tensor) -> None:
    target = folder / f"step_{claims.step:08d}-part_{part:05d}"
    temporary = fsops.temporary_beside(target)
    temporary.mkdir(mode=0o700)
    pieces = {f"piece/{number:05d}": piece for number, piece in enumerate(flat.split(_PIECE_ELEMENTS))}
    specs = {name: checkpoint_files.spec_of(name, piece) for name, piece in pieces.items()}
    entry, tensors = checkpoint_files.write_file(temporary / _PIECES, specs, pieces)
    record = {"format": FORMAT, "version": VERSION, "part": part, **vars(claims), "file": entry, "tensors": tensors}
    (temporary / _RECORD).write_bytes(sealed(record))
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)


# Finding a state again


def find(world: World, folder: Path, layout: str) -> tuple[FoundState | None, list[str]]:
    """The newest complete state in the memory of the ranks' nodes, the same on every rank, and a line for each copy
    that cannot be used. A collective: every rank verifies its share of what its node holds.
    """
    own: list[dict[str, Any]] = []
    problems: list[str] = []
    mine = sorted((folder / world.host).iterdir()) if is_own(folder / world.host) else []
    mine, per_node = [path for path in mine if _NAME.fullmatch(path.name)], ranks_per_node(world.size)
    for path in mine[world.rank % per_node :: per_node]:
        try:
            record = _verified(path)
            own.append({key: record[key] for key in (*Claims.__dataclass_fields__, "part")})
        except (OSError, ValueError, KeyError, WeftrainError) as error:
            problems.append(f"{world.host}: {path.name}: {str(error).removeprefix(f'{path}: ')}")
    told = [json.loads(words) for words in world.gathered(canonical_json({"found": own, "bad": problems}).decode())]
    lines = [f"a copy of the state in memory is passed over: {line}" for one in told for line in one["bad"]]
    state, why = choose([one["found"] for one in told], layout, folder)
    return state, [*lines, *([why] if why else [])]


def choose(found: Sequence[Sequence[Mapping[str, Any]]], layout: str, where: Path) -> tuple[FoundState | None, str]:
    """The newest state of which every part is there, from what each rank found; or why there is none."""
    states: dict[str, dict[int, int]] = {}
    claims: dict[str, Claims] = {}
    for rank, copies in enumerate(found):
        for copy in copies:
            one = Claims(**{key: value for key, value in copy.items() if key != "part"})
            key = sha256_json(vars(one))
            claims[key] = one
            states.setdefault(key, {}).setdefault(copy["part"], rank)
    fitting = [key for key, one in claims.items() if one.layout == layout]
    if not fitting:
        return None, "the copies in memory are of ranks that divide the state otherwise" if claims else ""
    whole = [key for key in fitting if len(states[key]) == claims[key].parts]
    if not whole:
        newest = max(fitting, key=lambda key: claims[key].step)
        lost = sorted(set(range(claims[newest].parts)) - set(states[newest]))
        step = claims[newest].step
        return None, f"no state in memory is complete: of step {step} the parts {', '.join(map(str, lost))} are lost"
    best = max(whole, key=lambda key: claims[key].step)
    holders = tuple(states[best][part] for part in range(claims[best].parts))
    return FoundState(claims[best], holders, where), ""


def _verified(path: Path) -> dict[str, Any]:
    """A copy's record, after every byte was hashed. Raises OSError, ValueError, KeyError, CheckpointError."""
    record = parse_sealed(read_plain(path / _RECORD, "record"), FORMAT, {VERSION})
    with open_regular(path / _PIECES) as file:
        layouts = {_PIECES: read_header(file)}
    if set(layouts[_PIECES]) != set(record["tensors"]):
        raise ValueError("holds other pieces than its record names")
    for name, claimed in record["tensors"].items():
        checkpoint_files.read_tensor_verified(path, name, claimed, layouts)
    return record


def restore(world: World, found: FoundState, spread: Spread, tensors: Sequence[Tensor]) -> None:
    """Fill this rank's tensors with its part, from its node's memory or from the rank that holds it. A collective."""
    size = sum(tensor.numel() for tensor in tensors)
    path = f"step_{found.claims.step:08d}-part_{{:05d}}"
    flat: Tensor | None = None
    for rank in range(spread.ranks):
        part, holder = rank % spread.parts, found.holders[rank % spread.parts]
        place = found.where / world.host / path.format(part)
        if spread.node(holder) == spread.node(rank):
            if rank == world.rank:
                flat = _read(place, size)
            continue
        with world.together("get a part of the state from another node's memory"):
            if world.rank == holder:
                dist.send(_read(place, None), rank)
            elif world.rank == rank:
                flat = torch.empty(size)
                dist.recv(flat, holder)
    assert flat is not None
    for tensor, part_of in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part_of.view(tensor.shape))


def _read(path: Path, elements: int | None) -> Tensor:
    record = parse_sealed(read_plain(path / _RECORD, "record"), FORMAT, {VERSION})
    with open_regular(path / _PIECES) as file:
        layouts = {_PIECES: read_header(file)}
    pieces = [
        checkpoint_files.read_tensor_verified(path, name, record["tensors"][name], layouts)
        for name in sorted(record["tensors"])
    ]
    flat = torch.cat(pieces)
    if elements is not None and flat.numel() != elements:
        raise ValueError(f"{path}: holds {flat.numel()} numbers, and this rank's part has {elements}")
    return flat


def tell(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stderr.write(f"weftrain: {line}\n")
