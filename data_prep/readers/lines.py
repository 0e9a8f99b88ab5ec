"""Lines of a share, and the JSON object on each: what readers of JSON lines have in common."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from weftrain.core.canonical import parse_json
from weftrain.core.errors import DataError
from weftrain.data_prep.compression import BROKEN_ARCHIVE, compression_of, open_decompressed
from weftrain.data_prep.documents import InputFile, Share
from weftrain.data_prep.read_options import ReadOptions

_SKIP_BYTES = 1 << 20


def read_lines(file: InputFile, share: Share) -> Generator[tuple[int, bytes | None], None, int]:
    """(line number within the share, the line) of each line that begins within the share; None for one that is too long.

    Returns how many there are. Raises DataError where the file cannot be read to its end.
    """
    number = 0
    try:
        with open_decompressed(file.address) as opened:
            position, end = 0, None
            if compression_of(file.address) is None:
                position, end = share.begin, share.end
                if position:
                    opened.seek(position - 1)
                    position += len(opened.readline()) - 1  # the rest of a line that began before
            while end is None or position < end:
                line = opened.readline(ReadOptions.max_line_bytes + 1)
                if not line:
                    break
                position += len(line)
                if len(line) > ReadOptions.max_line_bytes and not line.endswith(b"\n"):
                    while (rest := opened.readline(_SKIP_BYTES)) and not rest.endswith(b"\n"):
                        position += len(rest)
                    position += len(rest)
                    yield number, None
                else:
                    yield number, line
                number += 1
    except BROKEN_ARCHIVE as error:
        raise DataError(f"{file.address}: damaged or truncated: {error}; copy it again") from error
    return number


def parse_object(line: bytes | None) -> dict[str, Any] | str:
    """The object of a line, or what is wrong with it."""
    if line is None:
        return f"the line is longer than {ReadOptions.max_line_bytes:,} bytes; split the document"
    try:
        value = parse_json(line)
    except UnicodeDecodeError as error:
        return f"byte {error.start} of the line is not UTF-8 ({error.reason}); convert the file to UTF-8"
    except ValueError as error:
        return f"not JSON: {error}; each line must be one JSON object"
    return value if isinstance(value, dict) else "not a JSON object; each line must be one"


def has_lone_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
