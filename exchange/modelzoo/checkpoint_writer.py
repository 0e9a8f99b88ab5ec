"""The vendor's checkpoint file, written so that `cerebras.pytorch.load` opens it, and read without trust. Nothing of
the vendor's is used.

What `cerebras.pytorch.save` of release 2.10 writes (its format version 0.5; found by writing and reading with that
release): one HDF5 file, in its root a dataset for each tensor, named by its path in the state dict joined with dots:
`optimizer.state.0.exp_avg`.

| where                              | what |
|------------------------------------|-----------------------------------------------------------------------------------------------------|
| root attribute `__version__`       | 0.5; releases before 2.1 wrote 0.1 to 0.4, whose `__spec__` is a pickle: this
module never opens it | | root attribute `__spec__`          | JSON: the state dict's shape, once as nested objects and
once as torch's pytree spec                | | root attribute `__SUCCESS__`       | true, set last; a file without it is
half-written                                                   | | root attribute `KEY.__metadata__`  | JSON: what the
leaf KEY is. Numbers and strings stand here and have no dataset                      | | dataset attributes | the same
for a tensor: shape, dtype, the appliance's number of the dtype                            |

What a reader would get wrong: HDF5 has no bfloat16, so such a tensor is an int16 dataset that only the attribute
`dtypes` tells from integers. A tensor that stands under two names (a tied head) has one dataset; the other name is a
link in the JSON. And the vendor compresses with LZ4 (filter 32004), which h5py lacks: it is decoded here, in Python,
because C code that decodes bytes from a stranger's file belongs in no trainer; what does not compress, as trained fp32
weights do not, is copied at full speed.

`model.` stands before the names of release 1.9, whose state dict holds the bare decoder; later Model Zoos hold it in a
wrapper, hence `model.model.`: both are read, and `prefix` says which is written. More than 400 lines: writer and reader
explain each other.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
from h5py import h5d, h5l, h5p, h5s, h5t, h5z
from torch import Tensor

from weftrain.core.config import ModelConfig, OptimizerConfig
from weftrain.core.errors import CheckpointError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.hdf5 import HDF5_ERRORS, UntrustedFileError
from weftrain.core.formats.tensor_file import tensor_memory
from weftrain.core.optim import beta_power, parameter_groups
from weftrain.exchange import layouts as convert
from weftrain.exchange.layouts import Entry, entries, export_weights

FORMAT_VERSION = 0.5
RELEASE = "2.10.0"  # whose form this is: the root attribute `__cstorch_version__`
PLANES = ("exp_avg", "exp_avg_sq")
LZ4 = 32004  # registered filter number
Prefix = Literal["model", "model.model"]
_APPLIANCE_DTYPES = {torch.float32: 11, torch.bfloat16: 15}  # its element types, as `rtfx_dtypes` numbers them
_LINK = "LinkedObject"
_PAGE = 4096
_WRITE_BYTES = 64 << 20
_MAX_CHUNK_BYTES = 64 << 20
_REMEDY = "take another copy of the file, or write it again"


@dataclass(frozen=True)
class OptimizerState:
    """AdamW's state beside the weights. learning_rate: the base rate of the next step, recorded for the vendor's
    parameter groups.
    """

    config: OptimizerConfig
    updates: int
    learning_rate: float = 0.0


# Writing


@dataclass(frozen=True)
class _Stored:
    """A leaf with a dataset."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class _Link:
    """A leaf that is another one."""

    key: str


