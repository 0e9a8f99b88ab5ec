"""A frozen reference's log-probabilities of a dataset's preference pairs: `references/NAME.h5` beside its shards.

The file holds float64 [pairs, 2] for each set, chosen and rejected, and nothing else. `references/NAME.json` is sealed
and says what they are of: the datasets' ids, the tokenizer, the reference's model and a hash of its weights, and the
SHA-256 of the file. Its root commits to all of it, and is what a run records.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import h5py
import numpy as np
from pydantic import Field

from weftrain.core.errors import DataError, one_line
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import parse_sealed, root_of, sealed
from weftrain.core.formats.dataset import inside_folder
from weftrain.core.formats.dataset_manifest import DatasetManifest, SetName, merkle_root
from weftrain.core.formats.hdf5 import HDF5_ERRORS, UntrustedFileError, open_dataset
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.formats.safe_names import PlainName
from weftrain.core.formats.strict_model import PositiveInt, Sha256, StrictModel, validated

FOLDER = "references"
_FORMAT = "weftrain-reference"
_VERSION: Literal[1] = 1
# the names of files; recipes use the same type
ReferenceName = Annotated[PlainName, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class ReferenceSet(StrictModel):
    """A set of the dataset that was computed: its id, and its pairs."""

    id: Sha256
    pairs: PositiveInt


class ReferenceManifest(StrictModel):
    """references/NAME.json. of: what the reference is, in words. weights_sha256: over its tensors, whatever
    files they lie in. model: its section as a recipe has it. compute: the dtype of the forward pass.
    """

    format: Literal["weftrain-reference"]
    version: Literal[1]
    of: Annotated[str, Field(max_length=4096)]
    weights_sha256: Sha256
    model: dict[str, Any]
    tokenizer_sha256: Sha256
    compute: Literal["float32", "bfloat16"]
    sets: dict[SetName, ReferenceSet]
    num_bytes: PositiveInt
    sha256: Sha256  # of NAME.h5
    root: Sha256


@dataclass(frozen=True, eq=False)
class Reference:
    """values: float64 [pairs, 2] of each set: log-probabilities of the chosen and of the rejected answer."""

    path: Path
    manifest: ReferenceManifest
    values: Mapping[SetName, np.ndarray]

    @property
    def root(self) -> str:
        return self.manifest.root


def write_reference(
    folder: Path,
    name: str,
    dataset: DatasetManifest,
    values: Mapping[SetName, np.ndarray],
    *,
    of: str,
    weights_sha256: str,
    model: Mapping[str, Any],
    compute: Literal["float32", "bfloat16"],
) -> Reference:
    """Write the log-probabilities of a dataset's sets, float64 [pairs, 2] each. Raises DataError for values that cannot
    be log-probabilities, OSError.
    """
    for set_name, found in values.items():
        if problem := _wrong(found, dataset.sets[set_name].n_examples):
            raise DataError(f"{folder}: {problem} in the set '{set_name}': the reference's weights may be damaged")
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver="latest") as file:
        for set_name, found in values.items():
            file.create_dataset(set_name, data=found.astype("<f8"), track_times=False)
    data = buffer.getvalue()
    value = {
        "format": _FORMAT,
        "version": _VERSION,
        "of": of,
        "weights_sha256": weights_sha256,
        "model": dict(model),
        "tokenizer_sha256": dataset.tokenizer_sha256,
        "compute": compute,
        "sets": {key: {"id": dataset.sets[key].id, "pairs": dataset.sets[key].n_examples} for key in values},
        "num_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    fsops.make_dirs(folder / FOLDER)
    fsops.write_bytes(folder / FOLDER / f"{name}.h5", data)
    fsops.write_bytes(folder / FOLDER / f"{name}.json", sealed(value))  # last: without it there is no reference
    manifest = ReferenceManifest.model_validate(value | {"root": root_of(value)})
    return Reference(folder / FOLDER / f"{name}.json", manifest, dict(values))


def read_reference(folder: Path, name: str, dataset: DatasetManifest) -> Reference:
    """The reference of that name of the dataset in `folder`, every byte and number checked, and held against the
    dataset's ids and tokenizer. Raises DataError.
    """
    again = f"compute it with `weftrain data reference {folder} --of RUN --name {name}`"
    path = folder / FOLDER / f"{name}.json"
    try:
        value = parse_sealed(_read(folder, f"{name}.json"), _FORMAT, (_VERSION,))
        manifest = validated(ReferenceManifest, value)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such reference: {again}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {one_line(error)}; {again}") from error
    if manifest.tokenizer_sha256 != dataset.tokenizer_sha256:
        raise DataError(
            f"{path}: was computed with tokenizer {manifest.tokenizer_sha256[:12]}, the dataset has "
            f"{dataset.tokenizer_sha256[:12]}: {again}"
        )
    for set_name, entry in dataset.sets.items():
        found = manifest.sets.get(set_name)
        if found is None or (found.id, found.pairs) != (entry.id, entry.n_examples):
            of = "nothing" if found is None else f"dataset {found.id[:12]}"
            raise DataError(f"{path}: is of {of}, and the set '{set_name}' is {entry.id[:12]}: {again}")
    return Reference(path, manifest, _values(folder, name, manifest, again))


def training_id(ids: Sequence[str], roots: Sequence[str] = ()) -> str:
    """The id of what a run reads: of its sources' training sets, and of the references that it holds them against."""
    found = [*ids, *roots]
    return found[0] if len(found) == 1 else merkle_root(found)


