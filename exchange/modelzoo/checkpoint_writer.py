"""Writes a checkpoint file of the Cerebras Model Zoo (checkpoint_format.py describes it), which `cerebras.pytorch.load`
opens.

The HDF5 library lays out the file in memory without seeing a tensor (`_Image`). Then the file is written front to back,
each tensor's bytes in their place, one tensor at a time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
from h5py import h5d, h5p, h5s, h5t
from torch import Tensor

from weftrain.core.config import OptimizerConfig
from weftrain.core.errors import CheckpointError, os_errors_as
from weftrain.core.formats import fsops
from weftrain.core.formats.lazy_tensors import LazyTensors, select
from weftrain.core.formats.tensor_file import tensor_memory
from weftrain.core.model_config import ModelConfig
from weftrain.core.optim import beta_power, parameter_groups
from weftrain.exchange.layouts import ForeignTensor, export_weights, foreign_tensors
from weftrain.exchange.modelzoo.checkpoint_format import (
    APPLIANCE_DTYPES,
    FORMAT_VERSION,
    MOMENTS,
    Link,
    StoredTensor,
    flatten,
    metadata_json,
    spec_json,
    tensor_metadata,
)

RELEASE = "2.10.0"  # whose format this is: the root attribute `__cstorch_version__`
Prefix = Literal["model", "model.model"]
_PAGE = 4096
_WRITE_BYTES = 64 << 20


@dataclass(frozen=True)
class OptimizerState:
    """What AdamW's state needs besides the moments. learning_rate: the base rate of the next step, which goes into the
    vendor's parameter groups.
    """

    config: OptimizerConfig
    updates: int
    learning_rate: float = 0.0


def write_checkpoint(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    step: int,
    optimizer: OptimizerState | None = None,
    prefix: Prefix = "model",
) -> int:
    """Write a new checkpoint file and return its size in bytes. It appears whole and durable, or not at all; equal
    arguments give equal bytes.

    tensors: '<plane>/<canonical name>' as in core.backend.State, with the planes 'weights' and, where `optimizer` is
    given, 'exp_avg' and 'exp_avg_sq'; or plain canonical names, which are weights. fp32 or bf16, read one at a time.
    optimizer: parameters are numbered by weftrain's groups (core.optim.parameter_groups), and each group holds their
    names. Raises CheckpointError: the file exists, the disk is full or fails, or a tensor is missing or has the wrong
    shape or dtype.
    """
    planes = _planes(config, tensors, optimizer, path)
    state = _state_dict(config, planes, step, optimizer, prefix)
    with os_errors_as(CheckpointError, f"{path}: cannot be written", "check the disk and its permissions"):
        image = _Image(state, [key for key, _, _ in _datasets(config, optimizer, prefix)])
        if path.exists() or path.is_symlink():
            raise CheckpointError(f"{path}: exists: choose another name, or move it away")
        fsops.make_dirs(path.parent)
        if (free := fsops.free_bytes(path.parent)) < image.size:
            raise CheckpointError(
                f"{path}: the disk is full: {image.size:,} bytes needed, {free:,} free: make room, then write again"
            )
        _write(path, image, _values(config, planes, optimizer, prefix))
    return image.size


def _planes(
    config: ModelConfig, tensors: Mapping[str, Tensor], optimizer: OptimizerState | None, path: Path
) -> dict[str, LazyTensors]:
    """Plane -> canonical name -> tensor. Raises CheckpointError for a missing tensor and a dtype that has no form."""
    in_planes = any("/" in name for name in tensors)
    wanted = ("weights", *MOMENTS) if optimizer is not None else ("weights",)
    planes = {}
    for plane in wanted if in_planes else wanted[:1]:
        prefix = f"{plane}/" if in_planes else ""
        names = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
        planes[plane] = select(tensors, names)
    if missing := [plane for plane in wanted if not len(planes.get(plane, ()))]:
        raise CheckpointError(
            f"{path}: no tensors '{missing[0]}/...' were given: leave the optimizer out, or give its state"
        )
    for plane, content in planes.items():
        export_weights(content, config, "cerebras")  # raises for missing and unknown names
        for name in content:
            if (dtype := content.meta(name).dtype) not in APPLIANCE_DTYPES:
                raise CheckpointError(
                    f"{path}: tensor '{plane}/{name}' is {dtype}: the format holds float32 and bfloat16, convert it"
                )
    return planes


def _state_dict(
    config: ModelConfig, planes: Mapping[str, LazyTensors], step: int, optimizer: OptimizerState | None, prefix: Prefix
) -> dict[str, Any]:
    """The state dict that the file holds, with StoredTensor and Link for tensors, in the vendor's order."""
    inner = "" if prefix == "model" else "model."
    names = {foreign.parameters[0]: foreign for foreign in foreign_tensors(config, "cerebras")}
    model: dict[str, Any] = {}
    for name, foreign in names.items():
        bare = inner + foreign.name.removeprefix("model.")
        model[bare] = StoredTensor(planes["weights"].meta(name).dtype, foreign.shape)
        model |= {inner + copy.removeprefix("model."): Link(f"model.{bare}") for copy in foreign.copies}
    state: dict[str, Any] = {"model": model}
    if optimizer is not None:
        state["optimizer"] = _optimizer_dict(config, planes, optimizer, names)
        # Not a key of the vendor's: its own state has powers of beta instead, which underflow.
        state["optimizer_updates"] = optimizer.updates
    state["global_step"] = step
    return state