def write_checkpoint(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    step: int,
    optimizer: OptimizerState | None = None,
    prefix: Prefix = "model",
) -> int:
    """Write a new checkpoint file; it appears whole and durable, or not at all. Equal arguments give equal bytes. Its
    size in bytes.

    tensors: '<plane>/<canonical name>' as in core.backend.State, planes 'weights' and, with `optimizer`, 'exp_avg' and
    'exp_avg_sq'; or plain canonical names, which are weights. fp32 or bf16, each read when its turn comes; a lazy
    mapping may offer meta(name). optimizer: parameters are numbered by weftrain's groups (core.optim.parameter_groups),
    and each group carries their names. Raises CheckpointError: the file exists, the disk is full or fails, a tensor is
    missing, of another shape or dtype.
    """
    planes = _planes(config, tensors, optimizer, path)
    state = _state_dict(config, planes, step, optimizer, prefix)
    try:
        image = _Image(state, [key for key, _, _ in _datasets(config, optimizer, prefix)])
        if path.exists() or path.is_symlink():
            raise CheckpointError(f"{path}: exists: choose another name, or move it away")
        fsops.make_dirs(path.parent)
        if (free := fsops.free_bytes(path.parent)) < image.size:
            raise CheckpointError(
                f"{path}: the disk is full: {image.size:,} bytes needed, {free:,} free: make room, then write again"
            )
        _write(path, image, _values(config, planes, optimizer, prefix))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror or error}: check the disk and its permissions"
        ) from error
    return image.size


class _Plane(Mapping[str, Tensor]):
    """Canonical name -> tensor of one plane of `tensors`; `dtypes` of all of them, from meta(name) where the mapping
    offers it.
    """

    def __init__(self, tensors: Mapping[str, Tensor], before: str) -> None:
        self._tensors, self._before = tensors, before
        meta: Callable[[str], Tensor] = getattr(tensors, "meta", tensors.__getitem__)
        self.dtypes = {name: meta(before + name).dtype for name in self}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._before + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._before) for name in self._tensors if name.startswith(self._before))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _planes(
    config: ModelConfig, tensors: Mapping[str, Tensor], optimizer: OptimizerState | None, path: Path
) -> dict[str, _Plane]:
    """The planes to write, every tensor of each there and of a dtype that the file can hold."""
    in_planes = any("/" in name for name in tensors)
    wanted = ("weights", *PLANES) if optimizer is not None else ("weights",)
    planes = {
        plane: _Plane(tensors, f"{plane}/" if in_planes else "") for plane in (wanted if in_planes else wanted[:1])
    }
    if missing := [plane for plane in wanted if not len(planes.get(plane, ()))]:
        raise CheckpointError(
            f"{path}: no tensors '{missing[0]}/...' were given: leave the optimizer out, or give its state"
        )
    for plane, content in planes.items():
        export_weights(content, config, "cerebras")  # raises for missing and unknown names
        for name, dtype in content.dtypes.items():
            if dtype not in _APPLIANCE_DTYPES:
                raise CheckpointError(
                    f"{path}: tensor '{plane}/{name}' is {dtype}: the form holds float32 and bfloat16, convert it"
                )
    return planes


def _state_dict(
    config: ModelConfig, planes: Mapping[str, _Plane], step: int, optimizer: OptimizerState | None, prefix: Prefix
) -> dict[str, Any]:
    """The state dict that the file holds, with _Stored and _Link for tensors, in the vendor's order."""
    inner = "" if prefix == "model" else "model."
    names = {entry.parameters[0]: entry for entry in entries(config, "cerebras")}
    model: dict[str, Any] = {}
    for name, entry in names.items():
        bare = inner + entry.name.removeprefix("model.")
        model[bare] = _Stored(planes["weights"].dtypes[name], entry.shape)
        model |= {inner + copy.removeprefix("model."): _Link(f"model.{bare}") for copy in entry.copies}
    state: dict[str, Any] = {"model": model}
    if optimizer is not None:
        state["optimizer"] = _optimizer_dict(config, planes, optimizer, names)
        # ours: the vendor's own state holds it as powers of beta, which run out
        state["optimizer_updates"] = optimizer.updates
    state["global_step"] = step
    return state


