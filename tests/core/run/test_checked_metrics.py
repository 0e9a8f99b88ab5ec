"""What of metrics.jsonl an earlier start found whole is hashed and not read again; nothing else is believed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from weftrain.core.formats.canonical import parse_json, sealed
from weftrain.core.run import checked_metrics, metrics_lines
from weftrain.core.run.checked_metrics import CHECKED, CheckedPart, check_metrics, remember, remember_growth
from weftrain.core.run.metrics import METRICS


def line(step: int, **more: object) -> bytes:
    return json.dumps({"kind": "step", "time": 1.5, "step": step, "loss": 2.5, **more}).encode() + b"\n"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The lines that were checked, if they are no step lines alike."""
    monkeypatch.setattr(checked_metrics, "_WORTH_BYTES", 0)
    monkeypatch.setattr(metrics_lines.StepShapes, "match", lambda shapes, lines: False)
    found: list[bytes] = []
    parsed = metrics_lines.checked_line
    monkeypatch.setattr(metrics_lines, "checked_line", lambda data: (found.append(data), parsed(data))[1])
    return found


def test_only_what_came_since_is_read(tmp_path: Path, read: list[bytes]) -> None:
    path = tmp_path / METRICS
    path.write_bytes(line(1) + line(2) + b'{"kind": "st')
    damaged, part = check_metrics(path)
    assert (damaged, part.lines, part.size) == ([], 2, len(line(1) + line(2)))
    remember(path, part)
    read.clear()
    assert check_metrics(path) == ([], part)
    assert read == []
    path.write_bytes(line(1) + line(2) + b"damaged\n" + line(3))
    damaged, more = check_metrics(path)
    assert (damaged, more.lines) == ([3], 4)
    assert set(read) == {b"damaged", line(3)[:-1]}


@pytest.mark.parametrize("what", ["the part", "its length", "the note", "the note's hash", "a note of nothing"])
def test_what_does_not_fit_is_not_believed(what: str, tmp_path: Path, read: list[bytes]) -> None:
    path, note = tmp_path / METRICS, tmp_path / CHECKED
    path.write_bytes(line(1) + line(2) + line(3))
    remember(path, check_metrics(path)[1])
    value = parse_json(note.read_bytes())
    if what == "the part":
        path.write_bytes(line(1) + line(2).replace(b"2.5", b"2,5") + line(3))
    elif what == "its length":
        path.write_bytes(line(1) + b"damaged\n")
    elif what == "the note":
        path.write_bytes(line(1) + b"damaged\n" + line(3))
        note.write_bytes(sealed(value | {"sha256": "0" * 64}))
    elif what == "the note's hash":
        path.write_bytes(line(1) + b"damaged\n" + line(3))
        note.write_bytes(note.read_bytes().replace(b'"lines":3', b'"lines":9'))
    else:
        path.write_bytes(line(1) + b"damaged\n" + line(3))
        note.write_bytes(sealed(value | {"size": -1}))
    read.clear()
    assert check_metrics(path)[0] == [2]
    assert line(1)[:-1] in read


def test_a_short_file_gets_no_note(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_bytes(line(1))
    remember(path, CheckedPart(10, 1, "0" * 64))
    assert not (tmp_path / CHECKED).exists()


def test_a_run_notes_what_it_wrote_as_the_file_grows(
    tmp_path: Path, read: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, noted, size = tmp_path / METRICS, list[int](), len(line(100))
    monkeypatch.setattr(checked_metrics, "_WORTH_BYTES", 4 * size)
    for step in range(100, 200):
        with path.open("ab") as file:
            file.write(line(step))
        remember_growth(path)
        if (found := checked_metrics._known(path)) is not None and found.lines not in noted:
            noted.append(found.lines)
    assert noted[:8] == [4, 8, 12, 16, 20, 24, 28, 32]
    assert all(later - before >= later / 8 for before, later in itertools.pairwise(noted))
    assert noted[-1] > 87
    read.clear()
    assert check_metrics(path)[1].lines == 100
    assert len(set(read)) == 100 - noted[-1]


def test_a_running_process_notes_nothing_behind_a_damaged_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked_metrics, "_WORTH_BYTES", 1)
    path = tmp_path / METRICS
    path.write_bytes(line(1) + b"damaged\n" + line(2))
    remember_growth(path)
    assert not (tmp_path / CHECKED).exists()