def reference_files(name: str) -> tuple[str, str]:
    """The files of a reference below the dataset's folder: the manifest's, and that of the numbers."""
    return f"{FOLDER}/{name}.json", f"{FOLDER}/{name}.h5"


def reference_root(folder: Path, name: str) -> str:
    """The root of a reference's manifest, checked in itself; its numbers are not read. Raises DataError."""
    path = folder / FOLDER / f"{name}.json"
    try:
        return str(parse_sealed(_read(folder, f"{name}.json"), _FORMAT, (_VERSION,))["root"])
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}; restore it from a copy") from error


def _read(folder: Path, name: str) -> bytes:
    return read_plain(inside_folder(folder, f"{FOLDER}/{name}"), "reference")


def _values(folder: Path, name: str, manifest: ReferenceManifest, again: str) -> dict[SetName, np.ndarray]:
    path, values = folder / FOLDER / f"{name}.h5", dict[SetName, np.ndarray]()
    try:
        data = _read(folder, f"{name}.h5")
        if len(data) != manifest.num_bytes or hashlib.sha256(data).hexdigest() != manifest.sha256:
            raise ValueError(f"is not the file that {name}.json names: it was truncated, altered or exchanged")
        with h5py.File(io.BytesIO(data), "r") as file:
            for set_name, entry in manifest.sets.items():
                found = open_dataset(file, set_name, np.dtype("<f8"), 2, len(data))[...]
                if problem := _wrong(found, entry.pairs):
                    raise ValueError(f"{problem} in the set '{set_name}'")
                values[set_name] = found
    except FileNotFoundError:
        raise DataError(f"{path}: is missing: {again}") from None
    except (UntrustedFileError, *HDF5_ERRORS) as error:
        raise DataError(f"{path}: {one_line(error)}; {again}") from error
    return values


def _wrong(values: np.ndarray, pairs: int) -> str | None:
    """What is wrong with log-probabilities, or None. A sum of fp32 terms may exceed 0 by its rounding."""
    if values.shape != (pairs, 2) or values.dtype != np.float64:
        return f"has {values.dtype} {list(values.shape)} values, not float64 [{pairs}, 2]"
    wrong = np.flatnonzero(~(np.isfinite(values) & (values <= 1e-3)).all(axis=1))
    if len(wrong):
        return f"pair {wrong[0]} has log-probabilities {values[wrong[0]].tolist()}, which are none"
    return None
