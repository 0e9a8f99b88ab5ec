"""Checkpoints: `save`, `load`, `verify`, `newest`. Atomic, hashed, the same for every backend. core/run/retention.py
removes old ones.

A checkpoint is a folder `step_00000100`, named after the *completed* steps, of safetensors files and a manifest that is
written last. The manifest is canonical JSON and says what the state is, where it came from (parent, recipe, dataset,
position, fingerprint), and the SHA-256 of each tensor and of each file's header, which together cover every byte once.
`root`, the SHA-256 of the rest of the manifest, names the whole checkpoint. The same state saved twice has the same
root: nothing that differs between two equal runs (clock, host, path) goes into a manifest, except by the fingerprint.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weftrain.core.backend import State
from weftrain.core.errors import CheckpointError, UnreadableError
from weftrain.core.formats import checkpoint_files, fsops
from weftrain.core.formats.canonical import root_of, sealed, sha256_json
from weftrain.core.formats.checkpoint_files import Spec, WritesItself, Written
from weftrain.core.formats.checkpoint_manifest import FORMAT, MANIFEST, STEP_FOLDER, VERSION, folder_name
from weftrain.core.formats.lazy_tensors import LazyTensors, Progress, meta, meta_of
from weftrain.core.formats.tensor_file import DTYPES, tensor_bytes
from weftrain.core.lora import merged
from weftrain.core.tuning import LoraConfig

MANIFEST_ALLOWANCE_BYTES = 1 << 20  # manifest, headers and folder entries, in the estimate of what a save needs


@dataclass(frozen=True)
class CheckpointInfo:
    """A saved checkpoint. set_aside: where another or damaged checkpoint of the same step was moved."""

    path: Path
    step: int
    root: str
    size_bytes: int
    set_aside: Path | None = None


@dataclass(frozen=True)
class Saving:
    """A checkpoint being written. in_background: `finish` may run in a thread while the run trains on."""

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
            root, size = root_of(manifest), sum(entry["size"] for entry, _ in files.values())
            fsops.write_bytes(
                self.temporary / MANIFEST, sealed(manifest)
            )  # last: its rename syncs the folder's entries
            set_aside = _make_way(self.target, self.temporary, root)
            if self.temporary.exists():
                fsops.rename(self.temporary, self.target)
            return CheckpointInfo(self.target, self.claims["step"], root, size, set_aside)


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
    """Start to write `folder/step_NNNNNNNN`; it appears whole and durable, or not at all. All dicts hold JSON values.

    position: number of the next sample. sources: how far each source has been read, if known. parent: root of the
    checkpoint that this run continued from. `state.tensors` is read tensor by tensor, or writes itself if it is spread
    over several processes (`checkpoint_files.WritesItself`). A whole checkpoint of this step with the same root is
    kept; any other is moved to `*.superseded-N` or `*.damaged-N`. Raises CheckpointError if the disk is full or fails
    (older checkpoints are untouched), or if a name or dtype cannot be stored.
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
        if isinstance(state.tensors, WritesItself):
            parts = checkpoint_files.split(specs, state.tensors.writers)
            written = state.tensors.begin_files(temporary, parts)
            return Saving(target, temporary, claims, needed, written, in_background=True)
        parts = checkpoint_files.split(specs, 1)

    def write_files() -> Written:
        return {name: checkpoint_files.write_file(temporary / name, parts[name], state.tensors) for name in parts}

    return Saving(target, temporary, claims, needed, write_files, in_background=False)


def save(folder: Path, state: State, **claims: Any) -> CheckpointInfo:
    """Write a checkpoint and wait for it. Arguments and errors are those of `begin`."""
    return begin(folder, state, **claims).finish()


