"""Shards: what is written is what is read, twice the same bytes, whole or not at all, and nothing hostile or damaged
gets through.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from fault_injection import DEATHS, Death, Faults, injected
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weftrain.core.errors import DataError
from weftrain.core.formats import fsops, shard_file, shard_format
from weftrain.core.formats import shard_reader as shards
from weftrain.core.formats.shard_format import Documents, FimRecord, num_tokens, write_shard
from weftrain.core.formats.shard_reader import ShardReader, cumulative_lengths, read_document_starts, read_rows

TOKENIZER = "ab" * 32


def documents_of(length: int, rng: np.random.Generator) -> Documents:
    end = np.unique(np.append(rng.integers(1, length + 1, 5), length))
    identity = rng.integers(0, 256, (len(end), 16)).astype(np.uint8)
    source, file = (rng.integers(0, 2, len(end)).astype(np.int32) for _ in range(2))
    split = np.sort(rng.integers(0, 100, (len(end), 2)), axis=1)
    fim = FimRecord(rng.integers(0, 3, len(end)), split)
    return Documents(end, identity, source, 2, file, rng.integers(0, 1 << 40, len(end)), fim)


def few_documents(
    end: list[int],
    source: list[int],
    num_sources: int,
    id_bytes: int = 16,
    fim: FimRecord | None = None,
    **origin: list[int],
) -> Documents:
    number = len(end)
    file, record = (np.array(origin.get(name, [0] * number)) for name in ("file", "record"))
    return Documents(
        np.array(end), np.zeros((number, id_bytes), np.uint8), np.array(source), num_sources, file, record, fim
    )


def make(
    path: Path,
    *,
    rows: int = 40,
    sequence_length: int = 16,
    independent: bool = False,
    vocab_size: int = 5000,
    mask: bool = True,
    seed: int = 0,
) -> tuple[np.ndarray, Documents, np.ndarray | None]:
    """Write a random shard; its tokens, documents and loss mask."""
    rng = np.random.default_rng(seed)
    stride = sequence_length + independent
    tokens = rng.integers(0, vocab_size, num_tokens(rows, sequence_length, stride))
    documents, loss_mask = documents_of(len(tokens), rng), rng.integers(0, 2, len(tokens)) if mask else None
    write_shard(
        path,
        tokens,
        documents,
        sequence_length=sequence_length,
        row_stride=stride,
        vocab_size=vocab_size,
        tokenizer_sha256=TOKENIZER,
        loss_mask=loss_mask,
    )
    return tokens, documents, loss_mask


def windows(stream: np.ndarray, sequence_length: int, stride: int) -> np.ndarray:
    """Row by row from the definition."""
    rows = (len(stream) - sequence_length - 1) // stride + 1
    return np.stack([stream[row * stride : row * stride + sequence_length + 1] for row in range(rows)])


def assert_holds(reader: ShardReader, tokens: np.ndarray, documents: Documents, mask: np.ndarray | None) -> None:
    everything = np.arange(reader.num_rows)
    ids = reader.rows(everything)
    assert ids.dtype == np.int64
    assert np.array_equal(ids, windows(tokens, reader.sequence_length, reader.row_stride))
    read_mask = reader.loss_mask(everything)
    assert (read_mask is None) == (mask is None)
    if mask is not None:
        assert read_mask is not None
        assert read_mask.dtype == np.bool_
        assert np.array_equal(read_mask, windows(mask, reader.sequence_length, reader.row_stride)[:, 1:])
    read = reader.documents()
    assert np.array_equal(read.end, documents.end)
    assert np.array_equal(read.id, documents.id)
    assert np.array_equal(read.source, documents.source)
    assert read.num_sources == documents.num_sources
    assert np.array_equal(read.file, documents.file)
    assert np.array_equal(read.record, documents.record)
    assert read.fim is not None
    assert documents.fim is not None
    assert np.array_equal(read.fim.mode, documents.fim.mode)
    assert np.array_equal(read.fim.split, documents.fim.split)


def check_boundaries(reader: ShardReader, documents: Documents) -> None:
    """document_starts, cumulative_lengths and spans, each from the definition, token by token."""
    of_position = np.searchsorted(documents.end, np.arange(documents.end[-1]), side="right")
    rows = np.arange(reader.num_rows)
    starts = reader.document_starts(rows)
    assert starts.dtype == np.int32
    lengths = np.diff(cumulative_lengths(starts)).tolist()
    for row in rows.tolist():
        first = row * reader.row_stride
        inside = of_position[first : first + reader.sequence_length]
        expected = [int(np.flatnonzero(inside == document)[0]) for document in inside]
        assert starts[row].tolist() == expected
        parts = [lengths.pop(0) for _ in np.unique(inside)]
        assert parts == [int((inside == document).sum()) for document in np.unique(inside)]
        spans = reader.document_spans(row)
        assert [span.id for span in spans] == [documents.id[document].tobytes() for document in np.unique(inside)]
        assert [(span.first, span.last) for span in spans] == [
            (int(np.flatnonzero(inside == document)[0]), int(np.flatnonzero(inside == document)[-1]))
            for document in np.unique(inside)
        ]
        assert documents.fim is not None
        for span, document in zip(spans, np.unique(inside), strict=True):
            assert (span.file, span.record) == (documents.file[document], documents.record[document])
            assert span.fim == (documents.fim.mode[document], *documents.fim.split[document])
    assert not lengths


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 60),
    sequence_length=st.integers(1, 40),
    independent=st.booleans(),
    vocab_size=st.sampled_from([2, 300, 65_535, 65_536, 65_537, 2**31]),
    mask=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_round_trip(
    tmp_path: Path, rows: int, sequence_length: int, independent: bool, vocab_size: int, mask: bool, seed: int
) -> None:
    path = tmp_path / "shard.h5"
    shape: dict[str, Any] = {
        "rows": rows,
        "sequence_length": sequence_length,
        "independent": independent,
        "vocab_size": vocab_size,
    }
    written = make(path, **shape, mask=mask, seed=seed)
    reader = ShardReader(path)
    assert (reader.num_rows, reader.sequence_length, reader.vocab_size) == (rows, sequence_length, vocab_size)
    assert reader.access == "mapped"
    assert_holds(reader, *written)
    check_boundaries(reader, written[1])
    with h5py.File(path) as file:
        assert file["data"].dtype == (np.uint16 if vocab_size <= 65_536 else np.int32)
        assert file.attrs["n_examples"] == rows  # what a Cerebras loader asks for


def test_rows_in_any_order_and_repeated(tmp_path: Path) -> None:
    tokens, _, _ = make(tmp_path / "s.h5")
    indices = np.array([7, 0, 39, 7, 3])
    reader = ShardReader(tmp_path / "s.h5")
    assert np.array_equal(reader.rows(indices), windows(tokens, 16, 16)[indices])
    none = np.array([], dtype=np.int64)
    mask = reader.loss_mask(none)
    assert mask is not None
    assert (reader.rows(none).shape, mask.shape, reader.document_starts(none).shape) == ((0, 17), (0, 16), (0, 16))
    for outside in (-1, 40):
        with pytest.raises(IndexError, match="of 40"):
            reader.rows(np.array([outside]))


def test_two_writes_give_the_same_bytes_and_data_is_page_aligned(tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5"):
        make(tmp_path / name, rows=400, vocab_size=70_000)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["data"].id.get_offset() % 4096 == 0
        assert not any(file[name].id.get_create_plist().get_obj_track_times() for name in file)


def test_what_the_writer_says_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    tokens = np.arange(33)
    table = few_documents([33], [0], 1)
    info = write_shard(
        path, tokens, table, sequence_length=16, row_stride=16, vocab_size=33, tokenizer_sha256=TOKENIZER
    )
    assert info.num_bytes == path.stat().st_size
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert info.num_rows == 2
    assert info.digest == ShardReader(path).digest


def test_the_digest_commits_to_everything(tmp_path: Path) -> None:
    """Two shards that differ in one token, one mask entry, one document or one attribute have different digests."""
    tokens, mask = np.arange(33), np.ones(33, dtype=np.uint8)
    base: dict[str, Any] = {
        "tokens": tokens,
        "documents": few_documents([9, 33], [0, 0], 2),
        "sequence_length": 16,
        "row_stride": 16,
        "vocab_size": 40,
        "tokenizer_sha256": TOKENIZER,
        "loss_mask": mask,
    }
    documents = base["documents"]
    other_mask = mask.copy()
    other_mask[5] = 0
    changes: list[dict[str, Any]] = [
        {"tokens": np.append(tokens[:-1], 0)},
        {"loss_mask": other_mask},
        {"loss_mask": None},
        {"vocab_size": 41},
        {"tokenizer_sha256": "cd" * 32},
        {"sequence_length": 8, "row_stride": 8},
        {"documents": dataclasses.replace(documents, end=np.array([8, 33]))},
        {"documents": dataclasses.replace(documents, id=documents.id + 1)},
        {"documents": dataclasses.replace(documents, source=np.array([0, 1]))},
        {"documents": dataclasses.replace(documents, num_sources=3)},
        {"documents": dataclasses.replace(documents, file=np.array([0, 1]))},
        {"documents": dataclasses.replace(documents, record=np.array([0, 1]))},
        {"documents": dataclasses.replace(documents, fim=FimRecord(np.zeros(2), np.zeros((2, 2))))},
    ]
    digests = {
        write_shard(tmp_path / f"{index}.h5", **base | change).digest for index, change in enumerate([{}, *changes])
    }
    assert len(digests) == len(changes) + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.arange(32)}, "n_examples"),
        ({"tokens": np.arange(16)}, "n_examples"),
        ({"tokens": np.arange(33) - 1}, "vocabulary"),
        ({"vocab_size": 32}, "vocabulary"),
        ({"row_stride": 15}, "row_stride"),
        ({"loss_mask": np.ones(32)}, "loss_mask"),
        ({"loss_mask": np.full(33, 2)}, "loss_mask"),
        ({"documents": few_documents([32], [0], 1)}, "document ends"),
        ({"documents": few_documents([33], [1], 1)}, "sources"),
        ({"documents": few_documents([33], [0], 1, id_bytes=8)}, "shapes"),
        ({"documents": few_documents([33], [-1], 1)}, "a file and no source"),
        ({"documents": few_documents([33], [0], 1, file=[-1])}, "no source, or a source and no file"),
        ({"documents": few_documents([33], [0], 1, file=[-2])}, "doc_file"),
        ({"documents": few_documents([33], [0], 1, record=[0, 0])}, "shapes"),
        ({"documents": few_documents([33], [0], 1, fim=FimRecord(np.array([3]), np.array([[0, 1]])))}, "0..2"),
        (
            {"documents": few_documents([33], [0], 1, fim=FimRecord(np.array([1]), np.array([[2, 1]])))},
            "cuts do not rise",
        ),
        (
            {"documents": few_documents([33], [0], 1, fim=FimRecord(np.array([1]), np.array([[0, 1], [0, 1]])))},
            "doc_fim",
        ),
    ],
)
def test_the_writer_refuses_contradictions(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "tokens": np.arange(33),
        "documents": few_documents([33], [0], 1),
        "sequence_length": 16,
        "row_stride": 16,
        "vocab_size": 40,
        "tokenizer_sha256": TOKENIZER,
    }
    with pytest.raises(ValueError, match=r"s\.h5") as caught:
        write_shard(tmp_path / "s.h5", **arguments | change)
    assert message in str(caught.value) or "n_examples" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# -- whole or not at all


def operations_of_a_write(path: Path) -> int:
    with injected(Faults()) as faults:
        make(path)
    path.unlink()
    return len(faults.trace)


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    for operation in range(operations_of_a_write(path) - 1):  # all before the last, the sync of the folder
        with (
            injected(Faults("ENOSPC", operation)),
            pytest.raises(DataError, match=r"s\.h5: the shard cannot be written: No space left on device.*: make room"),
        ):
            make(path)
        assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_nothing_that_is_taken_for_a_shard(tmp_path: Path) -> None:
    path, outcomes = tmp_path / "s.h5", set()
    for operation in range(operations_of_a_write(path)):
        for kind in DEATHS:
            with injected(Faults(kind, operation)), pytest.raises(Death):
                make(path)
            outcomes.add(path.exists())
            if path.exists():
                ShardReader(path).verify()
            for left in tmp_path.iterdir():
                assert left == path or left.name.startswith(fsops.TEMPORARY_PREFIX)
                left.unlink()
    assert outcomes == {False, True}


# -- hostile and damaged files


def edit(path: Path, change: Callable[[h5py.File], None]) -> None:
    with h5py.File(path, "r+", libver="latest") as file:
        change(file)


def replace(name: str, **arguments: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **arguments)

    return change


def relink(name: str, link: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file.move(name, "moved") if isinstance(link, h5py.SoftLink) else file.pop(name)
        file[name] = link
        if isinstance(link, h5py.SoftLink):
            del file["moved"]

    return change


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(shape=file["data"].shape, dtype="<u2")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "data", shape=file["data"].shape)
    del file["data"]
    file.create_virtual_dataset("data", layout)


def former_names(names: bytes, format: bytes = b"weftrain-shard/2") -> Callable[[h5py.File], None]:
    """The attributes that shards of format 2 had."""

    def change(file: h5py.File) -> None:
        del file.attrs["num_sources"]
        file.attrs["sources"], file.attrs["format"] = np.bytes_(names), np.bytes_(format)

    return change


def set_attribute(name: str, value: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file.attrs.pop(name, None)
        if value is not None:
            file.attrs[name] = value

    return change


def grow(name: str, shape: tuple[int, ...], **arguments: Any) -> Callable[[h5py.File], None]:
    return replace(name, shape=shape, dtype={"data": "<u2", "doc_end": "<i8"}[name], **arguments)


LENGTH = num_tokens(40, 16, 16)
HOSTILE: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "soft link": (
        lambda file: (file.move("data", "doc"), file.__setitem__("data", h5py.SoftLink("/doc")))[0],
        "file: holds",
    ),
    "soft link in place": (relink("doc_end", h5py.SoftLink("/data")), "doc_end: is a soft or external link"),
    "external link": (relink("data", h5py.ExternalLink("/etc/passwd", "/data")), "data: is a soft or external link"),
    "external link for a table": (
        relink("block_digest", h5py.ExternalLink("other.h5", "/x")),
        "block_digest: is a soft or external link",
    ),
    "virtual dataset": (virtual, "data: is a virtual"),
    "external storage": (
        replace("data", shape=(LENGTH,), dtype="<u2", external=[("/etc/passwd", 0, 2 * LENGTH)]),
        "data: is a virtual, compact or externally stored",
    ),
    "a group": (lambda file: (file.pop("data"), file.create_group("data"))[0], "data: is not a dataset"),
    "an unknown object": (lambda file: file.create_dataset("more", data=[1]), "file: holds"),
    "a missing table": (lambda file: file.pop("doc_id"), "file: holds"),
    "wrong dtype": (replace("data", data=np.zeros(LENGTH, "<u4")), "data: has type uint32, not uint16"),
    "big-endian": (replace("data", data=np.zeros(LENGTH, ">u2")), "data: has type"),
    "float ends": (replace("doc_end", data=np.array([float(LENGTH)])), "doc_end: has type float64"),
    "strings": (replace("data", data=["a"] * 3), "data: has type object"),
    "wrong rank": (replace("data", data=np.zeros((LENGTH, 1), "<u2")), "data: has rank 2"),
    "scalar": (replace("data", data=np.uint16(1)), "data: "),
    "2 TiB declared": (grow("data", (1 << 40,)), "data: declares 2,199,023,255,552 bytes"),
    "2 TiB declared in chunks": (
        grow("data", (1 << 40,), chunks=(4096,), compression="gzip"),
        "data: declares 2,199,023,255,552 bytes",
    ),
    "a huge chunk": (grow("data", (1 << 30,), chunks=(1 << 30,), compression="gzip"), "data: declares"),
    "a huge chunk that is stored": (
        replace(
            "data",
            shape=(LENGTH,),
            dtype="<u2",
            maxshape=(None,),
            chunks=(34_000_000,),
            compression="gzip",
            data=np.ones(LENGTH, "<u2"),
        ),
        "data: declares 1,282 bytes in chunks of 68,000,000",
    ),
    "a huge table": (grow("doc_end", (1 << 40,)), "doc_end: declares"),
    "another filter": (
        replace("data", data=np.zeros(LENGTH, "<u2"), chunks=(64,), fletcher32=True),
        "data: uses a filter",
    ),
    "too few tokens": (replace("data", data=np.zeros(LENGTH - 16, "<u2")), "n_examples: 40 rows"),
    "too many rows": (set_attribute("n_examples", np.int64(41)), "n_examples: 41 rows"),
    "no rows": (set_attribute("n_examples", np.int64(0)), "n_examples"),
    "negative rows": (set_attribute("n_examples", np.int64(-(2**62))), "n_examples"),
    "float attribute": (set_attribute("n_examples", 40.0), "n_examples: is not a 64-bit integer"),
    "array attribute": (set_attribute("n_examples", np.array([40])), "n_examples: is not a scalar"),
    "variable string": (set_attribute("tokenizer_sha256", TOKENIZER), "tokenizer_sha256: is not a fixed-length string"),
    "long string": (set_attribute("digest", np.bytes_(b"a" * 65)), "digest: is not a fixed-length string"),
    "missing attribute": (set_attribute("vocab_size", None), "attributes: are"),
    "another format": (set_attribute("format", np.bytes_(b"weftrain-shard/9")), "format: is 'weftrain-shard/9'"),
    "another tokenizer": (set_attribute("tokenizer_sha256", np.bytes_(b"cd" * 32)), "digest: "),
    "smaller vocabulary": (set_attribute("vocab_size", np.int64(9)), "digest: "),
    "zero vocabulary": (set_attribute("vocab_size", np.int64(0)), "vocab_size: 0"),
    "stride 0": (set_attribute("row_stride", np.int64(0)), "row_stride: 0"),
    "sequence length 0": (set_attribute("sequence_length", np.int64(0)), "row_stride"),
    "fewer sources": (set_attribute("num_sources", np.int64(1)), "doc_source: an index lies outside the 1 sources"),
    "more sources": (set_attribute("num_sources", np.int64(3)), "digest: "),
    "a former attribute": (set_attribute("sources", np.bytes_(b'["a"]')), "attributes: are"),
    "sources no list": (former_names(b'{"a":1}'), "sources: is not a JSON list"),
    "sources no JSON": (former_names(b"["), "sources: is not JSON"),
    "too few former sources": (former_names(b'["a"]'), "doc_source: an index lies outside the 1 sources"),
    "former sources in format 3": (
        former_names(b'["a","b"]', b"weftrain-shard/3"),
        "format: is 'weftrain-shard/3', which these attributes",
    ),
    "falling ends": (replace("doc_end", data=np.array([9, 5, LENGTH])), "doc_end: "),
    "short mask": (replace("loss_mask", data=np.ones(LENGTH - 1, "|u1")), "loss_mask: has shape"),
    "altered table": (lambda file: file["doc_end"].__setitem__(0, file["doc_end"][0] + 1), "doc_end|digest"),
    "altered digests": (
        lambda file: file["block_digest"].__setitem__((0, 0), file["block_digest"][0, 0] ^ 1),
        "digest: ",
    ),
    "no block digests": (replace("block_digest", data=np.zeros((0, 32), "|u1")), "block_digest: has shape"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_on_opening(tmp_path: Path, case: str) -> None:
    path = tmp_path / "s.h5"
    make(path)
    change, message = HOSTILE[case]
    edit(path, change)
    with pytest.raises(DataError, match=message) as caught:
        ShardReader(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert "remove the dataset and prepare it again" in str(caught.value)


def test_a_size_that_lies_past_the_end_of_the_file(tmp_path: Path) -> None:
    """1 GiB allocated, cut off, and the end of file that an old superblock states without a checksum (bytes 40 to 47)
    made to fit.

    HDF5 2.0 refuses it too; 1.14 opens it.
    """
    make(tmp_path / "s.h5")
    path = tmp_path / "lies.h5"
    with h5py.File(tmp_path / "s.h5") as source, h5py.File(path, "w", libver="earliest") as file:
        for name, value in source.attrs.items():
            file.attrs[name] = value
        for name in set(source) - {"data"}:
            file[name] = source[name][...]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        h5py.h5d.create(file.id, b"data", h5py.h5t.STD_U16LE, h5py.h5s.create_simple((1 << 29,)), plist)
        offset = file["data"].id.get_offset()
    os.truncate(path, offset + 1000)
    data = bytearray(path.read_bytes())
    data[40:48] = len(data).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(
        DataError, match=r"lies\.h5: (data: declares 1,073,741,824 bytes at offset|file: cannot be read as HDF5)"
    ):
        ShardReader(path)


def test_files_that_are_no_hdf5(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    with pytest.raises(DataError, match="is missing"):
        ShardReader(path)
    with pytest.raises(DataError, match="not a regular file"):
        ShardReader(tmp_path)
    for contents in (b"", b"text", b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n" + bytes(4096)):
        path.write_bytes(contents)
        with pytest.raises(DataError, match="cannot be read as HDF5"):
            ShardReader(path)
    make(tmp_path / "whole.h5")
    path.write_bytes(bytes(512) + (tmp_path / "whole.h5").read_bytes())  # HDF5 looks for its signature at 512, too
    with pytest.raises(DataError):
        ShardReader(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "s.h5")
    with pytest.raises(DataError, match="not a regular file"):
        ShardReader(tmp_path / "s.h5")


def test_an_altered_token_is_found_on_first_touch_only_of_its_block(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    tokens, _, _ = make(path, rows=5000, sequence_length=256, mask=False)
    with h5py.File(path) as file:
        offset = file["data"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[offset + 2 * (1 << 20) - 100] ^= 1  # in the second block
    path.write_bytes(data)
    reader = ShardReader(path)
    assert np.array_equal(reader.rows(np.array([0, 4200])), windows(tokens, 256, 256)[[0, 4200]])
    for row in (3000, 4095):  # another row of the damaged block, and the altered one
        with pytest.raises(DataError, match=r"s\.h5: data: block 1 \(rows 2047\.\.4095\) does not hash"):
            reader.rows(np.array([row]))
    with pytest.raises(DataError, match="block 1"):
        reader.verify()


def test_a_row_across_blocks_checks_both(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    length = 700_000  # a row of three blocks
    tokens, documents, mask = make(path, rows=2, sequence_length=length)
    assert_holds(ShardReader(path), tokens, documents, mask)
    with h5py.File(path) as file:
        offset = file["data"].id.get_offset()
    for block, row in ((0, 0), (1, 0), (1, 1), (2, 1)):
        data = bytearray(path.read_bytes())
        data[offset + block * (1 << 20) + 5] ^= 1
        damaged = tmp_path / "damaged.h5"
        damaged.write_bytes(data)
        with pytest.raises(DataError, match=f"block {block} "):
            ShardReader(damaged).rows(np.array([row]))


def test_boundaries_come_from_the_mapped_file_which_is_not_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a large dataset has more shards than tables of documents could be kept of."""
    _, documents, _ = make(tmp_path / "s.h5")
    reader = ShardReader(tmp_path / "s.h5")
    assert np.array_equal(reader.document_ends(), documents.end)
    monkeypatch.setattr(shards, "open_shard", None)
    assert reader.document_starts(np.arange(40)).shape == (40, 16)
    assert reader.document_starts(np.array([], dtype=np.int64)).shape == (0, 16)
    with pytest.raises(IndexError, match="of 40"):
        reader.document_starts(np.array([40]))


