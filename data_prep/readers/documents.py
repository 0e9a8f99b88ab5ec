"""What readers hand to the pipeline: documents, failures, and the shares of files.

A document's `record` counts within its share, because a share in the middle of a large file does not know how many
lines precede it. The pipeline adds the records of earlier shares, so that shards and messages name real lines.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from weftrain.data_prep.conversations.messages import Conversation
from weftrain.data_prep.conversations.preferences import NoPreference, Preference

_HASHED_CHARACTERS = 1 << 22


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file. address: where fsspec opens it. name: in messages and the manifest. num_bytes: when listed. source: the
    kind of text, recorded for every token. modified_ns: None if unknown.
    """

    address: str
    name: str
    source: str
    format: str  # a key of readers/registry.py's READERS
    num_bytes: int
    modified_ns: int | None


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file that was found but is not read. reason: a few words to count by, such as 'hidden file'."""

    name: str
    num_bytes: int
    reason: str


class Share(NamedTuple):
    """[begin, end) of a file: bytes of the raw file for JSON lines, else units of its reader. (0, -1): all of it."""

    file: int  # index into the list of inputs
    begin: int
    end: int

    def bounds(self, units: int) -> tuple[int, int]:
        """Begin and end of the share in a file of so many units."""
        return self.begin, units if self.end == -1 else self.end


@dataclass(frozen=True, slots=True)
class Part:
    """What one task reads: shares in order, about num_bytes of input; a function of the inputs alone."""

    shares: tuple[Share, ...]
    num_bytes: int = 0


@dataclass(frozen=True)
class Document:
    """A text, or token ids where the input was tokenised. record: within its share.

    source: may differ from the file's. tokens: int32 or int64 [n], without an added eos. marks: uint8 [n] (marks.py);
    None: every token bears loss. belongs_to: a text that this one repeats parts of, so both are on the same side of the
    held-out split. conversation, preference: what the text is of, where those are read; the text is then its identity.
    weight: of the loss of all of a text's tokens.
    """

    file: int
    record: int
    source: str
    text: str | None
    tokens: np.ndarray | None = None
    marks: np.ndarray | None = None
    belongs_to: str | None = None
    conversation: Conversation | None = None
    preference: Preference | NoPreference | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Failure:
    """A document that could not be read. reason: problem and remedy, to follow 'file:line: '."""

    file: int
    record: int
    reason: str


@dataclass(frozen=True)
class FileRead:
    """The end of a share. records: lines or rows, failed and empty ones too. sha256: of its raw bytes, in hex."""

    share: Share
    records: int
    sha256: str


def text_sha256(text: str) -> tuple[bytes, int]:
    """SHA-256 and size of a text's UTF-8, without copying a long text."""
    digest, num_bytes = hashlib.sha256(), 0
    for start in range(0, len(text), _HASHED_CHARACTERS):
        data = text[start : start + _HASHED_CHARACTERS].encode()
        digest.update(data)
        num_bytes += len(data)
    return digest.digest(), num_bytes
