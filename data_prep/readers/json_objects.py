"""JSON objects of one document each: parsing, and their text and source under keys that may lead into nested objects.

Only requested fields must be unambiguous: NaN, repeated keys or long integers elsewhere in an object do no harm.
`core.formats.canonical.parse_json`, for the project's own records, refuses all of that.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any

from weftrain.data_prep.conversations.messages import Conversation, conversation_of
from weftrain.data_prep.conversations.preferences import Preference, preference_of
from weftrain.data_prep.readers.documents import Document, Failure, InputFile
from weftrain.data_prep.readers.normalisation import normalise
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.weights import weight_in

MISSING: Any = object()
_SPACE = " \t\r\n"
_LONG_BYTES = 1 << 20
_WIDE_ESCAPE = re.compile(rb"\\u(?!00[0-7])")  # of a character that is no single byte


class _WithRepeats(dict[str, Any]):
    """An object with repeated keys."""

    repeated: frozenset[str]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    result = _WithRepeats(plain)
    seen: set[str] = set()
    result.repeated = frozenset(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return result


_DECODER: Any = json.JSONDecoder(object_pairs_hook=_object)  # made once: json.loads would make one a call
# Python's int() has a limit of 4,300 digits
_LONG_INTEGERS: Any = json.JSONDecoder(object_pairs_hook=_object, parse_int=float)


def decode_at(text: str, begin: int) -> tuple[Any, int]:
    """The JSON value at text[begin:], and its end. Raises ValueError; json.JSONDecodeError has the place."""
    try:
        try:
            result: tuple[Any, int] = _DECODER.raw_decode(text, begin)
        except json.JSONDecodeError:
            raise
        except ValueError:
            result = _LONG_INTEGERS.raw_decode(text, begin)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return result


def parse_object(line: bytes | None) -> dict[str, Any] | str:
    """The object of a line, or what is wrong with it. None: the line is too long."""
    if line is None:
        return f"the line is longer than {ReadOptions.max_line_bytes:,} bytes; split the document"
    try:
        if len(line) > _LONG_BYTES and (value := _parse_long(line)) is not None:
            return value
        text = line.decode()
        value, end = decode_at(text, len(text) - len(text.lstrip(_SPACE)) if text[0] in _SPACE else 0)
        if text[end : end + 2] not in ("", "\n", "\r\n") and text[end:].strip(_SPACE):
            return "not JSON: something follows the object; each line must be one JSON object"
    except UnicodeDecodeError as error:
        return f"byte {error.start} of the line is not UTF-8 ({error.reason}); convert the file to UTF-8"
    except ValueError as error:
        return f"not JSON: {error}; each line must be one JSON object"
    return value if isinstance(value, dict) else "not a JSON object; each line must be one"


def _parse_long(line: bytes) -> dict[str, Any] | None:
    """The object of a long line in which a few characters would make the text take two or four bytes each; else None.
    It is parsed as Latin-1, where characters are bytes, and its strings are decoded afterwards. Raises ValueError.
    """
    if line.isascii() or _WIDE_ESCAPE.search(line) is not None or not _is_utf8(line):
        return None
    text = line.decode("latin-1")
    value, end = decode_at(text, len(text) - len(text.lstrip(_SPACE)) if text[0] in _SPACE else 0)
    if text[end:].strip(_SPACE) or not isinstance(value, dict):
        return None
    del text
    try:
        result: dict[str, Any] = _decoded(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return result


def _is_utf8(data: bytes) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for begin in range(0, len(data), _LONG_BYTES + 1):
            decoder.decode(data[begin : begin + _LONG_BYTES + 1])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _decoded(value: Any) -> Any:
    """A value whose strings hold the bytes of UTF-8, decoded."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("latin-1").decode()
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, dict):
        if isinstance(value, _WithRepeats):
            value.repeated = frozenset(map(_decoded, value.repeated))
        for key in list(value):
            item = value.pop(key)
            if isinstance(item, str) and not item.isascii():
                item = item.encode("latin-1")  # the last of the string, before it becomes four times as large
                value[_decoded(key)] = item.decode()
            else:
                value[_decoded(key)] = _decoded(item)
    return value


def field(value: dict[str, Any], key: str) -> Any:
    """The value under a key, or MISSING. Dots lead into nested objects unless the key exists as it stands. Raises
    ValueError for a repeated key on the way.
    """
    if key in value:
        if isinstance(value, _WithRepeats) and key in value.repeated:
            raise ValueError(f"key '{key}' appears twice; leave one of them")
        return value[key]
    for dot in (place for place, character in enumerate(key) if character == "."):
        inner = field(value, key[:dot]) if key[:dot] in value else MISSING
        if isinstance(inner, dict) and (found := field(inner, key[dot + 1 :])) is not MISSING:
            return found
    return MISSING


def record_document(
    index: int, number: int, value: dict[str, Any], file: InputFile, options: ReadOptions
) -> Document | Failure:
    """The document of an object: its conversation or preference where those are read, else its text."""
    if not (options.conversations or options.preferences):
        return text_document(index, number, value, file, options)
    try:
        source = file.source if options.source_key is None else field(value, options.source_key)
        for key in value:
            field(value, key)  # raises for a field that stands there twice
        found = preference_of(value) if options.preferences else conversation_of(value)
    except ValueError as error:
        return Failure(index, number, str(error))
    if not _is_name(source):
        return _no_source(index, number, options)
    if not isinstance(found, Conversation):
        prompt = found.prompt_identity if isinstance(found, Preference) else None
        return Document(index, number, source, found.identity, belongs_to=prompt, preference=found)
    words = found.words if found.weighted else None
    return Document(index, number, source, found.identity, belongs_to=words, conversation=found)


def text_document(
    index: int, number: int, value: dict[str, Any], file: InputFile, options: ReadOptions
) -> Document | Failure:
    """The document of an object, from the options' text_key, source_key and weight_key."""
    try:
        text = field(value, options.text_key)
        source = file.source if options.source_key is None else field(value, options.source_key)
        weight = 1.0 if options.weight_key is None else _weight(value, options.weight_key)
    except ValueError as error:
        return Failure(index, number, str(error))
    if text is MISSING:
        return Failure(
            index, number, f"no field '{options.text_key}'; name the field that holds the text with --text-key"
        )
    if not isinstance(text, str):
        return Failure(index, number, f"field '{options.text_key}' holds {type(text).__name__}, not text")
    if has_lone_surrogate(text):
        return Failure(
            index, number, f"field '{options.text_key}' holds a lone surrogate, or bytes that are not UTF-8; repair it"
        )
    if not _is_name(source):
        return _no_source(index, number, options)
    return Document(index, number, source, normalise(text, options.normalise), weight=weight)


def _weight(value: dict[str, Any], key: str) -> float:
    """Raises ValueError."""
    found = field(value, key)
    if found is MISSING:
        raise ValueError(f"no field '{key}': give the text a weight, or name its field with --weight-key")
    return weight_in(key, found)


def _is_name(source: Any) -> bool:
    return isinstance(source, str) and source != "" and not has_lone_surrogate(source)


def _no_source(index: int, number: int, options: ReadOptions) -> Failure:
    return Failure(
        index, number, f"field '{options.source_key}' holds no source's name; repair it, or leave --source-key out"
    )


def has_lone_surrogate(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
