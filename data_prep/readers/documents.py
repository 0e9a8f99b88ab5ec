"""What passes between readers and the pipeline: documents, what could not be read, and the shares of files that are
read.

A document's `record` counts within its share of the file, because a share in the middle of a large file does not know
how many lines precede it. The pipeline adds what the shares before it hold, so that shards and messages name real
lines.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_HASHED_CHARACTERS = 1 << 22


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file. address: where fsspec opens it. name: in messages and the record. num_bytes: its size when listed.

    source: which kind of text it is, kept for every token. modified_ns: None where the file system knows no time.
    """

    address: str
    name: str
    source: str
    format: str  # a key of readers/registry.py's READERS
    num_bytes: int
    modified_ns: int | None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that was found and is not read. reason: why, in a few words that count together in a summary, as 'hidden
    file'.
    """

    name: str
    num_bytes: int
    reason: str


class Share(NamedTuple):
    """[begin, end) of one file, which counts bytes of JSON lines as the file lies, compressed or not; else the units of
    its reader.

    0, -1: all of it.
    """

    file: int  # index into the list of inputs
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Part:
    """What one task reads: shares in order. A function of the inputs alone, never of how many processes there are.

    num_bytes: about how many bytes of input that are.
    """

    shares: tuple[Share, ...]
    num_bytes: int = 0


@dataclass(frozen=True)
class Document:
    """A text, or token ids where the input was tokenised already. record: see the module's docstring.

    source: of this document, which a reader may know better than the file's name. tokens: int32 or int64 [n], without
    an added eos; marks: uint8 [n], what marks.py says of each token; None: every token bears loss. belongs_to: the text
    on whose side, training or held-out, this one must be, because it repeats parts of it.
    """

    file: int
    record: int
    source: str
    text: str | None
    tokens: np.ndarray | None = None
    marks: np.ndarray | None = None
    belongs_to: str | None = None


@dataclass(frozen=True)
class Failure:
    """A document that could not be read. reason: what is wrong and the remedy, to stand after 'file:line: '."""

    file: int
    record: int
    reason: str


@dataclass(frozen=True)
class FileRead:
    """The end of a share. records: how many lines or rows it holds, failed and empty ones too. sha256: of its raw
    bytes, in hexadecimal.
    """

    share: Share
    records: int
    sha256: str


def text_sha256(text: str) -> tuple[bytes, int]:
    """SHA-256 and number of bytes of a text's UTF-8, without a copy of a long one."""
    digest, num_bytes = hashlib.sha256(), 0
    for start in range(0, len(text), _HASHED_CHARACTERS):
        data = text[start : start + _HASHED_CHARACTERS].encode()
        digest.update(data)
        num_bytes += len(data)
    return digest.digest(), num_bytes
