"""The safetensors file format, written tensor by tensor and read without trust.

Layout: 8 bytes little-endian header length; a JSON header `{"name": {"dtype", "shape", "data_offsets": [begin, end]}}`,
padded with spaces to a multiple of 8; the tensors' bytes, row-major, without gaps
(https://github.com/huggingface/safetensors#format). Why not the library: its writer holds a second copy of the state,
and its reader takes duplicate names and names like `../../x`. Offsets count from the end of the header, which must be
complete before the first tensor.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.plain_file import open_plain

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_FOREIGN_HEADER_BYTES = 16 << 20  # that of a 7B takes 30 kB; parsed JSON takes many times its bytes
MAX_NAME_CHARACTERS = 512
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NAME = re.compile(r"[A-Za-z0-9_]+([./-][A-Za-z0-9_]+)*")
_MAX_DIMENSIONS = 8
_LIBRARY_MARK = {"format": "pt"}  # the metadata by which other programs know a PyTorch layout


@dataclass(frozen=True)
class TensorLayout:
    """A tensor's place in a file: dtype as safetensors names it, shape, first byte and end from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def check_name(name: str) -> None:
    """Raises ValueError unless the name is words of letters, digits and _ joined by `/`, `.` or `-`."""
    if len(name) > MAX_NAME_CHARACTERS or not _NAME.fullmatch(name):
        raise ValueError(f"tensor name {name[:80]!r} is not words of letters, digits and _ joined by / . -")


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def file_order(specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """Names in file order: larger elements first, so that every tensor is aligned, then by name."""
    return sorted(specs, key=lambda name: (-DTYPES[specs[name][0]].itemsize, name))


def pack_header(specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The header, with its length, of a file that holds `specs` (name -> dtype, shape) in that order."""
    header: dict[str, Any] = {"__metadata__": _LIBRARY_MARK}
    offset = 0
    for name, (dtype, shape) in specs.items():
        end = offset + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def open_regular(path: Path) -> BinaryIO:
    """Open a plain file for reading. Raises ValueError for a symbolic link or anything else that is no plain file."""
    return open_plain(path, follow=False, buffering=0)


def read_header(file: BinaryIO, *, foreign: bool = False) -> dict[str, TensorLayout]:
    """The layout of an open file, checked against the file's size. Raises ValueError.

    foreign: another program's file: its metadata may be any text, its header at most MAX_FOREIGN_HEADER_BYTES.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(MAX_FOREIGN_HEADER_BYTES if foreign else MAX_HEADER_BYTES, size - 8):
        raise ValueError(f"claims a header of {length} bytes in a file of {size}")
    return parse_header(_read_exactly(file, length), size, foreign=foreign)


def parse_header(data: bytes, size: int, *, foreign: bool = False) -> dict[str, TensorLayout]:
    """The layout that a header says, without its length, of a file of `size` bytes. Raises ValueError."""
    length = len(data)
    header = parse_json(data)
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    metadata = header.pop("__metadata__", _LIBRARY_MARK)
    if foreign:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("the header's __metadata__ is not text under names")
    elif metadata != _LIBRARY_MARK:
        raise ValueError("the header is not one this program writes")
    layout = {name: _layout(name, entry, 8 + length) for name, entry in header.items()}
    expected = 8 + length
    for name, place in sorted(layout.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != expected:
            raise ValueError(
                f"tensor '{name}' begins at byte {place.begin}, not at {expected} where the one before it ends"
            )
        expected = place.end
    if expected != size:
        raise ValueError(f"the tensors end at byte {expected} of {size}")
    return layout


def header_bytes(file: BinaryIO) -> bytes:
    """Length and header of a file that `read_header` accepted, as stored. Raises ValueError if it became shorter."""
    file.seek(0)
    length = _read_exactly(file, 8)
    return length + _read_exactly(file, min(int.from_bytes(length, "little"), MAX_HEADER_BYTES))


def _layout(name: str, entry: Any, data_start: int) -> TensorLayout:
    check_name(name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor '{name}': the header entry is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor '{name}': unknown dtype {dtype!r}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor '{name}': shape and data_offsets must be short lists of numbers from 0")
    if offsets[1] - offsets[0] != tensor_bytes(dtype, tuple(shape)):
        raise ValueError(f"tensor '{name}': {offsets[1] - offsets[0]} bytes do not hold {dtype} {shape}")
    return TensorLayout(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_counts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_DIMENSIONS
        and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def tensor_memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in host memory, row-major; without a copy if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_tensor(file: BinaryIO, place: TensorLayout) -> torch.Tensor:
    """Read one tensor into new memory. Raises ValueError if the file has become shorter."""
    raw = torch.empty(place.end - place.begin, dtype=torch.uint8)
    memory = raw.numpy().data
    file.seek(place.begin)
    while memory:
        count = cast(Any, file).readinto(memory)
        if not count:
            raise ValueError(f"ends {len(memory)} bytes too early")
        memory = memory[count:]
    return raw.view(DTYPES[place.dtype]).reshape(place.shape)


def _read_exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ValueError(f"ends {count - len(data)} bytes too early")
    return data
