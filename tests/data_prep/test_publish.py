"""Datasets on another file system: there and back they are the same bytes, and half of one is none."""

from __future__ import annotations

import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest

from weftrain.core.errors import DataError
from weftrain.core.formats.dataset import read_dataset_manifest
from weftrain.core.formats.shard_set import ShardSet
from weftrain.data_prep.pipeline import prepare
from weftrain.data_prep.publish import fetch, is_remote, publish, staging_folder
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.stages.settings import Inputs
from weftrain.data_prep.tokens.tokenization import TextEncoder


@pytest.fixture
def dataset(tmp_path: Path, encoder: TextEncoder, texts: list[str]) -> Path:
    (tmp_path / "tokenizer.json").write_bytes(encoder.data)
    for number, text in enumerate(texts):
        (tmp_path / "in" / f"{number}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.txt").write_text(text)
    inputs = Inputs(tuple(list_inputs([str(tmp_path / "in")], source=None)), "text")
    settings = {
        "tokenizer": tmp_path / "tokenizer.json",
        "sequence_length": 16,
        "heldout_fraction": 0.2,
        "rows_per_shard": 40,
    }
    prepared = prepare(inputs, tmp_path / "out", name="d", **settings)  # type: ignore[arg-type]
    assert prepared is not None
    return prepared.folder


@pytest.fixture
def address() -> str:
    return f"memory://{uuid.uuid4().hex}/datasets/d"


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_there_and_back(dataset: Path, address: str, tmp_path: Path) -> None:
    publish(dataset, read_dataset_manifest(dataset), address)
    manifest = fetch(address, tmp_path / "back" / "d")
    assert files(tmp_path / "back" / "d") == files(dataset)
    rows, _ = ShardSet(tmp_path / "back" / "d", manifest, "train").rows(np.arange(3))
    assert rows.shape == (3, 17)
    with pytest.raises(DataError, match="exists already"):
        fetch(address, tmp_path / "back" / "d")


def test_again_copies_only_what_is_missing(dataset: Path, address: str) -> None:
    publish(dataset, read_dataset_manifest(dataset), address)
    system, root = fsspec.core.url_to_fs(address)
    system.rm(f"{root}/train/00001.h5")
    before = system.created(f"{root}/train/00000.h5")
    publish(dataset, read_dataset_manifest(dataset), address)
    assert system.exists(f"{root}/train/00001.h5")
    assert system.created(f"{root}/train/00000.h5") == before


def test_half_a_dataset_is_none(dataset: Path, address: str, tmp_path: Path) -> None:
    publish(dataset, read_dataset_manifest(dataset), address)
    system, root = fsspec.core.url_to_fs(address)
    for missing in ("train/00001.h5", "manifest.json"):
        system.rm(f"{root}/{missing}")
        with pytest.raises(DataError, match="cannot be fetched"):
            fetch(address, tmp_path / "back")
        assert not (tmp_path / "back").exists()


def test_damaged_on_the_way_is_refused(dataset: Path, address: str, tmp_path: Path) -> None:
    publish(dataset, read_dataset_manifest(dataset), address)
    system, root = fsspec.core.url_to_fs(address)
    data = bytearray(system.cat_file(f"{root}/train/00000.h5"))
    system.pipe_file(f"{root}/train/00000.h5", bytes(data[:-5000]))
    with pytest.raises(DataError, match=r"train/00000\.h5"):
        fetch(address, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_another_of_the_same_size_is_refused(dataset: Path, address: str, tmp_path: Path) -> None:
    publish(dataset, read_dataset_manifest(dataset), address)
    system, root = fsspec.core.url_to_fs(address)
    data = bytearray(system.cat_file(f"{root}/train/00000.h5"))
    data[4096] ^= 1  # the first token, where the tokens of a shard lie
    system.pipe_file(f"{root}/train/00000.h5", bytes(data))
    with pytest.raises(DataError, match=r"train/00000\.h5"):
        fetch(address, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_another_dataset_is_not_written_over(dataset: Path, address: str) -> None:
    system, root = fsspec.core.url_to_fs(address)
    system.pipe_file(f"{root}/manifest.json", (dataset / "manifest.json").read_bytes().replace(b'"seed"', b'"Seed"'))
    system.pipe_file(f"{root}/train/00000.h5", b"theirs")
    with pytest.raises(DataError, match="holds another dataset; name another address"):
        publish(dataset, read_dataset_manifest(dataset), address)
    assert system.cat_file(f"{root}/train/00000.h5") == b"theirs"


def test_what_could_not_be_read_travels_too(dataset: Path, address: str, tmp_path: Path) -> None:
    (dataset / "failures.jsonl").write_text('{"file": "x"}\n')
    publish(dataset, read_dataset_manifest(dataset), address)
    fetch(address, tmp_path / "back")
    assert (tmp_path / "back" / "failures.jsonl").read_text() == '{"file": "x"}\n'


def test_addresses() -> None:
    assert is_remote("s3://bucket/x")
    assert not is_remote("datasets")
    assert is_remote("file:///tmp/x")
    assert staging_folder("s3://a") != staging_folder("s3://b")
    with pytest.raises(DataError, match="no such file system"):
        fetch("nosuchscheme://x", Path("never"))
