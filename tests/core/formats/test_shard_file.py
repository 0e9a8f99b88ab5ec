"""Opening shards: hostile files are refused by field, and open files are bounded."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from shard_cases import TOKENIZER, edit, make, windows

from weftrain.core.errors import DataError
from weftrain.core.formats import shard_file
from weftrain.core.formats import shard_reader as shards
from weftrain.core.formats.shard_format import num_tokens
from weftrain.core.formats.shard_reader import ShardReader, read_document_starts, read_rows


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
        "format: is 'weftrain-shard/3', which these contents",
    ),
    "falling ends": (replace("doc_end", data=np.array([9, 5, LENGTH])), "doc_end: "),
    "weights in format 3": (
        lambda file: file.create_dataset("token_weights", data=np.ones(LENGTH, "<f4")),
        "format: is 'weftrain-shard/3', which these contents do not belong to; this program reads 'weftrain-shard/4'",
    ),
    "format 4 without weights": (
        set_attribute("format", np.bytes_(b"weftrain-shard/4")),
        "format: is 'weftrain-shard/4', which these contents",
    ),
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
