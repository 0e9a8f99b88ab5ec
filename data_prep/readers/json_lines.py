"""JSON lines: one object a line, its text under a field."""

from __future__ import annotations

from typing import Any

from weftrain.data_prep.documents import Document, Failure, InputFile, Share
from weftrain.data_prep.normalisation import normalise
from weftrain.data_prep.read_options import ReadOptions
from weftrain.data_prep.readers.contract import Probe, Reader, Records
from weftrain.data_prep.readers.lines import has_lone_surrogate, lines_before, parse_object, read_lines

SUFFIXES = (".jsonl", ".ndjson")


def holds_lines(probe: Probe) -> bool:
    """Whether a file holds JSON lines: by its name, or by its content whatever its name; one object alone only with the field of texts."""
    if probe.plain_name.endswith(SUFFIXES):
        return True
    content = probe.json
    return content is not None and (content.layout == "lines" or (content.layout == "line" and content.has_field(probe.text_key)))


def json_lines(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    """One JSON object a line, the text under options.text_key."""
    lines = read_lines(file, share)
    while True:
        try:
            number, line = next(lines)
        except StopIteration as stop:
            records: int = stop.value
            return records
        if line is not None and not line.strip():
            continue
        yield _json_document(index, number, line, file, options)


def _json_document(index: int, number: int, line: bytes | None, file: InputFile, options: ReadOptions) -> Document | Failure:
    value = parse_object(line)
    if isinstance(value, str):
        return Failure(index, number, value)
    if options.text_key not in value:
        return Failure(index, number, f"no field '{options.text_key}'; name the field that holds the text with --text-key")
    text = value[options.text_key]
    if not isinstance(text, str):
        return Failure(index, number, f"field '{options.text_key}' holds {type(text).__name__}, not text")
    if line is not None and b"\\u" in line and has_lone_surrogate(text):  # without an escape, strict UTF-8 has excluded it
        return Failure(index, number, f"field '{options.text_key}' holds a lone surrogate, which is no character; repair the line")
    source: Any = file.source
    if options.source_key is not None:
        source = value.get(options.source_key)
        if not isinstance(source, str) or not source or has_lone_surrogate(source):
            return Failure(index, number, f"field '{options.source_key}' holds no source's name; repair it, or leave --source-key out")
    return Document(index, number, source, normalise(text, options.normalise))


READER = Reader(name="jsonl", holds="text", read=json_lines, detect=holds_lines, by_bytes=True, records_before=lines_before)