def _optimizer_dict(
    config: ModelConfig, planes: Mapping[str, _Plane], optimizer: OptimizerState, names: Mapping[str, Entry]
) -> dict[str, Any]:
    """What the vendor's AdamW gives as its state dict, and `param_names` (torch's own key for it) in each group."""
    settings = optimizer.config
    states: dict[int, Any] = {}
    groups = []
    for group in parameter_groups(config, settings):
        numbers = tuple(range(len(states), len(states) + len(group.parameters)))
        for number, name in zip(numbers, group.parameters, strict=True):
            states[number] = {plane: _Stored(planes[plane].dtypes[name], names[name].shape) for plane in PLANES}
            states[number] |= {power: _Stored(torch.float32, ()) for power in ("beta1_power", "beta2_power")}
        groups.append(
            {
                "lr": optimizer.learning_rate * group.learning_rate_multiplier,
                "betas": (settings.beta1, settings.beta2),
                "eps": settings.eps,
                "weight_decay": group.weight_decay,
                "l2_regularization_rate": 0.0,
                "correct_bias": True,
                "amsgrad": False,
                "params": list(numbers),
                "param_names": [names[name].name for name in group.parameters],
            }
        )
    return {"state": states, "param_groups": groups}


def _datasets(config: ModelConfig, optimizer: OptimizerState | None, prefix: Prefix) -> Iterator[tuple[str, str, str]]:
    """(key, plane, canonical name) of every dataset in the order in which they lie in the file: that in which tensors
    are read.
    """
    names = {entry.parameters[0]: entry.name for entry in entries(config, "cerebras")}
    yield from ((f"{prefix}.{foreign.removeprefix('model.')}", "weights", name) for name, foreign in names.items())
    if optimizer is not None:
        numbered = [name for group in parameter_groups(config, optimizer.config) for name in group.parameters]
        for plane in (*PLANES, "beta1_power", "beta2_power"):
            yield from ((f"optimizer.state.{numbered.index(name)}.{plane}", plane, name) for name in names)


def _values(
    config: ModelConfig, planes: Mapping[str, _Plane], optimizer: OptimizerState | None, prefix: Prefix
) -> Iterator[tuple[str, Tensor]]:
    """Key -> tensor in the order of _datasets, each tensor read when it is asked for."""
    first_names = {entry.name for entry in entries(config, "cerebras")}
    powers: dict[str, Tensor] = {}
    if optimizer is not None:
        for plane, beta in (("beta1_power", optimizer.config.beta1), ("beta2_power", optimizer.config.beta2)):
            powers[plane] = torch.from_numpy(np.array(beta_power(beta, optimizer.updates)))
    streams = {
        plane: (tensor for foreign, tensor in export_weights(content, config, "cerebras") if foreign in first_names)
        for plane, content in planes.items()
    }
    for key, plane, name in _datasets(config, optimizer, prefix):
        tensor = powers[plane] if plane in powers else next(streams[plane])
        if plane in planes and tensor.dtype != planes[plane].dtypes[name]:
            raise CheckpointError(
                f"tensor '{plane}/{name}' is {tensor.dtype}, announced as {planes[plane].dtypes[name]}"
            )
        yield key, tensor


def _flatten(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key joined with dots, leaf), in order."""
    if not isinstance(tree, dict | list | tuple):
        yield key, tree
        return
    for name, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from _flatten(item, f"{key}.{name}" if key else str(name))


def _spec(tree: Any) -> str:
    """The JSON of `__spec__`: nested objects with '*' for leaves, and torch's pytree spec, itself JSON in a string."""
    return json.dumps([_stars(tree), json.dumps([1, _pytree(tree)])], indent=4)


def _stars(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(name): _stars(item) for name, item in tree.items()}
    return [_stars(item) for item in tree] if isinstance(tree, list | tuple) else "*"


def _pytree(tree: Any) -> dict[str, Any]:
    if isinstance(tree, dict):
        return {
            "type": "builtins.dict",
            "context": json.dumps(list(tree)),
            "children_spec": [_pytree(item) for item in tree.values()],
        }
    if isinstance(tree, list | tuple):
        return {
            "type": f"builtins.{type(tree).__name__}",
            "context": "null",
            "children_spec": [_pytree(item) for item in tree],
        }
    return {"type": None, "context": None, "children_spec": []}


def _tensor_metadata(leaf: _Stored) -> dict[str, Any]:
    return {
        "__TORCH__": True,
        "shapes": [list(leaf.shape)],
        "dtypes": [str(leaf.dtype)],
        "rtfx_dtypes": [_APPLIANCE_DTYPES[leaf.dtype]],
        "__TYPE__": "TorchTensorSerializer",
        "__NUMPY__": True,
        "compressed": False,
    }


