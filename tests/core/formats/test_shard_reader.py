"""Reading shards: what was written is what is read, and nothing damaged gets through."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_cases import assert_holds, check_boundaries, edit, make, windows

from weftrain.core.errors import DataError
from weftrain.core.formats import shard_format
from weftrain.core.formats import shard_reader as shards
from weftrain.core.formats.shard_format import PLANES, Documents
from weftrain.core.formats.shard_reader import ShardReader, read_rows


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 60),
    sequence_length=st.integers(1, 40),
    independent=st.booleans(),
    vocab_size=st.sampled_from([2, 300, 65_535, 65_536, 65_537, 2**31]),
    mask=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_round_trip(
    tmp_path: Path, rows: int, sequence_length: int, independent: bool, vocab_size: int, mask: bool, seed: int
) -> None:
    path = tmp_path / "shard.h5"
    shape: dict[str, Any] = {
        "rows": rows,
        "sequence_length": sequence_length,
        "independent": independent,
        "vocab_size": vocab_size,
    }
    written = make(path, **shape, mask=mask, seed=seed)
    reader = ShardReader(path)
    assert (reader.num_rows, reader.sequence_length, reader.vocab_size) == (rows, sequence_length, vocab_size)
    assert reader.access == "mapped"
    assert_holds(reader, *written)
    check_boundaries(reader, written[1])
    with h5py.File(path) as file:
        assert file["data"].dtype == (np.uint16 if vocab_size <= 65_536 else np.int32)
        assert file.attrs["n_examples"] == rows  # what a Cerebras loader asks for


def test_rows_in_any_order_and_repeated(tmp_path: Path) -> None:
    tokens, _, _ = make(tmp_path / "s.h5")
    indices = np.array([7, 0, 39, 7, 3])
    reader = ShardReader(tmp_path / "s.h5")
    assert np.array_equal(reader.rows(indices), windows(tokens, 16, 16)[indices])
    none = np.array([], dtype=np.int64)
    mask = reader.plane("loss_mask", none)
    assert mask is not None
    assert (reader.rows(none).shape, mask.shape, reader.document_starts(none).shape) == ((0, 17), (0, 16), (0, 16))
    for outside in (-1, 40):
        with pytest.raises(IndexError, match="of 40"):
            reader.rows(np.array([outside]))


def test_an_altered_token_is_found_on_first_touch_only_of_its_block(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    tokens, _, _ = make(path, rows=5000, sequence_length=256, mask=False)
    with h5py.File(path) as file:
        offset = file["data"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[offset + 2 * (1 << 20) - 100] ^= 1  # in the second block
    path.write_bytes(data)
    reader = ShardReader(path)
    assert np.array_equal(reader.rows(np.array([0, 4200])), windows(tokens, 256, 256)[[0, 4200]])
    for row in (3000, 4095):  # another row of the damaged block, and the altered one
        with pytest.raises(DataError, match=r"s\.h5: data: block 1 \(rows 2047\.\.4095\) does not hash"):
            reader.rows(np.array([row]))
    with pytest.raises(DataError, match="block 1"):
        reader.verify()


def test_a_row_across_blocks_checks_both(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    length = 700_000  # a row of three blocks
    tokens, documents, mask = make(path, rows=2, sequence_length=length)
    assert_holds(ShardReader(path), tokens, documents, mask)
    with h5py.File(path) as file:
        offset = file["data"].id.get_offset()
    for block, row in ((0, 0), (1, 0), (1, 1), (2, 1)):
        data = bytearray(path.read_bytes())
        data[offset + block * (1 << 20) + 5] ^= 1
        damaged = tmp_path / "damaged.h5"
        damaged.write_bytes(data)
        with pytest.raises(DataError, match=f"block {block} "):
            ShardReader(damaged).rows(np.array([row]))


def test_boundaries_come_from_the_mapped_file_which_is_not_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a large dataset has more shards than tables of documents could be kept of."""
    _, documents, _ = make(tmp_path / "s.h5")
    reader = ShardReader(tmp_path / "s.h5")
    assert np.array_equal(reader.document_ends(), documents.end)
    monkeypatch.setattr(shards, "open_shard", None)
    assert reader.document_starts(np.arange(40)).shape == (40, 16)
    assert reader.document_starts(np.array([], dtype=np.int64)).shape == (0, 16)
    with pytest.raises(IndexError, match="of 40"):
        reader.document_starts(np.array([40]))


