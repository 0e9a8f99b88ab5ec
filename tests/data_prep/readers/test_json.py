"""JSON in lines, arrays and one object after the other: fields that lead into objects, and what is no hindrance
elsewhere.
"""

from __future__ import annotations

import gzip
import json
import tracemalloc
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from weftrain.core.errors import DataError
from weftrain.data_prep.readers import json_array, json_lines, json_objects
from weftrain.data_prep.readers.documents import Document, Failure, InputFile, Share
from weftrain.data_prep.readers.read_options import ReadOptions

Read = Callable[..., list[Document | Failure]]
NO_CHARACTER = "field 'text' holds a lone surrogate, or bytes that are not UTF-8; repair it"
BOTH = pytest.mark.parametrize("name", ["t.jsonl", "t.json"])


def write(path: Path, rows: list[bytes]) -> Path:
    """Rows as lines, or as an array."""
    path.write_bytes(b"\n".join(rows) + b"\n" if path.suffix == ".jsonl" else b"[" + b",\n".join(rows) + b"]\n")
    return path


def reasons(items: list[Document | Failure]) -> list[str | None]:
    """Texts, and the reasons of failures."""
    return [item.text if isinstance(item, Document) else item.reason for item in items]


@BOTH
@pytest.mark.parametrize(
    ("row", "text"),
    [
        (b'{"text": "a", "score": NaN, "low": -Infinity}', "a"),
        (b'{"id": 1, "id": 2, "text": "a"}', "a"),
        (b'{"meta": {"text": 1, "text": 2}, "text": "a"}', "a"),
        (b'{"text": "a", "n": 1' + b"0" * 5000 + b"}", "a"),
        (b'{"text": "a", "n": 1e999, "bad": "\\ud800"}', "a"),
        (b' \t{"text": "\\ud83d\\ude00 \\u00e9"} \r', "\U0001f600 é"),
        (b'{"te\\u0078t": "a"}', "a"),
        (b'{"text": "a", "te\\u0078t": "a"}', "key 'text' appears twice; leave one of them"),
        (b'{"text": "\\udc80"}', NO_CHARACTER),
        (b'{"text": 1' + b"0" * 5000 + b"}", "field 'text' holds float, not text"),
        (b'{"txt": "a"}', "no field 'text'; name the field that holds the text with --text-key"),
    ],
)
def test_what_stands_in_other_fields_is_no_hindrance(
    tmp_path: Path, read_all: Read, name: str, row: bytes, text: str
) -> None:
    items = read_all(write(tmp_path / name, [b'{"text": "before"}', row, b'{"text": "after"}']))
    assert reasons(items) == ["before", text, "after"]
    assert [item.record for item in items] == [0, 1, 2]


