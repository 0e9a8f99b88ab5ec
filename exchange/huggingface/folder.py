"""Whole models as Hugging Face folders: config.json and weights in safetensors files, read without trust and written
whole or not at all.

A folder holds `model.safetensors`, or shards that `model.safetensors.index.json` deals the tensors out to. Names,
layouts and configs are exchange/layouts.py's; this module knows files. Tensors go through one at a time, so memory does
not grow with the model. Every file must be a regular file inside the folder: the hub's own cache holds symbolic links,
so download with `--local-dir`. Pickled files (`pytorch_model.bin`) are not read here: exchange/huggingface/pickled.py
converts them to safetensors first, if it is asked to.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weftrain.core.errors import CheckpointError, RecipeError, file_problem, os_errors_as
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json, sha256_json
from weftrain.core.formats.lazy_tensors import LazyTensors, meta, select
from weftrain.core.formats.safe_names import checked_segment
from weftrain.core.formats.tensor_file import (
    DTYPE_NAMES,
    DTYPES,
    TensorLayout,
    open_regular,
    pack_header,
    read_header,
    read_tensor,
    tensor_bytes,
    tensor_memory,
)
from weftrain.core.model_config import ModelConfig
from weftrain.exchange.huggingface.config import config_from_huggingface, config_to_huggingface, layout_of
from weftrain.exchange.huggingface.files import modeling_files
from weftrain.exchange.layouts import (
    export_weights,
    foreign_tensors,
    import_lazily,
    in_float32,
    is_buffer,
)

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
WEIGHT_DTYPES = ("F32", "BF16", "F16")  # each becomes fp32 without loss
WRITTEN_DTYPES = (torch.float32, torch.bfloat16)
MAX_CONFIG_BYTES = 1 << 20
MAX_INDEX_BYTES = 16 << 20
_REMEDY = "take another copy of the folder"
_SHARD = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")


# Reading


def read_config(folder: Path) -> ModelConfig:
    """The model that the folder's config.json describes. Raises CheckpointError for a file that cannot be read,
    RecipeError for a model that this decoder does not compute, another architecture by name.
    """
    config = read_json(folder)
    try:
        model = config_from_huggingface(config)
    except RecipeError as error:
        raise RecipeError(str(error).replace(CONFIG, str(folder / CONFIG), 1)) from error
    return model


def read_json(folder: Path) -> dict[str, Any]:
    """The folder's config.json as it is. Raises CheckpointError."""
    with _file_errors(folder, CONFIG):
        config = parse_json(_small_file(folder / CONFIG, MAX_CONFIG_BYTES))
        if not isinstance(config, dict):
            raise ValueError("is not a JSON object")
    return config


