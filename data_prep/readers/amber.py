"""Amber's released rows: JSON lines of `token_ids`, each of sequence_length + 1 ids."""

from __future__ import annotations

import numpy as np

from weftrain.data_prep.readers.contract import Probe, Reader, Records, wrong_length
from weftrain.data_prep.readers.documents import Document, Failure, InputFile, Share
from weftrain.data_prep.readers.ids import are_ids
from weftrain.data_prep.readers.json_objects import MISSING, field, parse_object
from weftrain.data_prep.readers.lines import lines_before, read_lines
from weftrain.data_prep.readers.read_options import ReadOptions

_MAX_ROW_BYTES = 16 << 20  # a million ids; as Python's numbers they take some twenty times as much memory


def amber_rows(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    def row(number: int, line: bytes | None) -> Document | Failure:
        return _row(index, number, line, file, options)

    return (yield from read_lines(file, share, row))


def _row(index: int, number: int, line: bytes | None, file: InputFile, options: ReadOptions) -> Document | Failure:
    if line is not None and len(line) > _MAX_ROW_BYTES:
        return Failure(
            index, number, f"the line is longer than the {_MAX_ROW_BYTES:,} bytes that a row of ids may take"
        )
    value = parse_object(line)
    if isinstance(value, str):
        return Failure(index, number, value)
    try:
        ids, source = field(value, "token_ids"), field(value, "source")
    except ValueError as error:
        return Failure(index, number, str(error))
    source = file.source if source is MISSING else source
    if not are_ids(ids):
        return Failure(index, number, "field 'token_ids' is not a list of token ids; each must be an integer from 0 on")
    if (wrong := wrong_length(len(ids), options)) is not None:
        return Failure(index, number, wrong)
    if not isinstance(source, str) or not source:
        return Failure(index, number, "field 'source' is not a source's name")
    return Document(index, number, source, None, np.array(ids, np.int32))


def _holds_token_ids(probe: Probe) -> bool:
    """Whether the first line is a tokenised row."""
    content = probe.json
    return (
        content is not None
        and content.layout in ("lines", "line")
        and content.has_field("token_ids")
        and not content.has_field("text")
    )


READERS = (
    Reader(
        name="amber", holds="rows", read=amber_rows, detect=_holds_token_ids, by_bytes=True, records_before=lines_before
    ),
)
