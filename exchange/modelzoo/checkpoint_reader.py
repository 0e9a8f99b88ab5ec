"""Reads a checkpoint file of the Cerebras Model Zoo, which checkpoint_format.py describes, without trusting it:
`read_checkpoint` gives a lazy mapping of canonical tensors.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from h5py import h5d, h5l, h5s, h5t, h5z
from torch import Tensor

from weftrain.core.errors import CheckpointError, one_line
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.hdf5 import HDF5_ERRORS, UntrustedFileError
from weftrain.core.formats.lazy_tensors import LazyTensors, meta
from weftrain.core.model_config import ModelConfig
from weftrain.exchange.layouts import ForeignTensor, foreign_tensors, import_tensor
from weftrain.exchange.modelzoo.checkpoint_format import FORMAT_VERSION, LINK, MOMENTS
from weftrain.exchange.modelzoo.lz4 import LZ4, lz4_frame

_MAX_CHUNK_BYTES = 64 << 20
_REMEDY = "take another copy of the file, or write it again"


def read_checkpoint(path: Path, config: ModelConfig, *, optimizer: bool = False) -> ModelZooCheckpoint:
    """A checkpoint of this model: '<plane>/<canonical name>' -> tensor.

    Reads format versions up to 0.5, thus also those of release 1.9. optimizer: read the planes 'exp_avg' and
    'exp_avg_sq' too; the file's parameter groups must name their parameters (`param_names`), because numbers alone
    would be a guess. Raises CheckpointError: at once for a half-written file, missing, unknown or linked names and
    wrong dtypes; while reading for a wrong shape, a truncated file or a second copy with other bits. Any value is
    accepted, NaN too.
    """
    return ModelZooCheckpoint(path, config, optimizer)


class ModelZooCheckpoint(LazyTensors):
    """See read_checkpoint. step: `global_step`, None where the file has none. optimizer_updates: as recorded, else
    `step`. ignored: what else the file holds at its top level.
    """

    def __init__(self, path: Path, config: ModelConfig, optimizer: bool) -> None:
        self.path = path
        with _file_errors(path), _opened(path) as (file, _):
            keys = _hard_links(file)
            version = _checked_version(file)
            linked = {key: _link_target(file, key) for key in _link_keys(file, keys, version)}
            before = "model." if any(key.startswith("model.model.") for key in (*keys, *linked)) else ""
            self._places = {f"weights/{name}": place for name, place in _weights(config, keys, linked, before).items()}
            if optimizer:
                self._places |= _moments(file, config, keys)
            self.step = _number(file, keys, "global_step")
            updates = _number(file, keys, "optimizer_updates")
            self.optimizer_updates = self.step if updates is None else updates
            known = {"model", "global_step", "optimizer_updates"} | ({"optimizer"} if optimizer else set())
            self.ignored = tuple(sorted({key.partition(".")[0] for key in keys} - known))
            metas = {
                name: meta(place.foreign.shapes[0], _dtype(_dataset(file, place.key), place.key))
                for name, place in self._places.items()
            }
        super().__init__(metas, self._load)

    def _load(self, name: str) -> Tensor:
        place = self._places[name]
        with _file_errors(self.path), _opened(self.path) as (file, size):
            tensor = _read(file, place.key, place.foreign.shape, size)
            for copy in place.copies:
                if not torch.equal(_bits(_read(file, copy, place.foreign.shape, size)), _bits(tensor)):
                    raise UntrustedFileError(
                        copy, f"differs from '{place.key}', which it should repeat; is the file of an untied model?"
                    )
            # This layout has one canonical parameter in each foreign tensor.
            return next(tensor for _, tensor in import_tensor(place.foreign, {place.foreign.name: tensor}))


@dataclass(frozen=True)
class _Place:
    """Where a tensor is stored: its dataset, and other datasets that must hold the same."""

    key: str
    copies: tuple[str, ...]
    foreign: ForeignTensor


@contextlib.contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Raise a CheckpointError that names the file for whatever is wrong with it."""
    try:
        yield
    except UntrustedFileError as error:
        raise CheckpointError(f"{path}: {error.field}: {error.problem}; {_REMEDY}") from error
    except HDF5_ERRORS as error:
        raise CheckpointError(f"{path}: cannot be read as HDF5: {one_line(error)}; {_REMEDY}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[h5py.File, int]]:
    """The HDF5 file at `path`, which must be a regular file, and its size in bytes."""
    if not path.exists() and not path.is_symlink():
        raise UntrustedFileError("file", "is missing")
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UntrustedFileError("file", "is a symbolic link or no plain file")
    with h5py.File(path, "r", locking=False) as file:
        yield file, status.st_size


def _hard_links(file: h5py.File) -> set[str]:
    """The names in the root. Raises UntrustedFileError for a link that may leave the file."""
    keys = set(file)
    for key in sorted(keys):
        if file.id.links.get_info(key.encode()).type != h5l.TYPE_HARD:
            raise UntrustedFileError(key, "is a soft or external link; links are not followed")
    return keys


def _checked_version(file: h5py.File) -> float:
    version = float(_attribute(file, "__version__", 0.1))  # the first releases had no such attribute
    if not 0 < version <= FORMAT_VERSION:
        raise UntrustedFileError("__version__", f"is {version}, this program reads up to {FORMAT_VERSION}")
    if version >= FORMAT_VERSION and not bool(_attribute(file, "__SUCCESS__", False)):
        raise UntrustedFileError("__SUCCESS__", "is not set: the program that wrote the file did not finish")
    return version


def _attribute(holder: Any, name: str, default: Any) -> Any:
    """A scalar attribute, or the default where there is none."""
    if name not in holder.attrs:
        return default
    if holder.attrs.get_id(name).get_space().get_simple_extent_type() != h5s.SCALAR:
        raise UntrustedFileError(name, "is not a scalar attribute")
    return holder.attrs[name]


def _leaf(file: h5py.File, key: str) -> dict[str, Any] | None:
    """The description of a leaf in the JSON of `KEY.__metadata__`; None where there is none."""
    name = f"{key}.__metadata__"
    text = _attribute(file, name, None)
    if text is None:
        return None
    if not isinstance(text, str):
        raise UntrustedFileError(name, "is not text")
    try:
        content = parse_json(text.encode())
    except ValueError as error:
        raise UntrustedFileError(name, f"is not JSON: {error}") from error
    own = content.get(name) if isinstance(content, dict) else None
    if not isinstance(own, dict):
        raise UntrustedFileError(name, "does not describe its leaf")
    return own


def _link_keys(file: h5py.File, keys: set[str], version: float) -> list[str]:
    """Leaves of the model without a dataset of their own."""
    if version < FORMAT_VERSION:
        return []
    names = (name.removesuffix(".__metadata__") for name in file.attrs if name.endswith(".__metadata__"))
    return [name for name in names if name.startswith("model.") and name not in keys]


def _link_target(file: h5py.File, key: str) -> str:
    own = _leaf(file, key)
    if own is None or own.get("__TYPE__") != LINK:
        kind = None if own is None else own.get("__TYPE__")
        raise UntrustedFileError(
            key, f"is stored as {kind!r}, without data in this file: load and save it with the vendor's package"
        )
    target = own.get("key")
    if not isinstance(target, str):
        raise UntrustedFileError(key, "is a link to nothing")
    return target


def _weights(config: ModelConfig, keys: set[str], linked: Mapping[str, str], before: str) -> dict[str, _Place]:
    """Canonical name -> place. Raises UntrustedFileError unless exactly the names of the model are there, each as a
    dataset or as a link to another name of the same tensor.
    """
    wanted = foreign_tensors(config, "cerebras")
    known = {before + name for foreign in wanted for name in (foreign.name, *foreign.copies)}
    present = {key for key in keys if key.startswith("model.")} | set(linked)
    required = {before + foreign.name for foreign in wanted}
    for problem, names in (("missing", required - present), ("unknown", present - known)):
        if names:
            shown = sorted(names)
            more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
            raise UntrustedFileError(", ".join(shown[:4]) + more, f"{problem}; is the file of this model?")
    places = {}
    for foreign in wanted:
        same = [before + name for name in (foreign.name, *foreign.copies)]
        held = [name for name in same if name in keys]
        for name in same:
            if name in linked and linked[name] not in held:
                raise UntrustedFileError(
                    name, f"is a link to '{linked[name][:80]}', which is not another name of the same tensor"
                )
        if not held:
            raise UntrustedFileError(same[0], "is missing; is the file of this model?")
        places[foreign.parameters[0]] = _Place(held[0], tuple(held[1:]), foreign)
    return places


def _moments(file: h5py.File, config: ModelConfig, keys: set[str]) -> dict[str, _Place]:
    """'<plane>/<canonical name>' -> place of the optimizer's tensors, which the parameter groups name."""
    numbers: dict[str, int] = {}
    pattern = re.compile(r"(optimizer\.param_groups\.\d+)\.param_names\.(\d+)\.__metadata__")
    for match in filter(None, map(pattern.fullmatch, file.attrs)):
        name, number = (_scalar(file, f"{match[1]}.{part}.{match[2]}") for part in ("param_names", "params"))
        if not isinstance(name, str) or type(number) is not int or name in numbers:
            raise UntrustedFileError(match[0], "names a parameter that it does not number, or one twice")
        numbers[name] = number
    if not numbers:
        raise UntrustedFileError(
            "optimizer.param_groups", "do not name their parameters (param_names): read the weights alone"
        )
    places = {}
    for foreign in foreign_tensors(config, "cerebras"):
        for plane in MOMENTS:
            key = f"optimizer.state.{numbers.get(foreign.name)}.{plane}"
            if key not in keys:
                raise UntrustedFileError(key, f"is missing, {plane} of '{foreign.name}'; is the file of this model?")
            places[f"{plane}/{foreign.parameters[0]}"] = _Place(key, (), foreign)
    return places


def _scalar(file: h5py.File, key: str) -> Any:
    """A number or text from the JSON; None where there is none. The vendor stores equal small values once and links to
    them.
    """
    own = _leaf(file, key)
    if own is not None and own.get("__TYPE__") == LINK and isinstance(own.get("key"), str):
        own = _leaf(file, own["key"])  # always a first name, never another link
    return None if own is None else own.get("scalar_value", own.get("string_value"))


def _number(file: h5py.File, keys: set[str], key: str) -> int | None:
    """An integer leaf, written as a number or as a tensor of one element; None where there is none."""
    if key not in keys:
        value = _scalar(file, key)
        return value if type(value) is int else None
    dataset = file[key]
    if (
        not isinstance(dataset, h5py.Dataset)
        or dataset.size != 1
        or dataset.dtype.kind not in "iuf"
        or dataset.external
        or dataset.is_virtual
    ):
        raise UntrustedFileError(key, "is not one number")
    return int(np.asarray(dataset[()]).reshape(()).item())


def _bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that NaN equals itself in a comparison."""
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def _read(file: h5py.File, key: str, shape: tuple[int, ...], file_bytes: int) -> Tensor:
    """One tensor. The shape is the config's, so no claim of the file decides how much memory is used."""
    dataset = _dataset(file, key)
    plist = dataset.id.get_create_plist()
    layout = plist.get_layout()
    if layout not in (h5d.CONTIGUOUS, h5d.CHUNKED) or plist.get_external_count():
        raise UntrustedFileError(
            key, "is a virtual, compact or externally stored dataset; only contiguous and chunked ones are read"
        )
    extent = dataset.id.get_space().get_simple_extent_type()
    if extent != (h5s.SIMPLE if shape else h5s.SCALAR) or tuple(dataset.shape) != shape:
        raise UntrustedFileError(
            key, f"has shape {dataset.shape}, the config makes it {shape}; is the file of this model?"
        )
    dtype = _dtype(dataset, key)
    if layout == h5d.CONTIGUOUS:
        offset, size = dataset.id.get_offset(), dtype.itemsize * math.prod(shape)
        if offset is None or offset + size > file_bytes:
            raise UntrustedFileError(
                key, f"should have {size:,} bytes at offset {offset}, the file has {file_bytes:,}: it is truncated"
            )
        array = np.asarray(dataset[()])
    else:
        array = _read_chunks(dataset, key, plist)
    tensor = torch.from_numpy(np.ascontiguousarray(array).reshape(shape))
    return tensor.view(dtype)


def _dataset(file: h5py.File, key: str) -> h5py.Dataset:
    dataset = file[key]
    if not isinstance(dataset, h5py.Dataset):
        raise UntrustedFileError(key, "is not a dataset")
    return dataset


def _dtype(dataset: h5py.Dataset, key: str) -> torch.dtype:
    """float32, or bfloat16, which is stored as int16."""
    kind = dataset.id.get_type()
    if kind == h5t.IEEE_F32LE:
        return torch.float32
    if kind in (h5t.STD_I16LE, h5t.STD_U16LE):
        named = dataset.attrs.get("dtypes", ())
        of_old = "is_bfloat16" in dataset.attrs and bool(_attribute(dataset, "is_bfloat16", False))
        if of_old or [str(name) for name in np.asarray(named).reshape(-1)[:2]] == ["torch.bfloat16"]:
            return torch.bfloat16
    raise UntrustedFileError(key, f"holds {dataset.dtype} (and no mark of bfloat16), not float32 or bfloat16")


def _read_chunks(dataset: h5py.Dataset, key: str, plist: Any) -> np.ndarray:
    """A chunked dataset. Raises UntrustedFileError where a chunk is missing."""
    filters = [plist.get_filter(index)[0] for index in range(plist.get_nfilters())]
    chunk_bytes = dataset.dtype.itemsize * math.prod(dataset.chunks)
    grid = [range(0, extent, step) for extent, step in zip(dataset.shape, dataset.chunks, strict=True)]
    if chunk_bytes > _MAX_CHUNK_BYTES:
        raise UntrustedFileError(key, f"has chunks of {chunk_bytes:,} bytes, more than {_MAX_CHUNK_BYTES:,}")
    if dataset.id.get_num_chunks() != math.prod(map(len, grid)):
        raise UntrustedFileError(
            key, f"has {dataset.id.get_num_chunks()} of {math.prod(map(len, grid))} chunks: it was not finished"
        )
    if set(filters) <= {h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE}:
        return np.asarray(dataset[()])
    if filters != [LZ4]:
        raise UntrustedFileError(key, f"uses filters {filters}; LZ4 ({LZ4}), gzip and shuffle are read")
    result = np.empty(dataset.shape, dataset.dtype)
    for corner in itertools.product(*grid):
        if dataset.id.get_chunk_info_by_coord(corner).size > 2 * chunk_bytes + 1024:
            raise UntrustedFileError(key, f"the chunk at {corner} is larger compressed than not")
        skipped, stored = dataset.id.read_direct_chunk(corner)
        raw = stored if skipped else lz4_frame(stored, chunk_bytes)
        if len(raw) != chunk_bytes:
            raise UntrustedFileError(key, f"the chunk at {corner} has {len(raw):,} bytes, not {chunk_bytes:,}")
        chunk = np.frombuffer(raw, dataset.dtype).reshape(dataset.chunks)
        place = tuple(slice(first, first + step) for first, step in zip(corner, dataset.chunks, strict=True))
        target = result[place]
        target[...] = chunk[tuple(slice(0, extent) for extent in target.shape)]
    return result
