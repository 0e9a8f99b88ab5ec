"""How a continuation is printed while its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from weftrain.cli.generate import _Stream

Decode = Callable[[Sequence[int]], str]


def as_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_text_comes_in_whole_characters(capsys: pytest.CaptureFixture[str]) -> None:
    prompt, rest = list("né".encode()[:2]), list("é\x1b!".encode()[1:])
    stream = _Stream(prompt, as_bytes)  # its last character is begun, not ended
    assert printed(capsys) == ""
    pieces = []
    for token in rest:
        stream.add(token)
        pieces.append(printed(capsys))
    assert pieces == ["né", "\\x1b", "!"]
    stream.add("é".encode()[0])
    assert printed(capsys) == ""
    stream.end()
    assert printed(capsys) == "\N{REPLACEMENT CHARACTER}\n"


def test_a_tokenizer_that_changes_its_mind(capsys: pytest.CaptureFixture[str]) -> None:
    stream = _Stream([1], lambda ids: "ab" if len(ids) == 1 else "x" * len(ids))
    stream.add(2)
    stream.end()
    assert printed(capsys) == "ab\nxx\n"


def test_ids(capsys: pytest.CaptureFixture[str]) -> None:
    stream = _Stream([1], None)
    for token in (5, 6):
        stream.add(token)
    stream.end()
    assert printed(capsys) == "5,6\n"