def damaged_block(path: Path, block: int) -> None:
    """Flip a bit of a block of `data`."""
    with h5py.File(path) as file:
        offset = file["data"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[offset + block * (1 << 20) + 5] ^= 1
    path.write_bytes(data)


def test_a_block_is_hashed_once_whichever_rows_reach_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # five blocks, several verified at once
    tokens, _, _ = make(tmp_path / "s.h5", rows=9000, sequence_length=256, mask=False)
    hashed: list[int] = []
    monkeypatch.setattr(
        shards,
        "block_digest",
        lambda data, planes: (hashed.append(len(data)), shard_format.block_digest(data, planes))[1],
    )
    reader = ShardReader(tmp_path / "s.h5")
    rows = np.random.default_rng(1).permutation(9000)
    for start in range(0, 9000, 1500):
        assert np.array_equal(
            reader.rows(rows[start : start + 1500]), windows(tokens, 256, 256)[rows[start : start + 1500]]
        )
    reader.rows(rows)
    reader.tokens(0, len(tokens))
    reader.verify()
    assert sorted(hashed) == [len(tokens) - 4 * (1 << 19), *[1 << 19] * 4]


def test_threads_that_read_the_same_blocks_at_once_get_verified_rows(tmp_path: Path) -> None:
    tokens, _, _ = make(tmp_path / "s.h5", rows=9000, sequence_length=256, mask=False)
    reader, rows = ShardReader(tmp_path / "s.h5"), np.arange(0, 9000, 100)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(reader.rows, [rows] * 8):
            assert np.array_equal(found, windows(tokens, 256, 256)[rows])
    assert reader.is_verified


def test_of_several_damaged_blocks_the_first_row_s_is_named_and_nothing_of_them_is_taken_for_verified(
    tmp_path: Path,
) -> None:
    """Blocks that one reading reaches are verified at once by threads; which of them is named must not depend on
    these.
    """
    path = tmp_path / "s.h5"
    tokens, _, _ = make(path, rows=9000, sequence_length=256, mask=False)
    for block in (1, 3):
        damaged_block(path, block)
    reader = ShardReader(path)
    rows = np.array([0, 7000, 3000, 5000, 8500])  # blocks 0, 3, 1, 2, 4
    for _ in range(3):
        with pytest.raises(DataError, match="block 3 "):
            reader.rows(rows)
    good = np.array([0, 5000, 8500])
    assert np.array_equal(reader.rows(good), windows(tokens, 256, 256)[good])
    with pytest.raises(DataError, match="block 1 "):
        reader.verify()
    assert not reader.is_verified


def test_rows_of_shards_of_two_dtypes_masked_and_not_mapped_and_chunked_in_one_batch(tmp_path: Path) -> None:
    written = {
        name: make(tmp_path / name, vocab_size=vocab_size, mask=mask, independent=independent, seed=seed)
        for seed, (name, vocab_size, mask, independent) in enumerate(
            [("a", 5000, False, False), ("b", 70_000, True, False), ("c", 5000, True, True), ("d", 70_000, False, True)]
        )
    }
    with h5py.File(tmp_path / "d") as source, h5py.File(tmp_path / "e", "w") as file:
        for key, value in source.attrs.items():
            file.attrs[key] = value
        for key in source:
            file.create_dataset(key, data=source[key][...], chunks=True, compression="gzip")
    written["e"] = written["d"]
    rng = np.random.default_rng(4)
    names, rows = rng.choice(list(written), 200), rng.integers(0, 40, 200)
    readers = {name: ShardReader(tmp_path / name) for name in written}
    ids = np.empty((200, 17), dtype=np.int64)
    positions = [int(row) * readers[name].row_stride for name, row in zip(names, rows, strict=True)]
    planes = read_rows(ids, [readers[name] for name in names], positions, tuple(PLANES))
    assert planes.keys() == {"loss_mask"}
    mask = planes["loss_mask"]
    for index, (name, row) in enumerate(zip(names, rows, strict=True)):
        tokens, _, loss_mask = written[name]
        stride = readers[name].row_stride
        assert np.array_equal(ids[index], windows(tokens, 16, stride)[row])
        assert np.array_equal(
            mask[index], np.ones(16) if loss_mask is None else windows(loss_mask, 16, stride)[row][1:]
        )
    assert read_rows(ids[:1], [readers["a"]], [16]) == {}
    readers["e"].close()


@pytest.mark.parametrize(("vocab_size", "bad"), [(5000, 5000), (70_000, -1), (70_000, 70_000)])
def test_a_token_beyond_the_vocabulary_is_refused_with_its_row(tmp_path: Path, vocab_size: int, bad: int) -> None:
    """A shard that is consistent in itself and still holds an id that the model has no embedding for."""
    path = tmp_path / "s.h5"
    make(path, vocab_size=vocab_size, mask=False)

    def change(file: h5py.File) -> None:
        file["data"][7 * 16 + 3] = bad
        file["block_digest"][...] = shard_format._block_digests(file["data"][...], [])
        header = {
            name: value.decode() if isinstance(value, bytes) else int(value) for name, value in file.attrs.items()
        }
        tables = {name: file[name][...] for name in (*shard_format.TABLES, shard_format.FIM)}
        file.attrs["digest"] = np.bytes_(shard_format.shard_digest(header, tables, False))

    edit(path, change)
    with pytest.raises(DataError, match=f"row 7 holds token id {bad}, beyond the vocabulary of {vocab_size}"):
        ShardReader(path).rows(np.array([0]))


@pytest.mark.parametrize("compression", ["gzip", None])
@pytest.mark.parametrize("mask", [True, False])
def test_a_rechunked_shard_is_read_through_h5py_and_says_so(
    tmp_path: Path, compression: str | None, mask: bool
) -> None:
    written = make(tmp_path / "s.h5", mask=mask)
    path = tmp_path / "chunked.h5"
    with h5py.File(tmp_path / "s.h5") as source, h5py.File(path, "w") as file:
        for name, value in source.attrs.items():
            file.attrs[name] = value
        for name in source:
            file.create_dataset(name, data=source[name][...], chunks=True, compression=compression, shuffle=True)
    reader = ShardReader(path)
    assert reader.access == f"h5py ('data' is chunked, compression {compression or 'none'})"
    assert_holds(reader, *written)
    assert np.array_equal(reader.tokens(5, 40), written[0][5:40])
    assert reader.rows(np.array([], dtype=np.int64)).shape == (0, 17)
    check_boundaries(reader, written[1])
    reader.close()
    edit(path, lambda file: file["data"].__setitem__(3, file["data"][3] ^ 1))
    with pytest.raises(DataError, match="block 0"):
        ShardReader(path).rows(np.array([39]))


def test_a_file_that_is_replaced_while_in_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    make(path)
    reader = ShardReader(path)
    make(path, seed=1)
    with pytest.raises(DataError, match="changed since it was opened"):
        reader.rows(np.array([0]))
    with pytest.raises(DataError, match="changed since the shard was opened"):
        reader.documents()
    path.unlink()
    with pytest.raises(DataError, match="cannot be mapped"):
        reader.rows(np.array([0]))


def assert_refused_or_whole(path: Path, written: tuple[np.ndarray, Documents, np.ndarray | None]) -> bool:
    """True where the file was refused; otherwise everything read must be right."""
    try:
        assert_holds(ShardReader(path), *written)
    except DataError:
        return True
    return False


def flip_and_check(tmp_path: Path, positions: np.ndarray, rng: np.random.Generator) -> int:
    path = tmp_path / "flipped.h5"
    written = make(tmp_path / "s.h5")
    original, refused = (tmp_path / "s.h5").read_bytes(), 0
    for position in positions:
        data = bytearray(original)
        data[int(position) % len(data)] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        refused += assert_refused_or_whole(path, written)
    return refused


def test_a_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    assert flip_and_check(tmp_path, rng.integers(0, 1 << 40, 250), rng) > 100


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "s.h5")
    original, path = (tmp_path / "s.h5").read_bytes(), tmp_path / "short.h5"
    for length in np.linspace(0, len(original) - 1, 60).astype(int):
        path.write_bytes(original[:length])
        with pytest.raises(DataError):
            ShardReader(path).verify()


