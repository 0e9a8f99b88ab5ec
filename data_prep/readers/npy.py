"""OLMo's .npy: one stream of ids without a header, as written by dolma's tokenizer and `np.memmap`; and `np.save`
arrays.

A document ends with the tokenizer's end token, or where dolma's .csv.gz beside the file says. Without a header, ids
have 2 or 4 bytes, the fewest that hold the vocabulary as in OLMo, or the type in --tokens-dtype.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from weftrain.core.errors import DataError, one_line
from weftrain.data_prep.inputs.compression import open_decompressed
from weftrain.data_prep.inputs.files import exists, open_address
from weftrain.data_prep.readers.contract import Reader, Records
from weftrain.data_prep.readers.documents import Document, Failure, InputFile, Share
from weftrain.data_prep.readers.ids import MAX_DOCUMENT_IDS, ids_document, read_array
from weftrain.data_prep.readers.read_options import ReadOptions

_BLOCK_IDS = 1 << 20
_MAGIC, _METADATA = b"\x93NUMPY", ".csv.gz"
_MAX_HEADER_BYTES = 1 << 14
_HEADER = re.compile(
    rb"\{'descr': '(\|[ui]1|<[ui][248])', 'fortran_order': (?:True|False), 'shape': \(([0-9]{1,18}),\), \}[ \n]*"
)
_MAX_ROW_BYTES = 1 << 20
_LOOK_IDS = 1 << 15


@dataclass(frozen=True)
class _Stream:
    """ids of `dtype` from byte `offset` on."""

    dtype: np.dtype[Any]
    offset: int
    ids: int

    def id_at(self, byte: int) -> int:
        """The id that a byte of the file belongs to."""
        return max(0, byte - self.offset) // self.dtype.itemsize


def _stream(file: InputFile, opened: IO[bytes], options: ReadOptions) -> _Stream:
    """What a file holds, checked against its size. Raises DataError."""
    if opened.read(len(_MAGIC)) == _MAGIC:
        return _with_header(file, opened)
    if options.stream_dtype is None:
        raise DataError(f"{file.address}: does not say how wide an id is: name the tokenizer with --tokenizer")
    dtype = np.dtype(options.stream_dtype).newbyteorder("<")
    ids, rest = divmod(file.num_bytes, dtype.itemsize)
    if rest:
        raise DataError(
            f"{file.address}: {file.num_bytes:,} bytes are no whole number of {dtype.name} ids: give another "
            "--tokens-dtype"
        )
    if dtype.itemsize == 2 and ids % 2 == 0:
        look = read_array(opened, file.address, 0, min(ids, _LOOK_IDS), dtype)
        if len(look) >= 16 and not look[1::2].any() and look[::2].any():
            raise DataError(
                f"{file.address}: every second id of 2 bytes is 0, so it holds ids of 4 bytes: give --tokens-dtype "
                "uint32"
            )
    return _Stream(dtype, 0, ids)


def _with_header(file: InputFile, opened: IO[bytes]) -> _Stream:
    """The form of `np.save`: magic, version, header length, and a header that is matched, not evaluated."""
    version = opened.read(2)
    if version not in (b"\1\0", b"\2\0"):
        raise DataError(
            f"{file.address}: has a header of version {tuple(version)}, which plain arrays do not have; copy it again"
        )
    length = int.from_bytes(opened.read(2 if version == b"\1\0" else 4), "little")
    header = opened.read(min(length, _MAX_HEADER_BYTES))
    found = _HEADER.fullmatch(header)
    if found is None:
        shown = ascii(header[:100].decode(errors="replace"))
        raise DataError(f"{file.address}: is not one dimension of little-endian integers but {shown}; write it as such")
    dtype, ids, offset = np.dtype(found[1].decode()), int(found[2]), opened.tell()
    if offset + ids * dtype.itemsize != file.num_bytes:
        raise DataError(
            f"{file.address}: {file.num_bytes:,} bytes are not the {ids:,} ids of {dtype} that it declares; copy it "
            "again"
        )
    return _Stream(dtype, offset, ids)


def npy_documents(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    """The documents that begin within a share, which counts bytes of the file."""
    number = 0
    with open_address(file.address) as opened:
        stream = _stream(file, opened, options)
        begin, end = map(stream.id_at, share.bounds(file.num_bytes))
        if begin >= end:
            return 0
        if exists(_metadata(file)):
            documents = _by_metadata(file, opened, stream, begin, end)
        else:
            documents = _by_end_token(file, opened, stream, begin, end, options.end_id)
        for ids in documents:
            yield _document(index, number, file, ids)
            number += 1
    return number


def _document(index: int, number: int, file: InputFile, ids: np.ndarray | int) -> Document | Failure:
    if isinstance(ids, np.ndarray):
        return ids_document(index, number, file.source, ids)
    problem = f"holds {ids:,} ids in one document, more than {MAX_DOCUMENT_IDS:,}"
    return Failure(index, number, f"{problem}: name the token that ends its documents with --eos, or split it")


def _by_end_token(
    file: InputFile, opened: IO[bytes], stream: _Stream, begin: int, end: int, end_id: int | None
) -> Iterator[np.ndarray | int]:
    """The ids of each document that begins at begin..end-1, with its end token; only their number if too many."""
    if end_id is None:
        raise DataError(
            f"{file.address}: its documents are told apart by the tokenizer's end token: name a tokenizer with "
            "--tokenizer"
        )
    held: list[np.ndarray] = []
    length, skipping = 0, begin > 0  # a document that began before the share belongs to the share before
    # the id before the share, if it is an end, makes the share's first id the beginning of a document
    at = max(0, begin - 1)
    while at < stream.ids:
        block = _read(file, opened, stream, at, min(at + _BLOCK_IDS, stream.ids))
        start = 0
        for stop in (np.flatnonzero(block == end_id) + 1).tolist():
            if not skipping:
                length += stop - start
                held.append(block[start:stop])
                yield np.concatenate(held) if length <= MAX_DOCUMENT_IDS else length
            held, length, skipping, start = [], 0, False, stop
            if at + start >= end:
                return
        if not skipping:
            length += len(block) - start
            held = [*held, block[start:]] if length <= MAX_DOCUMENT_IDS else []
        at += len(block)
    if length:
        yield np.concatenate(held) if length <= MAX_DOCUMENT_IDS else length


def _by_metadata(
    file: InputFile, opened: IO[bytes], stream: _Stream, begin: int, end: int
) -> Iterator[np.ndarray | int]:
    """The same by dolma's rows `start,end,id,src,loc`, which must cover all ids."""
    name, last = _metadata(file), 0
    for start, stop in _rows(name):
        if start != last or stop < start or stop > stream.ids:
            raise DataError(
                f"{name}: a document from {start:,} to {stop:,} follows one up to {last:,} of {stream.ids:,} ids; copy "
                "both again"
            )
        last = stop
        if start >= end and end < stream.ids:
            return
        if start >= begin:
            yield stop - start if stop - start > MAX_DOCUMENT_IDS else _read(file, opened, stream, start, stop)
    if last != stream.ids:
        raise DataError(
            f"{name}: its documents end at {last:,}, and {file.address} holds {stream.ids:,} ids; copy both again"
        )


