"""Amber's rows, told by their content whatever the file's name and compression are."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weftrain.data_prep.readers import amber
from weftrain.data_prep.readers.documents import Document, Failure
from weftrain.data_prep.readers.listing import list_inputs

ROWS = [{"token_ids": [number, 2, 3, 4, 5], "source": "arxiv"} for number in range(4)]


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.jsonl.gz", "rows.json.gz", "rows.jsonl.zst", "rows", "rows.JSONL.GZ"]
)
def test_rows_are_told_by_their_content(tmp_path: Path, read_all: Callable[..., Any], name: str) -> None:
    data = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if name.lower().endswith(".gz"):
        data = gzip.compress(data)
    elif name.endswith(".zst"):
        data = pytest.importorskip(
            "zstandard", reason="zstandard is not installed: pip install 'weftrain[data]'"
        ).compress(data)
    (tmp_path / name).write_bytes(data)
    assert [file.format for file in list_inputs([str(tmp_path / name)], source=None)] == ["amber"]
    items = read_all(tmp_path / name, sequence_length=4)
    assert [item.tokens.tolist() for item in items if isinstance(item, Document)] == [row["token_ids"] for row in ROWS]
    assert {item.source for item in items} == {"arxiv"}


def test_a_line_longer_than_a_row_may_be(
    tmp_path: Path, read_all: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amber, "_MAX_ROW_BYTES", 100)
    long = {"token_ids": list(range(60))}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (ROWS[0], long, ROWS[1])))
    first, failed, last = read_all(tmp_path / "rows.jsonl", sequence_length=4)
    assert isinstance(failed, Failure)
    assert "longer than the 100 bytes that a row of ids may take" in failed.reason
    assert (first.record, failed.record, last.record) == (0, 1, 2)