def _metadata(key: str, leaf: Any) -> str:
    """The JSON of a leaf's `KEY.__metadata__`."""
    own: dict[str, Any]
    if isinstance(leaf, _Stored):
        own = _tensor_metadata(leaf)
    elif isinstance(leaf, _Link):
        own = {"key": leaf.key, "__LINKED__": True, "__TYPE__": _LINK, "__NONE__": True}
    elif isinstance(leaf, str):
        own = {"string_value": leaf, "__TYPE__": "StringSerializer", "__NONE__": True}
    else:
        own = {"scalar_value": leaf, "__TYPE__": "ScalarSerializer", "__NONE__": True}
    return json.dumps(
        {"__spec__": json.loads(_spec({key: leaf})), "__objects__": [key], f"{key}.__metadata__": own}, indent=4
    )


class _Pages:
    """What the HDF5 library takes for a file, in memory. It is shown no tensor, so this holds its own structures
    alone.
    """

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}
        self.size = self._position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size

    def flush(self) -> None:
        pass

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        for at, count, page in self._spans(len(rest)):
            self.pages.setdefault(page, bytearray(_PAGE))[at : at + count] = rest[:count]
            rest = rest[count:]
        self.size = max(self.size, self._position)
        return len(memoryview(data).cast("B"))

    def read(self, size: int) -> bytes:
        data = bytearray(size)
        self.readinto(data)
        return bytes(data)

    def readinto(self, buffer: Any) -> int:
        rest = memoryview(buffer).cast("B")
        for at, count, page in self._spans(len(rest)):
            rest[:count] = self.pages.get(page, bytes(_PAGE))[at : at + count]
            rest = rest[count:]
        return len(memoryview(buffer).cast("B"))

    def _spans(self, length: int) -> Iterator[tuple[int, int, int]]:
        """(offset in page, bytes, page) of the next `length` bytes, moving the position along."""
        while length:
            page, at = divmod(self._position, _PAGE)
            count = min(length, _PAGE - at)
            self._position += count
            length -= count
            yield at, count, page


class _Image:
    """The finished file without its tensors: HDF5's structures, and where in between each tensor's bytes belong."""

    def __init__(self, state: Mapping[str, Any], order: list[str]) -> None:
        """order: the keys of the datasets, as they shall lie in the file."""
        pages, leaves = _Pages(), dict(_flatten(state))
        self.offsets: dict[str, tuple[int, int]] = {}  # dataset -> first byte, number of bytes
        with h5py.File(pages, "w", libver=("earliest", "v110")) as file:
            for key in order:
                self.offsets[key] = (_create(file, key, leaves[key]), leaves[key].num_bytes)
            attributes = {
                "__spec__": _spec(state),
                "__version__": np.float64(FORMAT_VERSION),
                "__cstorch_version__": RELEASE,
            }
            attributes |= {f"{key}.__metadata__": _metadata(key, leaf) for key, leaf in leaves.items()}
            for name, value in attributes.items():
                file.attrs[name] = value
            file.attrs["__SUCCESS__"] = True
        self._pages = pages.pages
        self.size = max(pages.size, *(first + count for first, count in self.offsets.values()))

    def structures(self, first: int, end: int) -> Iterator[bytes]:
        """The library's own bytes [first, end)."""
        while first < end:
            page, at = divmod(first, _PAGE)
            count = min(end - first, _PAGE - at)
            yield bytes(self._pages.get(page, bytes(_PAGE))[at : at + count])
            first += count


def _create(file: h5py.File, key: str, leaf: _Stored) -> int:
    """A contiguous dataset whose place is reserved and not written to; the place's first byte."""
    plist = h5p.create(h5p.DATASET_CREATE)
    plist.set_layout(h5d.CONTIGUOUS)
    plist.set_alloc_time(h5d.ALLOC_TIME_EARLY)  # and no fill value is set, so the library writes nothing there
    plist.set_obj_track_times(False)
    kind = h5t.STD_I16LE if leaf.dtype == torch.bfloat16 else h5t.IEEE_F32LE
    space = h5s.create_simple(leaf.shape) if leaf.shape else h5s.create(h5s.SCALAR)
    identifier = h5d.create(file.id, key.encode(), kind, space, dcpl=plist)
    attributes = h5py.Dataset(identifier).attrs
    for name, value in sorted(_tensor_metadata(leaf).items()):
        attributes[name] = value
    return int(identifier.get_offset())


