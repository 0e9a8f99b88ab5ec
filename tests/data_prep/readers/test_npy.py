"""OLMo's .npy without a header, dolma's .csv.gz beside it, and arrays of np.save: documents recomputed by splitting at
the end token.
"""

from __future__ import annotations

import csv
import gzip
import io
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weftrain.core.errors import DataError
from weftrain.core.formats.shard_set import ShardSet
from weftrain.data_prep.pipeline import prepare
from weftrain.data_prep.readers import npy
from weftrain.data_prep.readers.documents import Document, Failure
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.stages.settings import Inputs
from weftrain.data_prep.tokens.tokenization import TextEncoder

END = 7
IDS = [1, 2, END, 3, END, END, 4, 5, 6, 8, END, 9, 1, 1, 1, 300]
DOCUMENTS = [[1, 2, END], [3, END], [END], [4, 5, 6, 8, END], [9, 1, 1, 1, 300]]


def write(path: Path, ids: Sequence[int] = IDS, dtype: str = "<u2", save: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if save:
        np.save(path, np.array(ids, dtype))
    else:
        path.write_bytes(np.array(ids, dtype).tobytes())
    return path


def write_metadata(path: Path, bounds: Sequence[tuple[int, int]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(
        (start, end, f'an id, "{number}"\n', "s3://x/y.json.gz", number) for number, (start, end) in enumerate(bounds)
    )
    Path(str(path).removesuffix(".npy") + ".csv.gz").write_bytes(gzip.compress(text.getvalue().encode()))


def tokens(items: Sequence[Document | Failure]) -> list[list[int]]:
    assert all(
        isinstance(item, Document) and item.tokens is not None and item.tokens.dtype == np.int32 for item in items
    ), items
    return [item.tokens.tolist() for item in items if isinstance(item, Document) and item.tokens is not None]


@pytest.mark.parametrize(
    ("dtype", "save"), [("<u2", False), ("<u4", False), ("<u2", True), ("<i8", True), ("<u1", True)]
)
def test_documents_by_their_end_token_in_any_cut(
    tmp_path: Path, read_all: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, dtype: str, save: bool
) -> None:
    ids = [number % 256 for number in IDS] if dtype == "<u1" else IDS
    wanted = [[number % 256 for number in document] if dtype == "<u1" else document for document in DOCUMENTS]
    path = write(tmp_path / "part-0.npy", ids, dtype, save)
    options = {"end_id": END, "stream_dtype": None if save else np.dtype(dtype).name}
    for block in (1 << 20, 5, 1):
        monkeypatch.setattr(npy, "_BLOCK_IDS", block)
        for part_bytes in (1 << 40, *range(1, 12), 40):
            items = read_all(path, part_bytes, **options)
            assert tokens(items) == wanted
            assert [item.record for item in items] == [0, 1, 2, 3, 4]


def test_documents_by_the_metadata_of_dolma_in_any_cut(tmp_path: Path, read_all: Callable[..., Any]) -> None:
    path = write(tmp_path / "in" / "part-0.npy")
    bounds = [(0, 4), (4, 4), (4, 9), (9, 16)]
    write_metadata(path, bounds)
    for part_bytes in (1 << 40, *range(1, 12), 40):
        items = read_all(tmp_path / "in", part_bytes, stream_dtype="uint16", end_id=END)
        assert tokens(items) == [IDS[start:end] for start, end in bounds]
    assert [file.name for file in list_inputs([str(tmp_path / "in")], source=None)] == ["in/part-0.npy"]
    for wrong, message in (
        ([(0, 4), (5, 16)], "a document from 5 to 16 follows one up to 4 of 16 ids"),
        ([(0, 4), (4, 17)], "a document from 4 to 17 follows"),
        ([(0, 4)], r"its documents end at 4, and .*part-0\.npy holds 16 ids"),
    ):
        write_metadata(path, wrong)
        with pytest.raises(DataError, match=message):
            read_all(path, stream_dtype="uint16")


def test_an_address_of_another_file_system(read_all: Callable[..., Any]) -> None:
    root = f"memory://{uuid.uuid4().hex}/in"
    system, base = fsspec.core.url_to_fs(root)
    system.pipe_file(f"{base}/part-0.npy", np.array(IDS, "<u2").tobytes())
    assert tokens(read_all(root, 9, stream_dtype="uint16", end_id=END)) == DOCUMENTS


def test_too_long_documents_are_failures_and_reading_goes_on(
    tmp_path: Path, read_all: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npy, "MAX_DOCUMENT_IDS", 4)
    monkeypatch.setattr(npy, "_BLOCK_IDS", 2)
    items = read_all(write(tmp_path / "part-0.npy"), stream_dtype="uint16", end_id=END)
    assert [isinstance(item, Failure) for item in items] == [False, False, False, True, True]
    assert "holds 5 ids in one document" in items[3].reason


@pytest.mark.filterwarnings("ignore:Stored array in format 3.0")
@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3), np.int32), r"is not one dimension of little-endian integers but .*\(2, 3\)"),
        (np.zeros(3, np.float32), "but .*<f4"),
        (np.zeros(3, ">i4"), "but .*>i4"),
        (np.array([None], object), r"but .*\|O"),
        (np.zeros(3, [("Δ", "<i4")]), r"header of version \(3, 0\)"),
    ],
)
def test_arrays_that_are_no_stream_of_ids(
    tmp_path: Path, read_all: Callable[..., Any], array: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        read_all(tmp_path / "a.npy", end_id=END)


def test_widths_that_cannot_be(tmp_path: Path, read_all: Callable[..., Any]) -> None:
    path = write(tmp_path / "part-0.npy", list(range(1, 41)), "<u4")
    with pytest.raises(
        DataError, match="every second id of 2 bytes is 0, so it holds ids of 4 bytes: give --tokens-dtype uint32"
    ):
        read_all(path, stream_dtype="uint16", end_id=END)
    with pytest.raises(DataError, match="does not say how wide an id is: name the tokenizer with --tokenizer"):
        read_all(path, end_id=END)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="159 bytes are no whole number of uint32 ids"):
        read_all(path, stream_dtype="uint32", end_id=END)
    np.save(tmp_path / "short.npy", np.arange(9))
    (tmp_path / "short.npy").write_bytes((tmp_path / "short.npy").read_bytes()[:-8])
    with pytest.raises(DataError, match="bytes are not the 9 ids of int64 that it declares"):
        read_all(tmp_path / "short.npy", end_id=END)


