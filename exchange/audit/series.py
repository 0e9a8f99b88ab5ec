"""What an audit reads of a series: its revisions, their lists of files with hashes, and parts of those files."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weftrain.core.errors import RemoteError
from weftrain.core.formats.canonical import parse_json
from weftrain.exchange.audit.names import places_of

CONFIG = "config.json"
STATE = "trainer_state.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_DEPTH = 3  # of a revision's folder below the series'
_OPTIMIZER = re.compile(r"(^|/)(optimizer[^/]*\.(pt|bin|safetensors)|[^/]*optim[^/]*\.(pt|distcp)|exp_avg[^/]*)$", re.I)
_DATA_ORDER = re.compile(
    r"(^|/)([^/]*(data|sample|batch)[_-]?order[^/]*|[^/]*(shuffle|sample|doc)[_-]idx[^/]*|global_indices[^/]*"
    r"|[^/]*dataloader[^/]*|[^/]*batch_viewer[^/]*)$",
    re.I,
)
_OTHER_STATE = re.compile(r"(optim|scheduler|training_args|rng_state|trainer|dataloader|random_states)", re.I)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class VanishedError(RemoteError):
    """A revision or a file of it that is not there any more."""


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file of a revision. identity: equal for equal bytes, as `sha256:..` or `git:..`; "" where it is not known."""

    path: str
    size: int
    identity: str


@dataclass(frozen=True, slots=True)
class Revision:
    """One revision by its list of files. weights: its safetensors files or, if it has none, its pickled ones.

    commit: what its files are asked for by. here: whether its files can be read, and not their list alone.
    """

    name: str
    commit: str
    weights: tuple[ListedFile, ...]
    pickled: bool
    config: ListedFile | None
    state: ListedFile | None
    optimizer: bool
    data_order: bool
    here: bool = True

    @property
    def identity(self) -> str:
        """Equal for equal weights, whatever their files are called; "" where that is not known."""
        parts = sorted(file.identity for file in self.weights)
        return " ".join(parts) if parts and all(parts) else ""


def is_weight_file(path: str) -> bool:
    """Whether a file holds weights, by its name."""
    name = path.rpartition("/")[2]
    return name.endswith((".safetensors", *_PICKLED)) and not _OTHER_STATE.search(name)


def is_wanted(path: str) -> bool:
    """Whether a file of a revision's folder means anything to an audit."""
    name = path.rpartition("/")[2]
    return name in (CONFIG, STATE) or is_weight_file(path) or bool(_OPTIMIZER.search(path) or _DATA_ORDER.search(path))


def revision_of(name: str, commit: str, files: Iterable[ListedFile]) -> Revision:
    """The revision whose files these are, by paths relative to it. Weights lie beside its config."""
    files = list(files)
    top = {file.path: file for file in files if "/" not in file.path}
    weights = [file for path, file in sorted(top.items()) if is_weight_file(path)]
    safe = [file for file in weights if file.path.endswith(".safetensors")]
    return Revision(
        name=name,
        commit=commit,
        weights=tuple(safe or weights),
        pickled=bool(weights) and not safe,
        config=top.get(CONFIG),
        state=top.get(STATE),
        optimizer=any(_OPTIMIZER.search(file.path) for file in files),
        data_order=any(_DATA_ORDER.search(file.path) for file in files),
    )


def revision_folders(paths: Iterable[str]) -> dict[str, list[str]]:
    """Folder of a revision -> its files by paths relative to it, among the files of a whole series.

    The outermost folder with a step is the revision: what lies in it, such as global_step500, is part of it.
    """
    wanted = sorted(path for path in paths if is_wanted(path))
    split = [path.split("/") for path in wanted]
    named = places_of({"/".join(parts[:depth]) for parts in split for depth in range(1, len(parts))})
    found: dict[str, list[str]] = {}
    for parts in split:
        for depth in range(1, min(len(parts), MAX_DEPTH + 1)):
            if (name := "/".join(parts[:depth])) in named:
                found.setdefault(name, []).append("/".join(parts[depth:]))
                break
    return {name: files for name, files in sorted(found.items()) if any(map(_is_of_a_model, files))}


def _is_of_a_model(file: str) -> bool:
    return "/" not in file and (file == CONFIG or is_weight_file(file))


class Series(ABC):
    """Where revisions come from. All methods but `refs` may be called from several threads; they raise RemoteError,
    VanishedError, ValueError or OSError for what one revision's files are.
    """

    where: str  # as the user named it
    kind: str
    prefix = ""  # of the tensors that are weights
    cheap = False  # whether reading a few pieces of every tensor costs little

    @abstractmethod
    def refs(self) -> Sequence[str]:
        """The names of all revisions. Raises WeftrainError where the series cannot be read at all."""

    @abstractmethod
    def revision(self, name: str) -> Revision:
        """A revision's list of files."""

    @abstractmethod
    def read(self, revision: Revision, path: str, start: int, stop: int) -> bytes:
        """Bytes of a file; fewer where the file ends before."""

    def mark(self, name: str) -> str:
        """Equal for equal bytes of a revision, as cheaply as can be told, for one who comes again."""
        found = self.revision(name)
        files = [*found.weights, *(file for file in (found.config, found.state) if file is not None)]
        told = json.dumps([[file.path, file.size, file.identity] for file in files])
        return hashlib.sha256(told.encode()).hexdigest()[:32]

    def has_ended(self) -> bool:
        """Whether the series says itself that no more revisions will come."""
        return False

    def folder_of(self, revision: Revision) -> Path | None:
        """The folder of this machine that is the revision; None where its files are elsewhere."""
        return None

    def settled(self, revisions: list[Revision]) -> list[Revision]:
        """The revisions with the identities of their files as sure as hashes make them."""
        return revisions

    def config(self, revision: Revision) -> dict[str, Any] | None:
        """What config.json holds, or None where there is none."""
        return None if revision.config is None else self._object(revision, revision.config)

    def told_step(self, revision: Revision) -> int | None:
        """The step that the revision's own state names, if it has any."""
        if revision.state is None or revision.state.size > MAX_CONFIG_BYTES * 16 or not self.cheap:
            return None
        step = self._object(revision, revision.state, MAX_CONFIG_BYTES * 16).get("global_step")
        return step if type(step) is int else None

    def probe(self, revision: Revision) -> dict[str, float]:
        """Losses that were recorded of a revision, by what they are of."""
        return {}

    def tensor_keys(self, revision: Revision) -> dict[str, str]:
        """The hashes of a revision's tensors, where they are known without reading them."""
        return {}

    def close(self) -> None:
        """End what the series holds open; nothing is read after it."""
        return

    def _object(self, revision: Revision, file: ListedFile, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
        if file.size > limit:
            raise ValueError(f"{file.path} holds {file.size:,} bytes, more than the {limit:,} that are read of it")
        value = parse_json(self.read(revision, file.path, 0, file.size))
        if not isinstance(value, dict):
            raise ValueError(f"{file.path} is not a JSON object")
        return value


def without_files(revision: Revision) -> Revision:
    """The revision as one whose files are known by their list alone."""
    return replace(revision, here=False)
