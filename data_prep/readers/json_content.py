"""Recognising JSON by a file's first bytes: lines of objects, an array of objects, one object, or another value.

Only the head is parsed, leniently; the reader decides whether a line is valid.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from weftrain.data_prep.readers.json_objects import MISSING, field

_BOM = b"\xef\xbb\xbf"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class JsonContent:
    """layout: 'lines': two or more objects, one per line; 'line': one object on one line; 'array': of objects;
    'object': over several lines, one or more; 'value': an array of other values.

    first: the first object if the head holds all of it. head: the text.
    """

    layout: Literal["lines", "line", "array", "object", "value"]
    first: dict[str, Any] | None
    head: str

    def has_field(self, key: str) -> bool:
        """Whether the first object has a field, `outer.inner` if nested; a guess if the head is too short."""
        if self.first is None:
            last = key.rpartition(".")[2]
            return any(re.search(rf'"{re.escape(name)}"\s*:', self.head) is not None for name in (key, last))
        return field(self.first, key) is not MISSING

    def has_any(self, keys: Sequence[str]) -> bool:
        """Whether the first object has one of these fields."""
        return any(map(self.has_field, keys))

    @property
    def is_records(self) -> bool:
        """Whether it holds several objects, and so is no document or configuration file."""
        return self.layout in ("lines", "array")


def json_content(head: bytes, whole: bool) -> JsonContent | None:
    """The JSON that a file begins with, or None. whole: whether `head` is all of the file."""
    data = head.removeprefix(_BOM).lstrip()
    if data[:1] not in (b"{", b"["):
        return None
    text = data.decode(errors="replace")
    return _array(text, whole) if text[0] == "[" else _objects(text, whole)


def _objects(text: str, whole: bool) -> JsonContent | None:
    line, line_break, rest = text.partition("\n")
    value, end = _parse(line)
    if isinstance(value, dict) and not line[end:].strip():
        rest = rest.lstrip()
        if rest.startswith("{") or (not rest and not whole):
            return JsonContent("lines", value, text)
        return JsonContent("line", value, text) if not rest else None
    if not line_break and not whole:
        return JsonContent("line", None, text) if end == len(line) else None  # longer than the head
    value, end = _parse(text)
    if isinstance(value, dict):
        rest = text[end:].strip()
        return JsonContent("object", value, text) if not rest or rest.startswith("{") else None
    return JsonContent("object", None, text) if end == len(text) and not whole else None


def _array(text: str, whole: bool) -> JsonContent | None:
    inside = text[1:].lstrip()
    if inside.startswith("{"):
        value, end = _parse(inside)
        if isinstance(value, dict):
            return JsonContent("array", value, text) if inside[end:].lstrip()[:1] in (",", "]", "") else None
        return JsonContent("array", None, text) if end == len(inside) and not whole else None
    value, end = _parse(text)
    complete = isinstance(value, list) and not text[end:].strip()
    return JsonContent("value", None, text) if complete or (value is None and end == len(text) and not whole) else None


def _parse(text: str) -> tuple[Any, int]:
    """A value at the beginning of a text and its end; (None, len(text)) if it is cut; (None, 0) for no JSON."""
    try:
        return _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        # a cut \\u escape, number or literal
        cut = error.pos >= len(text) - 12 or error.msg.startswith("Unterminated string")
        return None, len(text) if cut else 0
    except (ValueError, RecursionError):
        return None, 0