class HuggingFaceWeights(LazyTensors):
    """A folder's tensors by their foreign names, in their own dtypes (F32, BF16, F16).

    Everything but the tensors' bytes is checked at once: file names, the index against the shards, every header against
    its file's size, dtypes. Buffers (layouts.is_buffer) may have any dtype. Raises CheckpointError naming file, tensor
    and remedy.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, tuple[str, TensorLayout]] = {}
        self.files = weight_files(folder)
        for name, wanted in self.files.items():
            with _file_errors(folder, name), open_regular(folder / name) as file:
                layout = read_header(file, foreign=True)
                _check_layout(layout, wanted)
            self._places |= {tensor: (name, place) for tensor, place in layout.items()}

        super().__init__(
            {name: meta(place.shape, DTYPES[place.dtype]) for name, (_, place) in self._places.items()}, self._load
        )

    def _load(self, name: str) -> Tensor:
        file_name, place = self._places[name]
        with _file_errors(self._folder, file_name), open_regular(self._folder / file_name) as file:
            return read_tensor(file, place)

    @property
    def buffers(self) -> list[str]:
        """Names of the tensors that are not weights and are skipped, sorted."""
        return sorted(name for name in self if is_buffer(name))


def state_tensors(weights: Mapping[str, Tensor], config: ModelConfig) -> LazyTensors:
    """A folder's weights as those of a State: 'weights/<canonical name>' -> fp32 tensor, exact.

    Raises CheckpointError, at once for names and shapes that are not the config's.
    """
    imported = import_lazily(weights, config, layout_of(config))
    return in_float32(select(imported, {f"weights/{name}": name for name in imported}))


def weight_files(folder: Path) -> dict[str, set[str] | None]:
    """File name -> the tensors that the index puts there; None where there is no index."""
    single, index = ((folder / name).exists() or (folder / name).is_symlink() for name in (SINGLE, INDEX))
    if single and index:
        raise CheckpointError(f"{folder}: holds both {SINGLE} and {INDEX}: move away the one that is not this model's")
    if single:
        return {SINGLE: None}
    if not index:
        pickled = next((name for name in (PICKLED, PICKLED_INDEX) if (folder / name).exists()), None)
        if pickled is not None:
            raise CheckpointError(
                f"{folder}: {pickled}: weights are pickled, and no safetensors file is there: see --allow-pickle"
            )
        raise CheckpointError(f"{folder}: holds neither {SINGLE} nor {INDEX}: name a folder with a model's weights")
    return dict(read_index(folder, INDEX, ".safetensors"))


def read_index(folder: Path, name: str, suffix: str) -> dict[str, set[str]]:
    """File name -> names of the tensors in it, from an index file. File names are plain and end in `suffix`. Raises
    CheckpointError.
    """
    with _file_errors(folder, name):
        index = parse_json(_small_file(folder / name, MAX_INDEX_BYTES))
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("has no weight_map")
        files: dict[str, set[str]] = {}
        for tensor, file_name in weight_map.items():
            if not _is_plain(file_name) or not file_name.endswith(suffix):
                raise ValueError(
                    f"tensor '{tensor[:80]}' lies in {str(file_name)[:80]!r}, which is not the plain name of a "
                    f"{suffix} file"
                )
            files.setdefault(file_name, set()).add(tensor)
    return files


def _is_plain(name: object) -> bool:
    try:
        checked_segment(name)
    except ValueError:
        return False
    return True


def _check_layout(layout: Mapping[str, TensorLayout], wanted: set[str] | None) -> None:
    if wanted is not None:
        for name in sorted(wanted ^ set(layout)):
            where = "missing, and the index puts it here" if name in wanted else "not one that the index puts here"
            raise ValueError(f"tensor '{name[:80]}' is {where}")
    for name, place in layout.items():
        if place.dtype not in WEIGHT_DTYPES and not is_buffer(name):
            raise ValueError(f"tensor '{name}' is {place.dtype}; weights are read from {', '.join(WEIGHT_DTYPES)}")


def _small_file(path: Path, limit: int) -> bytes:
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise ValueError(f"holds {size:,} bytes, more than the {limit:,} that it may")
        return file.read(size)


@contextlib.contextmanager
def _file_errors(folder: Path, name: str) -> Iterator[None]:
    """Turn whatever is wrong with one file into a CheckpointError that names it."""
    try:
        yield
    except (OSError, ValueError) as error:
        linked = (folder / name).is_symlink()
        remedy = "copy the files themselves (cp -rL), or download them with --local-dir" if linked else _REMEDY
        raise CheckpointError(f"{folder}: {name}: {file_problem(error)}: {remedy}") from error


def files_sha256(folder: Path, names: Sequence[str], progress: Callable[[int], None] = lambda num_bytes: None) -> str:
    """One hash for several files: SHA-256 of the canonical JSON of name -> SHA-256. progress: see fsops.sha256_file.
    Raises CheckpointError.
    """
    hashes = {}
    for name in names:
        with _file_errors(folder, name):
            hashes[name] = fsops.sha256_file(folder / name, progress)
    return sha256_json(hashes)


# Writing


@dataclass(frozen=True)
class Written:
    """A folder that was written: its files of weights, their tensors' bytes and number."""

    files: tuple[str, ...]
    size_bytes: int
    num_tensors: int