def _optimizer_dict(
    config: ModelConfig,
    planes: Mapping[str, LazyTensors],
    optimizer: OptimizerState,
    names: Mapping[str, ForeignTensor],
) -> dict[str, Any]:
    """The state dict of the vendor's AdamW, with `param_names` (torch's own key for it) in each group."""
    settings = optimizer.config
    states: dict[int, Any] = {}
    groups = []
    for group in parameter_groups(config, settings):
        numbers = tuple(range(len(states), len(states) + len(group.parameters)))
        for number, name in zip(numbers, group.parameters, strict=True):
            shape = names[name].shape
            states[number] = {plane: StoredTensor(planes[plane].meta(name).dtype, shape) for plane in MOMENTS}
            states[number] |= {power: StoredTensor(torch.float32, ()) for power in ("beta1_power", "beta2_power")}
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
    """(key, plane, canonical name) of every dataset, in the order of the file, which is that of reading."""
    names = {foreign.parameters[0]: foreign.name for foreign in foreign_tensors(config, "cerebras")}
    yield from ((f"{prefix}.{foreign.removeprefix('model.')}", "weights", name) for name, foreign in names.items())
    if optimizer is not None:
        numbered = [name for group in parameter_groups(config, optimizer.config) for name in group.parameters]
        for plane in (*MOMENTS, "beta1_power", "beta2_power"):
            yield from ((f"optimizer.state.{numbered.index(name)}.{plane}", plane, name) for name in names)


def _values(
    config: ModelConfig, planes: Mapping[str, LazyTensors], optimizer: OptimizerState | None, prefix: Prefix
) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) in the order of _datasets, each tensor read when its turn comes."""
    first_names = {foreign.name for foreign in foreign_tensors(config, "cerebras")}
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
        if plane in planes and tensor.dtype != planes[plane].meta(name).dtype:
            raise CheckpointError(
                f"tensor '{plane}/{name}' is {tensor.dtype}, announced as {planes[plane].meta(name).dtype}"
            )
        yield key, tensor


class _Pages:
    """A file in memory for the HDF5 library. It is given no tensor, so only its own structures are here."""

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
    """The finished file without its tensors: HDF5's structures, and the places of the tensors' bytes between them."""

    def __init__(self, state: Mapping[str, Any], order: list[str]) -> None:
        """order: the keys of the datasets in the order of the file."""
        pages, leaves = _Pages(), dict(flatten(state))
        self.offsets: dict[str, tuple[int, int]] = {}  # dataset -> first byte, number of bytes
        with h5py.File(pages, "w", libver=("earliest", "v110")) as file:
            for key in order:
                self.offsets[key] = (_create(file, key, leaves[key]), leaves[key].num_bytes)
            attributes = {
                "__spec__": spec_json(state),
                "__version__": np.float64(FORMAT_VERSION),
                "__cstorch_version__": RELEASE,
            }
            attributes |= {f"{key}.__metadata__": metadata_json(key, leaf) for key, leaf in leaves.items()}
            for name, value in attributes.items():
                file.attrs[name] = value
            file.attrs["__SUCCESS__"] = True
        self._pages = pages.pages
        self.size = max(pages.size, *(first + count for first, count in self.offsets.values()))

    def structures(self, first: int, end: int) -> Iterator[bytes]:
        """Bytes [first, end) of the HDF5 structures."""
        while first < end:
            page, at = divmod(first, _PAGE)
            count = min(end - first, _PAGE - at)
            yield bytes(self._pages.get(page, bytes(_PAGE))[at : at + count])
            first += count


def _create(file: h5py.File, key: str, leaf: StoredTensor) -> int:
    """Create a contiguous dataset whose bytes are reserved and not written; returns the offset of the first."""
    plist = h5p.create(h5p.DATASET_CREATE)
    plist.set_layout(h5d.CONTIGUOUS)
    plist.set_alloc_time(h5d.ALLOC_TIME_EARLY)  # no fill value is set, so nothing is written there
    plist.set_obj_track_times(False)
    kind = h5t.STD_I16LE if leaf.dtype == torch.bfloat16 else h5t.IEEE_F32LE
    space = h5s.create_simple(leaf.shape) if leaf.shape else h5s.create(h5s.SCALAR)
    identifier = h5d.create(file.id, key.encode(), kind, space, dcpl=plist)
    attributes = h5py.Dataset(identifier).attrs
    for name, value in sorted(tensor_metadata(leaf).items()):
        attributes[name] = value
    return int(identifier.get_offset())


def _write(path: Path, image: _Image, values: Iterator[tuple[str, Tensor]]) -> None:
    """Write the file front to back: structures and, in their places, tensors. Raises OSError."""
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
