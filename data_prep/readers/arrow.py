"""Arrow files and streams (`.arrow`, `.feather`), including folders saved by Hugging Face's `datasets`.

A local file is mapped, and its pages are released while reading, so memory grows with neither the file nor a record
batch. A share is a range of rows. A stream without its end marker was cut off.
"""

from __future__ import annotations

import fnmatch
import json
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from weftrain.core.errors import DataError, one_line
from weftrain.data_prep.inputs.compression import compression_of
from weftrain.data_prep.inputs.files import exists, is_local, open_address
from weftrain.data_prep.readers.arrow_columns import BATCH_BYTES, batch_rows, documents_of, find_columns
from weftrain.data_prep.readers.contract import Probe, Reader, Records
from weftrain.data_prep.readers.documents import InputFile, Share
from weftrain.data_prep.readers.read_options import ReadOptions

_FILE_MAGIC, _FEATHER_1_MAGIC = b"ARROW1", b"FEA1"
_STREAM_END = (b"\xff\xff\xff\xff\x00\x00\x00\x00", b"\x00\x00\x00\x00")  # the second before Arrow 0.15
_RELEASE_BYTES = 64 << 20
_MAX_STATE_BYTES = 64 << 20
STATE = "state.json"


@dataclass(frozen=True)
class _Opened:
    """A file that can be read several times. mapped: for a local file."""

    library: Any
    raw: Any
    mapped: mmap.mmap | None
    is_stream: bool

    def reader(self, fields: list[int] | None = None) -> Any:
        """A RecordBatchFileReader or RecordBatchStreamReader. fields: top-level columns to read; None: all. A mapped
        file offers all columns unread, while selecting some would copy each batch.
        """
        ipc = self.library.ipc
        options = (
            ipc.IpcReadOptions()
            if fields is None or self.mapped is not None
            else ipc.IpcReadOptions(included_fields=fields)
        )
        if self.mapped is None:
            self.raw.seek(0)
        source = self.raw if self.mapped is None else self.library.BufferReader(self.library.py_buffer(self.mapped))
        return ipc.open_stream(source, options=options) if self.is_stream else ipc.open_file(source, options=options)

    def batches(self, fields: list[int] | None = None) -> Iterator[Any]:
        reader = self.reader(fields)
        if self.is_stream:
            yield from reader
        else:
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)

    def release(self) -> None:
        """Releases the pages that were read; they are mapped again when needed."""
        if self.mapped is not None:
            self.mapped.madvise(mmap.MADV_DONTNEED)


@contextmanager
def open_arrow(file: InputFile) -> Iterator[_Opened]:
    """Raises DataError, also for damage found later."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise DataError("reading Arrow files needs pyarrow: pip install 'weftrain[data]'") from None
    if compression_of(file.address) is not None:
        raise DataError(
            f"{file.address}: Arrow files are read as they lie, and this one is compressed as a whole; decompress it"
        )
    try:
        with open_address(file.address) as raw:
            head = raw.read(8)
            raw.seek(max(0, file.num_bytes - 8))
            tail = raw.read(8)
            if head.startswith(_FEATHER_1_MAGIC):
                raise DataError(
                    f"{file.address}: is Feather version 1, which pyarrow no longer writes; write it again as Arrow or "
                    "Parquet"
                )
            is_stream = not head.startswith(_FILE_MAGIC)
            if is_stream and not tail.endswith(_STREAM_END):
                raise DataError(
                    f"{file.address}: is no whole Arrow file or stream; copy it again, or let its writer close it"
                )
            # Not closed but dropped: arrays may still point into it.
            mapped = mmap.mmap(raw.fileno(), 0, prot=mmap.PROT_READ) if is_local(file.address) else None
            yield _Opened(pyarrow, raw, mapped, is_stream)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.address}: cannot be read as Arrow: {one_line(error)}; copy it again") from error


def arrow_rows(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    state = _state(file.address)
    if state is not None and state.get("_indices_data_files"):
        raise DataError(
            f"{file.address}: {STATE} beside it selects rows by an index; call flatten_indices() and save the dataset "
            "again"
        )
    with open_arrow(file) as opened:
        schema = opened.reader().schema
        columns = find_columns(file, schema, options)
        fields = sorted({schema.names.index(path[0]) for path in columns.paths})
        end = None if share.end == -1 else share.end
        first = held = 0  # rows before the batch; bytes since pages were given back
        for batch in opened.batches(fields):
            begin, stop = max(share.begin, first), first + len(batch) if end is None else min(end, first + len(batch))
            # the sizes of its buffers, on which all else relies; documents_of validates what they hold
            batch.validate()
            rows = batch_rows(batch.get_total_buffer_size(), len(batch))
            for row in range(begin, stop, rows):
                part = batch.slice(row - first, min(rows, stop - row))
                yield from documents_of(index, row - share.begin, part, columns, file, options)
                held += BATCH_BYTES
                if held >= _RELEASE_BYTES:
                    opened.release()
                    held = 0
            first += len(batch)
            if end is not None and first >= end:
                break
        if end is not None and first < end:
            raise DataError(f"{file.address}: damaged: has {first:,} rows of {end:,}; copy it again")
    return (first if end is None else end) - share.begin


def _num_rows(file: InputFile) -> int:
    with open_arrow(file) as opened:
        return sum(map(len, opened.batches([0] if opened.reader().schema.names else None)))


def _is_arrow(probe: Probe) -> bool:
    if probe.plain_name.endswith((".arrow", ".feather", ".ipc")):
        return True
    return probe.head.startswith((_FILE_MAGIC, _FEATHER_1_MAGIC)) and b"\0" in probe.head


def _beside(address: str, name: str) -> str:
    folder, slash, _ = address.rpartition("/")
    return folder + slash + name


def _state(address: str) -> dict[str, Any] | None:
    """What `datasets` says of the files in a folder that it saved, or None. Raises DataError."""
    state = _beside(address, STATE)
    if not exists(state):
        return None
    with open_address(state) as opened:
        try:
            value = json.loads(opened.read(_MAX_STATE_BYTES))
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) and isinstance(value.get("_data_files"), list) else None


def _belongs_to_folder(probe: Probe) -> bool:
    """Whether a JSON file describes a folder saved by `datasets`; there are three such files."""
    name = probe.name.rpartition("/")[2]
    key = {STATE: b'"_data_files"', "dataset_info.json": b'"features"', "dataset_dict.json": b'"splits"'}.get(name)
    return key is not None and key in probe.head


def _not_data(probe: Probe) -> str | None:
    """Why an Arrow file in such a folder is not part of the dataset."""
    name = probe.address.rpartition("/")[2]
    if not name.endswith(".arrow"):
        return None
    if (state := _state(probe.address)) is not None:
        listed = [entry.get("filename") for entry in state["_data_files"] if isinstance(entry, dict)]
        return None if name in listed else f"not in {STATE}"
    if fnmatch.fnmatchcase(name, "cache-*.arrow") and exists(_beside(probe.address, "dataset_info.json")):
        return "cache of datasets"
    return None


READERS = (
    Reader(
        name="arrow",
        holds="text",
        read=arrow_rows,
        detect=_is_arrow,
        goes_with=_belongs_to_folder,
        not_data=_not_data,
        num_units=_num_rows,
    ),
)