def write_huggingface(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    model_type: str | None = None,
    max_shard_bytes: int = 4 << 30,
    extra_config: Mapping[str, Any] | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> Written:
    """Write a model's folder; it appears whole and durable, or not at all. Equal arguments give equal bytes.

    weights: canonical name -> tensor, each read once, when its turn comes, rounded to `dtype` (float32 or bfloat16) to
    nearest even. model_type: the family to write; by default the first that can hold the model. max_shard_bytes: of
    tensors in one file; a larger tensor has one of its own. extra_config: further keys of config.json. beside: file
    name -> bytes of further files, such as tokenizer.json (exchange/huggingface/files.py). A CrystalCoder's folder also
    has the code that transformers needs for it. Raises CheckpointError: the folder exists, the disk is full or fails,
    tensors do not fit the config, or the layout cannot hold the model (muP in Llama: see exchange.fold_mup.fold).
    """
    if dtype not in WRITTEN_DTYPES:
        raise CheckpointError(f"{folder}: dtype {dtype} is not written; there is {', '.join(map(str, WRITTEN_DTYPES))}")
    layout = layout_of(config) if model_type is None else model_type
    small = small_files(folder, config, dtype, extra_config, beside, model_type)
    stream = export_weights(weights, config, layout)  # raises for unknown and missing names
    specs = {foreign.name: (DTYPE_NAMES[dtype], foreign.shape) for foreign in foreign_tensors(config, layout)}
    shards = _split(specs, max_shard_bytes)
    total = sum(tensor_bytes(*spec) for spec in specs.values())
    if len(shards) > 1:
        weight_map = {name: file for file, part in shards.items() for name in part}
        small[INDEX] = _readable({"metadata": {"total_size": total}, "weight_map": weight_map})
    if folder.exists() or folder.is_symlink():
        raise CheckpointError(f"{folder}: exists: choose another name, or move it away")
    if (free := fsops.free_bytes(folder.parent)) < total:
        raise CheckpointError(
            f"{folder}: the disk is full: {total:,} bytes needed, {free:,} free: make room, then write again"
        )
    written = os_errors_as(CheckpointError, f"{folder}: cannot be written", "check the disk and its permissions")
    with written, fsops.temporary_tree(folder) as temporary:
        for file_name, part in shards.items():
            _write_shard(temporary / file_name, part, stream, dtype)
        for name, data in small.items():
            fsops.write_bytes(temporary / name, data)  # its rename syncs the folder's entries
        fsops.rename(temporary, folder)
    return Written(tuple(shards), total, len(specs))


def small_files(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    extra_config: Mapping[str, Any] | None = None,
    beside: Mapping[str, bytes] | None = None,
    model_type: str | None = None,
) -> dict[str, bytes]:
    """Every file of a model's folder but weights and their index, with its bytes; the arguments are those of
    `write_huggingface`. Raises CheckpointError for a name or a key that is taken.
    """
    code, keys = modeling_files(config)
    layout = layout_of(config) if model_type is None else model_type
    for name in beside or {}:
        if not _is_plain(name) or name in (CONFIG, *code) or is_weight_file(name):
            raise CheckpointError(
                f"{folder}: '{name[:80]}' cannot stand beside the model: give a plain file name of its own"
            )
    return {CONFIG: _config_json(folder, config, layout, dtype, keys, extra_config or {}), **code, **(beside or {})}


def is_weight_file(name: str) -> bool:
    """Whether a file of this name holds weights, or says in which file they are."""
    return name in (SINGLE, INDEX) or _SHARD.fullmatch(name) is not None


def _config_json(
    folder: Path,
    config: ModelConfig,
    layout: str,
    dtype: torch.dtype,
    code: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> bytes:
    keys = {**config_to_huggingface(config, layout), **code, "torch_dtype": str(dtype).removeprefix("torch.")}
    if taken := sorted(set(extra) & {*keys, "auto_map"}):  # auto_map names Python files, and there are only ours
        raise CheckpointError(
            f"{folder}: {CONFIG}: '{taken[0]}' follows from the model: leave it out of the further keys"
        )
    tokens = {"bos_token_id": None, "eos_token_id": None}
    if keys["model_type"] not in (
        "llama",
        "crystalcoder",
    ):  # the others' config classes may have a default of their own
        tokens["pad_token_id"] = None
    return _readable({**keys, **tokens, **extra})


def _readable(value: Any) -> bytes:
    canonical_json(value)  # refuses what is no JSON
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _split(
    specs: Mapping[str, tuple[str, tuple[int, ...]]], limit: int
) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """File name -> its tensors, in the order in which they come."""
    files: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, spec in specs.items():
        size = tensor_bytes(*spec)
        if files[-1] and filled + size > limit:
            files.append({})
            filled = 0
        files[-1][name] = spec
        filled += size
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{index:05d}-of-{len(files):05d}.safetensors": part for index, part in enumerate(files, 1)}


def _write_shard(
    path: Path,
    part: Mapping[str, tuple[str, tuple[int, ...]]],
    stream: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    with fsops.FileWriter(path) as file:
        file.write(pack_header(part))
        for wanted in part:
            name, tensor = next(stream)
            assert name == wanted  # both follow exchange.layouts.foreign_tensors
            if not tensor.is_floating_point():
                raise CheckpointError(f"tensor '{name}' is {tensor.dtype}: weights are floating-point numbers")
            file.write(tensor_memory(tensor.to(dtype)))
        file.sync()
