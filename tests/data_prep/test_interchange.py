"""Other programs' forms: out and in again the rows and documents are the same, and a shard of ours is a Cerebras corpus
as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from weftrain.core.errors import DataError
from weftrain.core.formats.dataset import read_dataset_manifest
from weftrain.core.formats.shard_set import ShardSet, open_set
from weftrain.data_prep.interchange import export_cerebras, export_megatron, whole_documents
from weftrain.data_prep.pipeline import Prepared, prepare
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.stages import plan
from weftrain.data_prep.stages.settings import Inputs
from weftrain.data_prep.tokens.tokenization import TextEncoder

S = 16


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_MEBI", 300)


def make(tmp_path: Path, path: Path, name: str, **changes: Any) -> Prepared:
    inputs = Inputs(tuple(list_inputs([str(path)], source=None)), "text", "none", ReadOptions(sequence_length=S))
    settings: dict[str, Any] = {
        "tokenizer": tmp_path / "tokenizer.json",
        "sequence_length": S,
        "heldout_fraction": 0.0,
        "rows_per_shard": 20,
    }
    prepared = prepare(inputs, tmp_path / "out", name=name, **settings | changes)
    assert prepared is not None
    return prepared


@pytest.fixture
def dataset(tmp_path: Path, encoder: TextEncoder, texts: list[str]) -> Prepared:
    (tmp_path / "tokenizer.json").write_bytes(encoder.data)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return make(tmp_path, tmp_path / "t.jsonl", "d")


def rows_of(folder: Path) -> tuple[np.ndarray, np.ndarray | None]:
    shards = ShardSet(folder, read_dataset_manifest(folder), "train")
    return shards.rows(np.arange(shards.num_rows))


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_cerebras_rows_there_and_back(dataset: Prepared, tmp_path: Path, packing: str) -> None:
    source = dataset if packing == "concatenate" else make(tmp_path, tmp_path / "t.jsonl", "packed", packing="best_fit")
    files = export_cerebras(source.folder, "train", tmp_path / "cerebras", rows_per_file=50)
    ids, mask = rows_of(source.folder)
    assert len(files) == -(-len(ids) // 50)
    with h5py.File(files[0]) as file:
        data = file["data"]
        assert (data.shape, data.dtype, data.chunks, data.compression) == ((50, 3, S), np.int32, (1, 3, S), "gzip")
        assert file.attrs["n_examples"] == 50
        assert np.array_equal(data[:, 0], ids[:50, :-1])
        assert np.array_equal(data[:, 2], ids[:50, 1:])
        assert np.array_equal(data[:, 1], np.ones((50, S)) if mask is None else mask[:50])
    back_ids, back_mask = rows_of(make(tmp_path, tmp_path / "cerebras", "back", order="as_read").folder)
    assert np.array_equal(back_ids, ids)
    assert (back_mask is None) == (mask is None)
    if mask is not None:
        assert back_mask is not None
        assert np.array_equal(back_mask, mask)
    with pytest.raises(DataError, match=r"holds \.h5 files already"):
        export_cerebras(source.folder, "train", tmp_path / "cerebras")


def test_megatron_documents_there_and_back(
    dataset: Prepared, tmp_path: Path, encoder: TextEncoder, texts: list[str]
) -> None:
    export_megatron(dataset.folder, "train", tmp_path / "mega" / "m")
    manifest, shards = open_set(dataset.folder, "train")
    documents = list(whole_documents(manifest, shards))
    wanted = {(*ids.tolist(), manifest.eos_id) for ids in encoder.encode(texts, texts)}
    assert len(documents) == len(texts)
    assert {tuple(ids.tolist()) for ids in documents[:-1]} < wanted  # the last is cut at the end of the rows
    back = make(tmp_path, tmp_path / "mega", "back", order="as_read")
    assert np.array_equal(rows_of(back.folder)[0], rows_of(dataset.folder)[0])
    with pytest.raises(DataError, match="exists already"):
        export_megatron(dataset.folder, "train", tmp_path / "mega" / "m")
    with pytest.raises(DataError, match="has no set 'heldout'"):
        export_megatron(dataset.folder, "heldout", tmp_path / "x")


def test_the_same_row_on_both_sides_of_a_shards_end_is_two_documents(tmp_path: Path, encoder: TextEncoder) -> None:
    (tmp_path / "tokenizer.json").write_bytes(encoder.data)
    (tmp_path / "rows.jsonl").write_text((json.dumps({"token_ids": list(range(5, S + 6)), "source": "s"}) + "\n") * 2)
    prepared = make(tmp_path, tmp_path / "rows.jsonl", "rows", rows_per_shard=1, order="as_read")
    manifest, shards = open_set(prepared.folder, "train")
    assert len(list(whole_documents(manifest, shards))) == shards.num_rows == 2


@pytest.mark.parametrize("rows_per_shard", [20, 10_000])
def test_rows_that_are_not_there(dataset: Prepared, tmp_path: Path, rows_per_shard: int) -> None:
    _, shards = open_set(make(tmp_path, tmp_path / "t.jsonl", "other", rows_per_shard=rows_per_shard).folder, "train")
    for row in (-1, shards.num_rows):
        with pytest.raises(IndexError, match=f"rows {row}..{row} of {shards.num_rows}"):
            shards.rows(np.array([row]))


class CorpusReader:
    """What a reader of rank-1 `data` does, from the form's description: all files one stream, windows of S + 1 at
    stride S.
    """

    def __init__(self, folder: Path, sequence_length: int) -> None:
        self.length = sequence_length
        with h5py.File(next(iter(sorted(folder.glob("*.h5"))))) as file:
            assert file["data"].ndim == 1
            self.stream = file["data"][...]

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.length

    def __getitem__(self, row: int) -> np.ndarray:
        return self.stream[row * self.length : row * self.length + self.length + 1].astype(np.int32)


def test_a_shard_is_a_cerebras_corpus_as_it_is(dataset: Prepared, tmp_path: Path) -> None:
    reader = CorpusReader(dataset.folder / "train", S)
    ids, _ = rows_of(dataset.folder)
    assert len(reader) == 20
    assert all(np.array_equal(reader[row], ids[row]) for row in range(20))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.h5").write_bytes((dataset.folder / "train" / "00000.h5").read_bytes())
    back = make(tmp_path, tmp_path / "corpus", "back", order="as_read")
    assert np.array_equal(rows_of(back.folder)[0], ids[:20])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"X" + data[1:], "does not begin as a Megatron index"),
        (lambda data: data[:9] + b"\x02" + data[10:], "version 2"),
        (lambda data: data[:17] + b"\x07" + data[18:], "float32"),
        (lambda data: data[:-8], "which .* do not make"),
        (lambda data: data[:34] + b"\xff\xff\xff\x7f" + data[38:], "points outside"),
        (lambda data: data[:-8] + b"\x00" * 8, "documents do not rise"),
        (lambda data: data[:20], "copy it again"),
    ],
)
def test_a_megatron_index_that_lies(dataset: Prepared, tmp_path: Path, damage: Any, message: str) -> None:
    _, index = export_megatron(dataset.folder, "train", tmp_path / "mega" / "m")
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(DataError, match=rf"m\.idx: .*{message}"):
        make(tmp_path, tmp_path / "mega", "back", order="as_read")


def test_cerebras_files_that_lie(tmp_path: Path, dataset: Prepared) -> None:
    rows = np.random.default_rng(0).integers(0, 300, (4, S + 1)).astype(np.int32)
    whole = np.stack([rows[:, :-1], np.ones((4, S), np.int32), rows[:, 1:]], axis=1)

    def write(data: Any, name: str = "data", **attributes: Any) -> Path:
        path = tmp_path / "bad.h5"
        path.unlink(missing_ok=True)
        with h5py.File(path, "w") as file:
            file.create_dataset(name, data=data)
            file.attrs.update(attributes)
        return path

    shifted = whole.copy()
    shifted[2, 2, 5] += 1
    masks = whole.copy()
    masks[1, 1, 3] = 2
    for data, attributes, message in (
        (shifted, {}, r"bad\.h5:3: the label at 5 .* shifted by one"),
        (masks, {}, r"bad\.h5:2: .*loss mask other than 0 and 1"),
        (whole, {"n_examples": 5}, "n_examples: is 5, 'data' has 4 rows"),
        (whole[:, :2], {}, "not \\(N, 3, S\\)"),
        (whole.astype(np.float32), {}, "has type float32"),
        (whole[:, :, :-1], {}, "holds 16 token ids, not 16 \\+ 1"),
    ):
        with pytest.raises(DataError, match=message):
            make(tmp_path, write(data, **attributes), "x")
    with pytest.raises(DataError, match="data: is missing"):
        make(tmp_path, write(whole, "other"), "x")
