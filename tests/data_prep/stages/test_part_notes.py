"""A part's shares and failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from weftrain.core.errors import DataError
from weftrain.data_prep.readers.documents import Failure, FileRead, Share
from weftrain.data_prep.stages.part_notes import FailureList, Shares, in_blocks, read_failures, read_note


def test_records_of_earlier_shares_of_the_same_file_are_counted() -> None:
    shares = Shares()
    for file, begin, records in ((0, 0, 3), (0, 10, 4), (1, 0, 5)):
        assert shares.before(1) == 0
        shares.add(FileRead(Share(file, begin, begin + 10), records, "ab"))
    assert shares.before(0) == 0
    assert shares.before(1) == 5
    assert shares.listed == [[0, 0, 3, "ab"], [0, 10, 4, "ab"], [1, 0, 5, "ab"]]


def test_failures_come_back_and_no_file_is_left_without_any_or_after_an_error(tmp_path: Path) -> None:
    wanted = [Failure(0, number, "is not UTF-8") for number in range(3)]
    with FailureList(tmp_path / "some") as some, FailureList(tmp_path / "none"):
        for failure in wanted:
            some.add(failure)
    assert list(read_failures(tmp_path / "some")) == wanted
    with pytest.raises(KeyError), FailureList(tmp_path / "broken") as broken:
        broken.add(wanted[0])
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["some"]


def test_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("{")
    for read in (read_note, lambda path: list(read_failures(path))):
        with pytest.raises(DataError, match=r"x: cannot be read: .* and prepare again"):
            read(tmp_path / "x")


def test_lines_are_joined_to_blocks() -> None:
    blocks = list(in_blocks([b"a" * (1 << 19)] * 5))
    assert [len(block) >> 19 for block in blocks] == [2, 2, 1]