def _rows(name: str) -> Iterator[tuple[int, int]]:
    try:
        with open_decompressed(name) as opened:
            for row in csv.reader(_text_lines(name, opened)):
                if len(row) < 2 or not (
                    row[0].isascii() and row[0].isdigit() and row[1].isascii() and row[1].isdigit()
                ):
                    raise DataError(f"{name}: a row is {','.join(row)[:80]!r}, not start,end,id,src,loc; copy it again")
                yield int(row[0][:20]), int(row[1][:20])
    except csv.Error as error:
        raise DataError(f"{name}: damaged: {one_line(error)}; copy it again") from error


def _text_lines(name: str, opened: IO[bytes]) -> Iterator[str]:
    while line := opened.readline(_MAX_ROW_BYTES + 1):
        if len(line) > _MAX_ROW_BYTES:
            raise DataError(f"{name}: a row is longer than {_MAX_ROW_BYTES:,} bytes; copy it again")
        yield line.decode(errors="replace")  # of the id and path of a document, which are not read


def _read(file: InputFile, opened: IO[bytes], stream: _Stream, begin: int, end: int) -> np.ndarray:
    return read_array(opened, file.address, stream.offset + begin * stream.dtype.itemsize, end - begin, stream.dtype)


def _metadata(file: InputFile) -> str:
    return file.address.removesuffix(".npy") + _METADATA


READERS = (
    Reader(
        name="npy",
        holds="tokens",
        read=npy_documents,
        detect=lambda probe: probe.name.endswith(".npy"),
        goes_with=lambda probe: (
            probe.name.endswith(_METADATA) and exists(probe.address.removesuffix(_METADATA) + ".npy")
        ),
        num_units=lambda file: file.num_bytes,
        beside=lambda file: (_metadata(file),) if exists(_metadata(file)) else (),
        by_end_token=True,
    ),
)
