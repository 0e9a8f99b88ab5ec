"""What a format is: how its files are recognised, cut into shares, and read as documents.

A new format is one module that makes a `Reader`, and its name in registry.py.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Literal

from weftrain.core.errors import DataError
from weftrain.data_prep.inputs.compression import BrokenArchive, compression_of, open_decompressed, plain_name
from weftrain.data_prep.inputs.files import exists, is_local, read_head
from weftrain.data_prep.inputs.listing_rules import may_hold_json
from weftrain.data_prep.readers.documents import Document, Failure, InputFile, Share
from weftrain.data_prep.readers.json_content import JsonContent, json_content
from weftrain.data_prep.readers.read_options import ReadOptions

# returns how many records the share holds, failed and empty ones too
Records = Generator[Document | Failure, None, int]
HEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class Probe:
    """A file whose format is asked for. name: as in messages, below the folder it was found in. keys: fields of
    which any tells JSON records from other JSON. known_head: the first HEAD_BYTES of the raw file, if already read.
    """

    name: str
    address: str
    keys: tuple[str, ...] = ("text",)
    known_head: bytes | None = None

    @property
    def base(self) -> str:
        return self.name.rpartition("/")[2]

    @cached_property
    def plain_name(self) -> str:
        """The name in lower case, without a compression suffix."""
        return plain_name(self.name.lower())

    @property
    def compressed(self) -> bool:
        return compression_of(self.name) is not None

    @cached_property
    def head(self) -> bytes:
        """The first HEAD_BYTES, decompressed; as far as readable in a damaged archive. Raises DataError."""
        if not self.compressed:
            return read_head(self.address, HEAD_BYTES) if self.known_head is None else self.known_head
        with open_decompressed(self.address) as opened:
            try:
                return opened.read(HEAD_BYTES)
            except BrokenArchive:
                return b""

    @cached_property
    def json(self) -> JsonContent | None:
        """The kind of JSON; None for other content, or a name that says otherwise, such as `.py`."""
        if not may_hold_json(self.plain_name):
            return None
        return json_content(self.head, whole=len(self.head) < HEAD_BYTES)

    def has_beside(self, suffix: str) -> bool:
        """Whether the file with this suffix instead of its own exists."""
        return exists(with_suffix(self.address, suffix))


def one_unit(file: InputFile) -> int:
    """num_units of a format whose files are read whole."""
    return 1


def unit_is_a_record(file: InputFile, begin: int) -> int:
    """records_before of a format whose shares count records."""
    return begin


def goes_with_none(probe: Probe) -> bool:
    """goes_with of a format whose files stand alone."""
    return False


def always_data(probe: Probe) -> str | None:
    """not_data of a format whose files are all inputs."""
    return None


def nothing_beside(file: InputFile) -> tuple[str, ...]:
    """beside of a format whose files stand alone."""
    return ()


def with_suffix(address: str, suffix: str) -> str:
    """An address with its last suffix replaced."""
    return address.removesuffix(PurePosixPath(address).suffix) + suffix


@dataclass(frozen=True)
class Reader:
    """A format. name: for `--format`. holds: text to encode; token ids of documents; or rows of sequence_length + 1
    ids.

    detect(probe): whether a file has this format. goes_with(probe): whether a file is read with another of this format.
    not_data(probe): why a file of this format in a folder is no input, as counted in summaries, or None. by_bytes:
    shares count bytes, and a record belongs to the share that it begins in; otherwise shares count num_units(file), 1
    if a file cannot be cut. cuts(file, pieces): the units at which about so many shares end; None: equal shares. read:
    the documents of a share, in order, returning the number of records; may raise OSError, and DataError for a file
    damaged as a whole. records_before(file, begin): records that precede a share beginning there. beside(file): files
    that are read with it, hashed before its first share. by_end_token: documents end with the tokenizer's end token,
    and ids without a header have the width of its vocabulary (ReadOptions.of_tokenizer).
    """

    name: str
    holds: Literal["text", "tokens", "rows"]
    read: Callable[[int, InputFile, Share, ReadOptions], Records]
    detect: Callable[[Probe], bool]
    goes_with: Callable[[Probe], bool] = goes_with_none
    not_data: Callable[[Probe], str | None] = always_data
    by_bytes: bool = False
    num_units: Callable[[InputFile], int] = one_unit
    cuts: Callable[[InputFile, int], list[int]] | None = None
    records_before: Callable[[InputFile, int], int] = unit_is_a_record
    beside: Callable[[InputFile], tuple[str, ...]] = nothing_beside
    by_end_token: bool = False


def wrong_length(length: int, options: ReadOptions) -> str | None:
    """What is wrong with a row of `length` ids, or None."""
    if options.sequence_length is None or length == options.sequence_length + 1:
        return None
    return (
        f"holds {length} token ids, not {options.sequence_length} + 1; give --sequence-length {length - 1} if all rows "
        "are so long"
    )


def local_only(file_or_address: str, what: str) -> None:
    """Raises DataError for an address of another file system."""
    if not is_local(file_or_address):
        raise DataError(f"{file_or_address}: {what} are read from local folders only; copy them here first")
