"""A stored reference is exactly what was computed, of exactly this dataset; anything else is refused in one line."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from written_datasets import make_dataset

from weftrain.core.errors import DataError
from weftrain.core.formats.canonical import sealed
from weftrain.core.formats.dataset import read_dataset_manifest
from weftrain.core.formats.reference_file import read_reference, reference_root, training_id, write_reference

PAIRS = {"train": 12, "heldout": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of pairs with a reference called `frozen`."""
    told = {"seed": 0, "eos": None, "preferences": "pairs"}
    make_dataset(tmp_path / "d", [7, 5], [4], masked=True, preparation=told, packing="rows")
    write(tmp_path / "d", values())
    return tmp_path / "d"


def values(seed: int = 0) -> dict[Any, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: -random.random((pairs, 2)) * 100 for name, pairs in PAIRS.items()}


def write(folder: Path, found: dict[Any, np.ndarray]) -> str:
    model = {"hidden_size": 8}
    manifest = read_dataset_manifest(folder)
    return write_reference(
        folder, "frozen", manifest, found, of="run", weights_sha256="0" * 64, model=model, compute="float32"
    ).root


def read(folder: Path) -> Any:
    return read_reference(folder, "frozen", read_dataset_manifest(folder))


def test_what_is_read_is_what_was_written_and_twice_the_same_bytes(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in (folder / "references").iterdir()}
    found = read(folder)
    for name, wanted in values().items():
        assert np.array_equal(found.values[name], wanted)
    assert found.root == reference_root(folder, "frozen") == write(folder, values())
    assert {path.name: path.read_bytes() for path in (folder / "references").iterdir()} == before
    assert write(folder, values(1)) != found.root


def test_a_run_without_references_has_the_id_that_it_had(folder: Path) -> None:
    train_id = read_dataset_manifest(folder).train.id
    assert training_id([train_id]) == train_id
    assert training_id([train_id], [reference_root(folder, "frozen")]) != train_id


def test_every_flipped_byte_and_every_cut_is_refused(folder: Path) -> None:
    for path in sorted((folder / "references").iterdir()):
        whole = path.read_bytes()
        places = np.random.default_rng(1).integers(0, len(whole), 60).tolist()
        for place in places:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            with pytest.raises(DataError, match="frozen"):
                read(folder)
        for place in [0, 1, *places[:20]]:
            path.write_bytes(whole[:place])
            with pytest.raises(DataError, match="frozen"):
                read(folder)
        path.write_bytes(whole)
    assert read(folder).values


def resealed(folder: Path, change: dict[str, Any], data: bytes | None = None) -> None:
    """The manifest with other values, sealed anew, as somebody would who edits a reference."""
    path = folder / "references" / "frozen.json"
    value = json.loads(path.read_bytes()) | change
    del value["root"]
    if data is not None:
        (folder / "references" / "frozen.h5").write_bytes(data)
        value |= {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_bytes(sealed(value))


def hdf5(**sets: Any) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver="latest") as file:
        for name, found in sets.items():
            file[name] = found
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (lambda: hdf5(**values() | {"train": np.full((12, 2), np.nan)}), "pair 0 has log-probabilities"),
        (lambda: hdf5(**values() | {"train": np.full((12, 2), 0.5)}), "pair 0 has log-probabilities"),
        (lambda: hdf5(**values() | {"train": np.zeros((11, 2))}), r"has float64 \[11, 2\] values"),
        (lambda: hdf5(**values() | {"train": np.zeros((12, 2), np.float32)}), "has type float32, not float64"),
        (lambda: hdf5(train=h5py.SoftLink("/heldout"), heldout=values()["heldout"]), "links are not followed"),
        (lambda: hdf5(train=h5py.ExternalLink("/etc/passwd", "x"), heldout=values()["heldout"]), "links are not"),
        (lambda: hdf5(heldout=values()["heldout"]), "train"),
        (lambda: b"not HDF5", "frozen.h5"),
    ],
)
def test_numbers_that_cannot_be_are_refused_even_if_every_hash_was_made_again(
    folder: Path, data: Any, why: str
) -> None:
    resealed(folder, {}, data())
    with pytest.raises(DataError, match=why):
        read(folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tokenizer_sha256": "1" * 64}, "was computed with tokenizer 111111111111, the dataset has"),
        ({"sets": {"train": {"id": "2" * 64, "pairs": 12}}}, "is of dataset 222222222222, and the set 'train' is"),
        ({"version": 2}, "version 2 is not one that this program reads"),
        ({"more": 1}, "key 'more'"),
    ],
)
def test_a_reference_of_something_else_is_refused(folder: Path, change: dict[str, Any], why: str) -> None:
    resealed(folder, change)
    with pytest.raises(DataError, match=why):
        read(folder)


def test_what_is_missing_says_how_to_compute_it(folder: Path) -> None:
    (folder / "references" / "frozen.h5").unlink()
    with pytest.raises(DataError, match=r"frozen.h5: is missing: compute it with `weftrain data reference .* --of RUN"):
        read(folder)
    with pytest.raises(DataError, match="there is no such reference"):
        read_reference(folder, "other", read_dataset_manifest(folder))


def test_values_that_are_no_log_probabilities_are_not_written(folder: Path) -> None:
    with pytest.raises(DataError, match="pair 3 has log-probabilities"):
        found = values()
        found["train"][3, 1] = np.inf
        write(folder, found)