def load(
    path: Path, *, verified: bool = False, progress: Progress = lambda done, total: None
) -> tuple[State, dict[str, Any]]:
    """A checkpoint's state and manifest. Every byte is verified first, unless the caller has just done so (`verified`)
    or the checkpoint lies elsewhere (core/formats/distant_files.py).

    The state's tensors are lazy: each is read when it is asked for, as new memory, and its hash is checked once more,
    so that nothing altered in between reaches a model. Raises CheckpointError.
    """
    if verified:
        manifest, layouts = checkpoint_files.read_structure(path)
    else:
        manifest, layouts = checkpoint_files.read_distant(path) or checkpoint_files.read_verified(path, progress)
    claimed = manifest["tensors"]
    tensors = LazyTensors(
        {name: meta(entry["shape"], DTYPES[entry["dtype"]]) for name, entry in claimed.items()},
        lambda name: checkpoint_files.read_tensor_verified(path, name, claimed[name], layouts),
    )
    return State(manifest["step"], manifest["optimizer_updates"], tensors), manifest


def verify(path: Path, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Read every byte of a checkpoint and return its manifest. Raises CheckpointError naming file and remedy."""
    return checkpoint_files.read_verified(path, progress)[0]


def step_folders(folder: Path) -> dict[int, Path]:
    """The checkpoints of a `checkpoints` folder by step, whole or not. Raises UnreadableError."""
    entries = checkpoint_files.entries_of(folder)
    return {int(match[1]): path for path in entries if (match := STEP_FOLDER.fullmatch(path.name))}


def newest(
    folder: Path,
    report: Callable[[str], None],
    without: Set[Path] = frozenset(),
    progress: Progress = lambda done, total: None,
    structure_only: bool = False,
) -> Path | None:
    """The newest whole checkpoint in a `checkpoints` folder; None if there is none. Every byte of it is verified, or
    all but the tensors where it lies elsewhere: they are hashed when they are read.

    structure_only: its tensors are not read, for a run that goes on from another state that follows it. report: gets
    one line for each checkpoint passed over. Folders under temporary names, set aside, named otherwise, or in `without`
    do not count. Raises UnreadableError if the newest one cannot be read at all: it may be whole, and an older one in
    its place would silently lose what was trained since.
    """
    for _, path in sorted(step_folders(folder).items(), reverse=True):
        if path in without:
            continue
        try:
            if structure_only:
                checkpoint_files.read_structure(path)
            elif checkpoint_files.read_distant(path) is None:
                checkpoint_files.read_verified(path, progress)
        except UnreadableError:
            raise
        except CheckpointError as error:
            report(f"passed over a damaged checkpoint: {error}")
        else:
            return path
    return None


class Weights(LazyTensors):
    """The weights of a state by canonical name, without the optimizer's tensors.

    lora: of the recipe that trained them; its adapters are then added to the weights that they belong to.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], lora: LoraConfig | None = None) -> None:
        found = {
            name.removeprefix("weights/"): meta_of(tensors, name) for name in tensors if name.startswith("weights/")
        }
        model = merged(LazyTensors(found, lambda name: tensors[f"weights/{name}"]), lora)
        super().__init__({name: found[name] for name in model}, lambda name: model[name])


def _spec(target: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> Spec:
    try:
        return checkpoint_files.spec_of(name, meta_of(tensors, name))
    except ValueError as error:
        raise CheckpointError(f"{target}: tensor '{name[:80]}': {error}: rename or convert it before saving") from error


@contextlib.contextmanager
def _or_nothing(target: Path, temporary: Path, needed_bytes: int) -> Iterator[None]:
    """Around the writing of a checkpoint: what fails leaves nothing behind, and says why as a CheckpointError."""
    try:
        yield
    except (CheckpointError, OSError) as error:
        with contextlib.suppress(OSError):  # what cannot be removed now is removed when the run is next opened
            fsops.remove_tree(temporary)
        if isinstance(error, CheckpointError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(_no_space(target, needed_bytes, fsops.free_bytes(target.parent))) from error
        where = f" ({error.filename})" if error.filename else ""
        raise CheckpointError(
            f"{target}: cannot be written: {error.strerror}{where}; older checkpoints are untouched: check the disk "
            "and its permissions"
        ) from error


def _make_way(target: Path, temporary: Path, root: str) -> Path | None:
    """If `target` exists: remove the new copy if it is the same, else move the old one aside and return where to."""
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


def _no_space(target: Path, needed: int, free: int) -> str:
    return (
        f"{target}: the disk is full: {needed:,} bytes needed, {free:,} free; older checkpoints are untouched: make "
        "room, then resume"
    )
