"""Readers: documents in a fixed order, and for everything that cannot be read the file and the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weftrain.core.errors import DataError
from weftrain.data_prep.readers import Document, file_inputs


def read(*paths: Path, **options: object) -> list[Document]:
    return list(file_inputs(paths, **options).read())  # type: ignore[arg-type]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "zw\\u00f6lf\\n", "more": [1]}\n')
    assert read(path) == [Document("a.jsonl:1", "a.jsonl", "one"), Document("a.jsonl:3", "a.jsonl", "zwölf\n")]
    path.write_text('{"body": "one"}')
    assert [document.text for document in read(path, text_key="body")] == ["one"]


def test_a_text_file_is_one_document_with_its_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\n\ntwö".encode())
    assert read(path) == [Document("a.txt", "a.txt", "one\r\n\ntwö")]


def test_a_folder_is_read_sorted_without_hidden_files_links_and_binaries(tmp_path: Path) -> None:
    folder = tmp_path / "src"
    for name in ("b/y.py", "b/x.py", "a.c", ".git/config", "b/.hidden", "c.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "image.bin").write_bytes(b"\xff\xfe")
    (folder / "zeros.bin").write_bytes(b"\0\0")
    (folder / "d.jsonl").write_text('{"text": "line"}\n')
    (tmp_path / "secret").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    assert [document.name for document in read(folder)] == ["src/a.c", "src/c.md", "src/d.jsonl:1", "src/b/x.py", "src/b/y.py"]
    assert [document.name for document in read(folder, suffixes=[".py"])] == ["src/b/x.py", "src/b/y.py"]
    assert {document.source for document in read(folder)} == {"src"}


def test_the_order_is_not_the_file_systems(tmp_path: Path) -> None:
    names = [f"{folder}/{file}.txt" for folder in "hcafbegd" for file in "zyx"]
    for name in names:
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text(name)
    assert [document.text for document in read(tmp_path / "src")] == sorted(names)


def test_reading_twice_gives_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    inputs = file_inputs([tmp_path / "b.txt", tmp_path / "a.txt"])
    assert list(inputs.read()) == list(inputs.read())
    assert [document.text for document in inputs.read()] == ["b", "a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"a\.jsonl:2: not JSON"),
        (b'{"text": "a", "text": "b"}', r"a\.jsonl:2: not JSON: .*twice"),
        (b'{"text": NaN}', r"a\.jsonl:2: not JSON"),
        (b"[" * 5000, r"a\.jsonl:2: not JSON"),
        (b'{"other": 1}', r"a\.jsonl:2: no field 'text'"),
        (b'["text"]', r"a\.jsonl:2: no field 'text'"),
        (b'{"text": 5}', r"a\.jsonl:2: field 'text' holds int, not text"),
        (b'{"text": "\\ud800"}', r"a\.jsonl:2: field 'text' holds a lone surrogate"),
        (b'{"text": "\xff"}', r"a\.jsonl:2: byte 10 of the line is not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        read(path)


def test_bad_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xe9e\n")
    with pytest.raises(DataError, match=r"a\.txt:3: byte 11 is not UTF-8 .*; convert"):
        read(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"a\.txt:3"):
        read(tmp_path, suffixes=[".txt"])


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        file_inputs([tmp_path / "none.txt"])
    with pytest.raises(DataError, match="no input"):
        file_inputs([])
    with pytest.raises(DataError, match="holds no text file"):
        read(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"holds no file ending in \.py, \.c"):
        read(tmp_path, suffixes=[".py", ".c"])


def test_a_long_line_is_one_document(tmp_path: Path) -> None:
    text = "x" * 300_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    assert read(tmp_path / "a.jsonl")[0].text == text
