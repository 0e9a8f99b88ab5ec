"""JSON lines: one object a line, its text under a field."""

from __future__ import annotations

from weftrain.data_prep.readers.contract import Probe, Reader, Records
from weftrain.data_prep.readers.documents import Document, Failure, InputFile, Share
from weftrain.data_prep.readers.json_objects import parse_object, record_document
from weftrain.data_prep.readers.lines import lines_before, read_lines
from weftrain.data_prep.readers.read_options import ReadOptions

SUFFIXES = (".jsonl", ".ndjson")


def holds_lines(probe: Probe) -> bool:
    """Whether a file holds JSON lines, by name or content; a single object only if it has the text field. A file named
    so that begins as an array, or as a multi-line object with the text field, does not.
    """
    content = probe.json
    if probe.plain_name.endswith(SUFFIXES):
        if content is None or content.layout not in ("array", "object"):
            return True
        return content.layout == "object" and (content.first is None or not content.has_any(probe.keys))
    return content is not None and (
        content.layout == "lines" or (content.layout == "line" and content.has_any(probe.keys))
    )


def json_lines(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    def document(number: int, line: bytes | None) -> Document | Failure:
        value = parse_object(line)
        return (
            Failure(index, number, value)
            if isinstance(value, str)
            else record_document(index, number, value, file, options)
        )

    return (yield from read_lines(file, share, document))


READERS = (
    Reader(name="jsonl", holds="text", read=json_lines, detect=holds_lines, by_bytes=True, records_before=lines_before),
)
