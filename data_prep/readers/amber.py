"""Amber's released rows: JSON lines of `token_ids`, each of sequence_length + 1 ids."""

from __future__ import annotations

import numpy as np

from weftrain.data_prep.documents import Document, Failure, InputFile, Share
from weftrain.data_prep.read_options import ReadOptions
from weftrain.data_prep.readers.contract import Probe, Reader, Records, wrong_length
from weftrain.data_prep.readers.ids import are_ids
from weftrain.data_prep.readers.json_objects import MISSING, field, parse_object
from weftrain.data_prep.readers.lines import lines_before, read_lines

_MAX_ROW_BYTES = 16 << 20  # a million ids; as Python's numbers they take some twenty times as much memory


def amber_rows(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    """`{"token_ids": [sequence_length + 1 ints], "source": "c4"}` a line."""
    lines = read_lines(file, share)
    while True:
        try:
            number, line = next(lines)
        except StopIteration as stop:
            records: int = stop.value
            return records
        if line is not None and not line.strip():
            continue
        if line is not None and len(line) > _MAX_ROW_BYTES:
            yield Failure(index, number, f"the line is longer than the {_MAX_ROW_BYTES:,} bytes that a row of ids may take")
            continue
        value = parse_object(line)
        if isinstance(value, str):
            yield Failure(index, number, value)
            continue
        try:
            ids, source = field(value, "token_ids"), field(value, "source")
        except ValueError as error:
            yield Failure(index, number, str(error))
            continue
        source = file.source if source is MISSING else source
        if not are_ids(ids):
            yield Failure(index, number, "field 'token_ids' is not a list of token ids; each must be an integer from 0 on")
        elif (wrong := wrong_length(len(ids), options)) is not None:
            yield Failure(index, number, wrong)
        elif not isinstance(source, str) or not source:
            yield Failure(index, number, "field 'source' is not a source's name")
        else:
            yield Document(index, number, source, None, np.array(ids, np.int32))


def _holds_token_ids(probe: Probe) -> bool:
    """Whether the first line is a tokenised row."""
    content = probe.json
    return content is not None and content.layout in ("lines", "line") and content.has_field("token_ids") and not content.has_field("text")


READER = Reader(name="amber", holds="rows", read=amber_rows, detect=_holds_token_ids, by_bytes=True, records_before=lines_before)
