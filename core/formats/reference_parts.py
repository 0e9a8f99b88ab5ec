"""What of a reference is computed so far: a file for each shard in `references/NAME.parts/`, until the whole is written
(reference_file.py). A computation that was killed goes on after the last of them.

A file is the SHA-256 of what follows, and the float64 log-probabilities of the shard's pairs, chosen and rejected. The
folder below NAME.parts is named by a hash of all that they follow from, so parts of another model are never taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import sha256_json
from weftrain.core.formats.dataset import inside_folder
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.formats.reference_file import FOLDER

_HASH_BYTES = 32


class ReferenceParts:
    """The parts of the reference `name` of the dataset in `folder`. follows_from: what decides every bit of them."""

    def __init__(self, folder: Path, name: str, follows_from: Mapping[str, Any]) -> None:
        self._dataset, self._within = folder, Path(FOLDER, f"{name}.parts", sha256_json(dict(follows_from))[:16])

    def read(self, set_name: str, shard: int, pairs: int) -> np.ndarray | None:
        """float64 [pairs, 2]; None where there is no such part, or a damaged one, which is computed again."""
        try:
            data = read_plain(
                inside_folder(self._dataset, str(self._within / self._file(set_name, shard))), "reference"
            )
        except OSError:
            return None
        found = data[_HASH_BYTES:]
        if len(found) != pairs * 16 or hashlib.sha256(found).digest() != data[:_HASH_BYTES]:
            return None
        return np.frombuffer(found, "<f8").reshape(pairs, 2).astype(np.float64)

    def write(self, set_name: str, shard: int, values: np.ndarray) -> None:
        """values: float64 [pairs, 2]. Raises OSError."""
        data = np.ascontiguousarray(values, "<f8").tobytes()
        fsops.make_dirs(self._dataset / self._within)
        path = self._dataset / self._within / self._file(set_name, shard)
        fsops.write_bytes(path, hashlib.sha256(data).digest() + data)

    def remove(self) -> None:
        """All parts of this name, those of other models too: the whole is written. Raises OSError."""
        if (parts := self._dataset / self._within.parent).is_dir():
            fsops.remove_tree(parts)

    @staticmethod
    def _file(set_name: str, shard: int) -> str:
        return f"{set_name}-{shard:05d}"
