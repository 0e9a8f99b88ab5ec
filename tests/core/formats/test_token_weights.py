"""Weights of tokens in shards: exact to the last bit, under the digest, held against the mask, and absent where no token
has any, so that other shards are the bytes that they were.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_cases import TOKENIZER, edit, few_documents, make, windows

from weftrain.core.errors import DataError
from weftrain.core.formats import shard_format
from weftrain.core.formats.shard_format import LEAST_WEIGHT, MOST_WEIGHT, PLANES, write_shard
from weftrain.core.formats.shard_reader import ShardReader, read_rows

WEIGHT = st.floats(float(np.float32(LEAST_WEIGHT)), MOST_WEIGHT, width=32)


def write(path: Path, tokens: np.ndarray, mask: np.ndarray | None, weights: np.ndarray | None, stride: int = 8) -> str:
    documents = few_documents([len(tokens)], [0], 1)
    shape = {"sequence_length": 8, "row_stride": stride, "vocab_size": 999, "tokenizer_sha256": TOKENIZER}
    return write_shard(path, tokens, documents, **shape, loss_mask=mask, token_weights=weights).digest  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), rows=st.integers(1, 9), stride=st.sampled_from([8, 9]), masked=st.booleans())
def test_round_trip(tmp_path: Path, data: st.DataObject, rows: int, stride: int, masked: bool) -> None:
    length = (rows - 1) * stride + 9
    weights = np.array(data.draw(st.lists(WEIGHT, min_size=length, max_size=length)), np.float32)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=length, max_size=length))) if masked else None
    path, tokens = tmp_path / "s.h5", np.arange(length)
    write(path, tokens, mask, weights, stride)
    reader, everything = ShardReader(path), np.arange(rows)
    found = reader.plane("token_weights", everything)
    stored = weights if mask is None else np.where(mask, weights, np.float32(0))
    assert found is not None
    assert found.dtype == np.float32
    assert found.tobytes() == windows(stored, 8, stride)[:, 1:].tobytes()  # of labels
    order = data.draw(st.permutations(range(rows)))
    ids = np.empty((rows, 9), np.int64)
    planes = read_rows(ids, [reader] * rows, [row * stride for row in order], tuple(PLANES))
    assert planes["token_weights"].tobytes() == found[order].tobytes()
    assert ("loss_mask" in planes) == masked
    assert read_rows(ids, [reader] * rows, [row * stride for row in order]).keys() <= {"loss_mask"}
    with h5py.File(path) as file:
        assert file["token_weights"].dtype == np.dtype("<f4")
        assert file.attrs["format"] == b"weftrain-shard/4"


def test_a_weight_in_the_digits_of_json_comes_back_as_it_was_given(tmp_path: Path) -> None:
    given_ = np.array([0.1, 0.3333333, 2.5, 1e6, 1e-6, 123456.7, 1.0, 7.25, 0.9999999])
    write(tmp_path / "s.h5", np.arange(9), None, given_)
    found = ShardReader(tmp_path / "s.h5").plane("token_weights", np.array([0]))
    assert found is not None
    assert [float(str(weight)) for weight in found[0]] == given_[1:].tolist()


def test_shards_without_weights_are_what_they_were(tmp_path: Path) -> None:
    """By the digests of what the program wrote before it knew of weights, and by the names of all that is in the file."""
    former = {False: "bedfdda0bcfdf33f", True: "c76271e0540ab21e"}
    for mask, digest in former.items():
        make(tmp_path / "s.h5", mask=mask, seed=7)
        assert ShardReader(tmp_path / "s.h5").digest.startswith(digest)
        with h5py.File(tmp_path / "s.h5") as file:
            assert set(file) == {"data", "doc_fim", *shard_format.TABLES} | ({"loss_mask"} if mask else set())
            assert file.attrs["format"] == b"weftrain-shard/3"


def test_shards_with_and_without_weights_in_one_batch(tmp_path: Path) -> None:
    tokens, weights = np.arange(17), np.linspace(0.5, 2.5, 17).astype(np.float32)
    write(tmp_path / "a", tokens, None, None)
    write(tmp_path / "b", tokens, tokens % 2 == 0, weights)
    a, b = ShardReader(tmp_path / "a"), ShardReader(tmp_path / "b")
    ids = np.empty((3, 9), np.int64)
    planes = read_rows(ids, [a, b, a], [8, 0, 0], tuple(PLANES))
    assert planes["token_weights"][0].tolist() == planes["token_weights"][2].tolist() == [1.0] * 8
    assert planes["token_weights"][1].tolist() == np.where(tokens % 2 == 0, weights, 0)[1:9].tolist()
    assert planes["loss_mask"].tolist() == [[True] * 8, [False, True] * 4, [True] * 8]
    assert read_rows(ids[:1], [a], [0], tuple(PLANES)) == {}


@pytest.mark.parametrize("masked", [False, True])
def test_a_flipped_bit_of_any_weight_is_refused(tmp_path: Path, masked: bool) -> None:
    path, tokens = tmp_path / "s.h5", np.arange(33)
    write(path, tokens, tokens % 3 > 0 if masked else None, np.full(33, 0.75))
    whole = path.read_bytes()
    with h5py.File(path) as file:
        first, size = file["token_weights"].id.get_offset(), file["token_weights"].nbytes
    assert size == 4 * 33
    for place in range(first, first + size):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"block 0 .* does not hash to its digest"):
            ShardReader(path).rows(np.array([0]))


@pytest.mark.parametrize(
    ("weight", "place", "problem"),
    [
        (np.nan, 5, "the weight of a token that bears loss lies outside"),
        (np.inf, 5, "lies outside"),
        (-0.5, 5, "lies outside"),
        (0.0, 5, "lies outside"),
        (2e6, 5, "lies outside"),
        (0.5, 6, "a token that bears no loss has a weight other than 0"),
        (np.nan, 6, "a token that bears no loss has a weight other than 0"),
    ],
)
def test_weights_that_no_writer_makes_are_refused_though_everything_hashes(
    tmp_path: Path, weight: float, place: int, problem: str
) -> None:
    path, tokens = tmp_path / "s.h5", np.arange(33)
    write(path, tokens, tokens % 3 > 0, np.ones(33))

    def change(file: h5py.File) -> None:
        file["token_weights"][place] = weight
        planes = [file[name][...] for name in PLANES]
        file["block_digest"][...] = shard_format._block_digests(file["data"][...], planes)
        header = {
            name: value.decode() if isinstance(value, bytes) else int(value) for name, value in file.attrs.items()
        }
        tables = {name: file[name][...] for name in shard_format.TABLES}
        file.attrs["digest"] = np.bytes_(shard_format.shard_digest(header, tables, True))

    edit(path, change)
    with pytest.raises(DataError, match=rf"s\.h5: token_weights: block 0: .*{problem}") as refused:
        ShardReader(path).verify()
    assert "\n" not in str(refused.value)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.one_of(WEIGHT, st.sampled_from([0.0, -0.0, 1e-7, -1.0, 2e6, np.nan, np.inf]))),
        min_size=1,
        max_size=6,
    )
)
def test_what_is_checked_is_the_definition(tokens: list[tuple[bool, float]]) -> None:
    weights = np.array([weight for _, weight in tokens], np.float32)
    low, high = np.float32(LEAST_WEIGHT), np.float32(MOST_WEIGHT)
    right = all(
        low <= weight <= high if bears else weight == 0 for (bears, _), weight in zip(tokens, weights, strict=True)
    )
    mask = np.array([bears for bears, _ in tokens], np.uint8)
    assert (shard_format.weights_problem(weights, mask) is None) == right
    everywhere = all(low <= weight <= high for weight in weights)
    assert (shard_format.weights_problem(weights, None) is None) == everywhere
