"""Archives: every form that the tools write is read, in bounded memory; every kind of damage is named; and shares of
them add up.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import re
import struct
import tracemalloc
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weftrain.core.errors import DataError
from weftrain.data_prep.inputs import compression
from weftrain.data_prep.inputs.compression import BrokenArchive, Decompressed, open_decompressed
from weftrain.data_prep.readers import shares
from weftrain.data_prep.readers.documents import Document, Failure, FileRead, InputFile
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.readers.shares import read_part, records_before, split_parts

SUFFIXES = (".gz", ".zst", ".bz2", ".xz")


def compress(data: bytes, suffix: str) -> bytes:
    """One frame."""
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed: pip install 'weftrain[data]'")
        return bytes(zstandard.ZstdCompressor().compress(data))
    return {
        ".gz": lambda: gzip.compress(data, mtime=0),
        ".bz2": lambda: bz2.compress(data),
        ".xz": lambda: lzma.compress(data),
    }[suffix]()


def read(path: Path, part_bytes: int = 1 << 40) -> list[Document | Failure]:
    """Every line, with its number in the file."""
    files = list_inputs([str(path)], source=None, format="jsonl")
    items: list[Document | Failure] = []
    for part in split_parts(files, part_bytes):
        before = {share: records_before(files[0], share) for share in part.shares}
        held: list[Document | Failure] = []
        for item in read_part(files, part, ReadOptions()):
            if isinstance(item, FileRead):
                items += [type(one)(**{**one.__dict__, "record": one.record + before[item.share]}) for one in held]
                held = []
            else:
                held.append(item)
    return items


DATA = b"".join(b"%d %s\n" % (number, random.Random(number).randbytes(30).hex().encode()) for number in range(3000))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_frames_of_any_number_and_name(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = compress(DATA[:1000], suffix) + compress(b"", suffix) + compress(DATA[1000:], suffix)
    if suffix == ".zst":
        frames = struct.pack("<II", 0x184D2A5E, 3) + b"abc" + frames
    else:
        frames = frames + bytes(512)  # as tapes and tar pad them
    for input_bytes in (1 << 16, 7):
        monkeypatch.setattr(compression, "INPUT_BYTES", input_bytes)
        path = tmp_path / f"a.JSONL{suffix.upper()}"
        path.write_bytes(frames)
        with open_decompressed(str(path)) as opened:
            assert opened.read() == DATA


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_cut_off_or_followed_by_something_else(tmp_path: Path, suffix: str) -> None:
    archive = compress(DATA, suffix)
    middle = len(archive) // 2
    path = tmp_path / f"a.txt{suffix}"
    for damaged, message in (
        (archive[:-1], "damaged or truncated: the archive ends too early"),
        (archive[:middle], "damaged or truncated: the archive ends too early"),
        (archive[:3], "damaged or truncated: the archive ends too early"),
        (b"", "damaged or truncated: the archive ends too early, at byte 0"),
        (archive[:middle] + bytes(64) + archive[middle + 64 :], "damaged or truncated: .*near byte"),
        (b"plain text, renamed", "damaged or truncated: .*near byte 0"),
        (
            archive + b"and something else",
            f"something else follows the end of the archive, at byte {len(archive):,}; copy it again, or cut",
        ),
    ):
        path.write_bytes(damaged)
        with open_decompressed(str(path)) as opened, pytest.raises(BrokenArchive, match=rf"a\.txt\{suffix}: {message}"):
            opened.read()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_compressed_under_a_name_of_text_or_compressed_twice_is_told(tmp_path: Path, suffix: str) -> None:
    data = compress(b'{"text": "a"}\n', suffix)
    (tmp_path / "t.jsonl").write_bytes(data)
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(data))
    told = rf"begins as \{suffix} files do; give its name that ending, or decompress it"
    for name in ("t.jsonl", "t.jsonl.gz"):
        with pytest.raises(DataError, match=rf"{name}: {told}"):
            read(tmp_path / name)
    (tmp_path / "t.txt").write_bytes(data)
    files = list_inputs([str(tmp_path / "t.txt")], source=None, format="text")
    [failure] = [
        item
        for part in split_parts(files, 1 << 20)
        for item in read_part(files, part, ReadOptions())
        if isinstance(item, Failure)
    ]
    assert re.fullmatch(told, failure.reason)
    (tmp_path / "magic.jsonl").write_bytes(b'BZh9\n{"text": "a"}\n')
    assert [type(item) for item in read(tmp_path / "magic.jsonl")] == [Failure, Document]


def test_a_long_window_is_read_and_an_endless_one_refused(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed: pip install 'weftrain[data]'")
    parameters = zstandard.ZstdCompressionParameters(window_log=31, chain_log=6, hash_log=6, strategy=1)
    # unknown size: the frame states its window
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    archive = compressor.compress(DATA) + compressor.flush()
    assert zstandard.get_frame_parameters(archive).window_size == 1 << 31
    path = tmp_path / "a.txt.zst"
    path.write_bytes(archive)
    with open_decompressed(str(path)) as opened:
        assert opened.read() == DATA
    path.write_bytes(archive[:5] + bytes([(32 - 10) << 3]) + archive[6:])
    with (
        open_decompressed(str(path)) as opened,
        pytest.raises(BrokenArchive, match=r"a window of more than 2.00 GiB .*smaller one"),
    ):
        opened.read()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_bomb_is_decompressed_in_pieces(tmp_path: Path, suffix: str) -> None:
    path, size = tmp_path / f"a.txt{suffix}", (200 if suffix == ".zst" else 30) << 20
    path.write_bytes(compress(bytes(size), suffix))
    tracemalloc.start()
    with open_decompressed(str(path)) as opened:
        total = sum(iter(lambda: len(opened.read(1 << 20)), 0))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == size
    assert peak_bytes < (72 << 20 if suffix == ".zst" else 16 << 20)


LINES = st.lists(
    st.one_of(st.just(b""), st.integers(0, 400).map(lambda size: random.Random(size).randbytes(size).hex().encode())),
    max_size=40,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=LINES,
    ends=st.booleans(),
    suffix=st.sampled_from([".gz", ".zst"]),
    frame=st.integers(1, 4000),
    part_bytes=st.integers(20, 4000),
)
def test_any_cut_of_an_archive_gives_the_lines_of_the_whole(
    tmp_path: Path, lines: list[bytes], ends: bool, suffix: str, frame: int, part_bytes: int
) -> None:
    text = [json.dumps({"text": line.decode()}).encode() if line else b"" for line in lines]
    data = b"\n".join(text) + (b"\n" if ends and lines else b"")
    path = tmp_path / f"{uuid.uuid4().hex}.jsonl{suffix}"
    path.write_bytes(
        b"".join(compress(data[begin : begin + frame], suffix) for begin in range(0, max(1, len(data)), frame))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "INPUT_BYTES", 32)
        patch.setattr(shares, "MIN_ARCHIVE_SHARE_BYTES", 16)
        items = read(path, part_bytes)
        pieces = [
            share for part in split_parts(list_inputs([str(path)], source=None), part_bytes) for share in part.shares
        ]
    assert [(item.record, item.text) for item in items if isinstance(item, Document)] == [
        (number, line.decode()) for number, line in enumerate(lines) if line
    ]
    assert len(items) == sum(map(bool, lines))
    assert len(pieces) <= shares.MAX_ARCHIVE_SHARES
    assert [piece.begin for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]


def test_a_large_archive_is_cut_and_one_that_decompresses_slowly_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cuts(suffix: str, mebibytes: int) -> int:
        file = InputFile("absent.jsonl" + suffix, "absent", "s", "jsonl", mebibytes << 20, None)
        return sum(len(part.shares) for part in split_parts([file], 4 << 20))

    assert [cuts(".gz", size) for size in (1, 63, 64, 200, 256, 9000)] == [1, 1, 2, 6, 8, 8]
    assert cuts(".zst", 9000) == 8
    assert cuts(".xz", 9000) == cuts(".bz2", 9000) == 1


def test_positions_are_where_blocks_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "INPUT_BYTES", 100)
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(DATA, mtime=0))
    with Decompressed(str(path), keep_positions=True) as archive:
        data = archive.readall()
        assert data == DATA
        positions = [archive.position(offset) for offset in range(len(data))]
    assert positions == sorted(positions)
    assert all(position % 100 == 0 for position in positions)
    assert max(positions) < path.stat().st_size
    for position in sorted(set(positions))[::97]:
        with Decompressed(str(path)) as archive:
            skipped = b"".join(archive.chunks_before(position))
            assert skipped == data[: positions.index(position)]
            assert archive.readall() == data[len(skipped) :]
