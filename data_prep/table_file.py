"""The files that stages hand on: named numpy arrays and a JSON note in one safetensors file, written whole, read in slices.

What a reader would get wrong: these are the work folder's own files, made and read by the same program, and removed at the end. They are
never what a dataset is made of, and nothing that came from outside is read with this.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from weftrain.core import fsops
from weftrain.core.canonical import canonical_json, parse_json
from weftrain.core.errors import DataError

_DTYPES = {"U8": np.uint8, "U16": np.uint16, "I32": np.int32, "I64": np.int64}


def write_table(path: Path, arrays: Mapping[str, np.ndarray], note: Mapping[str, Any]) -> None:
    """Write atomically; equal arguments give equal bytes. Raises OSError."""
    ready = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    fsops.write_bytes(path, save(ready, metadata={"note": canonical_json(note).decode()}))


class Table:
    """A file that `write_table` made, open for reading. `note`: what was given. Raises DataError, by file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(str(path), "np")
            self.note: dict[str, Any] = parse_json(self._file.metadata()["note"].encode())
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise DataError(f"{path}: cannot be read: {error}; remove {path.parent.parent} and prepare again") from error

    def __getitem__(self, name: str) -> np.ndarray:
        """The whole array."""
        array: np.ndarray = self._file.get_tensor(name)
        return array

    def __contains__(self, name: str) -> bool:
        return name in self._file.keys()  # noqa: SIM118 - the library's object is no mapping

    def slice(self, name: str, start: int, stop: int) -> np.ndarray:
        """array[start:stop] along the first axis, without reading the rest."""
        place = self._file.get_slice(name)
        if start >= stop:  # which the library refuses
            return np.empty((0, *place.get_shape()[1:]), _DTYPES[place.get_dtype()])
        array: np.ndarray = place[start:stop]
        return array