def test_a_dataset_takes_end_token_and_width_from_its_tokenizer(
    tmp_path: Path, encoder: TextEncoder, texts: list[str]
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(encoder.data)
    encoded = [np.append(ids, encoder.eos_id) for ids in encoder.encode(texts, texts)]
    write(tmp_path / "in" / "part-0.npy", np.concatenate(encoded).tolist())
    inputs = Inputs(
        tuple(list_inputs([str(tmp_path / "in")], source=None)), "ids", "none", ReadOptions(sequence_length=16)
    )
    prepared = prepare(
        inputs,
        tmp_path / "out",
        name="d",
        tokenizer=tmp_path / "tokenizer.json",
        sequence_length=16,
        heldout_fraction=0.0,
        order="as_read",
    )
    assert prepared is not None
    assert prepared.manifest.documents.read == len(texts)
    shards = ShardSet(prepared.folder, prepared.manifest, "train")
    stream = np.concatenate(encoded)
    ids, _ = shards.rows(np.arange(shards.num_rows))
    assert all(np.array_equal(row, stream[place * 16 : place * 16 + 17]) for place, row in enumerate(ids))


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.booleans(), st.booleans(), st.integers(0, 130), st.binary(max_size=12), st.booleans())
def test_any_damage_is_documents_failures_or_one_error(
    tmp_path: Path, check_damaged: Callable[..., None], save: bool, metadata: bool, place: int, data: bytes, cut: bool
) -> None:
    path = write(tmp_path / uuid.uuid4().hex / "part-0.npy", save=save)
    damaged = path
    if metadata:
        write_metadata(path, [(0, 4), (4, 16)])
        damaged = path.with_name("part-0.csv.gz")
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:place] + data + (b"" if cut else whole[place + len(data) :]))
    check_damaged(path, 9, stream_dtype="uint16", end_id=END)
