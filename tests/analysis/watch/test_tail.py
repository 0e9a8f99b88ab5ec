"""The ends of files that grow: whole lines, once each, from wherever the reader begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from weftrain.analysis.watch.tail import LineTail, last_lines


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_new_lines_come_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    tail = LineTail(path)
    assert tail.read() == []
    append(path, "one\ntw")
    assert tail.read() == [b"one"]
    assert tail.read() == []
    append(path, "o\n\nthree\n")
    assert tail.read() == [b"two", b"", b"three"]
    path.write_text("one\n")  # torn lines were moved away
    assert tail.read() == []
    append(path, "four\n")
    assert tail.read() == [b"four"]
    monkeypatch.setattr("weftrain.analysis.watch.tail.MAX_BYTES", 8)
    append(path, "a\nb\nc\nlong" * 1 + "x" * 20 + "\nlast\n")
    found = []
    while tail.offset < path.stat().st_size:
        found += tail.read()
    assert found[:3] == [b"a", b"b", b"c"]
    assert found[-1] == b"last"


def test_the_last_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert last_lines(path, 10) == ([], 0)
    path.write_text("one\ntwo\nthree\nto")
    assert last_lines(path, 100) == ([b"one", b"two", b"three"], 14)
    assert last_lines(path, 10) == ([b"three"], 14)
    assert last_lines(path, 1) == ([], 15)