@pytest.mark.soak
def test_every_byte_flipped(tmp_path: Path) -> None:
    rng, size = np.random.default_rng(2), 0
    make(tmp_path / "size.h5")
    size = (tmp_path / "size.h5").stat().st_size
    assert flip_and_check(tmp_path, np.arange(size), rng) > size // 4


@pytest.mark.prove
@pytest.mark.parametrize("times", [1000, pytest.param(4000, marks=pytest.mark.soak)])
def test_many_bytes_replaced(times: int, tmp_path: Path) -> None:
    """Runs of random bytes, zeros and copied pieces, so that HDF5 meets structure in the wrong place."""
    rng = np.random.default_rng(3)
    written = make(tmp_path / "s.h5")
    original, path = (tmp_path / "s.h5").read_bytes(), tmp_path / "mangled.h5"
    for _ in range(times):
        data = bytearray(original)
        for _ in range(int(rng.integers(1, 4))):
            length, at = int(rng.integers(1, 200)), int(rng.integers(len(data)))
            start = int(rng.integers(len(data)))
            piece = [rng.bytes(length), bytes(length), bytes(data[start : start + length])][int(rng.integers(3))]
            data[at : at + length] = piece[: len(data) - at]
        path.write_bytes(data)
        assert_refused_or_whole(path, written)