def _write(path: Path, image: _Image, values: Iterator[tuple[str, Tensor]]) -> None:
    """The file front to back: structures and, in their places, tensors. OSError where the disk says so."""
    temporary = fsops.temporary_beside(path)
    try:
        with fsops.FileWriter(temporary) as file:
            done = 0
            for key, tensor in values:
                first, count = image.offsets[key]
                for part in image.structures(done, first):
                    file.write(part)
                memory = tensor_memory(tensor)
                assert len(memory) == count
                assert first >= done  # datasets lie in the order in which they were made, which is that of `values`
                for start in range(0, count, _WRITE_BYTES):
                    file.write(memory[start : start + _WRITE_BYTES])
                done = first + count
            for part in image.structures(done, image.size):
                file.write(part)
            file.sync()
        fsops.rename(temporary, path)
    except (OSError, CheckpointError):
        if temporary.exists():
            _remove_if_possible(temporary)
        raise


def _remove_if_possible(path: Path) -> None:
    with contextlib.suppress(OSError):  # the error that led here is the one to report
        fsops.remove_file(path)


# Reading


def read_checkpoint(path: Path, config: ModelConfig, *, optimizer: bool = False) -> Tensors:
    """A checkpoint of this model: '<plane>/<canonical name>' -> tensor, each read and checked when it is asked for.

    Reads format versions up to 0.5, thus also those of release 1.9. optimizer: the planes 'exp_avg' and 'exp_avg_sq'
    too, which needs a file whose parameter groups name their parameters (`param_names`): numbers alone would be a
    guess. Raises CheckpointError, now, for names and links and, later, for a tensor: half-written, truncated or altered
    file, missing or unknown tensor, a link that leaves the file, another shape or dtype, a second copy with other bits.
    Values are not looked at: NaN is one.
    """
    return Tensors(path, config, optimizer)


class Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint file, one at a time; see read_checkpoint.

    step: `global_step`, None where the file has none. optimizer_updates: as recorded, else `step`. passed_over: what
    else the file holds at its top level, and this program does not read.
    """

    def __init__(self, path: Path, config: ModelConfig, optimizer: bool) -> None:
        self.path = path
        with _blamed(path), _opened(path) as (file, _):
            keys = _hard_links(file)
            version = _checked_version(file)
            linked = {
                key: target
                for key in _link_keys(file, keys, version)
                if (target := _link_target(file, key)) is not None
            }
            before = "model." if any(key.startswith("model.model.") for key in (*keys, *linked)) else ""
            self._places = {f"weights/{name}": place for name, place in _weights(config, keys, linked, before).items()}
            if optimizer:
                self._places |= _moments(file, config, keys)
            self.step = _number(file, keys, "global_step")
            updates = _number(file, keys, "optimizer_updates")
            self.optimizer_updates = self.step if updates is None else updates
            known = {"model", "global_step", "optimizer_updates"} | ({"optimizer"} if optimizer else set())
            self.passed_over = tuple(sorted({key.partition(".")[0] for key in keys} - known))

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        with _blamed(self.path), _opened(self.path) as (file, size):
            tensor = _read(file, place.key, place.entry.shape, size)
            for copy in place.copies:
                if not torch.equal(_bits(_read(file, copy, place.entry.shape, size)), _bits(tensor)):
                    raise UntrustedFileError(
                        copy, f"differs from '{place.key}', which it should repeat; is the file of an untied model?"
                    )
            # one canonical parameter in each entry of this layout
            return next(tensor for _, tensor in convert._import(place.entry, {place.entry.name: tensor}))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: its dataset, others that must hold the same, and what it is."""

    key: str
    copies: tuple[str, ...]
    entry: Entry


