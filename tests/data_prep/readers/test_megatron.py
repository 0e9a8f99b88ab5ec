"""Megatron's .bin and .idx, built here byte by byte after the form that `indexed_dataset.py` of Megatron-LM has."""

from __future__ import annotations

import itertools
import struct
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
from weftrain.data_prep.readers import ids, megatron
from weftrain.data_prep.readers.documents import Document, Failure
from weftrain.data_prep.readers.listing import list_inputs

CODES = {"<u1": 1, "<i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8}
DOCUMENTS = [[[1, 2, 3], [4]], [[5, 6]], [], [[7], [8, 9], [10]]]  # of sequences


def write(
    folder: Path,
    documents: Sequence[Sequence[Sequence[int]]] = DOCUMENTS,
    dtype: str = "<i4",
    code: int | None = None,
    tail: bytes = b"",
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    sequences = [np.array(sequence, dtype) for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    first = np.array([0, *itertools.accumulate(map(len, documents))], "<i8")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code or CODES[dtype], len(sequences), len(first))
    (folder / "m.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + first.tobytes() + tail)
    (folder / "m.bin").write_bytes(b"".join(sequence.tobytes() for sequence in sequences))
    return folder / "m.bin"


def tokens(items: Sequence[Document | Failure]) -> list[list[int]]:
    assert all(
        isinstance(item, Document) and item.tokens is not None and item.tokens.dtype == np.int32 for item in items
    ), items
    return [item.tokens.tolist() for item in items if isinstance(item, Document) and item.tokens is not None]


@pytest.mark.parametrize("dtype", CODES)
def test_every_integer_type_documents_of_several_sequences_and_any_cut(
    tmp_path: Path, read_all: Callable[..., Any], dtype: str
) -> None:
    path = write(tmp_path / "in", dtype=dtype)
    wanted = [[1, 2, 3, 4], [5, 6], [], [7, 8, 9, 10]]
    for part_bytes in (1 << 40, 5, 1):
        items = read_all(tmp_path / "in", part_bytes)
        assert tokens(items) == wanted
        assert [item.record for item in items] == [0, 1, 2, 3]
    assert [file.name for file in list_inputs([str(tmp_path / "in")], source=None)] == [f"in/{path.name}"]


@pytest.mark.parametrize("width", [2, 4])
def test_files_that_datatrove_writes(tmp_path: Path, read_all: Callable[..., Any], width: int) -> None:
    writer = pytest.importorskip(
        "datatrove.pipeline.tokens.megatron_tokenizer",
        reason="datatrove is not installed: pip install 'weftrain[quality]'",
    )
    written = writer.MegatronTokenizedFile(str(tmp_path), "00000_tokens", token_size=width)
    for document in ([1, 2, 3], [], [65_535]):
        written.write(document)
    written.close()
    assert tokens(read_all(tmp_path)) == [[1, 2, 3], [], [65_535]]


def test_an_index_longer_than_what_is_read_at_once(
    tmp_path: Path, read_all: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron, "TABLE_ROWS", 2)
    documents = [[[number, number + 1], [number] * (number % 3), [7]] for number in range(9)]
    write(tmp_path, documents)
    assert tokens(read_all(tmp_path / "m.bin", 40)) == [list(itertools.chain(*document)) for document in documents]


def test_what_is_no_id_or_too_long_is_a_failure_of_its_document(
    tmp_path: Path, read_all: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron, "MAX_DOCUMENT_IDS", 4)
    monkeypatch.setattr(ids, "MAX_DOCUMENT_IDS", 4)
    write(tmp_path, [[[1]], [[2, -1]], [[1, 2, 3], [4, 5]], [[3]]], "<i8")
    first, negative, long, last = read_all(tmp_path / "m.bin")
    assert tokens([first, last]) == [[1], [3]]
    assert "holds ids -1..2, and each must be one of 0..2147483647; repair it" in negative.reason
    assert "holds 5 ids in one document, more than 4" in long.reason


def test_a_multimodal_index_whose_sequences_are_all_text(tmp_path: Path, read_all: Callable[..., Any]) -> None:
    path = write(tmp_path, tail=bytes(6))
    assert len(read_all(path)) == 4
    with pytest.raises(DataError, match=r"m\.idx: is multimodal: it has sequences of a mode other than 0"):
        read_all(write(tmp_path, tail=bytes(5) + b"\x01"))


@pytest.mark.parametrize(
    ("code", "message"),
    [(6, "version 1 and float64"), (7, "version 1 and float32"), (9, "version 1 and type 9"), (255, "type 255")],
)
def test_types_that_are_no_ids(tmp_path: Path, read_all: Callable[..., Any], code: int, message: str) -> None:
    with pytest.raises(DataError, match=rf"m\.idx: has .*{message}"):
        read_all(write(tmp_path, code=code))


def test_files_of_another_file_system_and_a_bin_alone(tmp_path: Path, read_all: Callable[..., Any]) -> None:
    path = write(tmp_path)
    root = f"memory://{uuid.uuid4().hex}/in"
    system, base = fsspec.core.url_to_fs(root)
    for name in ("m.bin", "m.idx"):
        system.pipe_file(f"{base}/{name}", (tmp_path / name).read_bytes())
    with pytest.raises(
        DataError, match=r"m\.bin: Megatron files are read from local folders only; copy them here first"
    ):
        list_inputs([root], source=None)
    (tmp_path / "m.idx").unlink()
    with pytest.raises(DataError, match=r"a Megatron \.bin needs its index beside it"):
        read_all(path, format="megatron")


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 200), st.binary(max_size=9), st.sampled_from(["m.idx", "m.bin"]), st.booleans())
def test_any_damage_is_documents_failures_or_one_error(
    tmp_path: Path, check_damaged: Callable[..., None], place: int, data: bytes, name: str, cut: bool
) -> None:
    folder = tmp_path / uuid.uuid4().hex
    path = write(folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:place] + data + (b"" if cut else whole[place + len(data) :]))
    check_damaged(path, 11)