def damaged_block(path: Path, block: int) -> None:
    """Flip a bit of a block of `data`."""
    with h5py.File(path) as file:
        offset = file["data"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[offset + block * (1 << 20) + 5] ^= 1
    path.write_bytes(data)


def test_a_block_is_hashed_once_whichever_rows_reach_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # five blocks, several verified at once
    tokens, _, _ = make(tmp_path / "s.h5", rows=9000, sequence_length=256, mask=False)
    hashed: list[int] = []
    monkeypatch.setattr(
        shards, "block_digest", lambda data, mask: (hashed.append(len(data)), shard_format.block_digest(data, mask))[1]
    )
    reader = ShardReader(tmp_path / "s.h5")
    rows = np.random.default_rng(1).permutation(9000)
    for start in range(0, 9000, 1500):
        assert np.array_equal(
            reader.rows(rows[start : start + 1500]), windows(tokens, 256, 256)[rows[start : start + 1500]]
        )
    reader.rows(rows)
    reader.tokens(0, len(tokens))
    reader.verify()
    assert sorted(hashed) == [len(tokens) - 4 * (1 << 19), *[1 << 19] * 4]


def test_threads_that_read_the_same_blocks_at_once_get_verified_rows(tmp_path: Path) -> None:
    tokens, _, _ = make(tmp_path / "s.h5", rows=9000, sequence_length=256, mask=False)
    reader, rows = ShardReader(tmp_path / "s.h5"), np.arange(0, 9000, 100)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(reader.rows, [rows] * 8):
            assert np.array_equal(found, windows(tokens, 256, 256)[rows])
    assert reader.is_verified


def test_of_several_damaged_blocks_the_first_row_s_is_named_and_nothing_of_them_is_taken_for_verified(
    tmp_path: Path,
) -> None:
    """Blocks that one reading reaches are verified at once by threads; which of them is named must not depend on
    these.
    """
    path = tmp_path / "s.h5"
    tokens, _, _ = make(path, rows=9000, sequence_length=256, mask=False)
    for block in (1, 3):
        damaged_block(path, block)
    reader = ShardReader(path)
    rows = np.array([0, 7000, 3000, 5000, 8500])  # blocks 0, 3, 1, 2, 4
    for _ in range(3):
        with pytest.raises(DataError, match="block 3 "):
            reader.rows(rows)
    good = np.array([0, 5000, 8500])
    assert np.array_equal(reader.rows(good), windows(tokens, 256, 256)[good])
    with pytest.raises(DataError, match="block 1 "):
        reader.verify()
    assert not reader.is_verified


def test_rows_of_shards_of_two_dtypes_masked_and_not_mapped_and_chunked_in_one_batch(tmp_path: Path) -> None:
    written = {
        name: make(tmp_path / name, vocab_size=vocab_size, mask=mask, independent=independent, seed=seed)
        for seed, (name, vocab_size, mask, independent) in enumerate(
            [("a", 5000, False, False), ("b", 70_000, True, False), ("c", 5000, True, True), ("d", 70_000, False, True)]
        )
    }
    with h5py.File(tmp_path / "d") as source, h5py.File(tmp_path / "e", "w") as file:
        for key, value in source.attrs.items():
            file.attrs[key] = value
        for key in source:
            file.create_dataset(key, data=source[key][...], chunks=True, compression="gzip")
    written["e"] = written["d"]
    rng = np.random.default_rng(4)
    names, rows = rng.choice(list(written), 200), rng.integers(0, 40, 200)
    readers = {name: ShardReader(tmp_path / name) for name in written}
    ids = np.empty((200, 17), dtype=np.int64)
    positions = [int(row) * readers[name].row_stride for name, row in zip(names, rows, strict=True)]
    mask = read_rows(ids, [readers[name] for name in names], positions)
    assert mask is not None
    for index, (name, row) in enumerate(zip(names, rows, strict=True)):
        tokens, _, loss_mask = written[name]
        stride = readers[name].row_stride
        assert np.array_equal(ids[index], windows(tokens, 16, stride)[row])
        assert np.array_equal(
            mask[index], np.ones(16) if loss_mask is None else windows(loss_mask, 16, stride)[row][1:]
        )
    assert read_rows(ids[:1], [readers["a"]], [16]) is None
    readers["e"].close()


@pytest.mark.parametrize(("vocab_size", "bad"), [(5000, 5000), (70_000, -1), (70_000, 70_000)])
def test_a_token_beyond_the_vocabulary_is_refused_with_its_row(tmp_path: Path, vocab_size: int, bad: int) -> None:
    """A shard that is consistent in itself and still holds an id that the model has no embedding for."""
    path = tmp_path / "s.h5"
    make(path, vocab_size=vocab_size, mask=False)

    def change(file: h5py.File) -> None:
        file["data"][7 * 16 + 3] = bad
        file["block_digest"][...] = shard_format._block_digests(file["data"][...], None)
        header = {
            name: value.decode() if isinstance(value, bytes) else int(value) for name, value in file.attrs.items()
        }
        tables = {name: file[name][...] for name in (*shard_format.TABLES, shard_format.FIM)}
        file.attrs["digest"] = np.bytes_(shard_format.shard_digest(header, tables, False))

    edit(path, change)
    with pytest.raises(DataError, match=f"row 7 holds token id {bad}, beyond the vocabulary of {vocab_size}"):
        ShardReader(path).rows(np.array([0]))


@pytest.mark.parametrize("compression", ["gzip", None])
@pytest.mark.parametrize("mask", [True, False])
def test_a_rechunked_shard_is_read_through_h5py_and_says_so(
    tmp_path: Path, compression: str | None, mask: bool
) -> None:
    written = make(tmp_path / "s.h5", mask=mask)
    path = tmp_path / "chunked.h5"
    with h5py.File(tmp_path / "s.h5") as source, h5py.File(path, "w") as file:
        for name, value in source.attrs.items():
            file.attrs[name] = value
        for name in source:
            file.create_dataset(name, data=source[name][...], chunks=True, compression=compression, shuffle=True)
    reader = ShardReader(path)
    assert reader.access == f"h5py ('data' is chunked, compression {compression or 'none'})"
    assert_holds(reader, *written)
    assert np.array_equal(reader.tokens(5, 40), written[0][5:40])
    assert reader.rows(np.array([], dtype=np.int64)).shape == (0, 17)
    check_boundaries(reader, written[1])
    reader.close()
    edit(path, lambda file: file["data"].__setitem__(3, file["data"][3] ^ 1))
    with pytest.raises(DataError, match="block 0"):
        ShardReader(path).rows(np.array([39]))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "_mapping", lru_cache(maxsize=4)(shard_file._mapping.__wrapped__))
    tokens, _, _ = make(tmp_path / "0.h5")
    for index in range(1, 20):
        os.link(tmp_path / "0.h5", tmp_path / f"{index}.h5")
    gc.collect()  # or what earlier tests left open could be closed between the two counts
    before = len(os.listdir("/proc/self/fd"))
    readers = [ShardReader(tmp_path / f"{index}.h5") for index in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before
    for reader in [*readers, *readers]:
        assert np.array_equal(reader.rows(np.array([5])), windows(tokens, 16, 16)[[5]])
        assert len(os.listdir("/proc/self/fd")) <= before + 4
    ids = np.empty((20, 17), dtype=np.int64)
    read_rows(ids, readers, [5 * 16] * 20)  # of more shards in one batch than may be mapped
    assert np.array_equal(ids, np.repeat(windows(tokens, 16, 16)[[5]], 20, axis=0))
    monkeypatch.setattr(shards, "_GATHERED_ROWS", 2)
    opened, document_ends = [], ShardReader.document_ends
    monkeypatch.setattr(
        ShardReader,
        "document_ends",
        lambda self: (opened.append(len(os.listdir("/proc/self/fd"))), document_ends(self))[1],
    )
    starts = read_document_starts(16, readers, [5 * 16] * 20)
    assert max(opened) <= before + 4 + 2
    assert np.array_equal(starts, np.repeat(readers[0].document_starts(np.array([5])), 20, axis=0))
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_a_file_that_is_replaced_while_in_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    make(path)
    reader = ShardReader(path)
    make(path, seed=1)
    with pytest.raises(DataError, match="changed since it was opened"):
        reader.rows(np.array([0]))
    with pytest.raises(DataError, match="changed since the shard was opened"):
        reader.documents()
    path.unlink()
    with pytest.raises(DataError, match="cannot be mapped"):
        reader.rows(np.array([0]))


def assert_refused_or_whole(path: Path, written: tuple[np.ndarray, Documents, np.ndarray | None]) -> bool:
    """True where the file was refused; otherwise everything read must be right."""
    try:
        assert_holds(ShardReader(path), *written)
    except DataError:
        return True
    return False


def flip_and_check(tmp_path: Path, positions: np.ndarray, rng: np.random.Generator) -> int:
    path = tmp_path / "flipped.h5"
    written = make(tmp_path / "s.h5")
    original, refused = (tmp_path / "s.h5").read_bytes(), 0
    for position in positions:
        data = bytearray(original)
        data[int(position) % len(data)] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        refused += assert_refused_or_whole(path, written)
    return refused


def test_a_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    assert flip_and_check(tmp_path, rng.integers(0, 1 << 40, 250), rng) > 100


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "s.h5")
    original, path = (tmp_path / "s.h5").read_bytes(), tmp_path / "short.h5"
    for length in np.linspace(0, len(original) - 1, 60).astype(int):
        path.write_bytes(original[:length])
        with pytest.raises(DataError):
            ShardReader(path).verify()


@pytest.mark.prove
def test_every_byte_flipped(tmp_path: Path) -> None:
    rng, size = np.random.default_rng(2), 0
    make(tmp_path / "size.h5")
    size = (tmp_path / "size.h5").stat().st_size
    assert flip_and_check(tmp_path, np.arange(size), rng) > size // 4


@pytest.mark.prove
def test_many_bytes_replaced(tmp_path: Path) -> None:
    """Runs of random bytes, zeros and copied pieces, so that HDF5 meets structure in the wrong place."""
    rng = np.random.default_rng(3)
    written = make(tmp_path / "s.h5")
    original, path = (tmp_path / "s.h5").read_bytes(), tmp_path / "mangled.h5"
    for _ in range(4000):
        data = bytearray(original)
        for _ in range(int(rng.integers(1, 4))):
            length, at = int(rng.integers(1, 200)), int(rng.integers(len(data)))
            start = int(rng.integers(len(data)))
            piece = [rng.bytes(length), bytes(length), bytes(data[start : start + length])][int(rng.integers(3))]
            data[at : at + length] = piece[: len(data) - at]
        path.write_bytes(data)
        assert_refused_or_whole(path, written)
