"""JSON that is not lines: an array of objects, or objects in sequence over any number of lines, read as a stream.

A sliding window holds one object and about a block more. A syntax error ends the file, since the start of the next
object is unknown; a value that is no document is a failure of its own.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import IO, Any

from weftrain.core.errors import DataError
from weftrain.data_prep.inputs.compression import open_decompressed
from weftrain.data_prep.inputs.files import BLOCK_BYTES
from weftrain.data_prep.readers.contract import Probe, Reader, Records
from weftrain.data_prep.readers.documents import Failure, InputFile, Share
from weftrain.data_prep.readers.json_objects import decode_at, record_document
from weftrain.data_prep.readers.lines import without_mark
from weftrain.data_prep.readers.read_options import ReadOptions

_SPACE = re.compile(r"[ \t\r\n]*")
_TOKEN = 16  # as long as the longest token that may be cut at the end of the window, a pair of escaped surrogates


class _Window:
    """The text of a file from `place` on, as far as it is read."""

    def __init__(self, file: InputFile, opened: IO[bytes]) -> None:
        self._file, self._opened = file, opened
        # a bad byte is its own object's failure
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.place, self.ended = "", 0, False
        self._text_begin = 0  # of the window, in characters of the file
        self.extend(without_mark(file, opened.read(BLOCK_BYTES)))

    def extend(self, data: bytes | None = None) -> None:
        """Read on, at least as much as the window holds, so that parsing it again at most doubles the time."""
        if data is None:
            data = self._opened.read(max(BLOCK_BYTES, len(self.text) - self.place))
        self.ended = not data
        self._text_begin += self.place
        self.text, self.place = self.text[self.place :] + self._decoder.decode(data, final=self.ended), 0

    def next_character(self) -> str:
        """The next character that is not white space, which stays unread; empty at the end."""
        while True:
            match = _SPACE.match(self.text, self.place)
            assert match is not None
            self.place = match.end()
            if self.place < len(self.text) or self.ended:
                return self.text[self.place : self.place + 1]
            self.extend()

    def value(self, number: int) -> Any:
        """The value that begins here. Raises DataError."""
        while True:
            try:
                value, end = decode_at(self.text, self.place)
                # a number may be cut, as 1 of 1e+9
                if self.ended or self.text[end - 1] in '}]"' or end + 2 < len(self.text):
                    self.place = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _TOKEN
                if self.ended or not cut:
                    raise self.problem(number, f"not JSON: {error.msg}", error.pos) from None
            except ValueError as error:
                raise self.problem(number, f"not JSON: {error}", self.place) from None
            if len(self.text) - self.place > ReadOptions.max_line_bytes:
                raise self.problem(
                    number, f"is longer than {ReadOptions.max_line_bytes:,} characters, or not JSON", self.place
                )
            self.extend()

    def problem(self, number: int, what: str, place: int) -> DataError:
        where = f"at character {self._text_begin + place + 1:,} of the file"
        return DataError(
            f"{self._file.address}: record {number + 1} {what}, {where}; what follows cannot be told apart: repair the "
            "file"
        )


def json_objects(index: int, file: InputFile, share: Share, options: ReadOptions) -> Records:
    number = 0
    with open_decompressed(file.address) as opened:
        window = _Window(file, opened)
        array = window.next_character() == "["
        window.place += array
        while character := window.next_character():
            if array and character == "]" and not number:
                break
            value = window.value(number)
            if isinstance(value, dict):
                yield record_document(index, number, value, file, options)
            else:
                yield Failure(index, number, "not a JSON object; each record must be one")
            number += 1
            if array:
                character = window.next_character()
                if character == "]":
                    break
                if character != ",":
                    raise window.problem(
                        number,
                        "is not preceded by a comma" if character else "is missing: the array has no end",
                        window.place,
                    )
                window.place += 1
        window.place += array
        if array and window.next_character():
            raise window.problem(number, "follows the end of the array", window.place)
        if array and not character:
            raise window.problem(number, "is missing: the array has no end", window.place)
    return number


def _holds_objects(probe: Probe) -> bool:
    """An array of objects; or objects over several lines that have the text field, unlike a configuration file."""
    content = probe.json
    return content is not None and (
        content.layout == "array" or (content.layout == "object" and content.has_any(probe.keys))
    )


READERS = (Reader(name="json", holds="text", read=json_objects, detect=_holds_objects),)