class _blamed:  # noqa: N801 - used as a function, as contextmanager's are
    """Turn whatever is wrong with the file into a CheckpointError that names it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UntrustedFileError):
            raise CheckpointError(f"{self._path}: {error.field}: {error.problem}; {_REMEDY}") from error
        if isinstance(error, HDF5_ERRORS):
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{self._path}: cannot be read as HDF5: {reason}; {_REMEDY}") from error


class _opened:  # noqa: N801 - used as a function
    """The HDF5 file of a regular file, and the file's size in bytes."""

    def __init__(self, path: Path) -> None:
        if not path.exists() and not path.is_symlink():
            raise UntrustedFileError("file", "is missing")
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UntrustedFileError("file", "is a symbolic link or no plain file")
        self._file, self._size = h5py.File(path, "r", locking=False), status.st_size

    def __enter__(self) -> tuple[h5py.File, int]:
        return self._file, self._size

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _hard_links(file: h5py.File) -> set[str]:
    """The root's names, all of which must be objects of this file."""
    keys = set(file)
    for key in sorted(keys):
        if file.id.links.get_info(key.encode()).type != h5l.TYPE_HARD:
            raise UntrustedFileError(key, "is a soft or external link; links are not followed")
    return keys


def _checked_version(file: h5py.File) -> float:
    version = float(_attribute(file, "__version__", 0.1))  # the first releases wrote none
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
    """What the JSON of `KEY.__metadata__` says of the leaf; None where there is none."""
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


def _link_target(file: h5py.File, key: str) -> str | None:
    own = _leaf(file, key)
    if own is None or own.get("__TYPE__") != _LINK:
        kind = None if own is None else own.get("__TYPE__")
        raise UntrustedFileError(
            key, f"is stored as {kind!r}, without data in this file: load and save it with the vendor's package"
        )
    target = own.get("key")
    if not isinstance(target, str):
        raise UntrustedFileError(key, "is a link to nothing")
    return target


def _weights(config: ModelConfig, keys: set[str], linked: Mapping[str, str], before: str) -> dict[str, _Place]:
    """Canonical name -> place. Every name of the model must be there, as a dataset or as a link to its first name, and
    no other.
    """
    wanted = entries(config, "cerebras")
    known = {before + name for entry in wanted for name in (entry.name, *entry.copies)}
    present = {key for key in keys if key.startswith("model.")} | set(linked)
    required = {before + entry.name for entry in wanted}
    for problem, names in (("missing", required - present), ("unknown", present - known)):
        if names:
            shown = sorted(names)
            more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
            raise UntrustedFileError(", ".join(shown[:4]) + more, f"{problem}; is the file of this model?")
    places = {}
    for entry in wanted:
        same = [before + name for name in (entry.name, *entry.copies)]
        held = [name for name in same if name in keys]
        for name in same:
            if name in linked and linked[name] not in held:
                raise UntrustedFileError(
                    name, f"is a link to '{linked[name][:80]}', which is not another name of the same tensor"
                )
        if not held:
            raise UntrustedFileError(same[0], "is missing; is the file of this model?")
        places[entry.parameters[0]] = _Place(held[0], tuple(held[1:]), entry)
    return places


def _moments(file: h5py.File, config: ModelConfig, keys: set[str]) -> dict[str, _Place]:
    """'<plane>/<canonical name>' -> place of the optimizer's tensors, by the names that the parameter groups give
    them.
    """
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
    for entry in entries(config, "cerebras"):
        for plane in PLANES:
            key = f"optimizer.state.{numbers.get(entry.name)}.{plane}"
            if key not in keys:
                raise UntrustedFileError(key, f"is missing, {plane} of '{entry.name}'; is the file of this model?")
            places[f"{plane}/{entry.parameters[0]}"] = _Place(key, (), entry)
    return places