@BOTH
def test_keys_lead_into_objects_and_a_key_with_a_dot_wins(tmp_path: Path, read_all: Read, name: str) -> None:
    rows: list[Any] = [
        {"meta": {"text": "a", "from": {"site": "x"}}},
        {"meta.text": "b", "meta": {"text": "not this", "from.site": "y"}},
        {"meta": {"inner.text": "no"}, "meta.from": {"site": "z"}},
        {"meta": "text"},
        {"meta": {"text": "c"}},
    ]
    path = write(tmp_path / name, [json.dumps(row).encode() for row in rows])
    format = {"t.jsonl": "jsonl", "t.json": "json"}[name]
    items = read_all(path, format=format, text_key="meta.text", source_key="meta.from.site")
    missing = "no field 'meta.text'; name the field that holds the text with --text-key"
    nameless = "field 'meta.from.site' holds no source's name; repair it, or leave --source-key out"
    assert reasons(items) == ["a", "b", missing, missing, nameless]
    assert [item.source for item in items if isinstance(item, Document)] == ["x", "y"]
    twice = write(
        tmp_path / f"2{name}",
        [b'{"meta": {"text": "a"}, "meta": {"text": "b"}}', b'{"meta": {"text": "a", "text": "b"}}'],
    )
    assert reasons(read_all(twice, format=format, text_key="meta.text")) == [
        "key 'meta' appears twice; leave one of them",
        "key 'text' appears twice; leave one of them",
    ]


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.jsonl.gz", "t.json.gz"])
def test_a_byte_order_mark_is_no_part_of_json(tmp_path: Path, read_all: Read, name: str) -> None:
    pack: Callable[[bytes], bytes] = gzip.compress if name.endswith(".gz") else bytes
    path = tmp_path / name
    path.write_bytes(pack('\ufeff{"text": "\ufeffé"}\n{"text": "b"}\n'.encode()))
    assert reasons(read_all(path)) == ["\ufeffé", "b"]
    for encoding in ("utf-16", "utf-32"):
        path.write_bytes(pack('{"text": "a"}\n'.encode(encoding)))
        with pytest.raises(
            DataError, match=rf"{name}: begins with the byte order mark of UTF-16 or UTF-32; convert the file to UTF-8"
        ):
            read_all(path, format="jsonl" if "jsonl" in name else "json")


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b'[{"text": "a"}]', ["a"]),
        (b' \n [ \n{"text": "a"} ,\n{"text":\n "b"}\n ] \n', ["a", "b"]),
        (b"[]", []),
        (b" [ ] ", []),
        (b'{\n "text": "a"\n}\n{\n "text": "b"\n}\n', ["a", "b"]),
        (b'{"text": "a"}{"text": "b"}', ["a", "b"]),
        (b'[{"text": "a"}, "b", 12, [3], null]', ["a"] + ["not a JSON object; each record must be one"] * 4),
        (b'{"text": "a"}\n"b"', ["a", "not a JSON object; each record must be one"]),
        (
            b'[{"text": "a"}, {"text": "\xff"}, {"text": "c"}]',
            ["a", "field 'text' holds a lone surrogate, or bytes that are not UTF-8; repair it", "c"],
        ),
    ],
)
def test_arrays_and_objects_of_any_layout(tmp_path: Path, read_all: Read, data: bytes, texts: list[str]) -> None:
    (tmp_path / "t.json").write_bytes(data)
    assert reasons(read_all(tmp_path / "t.json", format="json")) == texts


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"text": "a"}', "record 2 is missing: the array has no end, at character 15 of the file"),
        (b"[", "record 1 is missing: the array has no end, at character 2 of the file"),
        (b'[{"text": "a"} {"text": "b"}]', "record 2 is not preceded by a comma, at character 16 of the file"),
        (b'[{"text": "a"},]', "record 2 not JSON: Expecting value, at character 16 of the file"),
        (b'[{"text": "a"}] x', "record 2 follows the end of the array, at character 17 of the file"),
        (b'[{"text": "a"}, {"text": b}]', "record 2 not JSON: Expecting value, at character 26 of the file"),
        (
            b'[{"text": "a"}, {"text": "b',
            "record 2 not JSON: Unterminated string starting at, at character 26 of the file",
        ),
        (b'[{"text": "a"}, ' + b"[" * 100_000, "record 2 not JSON: nested too deeply, at character 17 of the file"),
        (b"words", "record 1 not JSON: Expecting value, at character 1 of the file"),
    ],
)
def test_a_syntax_error_ends_the_file(tmp_path: Path, read_all: Read, data: bytes, message: str) -> None:
    (tmp_path / "t.json").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_all(tmp_path / "t.json", format="json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(JSON, max_size=8),
    array=st.booleans(),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
    window=st.integers(1, 40),
)
@example(values=[0.0, 0, 1e300, 0, 0, -5e-9], array=True, ascii_only=False, indent=None, window=1)
def test_any_window_gives_the_values_of_the_whole(
    tmp_path: Path, read_all: Read, values: list[Any], array: bool, ascii_only: bool, indent: int | None, window: int
) -> None:
    rows = [{"text": f"{number}", "other": value} if number % 3 else value for number, value in enumerate(values)]
    if array:
        text = json.dumps(rows, ensure_ascii=ascii_only, indent=indent)
    else:
        text = "\n".join(json.dumps(row, ensure_ascii=ascii_only, indent=indent) for row in [{}, *rows])
    path = tmp_path / f"{uuid.uuid4().hex}.json"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "BLOCK_BYTES", window)
        items = read_all(path, format="json")
    wanted = [f"{number}" if number % 3 else None for number in range(len(rows))]
    assert [item.text if isinstance(item, Document) else None for item in items] == ([] if array else [None]) + wanted


@settings(deadline=None, max_examples=100)
@given(value=st.dictionaries(st.text(max_size=5), JSON, max_size=5), ascii_only=st.booleans(), repeated=st.booleans())
def test_a_long_line_is_parsed_as_any_other(value: dict[str, Any], ascii_only: bool, repeated: bool) -> None:
    value = value | {"text": "e\u0301 \U0001f600", "ключ": {"é": 1}}
    line = json.dumps(value, ensure_ascii=ascii_only, allow_nan=True)
    if repeated:
        line = line[:-1] + ', "text": "", "ключ": 2}'
    with pytest.MonkeyPatch.context() as patch:
        short = json_objects.parse_object(line.encode(errors="replace"))
        patch.setattr(json_objects, "_LONG_BYTES", 0)
        long = json_objects.parse_object(line.encode(errors="replace"))
    assert isinstance(long, dict)
    assert repr(long.items()) == repr(short.items()) if isinstance(short, dict) else False
    assert (
        getattr(long, "repeated", None)
        == getattr(short, "repeated", None)
        == (frozenset({"text", "ключ"}) if repeated else None)
    )


def test_a_long_line_is_held_once(tmp_path: Path) -> None:
    size = 4 << 20
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "' + "x" * size + '\U0001f600"}\n{"text": "b"}\n', encoding="utf-8")
    status = path.stat()
    file = InputFile(str(path), path.name, "s", "jsonl", status.st_size, status.st_mtime_ns)
    items = json_lines.READERS[0].read(0, file, Share(0, 0, -1), ReadOptions())
    tracemalloc.start()
    first = next(items)
    held_bytes = tracemalloc.get_traced_memory()[0]
    is_document = isinstance(first, Document)
    del first
    next(items)
    after_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert is_document
    assert held_bytes < 4.6 * size  # the text takes four bytes a character; the file's buffer
    assert after_bytes < size


def test_a_large_array_is_read_in_a_window(tmp_path: Path, read_all: Read) -> None:
    path = tmp_path / "t.json"
    path.write_text("[" + ",\n".join('{"text": "' + "x" * 2000 + '"}' for _ in range(8000)) + "]")
    tracemalloc.start()
    items = sum(isinstance(item, Document) for item in _stream(path))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert items == 8000
    assert peak_bytes < 8 << 20


def _stream(path: Path) -> Any:
    status = path.stat()
    file = InputFile(str(path), path.name, "s", "json", status.st_size, status.st_mtime_ns)
    return json_array.READERS[0].read(0, file, Share(0, 0, -1), ReadOptions())
