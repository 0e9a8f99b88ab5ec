"""Stand-ins: what is read is what lies elsewhere, only that travels, and without a reader nothing is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from weftrain.core.formats import distant_files, fsops
from weftrain.core.formats.plain_file import UnreadableFileError, open_plain, plain_lines, read_plain

DATA = b"".join(b"%07d\n" % number for number in range(100_000))


@pytest.fixture
def asked() -> list[tuple[int, int]]:
    return []


@pytest.fixture
def stand_in(tmp_path: Path, asked: list[tuple[int, int]]) -> Iterator[Path]:
    """The stand-in of a file that holds DATA."""

    def read(start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return DATA[start:stop]

    token = distant_files.new_token()
    distant_files.serve(token, read)
    fsops.write_sparse(tmp_path / "file", distant_files.MAGIC + token, len(DATA))
    yield tmp_path / "file"
    distant_files.forget(token)


def test_it_reads_as_the_file(stand_in: Path, asked: list[tuple[int, int]]) -> None:
    assert stand_in.stat().st_size == len(DATA)
    assert stand_in.stat().st_blocks * 512 <= 4096
    assert read_plain(stand_in, "metrics") == DATA
    assert [*plain_lines(stand_in, "ledger")][99_999] == b"0099999"
    asked.clear()
    with open_plain(stand_in, buffering=0) as file:
        file.seek(8_000)
        assert file.read(16) == b"0001000\n0001001\n"
        assert file.read(8) == b"0001002\n"
    assert len(asked) == 1, "what was fetched with it is not fetched again"


def test_a_copy_is_of_the_bytes(stand_in: Path, tmp_path: Path) -> None:
    for copy in (fsops.copy_file, fsops.link_or_copy):
        copy(stand_in, tmp_path / copy.__name__)
        assert (tmp_path / copy.__name__).read_bytes() == DATA
    assert fsops.sha256_file(stand_in) == fsops.sha256_file(tmp_path / "copy_file")


def test_a_short_answer_is_an_error(tmp_path: Path) -> None:
    token = distant_files.new_token()
    distant_files.serve(token, lambda start, stop: DATA[start : stop - 1])
    fsops.write_sparse(tmp_path / "file", distant_files.MAGIC + token, len(DATA))
    with pytest.raises(OSError, match="bytes came of"):
        read_plain(tmp_path / "file", "metrics")


def test_without_its_reader_it_is_refused(stand_in: Path) -> None:
    token = distant_files.token_of(stand_in)
    assert token is not None
    distant_files.forget(token)
    with pytest.raises(UnreadableFileError, match="open the run by its address"):
        open_plain(stand_in)