def _scalar(file: h5py.File, key: str) -> Any:
    """A number or text that stands in the JSON; None where there is none. Equal ones of Python's small objects are
    links to one another.
    """
    own = _leaf(file, key)
    if own is not None and own.get("__TYPE__") == _LINK and isinstance(own.get("key"), str):
        own = _leaf(file, own["key"])  # the vendor links to a first name, never to another link
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
    """For a comparison in which NaN equals itself."""
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def _read(file: h5py.File, key: str, shape: tuple[int, ...], file_bytes: int) -> Tensor:
    """One tensor. The shape is the config's, so nothing that the file claims decides how much memory is taken."""
    dataset = file[key]
    if not isinstance(dataset, h5py.Dataset):
        raise UntrustedFileError(key, "is not a dataset")
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
    return tensor.view(torch.bfloat16) if dtype.kind == "i" else tensor


def _dtype(dataset: h5py.Dataset, key: str) -> np.dtype[Any]:
    """float32, or int16 for bfloat16."""
    kind = dataset.id.get_type()
    if kind == h5t.IEEE_F32LE:
        return np.dtype("<f4")
    if kind in (h5t.STD_I16LE, h5t.STD_U16LE):
        named = dataset.attrs.get("dtypes", ())
        of_old = "is_bfloat16" in dataset.attrs and bool(_attribute(dataset, "is_bfloat16", False))
        if of_old or [str(name) for name in np.asarray(named).reshape(-1)[:2]] == ["torch.bfloat16"]:
            return np.dtype("<i2")
    raise UntrustedFileError(key, f"holds {dataset.dtype} (and no mark of bfloat16), not float32 or bfloat16")


def _read_chunks(dataset: h5py.Dataset, key: str, plist: Any) -> np.ndarray:
    """A chunked dataset, every chunk of it there."""
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


def lz4_frame(stored: bytes, size: int) -> bytes:
    """HDF5's LZ4 frame of `size` bytes: their number (8 bytes, big-endian), the block size (4), and each block behind
    its length (4).

    A block as long as it is uncompressed is stored. Raises UntrustedFileError.
    """
    total, block_size = int.from_bytes(stored[:8], "big"), int.from_bytes(stored[8:12], "big")
    if len(stored) < 12 or total != size or block_size == 0:
        raise UntrustedFileError(
            "LZ4", f"a frame says that it holds {total:,} bytes in blocks of {block_size:,}, not {size:,}"
        )
    result, at = bytearray(), 12
    while len(result) < size:
        wanted = min(block_size, size - len(result))
        length = int.from_bytes(stored[at : at + 4], "big")
        block = stored[at + 4 : at + 4 + length]
        if length == 0 or len(block) != length:
            raise UntrustedFileError(
                "LZ4", f"a block of {length:,} bytes at {at:,} leaves its frame of {len(stored):,}"
            )
        result += block if length == wanted else lz4_block(block, wanted)
        at += 4 + length
    return bytes(result)


def lz4_block(data: bytes, size: int) -> bytearray:
    """One LZ4 block of `size` bytes (github.com/lz4/lz4, lz4_Block_format): literals, then a match, until the last
    literals.

    Raises UntrustedFileError where it is not one.
    """
    result, at = bytearray(), 0
    try:
        while True:
            token = data[at]
            at += 1
            literals, match = token >> 4, token & 15
            if literals == 15:
                literals, at = _lz4_length(data, at, literals)
            if at + literals > len(data) or len(result) + literals > size:
                raise UntrustedFileError("LZ4", "literals leave their block")
            result += data[at : at + literals]
            at += literals
            if at == len(data):
                break
            distance = data[at] | data[at + 1] << 8
            at += 2
            if match == 15:
                match, at = _lz4_length(data, at, match)
            match += 4
            if not 0 < distance <= len(result) or len(result) + match > size:
                raise UntrustedFileError("LZ4", "a match leaves its block")
            start = len(result) - distance
            piece = result[start : start + match]
            result += (piece * (match // len(piece) + 1))[:match]  # a match may reach into itself: the piece repeats
    except IndexError:
        raise UntrustedFileError("LZ4", "a block ends in the middle") from None
    if len(result) != size:
        raise UntrustedFileError("LZ4", f"a block holds {len(result):,} bytes, not {size:,}")
    return result


def _lz4_length(data: bytes, at: int, length: int) -> tuple[int, int]:
    """A length that goes on in bytes of 255, and the position behind it."""
    while (byte := data[at]) == 255:
        length, at = length + 255, at + 1
    return length + byte, at + 1
