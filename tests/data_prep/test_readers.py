"""Every format: its documents, in order, whatever the file system lists first; and what is wrong, by file and line."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import SHARED

from weftrain.core.errors import DataError
from weftrain.data_prep.readers import read_options
from weftrain.data_prep.readers.documents import Document, Failure, FileRead, InputFile
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.readers.shares import read_part, records_before, split_parts

DATA = SHARED / "data"


DEFAULTS = ReadOptions()


def read(
    files: Sequence[InputFile], options: ReadOptions = DEFAULTS, part_bytes: int = 1 << 40
) -> list[Document | Failure]:
    """Everything, with records of the whole file."""
    items: list[Document | Failure] = []
    lines: dict[int, int] = {}
    for part in split_parts(files, part_bytes):
        for item in read_part(files, part, options):
            if isinstance(item, FileRead):
                assert len(item.sha256) == 64
                lines[item.share.file] = lines.get(item.share.file, 0) + item.records
            else:
                items.append(type(item)(**{**item.__dict__, "record": item.record + lines.get(item.file, 0)}))
    return items


def texts(items: list[Document | Failure]) -> list[str | None]:
    assert all(isinstance(item, Document) for item in items), items
    return [item.text for item in items if isinstance(item, Document)]


def lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- JSON lines

LINES = st.one_of(st.just(""), st.text(max_size=30).map(lambda text: json.dumps({"text": text})), st.just("{broken"))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(LINES, min_size=1, max_size=12).filter(any), st.integers(1, 60), st.booleans())
def test_any_cut_gives_the_lines_of_the_whole(tmp_path: Path, rows: list[str], part_bytes: int, ends: bool) -> None:
    path = tmp_path / f"{uuid.uuid4().hex}.jsonl"
    path.write_text("\n".join(rows) + ("\n" if ends and rows else ""))
    files = list_inputs([str(path)], source=None, format="jsonl")
    whole = read(files)
    assert read(files, part_bytes=part_bytes) == whole
    for item in whole:
        assert ("broken" in rows[item.record]) == isinstance(item, Failure)
    for part in split_parts(files, part_bytes):
        for share in part.shares:
            before = path.read_bytes()[: share.begin]
            assert records_before(files[0], share) == before.count(b"\n") + (
                bool(before) and not before.endswith(b"\n")
            )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"txt": "a"}', "no field 'text'; name the field that holds the text with --text-key"),
        (b'{"text": 3}', "field 'text' holds int, not text"),
        (b'{"text": null}', "field 'text' holds NoneType, not text"),
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "a", "text": "b"}', "key 'text' appears twice"),
        (b'{"text": NaN}', "field 'text' holds float, not text"),
        (b"[1]", "not a JSON object"),
        (b'{"text": "\xff"}', "byte 10 of the line is not UTF-8"),
        (b'{"text": "\\ud800"}', "a lone surrogate"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_line_that_is_no_document_is_named_and_reading_goes_on(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}\n')
    first, failed, last = read(list_inputs([str(tmp_path / "t.jsonl")], source=None, format="jsonl"))
    assert (first.record, failed.record, last.record) == (0, 2, 3)
    assert isinstance(failed, Failure)
    assert reason in failed.reason


def test_keys_and_sources(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", [{"body": "a", "from": "x"}, {"body": "b"}, {"body": "c", "from": 3}])
    items = read(list_inputs([str(path)], source="s"), ReadOptions(text_key="body", source_key="from"))
    assert isinstance(items[0], Document)
    assert items[0].source == "x"
    assert all(isinstance(item, Failure) and "holds no source's name" in item.reason for item in items[1:])
    plain = read(list_inputs([str(path)], source="s"), ReadOptions(text_key="body"))
    assert [item.source for item in plain if isinstance(item, Document)] == ["s"] * 3


def test_a_line_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_options.ReadOptions, "max_line_bytes", 100)
    path = lines(tmp_path / "t.jsonl", [{"text": "a"}, {"text": "b" * 5000}, {"text": "c"}])
    first, long, last = read(list_inputs([str(path)], source=None))
    assert isinstance(long, Failure)
    assert "longer than 100 bytes" in long.reason
    assert (first.record, long.record, last.record) == (0, 1, 2)
    (tmp_path / "big.txt").write_text("x" * 200)
    (failed,) = read(list_inputs([str(tmp_path / "big.txt")], source=None))
    assert isinstance(failed, Failure)


# -- compressed


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])  # two members
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed: pip install 'weftrain[data]'")
    compressor = zstandard.ZstdCompressor()
    return compressor.compress(data[:1000]) + compressor.compress(data[1000:])


def test_a_bomb_is_a_line_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_options.ReadOptions, "max_line_bytes", 1 << 16)
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"t.jsonl{suffix}"
        path.write_bytes(compressed(b'{"text": "' + b"a" * (32 << 20) + b'"}\n{"text": "after"}\n', suffix))
        bomb, after = read(list_inputs([str(path)], source=None))
        assert isinstance(bomb, Failure)
        assert isinstance(after, Document)


# -- tokenised


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"token_ids": [1, 2, 3, 4], "source": "c4"}, "holds 4 token ids, not 4 + 1; give --sequence-length 3"),
        ({"token_ids": [1, 2, 3, 4, -1]}, "not a list of token ids"),
        ({"token_ids": [1, 2, 3, 4, 5.0]}, "not a list of token ids"),
        ({"token_ids": [1, 2, 3, 4, True]}, "not a list of token ids"),
        ({"token_ids": [1, 2, 3, 4, 2**31]}, "not a list of token ids"),
        ({"token_ids": "12345"}, "not a list of token ids"),
        ({"ids": [1]}, "not a list of token ids"),
        ({"token_ids": [1, 2, 3, 4, 5], "source": 7}, "not a source's name"),
    ],
)
def test_ambers_rows(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"token_ids": [1, 2, 3, 4, 5], "source": "arxiv"}, row])
    files = list_inputs([str(path)], source=None)
    assert files[0].format == "amber"
    good, bad = read(files, ReadOptions(sequence_length=4))
    assert isinstance(good, Document)
    assert good.tokens is not None
    assert (good.tokens.tolist(), good.source) == ([1, 2, 3, 4, 5], "arxiv")
    assert isinstance(bad, Failure)
    assert reason in bad.reason


def test_the_released_sample_of_amber() -> None:
    path = DATA / "amber" / "memorization_sample.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here: the released files lie beside the repository")
    first = json.loads(path.open().readline())
    items = read(list_inputs([str(path)], source="amber", format="amber"))
    assert len(items) > 10
    if "token_ids" in first:
        assert all(isinstance(item, Document) for item in items)
        assert all(
            item.tokens is not None and item.tokens.max() < 32_000 for item in items if isinstance(item, Document)
        )
    else:
        assert all(isinstance(item, Failure) for item in items)


# -- all formats


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=400),
    st.sampled_from(["t.jsonl", "t.txt", "t.jsonl.gz", "t.jsonl.zst", "t.parquet", "t.h5", "t.bin"]),
    st.sampled_from(
        [
            b"",
            b'{"token_ids": [',
            b"\x1f\x8b\x08",
            b"\x28\xb5\x2f\xfd",
            b"PAR1",
            b"\x89HDF\r\n\x1a\n",
            b"MMIDIDX\x00\x00",
        ]
    ),
)
def test_bytes_of_any_kind_are_documents_failures_or_one_error(
    tmp_path: Path, data: bytes, name: str, magic: bytes
) -> None:
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    (folder / name).write_bytes(magic + data)
    if name == "t.bin":
        (folder / "t.idx").write_bytes(magic + data)
    try:
        items = read(list_inputs([str(folder / name)], source=None), ReadOptions(sequence_length=4))
    except DataError as error:
        message = str(error)
    else:
        message = "t."
        assert all(isinstance(item, Document | Failure) for item in items)
    assert "t." in message
    assert "\n" not in message


@pytest.mark.parametrize("change", ["longer", "same size"])
def test_a_file_that_changes(tmp_path: Path, change: str) -> None:
    (tmp_path / "a.txt").write_text("before")
    files = list_inputs([str(tmp_path / "a.txt")], source=None)
    (tmp_path / "a.txt").write_text("afterwards" if change == "longer" else "beFore")
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    with pytest.raises(DataError, match=r"a\.txt: changed while it was read"):
        read(files)


def test_normalisation_is_by_name_and_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffe\u0301 \ufb01\r\nx\ry".encode())
    files = list_inputs([str(tmp_path / "a.txt")], source=None)
    assert texts(read(files)) == ["\ufeffe\u0301 \ufb01\r\nx\ry"]
    assert texts(read(files, ReadOptions(normalise=("newlines", "strip_bom")))) == ["e\u0301 \ufb01\nx\ny"]
    assert texts(read(files, ReadOptions(normalise=("strip_bom", "NFC")))) == ["\u00e9 \ufb01\r\nx\ry"]
    assert texts(read(files, ReadOptions(normalise=("NFKC", "newlines", "strip_bom")))) == ["\u00e9 fi\nx\ny"]
    with pytest.raises(DataError, match="--normalise nfc: there is NFC"):
        read(files, ReadOptions(normalise=("nfc",)))


def test_shares_hash_to_the_file_where_they_are_all_of_it(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", [{"text": "x" * number} for number in range(50)])
    files = list_inputs([str(path)], source=None)
    (share,) = [
        item
        for part in split_parts(files, 1 << 40)
        for item in read_part(files, part, ReadOptions())
        if isinstance(item, FileRead)
    ]
    assert share.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert share.records == 50
    assert np.array_equal([0], [share.share.begin])
