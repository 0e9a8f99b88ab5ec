"""Cutting inputs into shares and parts, and reading a part: documents in order, failures, and what each share held.

Parts are a function of the files' names and sizes, and of the number of units in files that are not cut by bytes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator

from weftrain.core.formats.line_table import Lines
from weftrain.core.formats.shard_format import PADDING
from weftrain.data_prep.inputs.compression import CUT, compression_of
from weftrain.data_prep.inputs.files import check_unchanged, range_sha256, reading
from weftrain.data_prep.readers.contract import Records
from weftrain.data_prep.readers.documents import Document, Failure, FileRead, InputFile, Part, Share
from weftrain.data_prep.readers.normalisation import check_normalisations
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.readers.registry import READERS

MAX_SOURCE_CHARACTERS = 2048  # as long as addresses of pages are
MAX_ARCHIVE_SHARES = 8  # each decompresses from the beginning
MIN_ARCHIVE_SHARE_BYTES = 32 << 20
MAX_PART_SHARES = 1 << 13


def is_cut_by_bytes(file: InputFile) -> bool:
    """Whether shares count bytes of the raw file. bz2 and xz decompress too slowly for that."""
    return READERS[file.format].by_bytes and compression_of(file.address) in (None, *CUT)


@functools.lru_cache(maxsize=4096)
def _num_units(file: InputFile) -> int:
    return READERS[file.format].num_units(file)


def split_parts(files: Iterable[InputFile], part_bytes: int) -> list[Part]:
    """Files in order, as parts of about `part_bytes`: small ones together, large ones cut. Raises DataError."""
    parts: list[Part] = []
    shares: list[Share] = []
    held = 0
    for index, file in enumerate(files):
        for share, size in _shares(index, file, part_bytes):
            if shares and (held + size > part_bytes or len(shares) == MAX_PART_SHARES):
                parts.append(Part(tuple(shares), held))
                shares, held = [], 0
            shares.append(share)
            held += size
    if shares:
        parts.append(Part(tuple(shares), held))
    return parts


def _shares(index: int, file: InputFile, part_bytes: int) -> Iterator[tuple[Share, int]]:
    """A file's shares and about how many bytes each reads."""
    pieces = max(1, -(-file.num_bytes // part_bytes))
    units = file.num_bytes if is_cut_by_bytes(file) else _num_units(file) if pieces > 1 else 1
    if compression_of(file.address) is not None:
        pieces = min(pieces, MAX_ARCHIVE_SHARES, file.num_bytes // MIN_ARCHIVE_SHARE_BYTES)
    pieces = max(1, min(pieces, units))
    if not is_cut_by_bytes(file) and pieces == 1:
        yield Share(index, 0, -1), file.num_bytes
        return
    cuts = READERS[file.format].cuts
    ends = [units * piece // pieces for piece in range(1, pieces + 1)] if cuts is None else cuts(file, pieces)
    for begin, end in itertools.pairwise((0, *ends)):
        yield Share(index, begin, end), file.num_bytes * (end - begin) // max(1, units)


def records_before(file: InputFile, share: Share) -> int:
    """How many records of a file precede a share. Raises DataError."""
    return READERS[file.format].records_before(file, share.begin) if share.begin else 0


def share_sha256(file: InputFile, share: Share) -> str:
    """SHA-256 of a share's raw bytes, or of the same proportion of the file where a share counts something else. Files
    that are read beside it go with the first share. Raises DataError.
    """
    begin, end, reader = share.begin, share.end, READERS[file.format]
    beside = reader.beside(file) if begin == 0 else ()
    if not is_cut_by_bytes(file):
        units = max(1, _num_units(file)) if end != -1 else 1
        begin, end = file.num_bytes * begin // units, file.num_bytes * (end if end != -1 else 1) // units
    return range_sha256(file, begin, end, beside)


def _well_named(items: Records) -> Records:
    """The items, with a Failure for a document whose source is no name, such as a text, which would fill the memory."""
    while True:
        try:
            yield _named(next(items))  # kept by no name here, for a text may be as long as memory allows once
        except StopIteration as end:
            return int(end.value)


def _named(item: Document | Failure) -> Document | Failure:
    if not isinstance(item, Document) or (0 < len(item.source) <= MAX_SOURCE_CHARACTERS and item.source != PADDING):
        return item
    length = f"{len(item.source):,} characters long, {MAX_SOURCE_CHARACTERS:,} are allowed"
    problem = f"is {PADDING}, which stands for what fills rows" if item.source == PADDING else f"is {length}"
    return Failure(
        item.file, item.record, f"the source's name {problem}; repair it, or name another field with --source-key"
    )


def read_part(files: Lines[InputFile], part: Part, options: ReadOptions) -> Iterator[Document | Failure | FileRead]:
    """Everything in a part, in order; a FileRead ends each share. Raises DataError for unreadable or changed files."""
    check_normalisations(options.normalise)
    for share in part.shares:
        file = files[share.file]
        check_unchanged(file)
        with reading(file.address):
            records = yield from _well_named(READERS[file.format].read(share.file, file, share, options))
        sha256 = share_sha256(file, share)
        check_unchanged(file)
        yield FileRead(share, records, sha256)
