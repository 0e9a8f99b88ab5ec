"""Cerebras HDF5: padded rows, packed rows of several documents, and every integer type; recomputed from the planes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.core.errors import DataError
from weftrain.core.formats.dataset import read_dataset_manifest
from weftrain.core.formats.shard_set import ShardSet
from weftrain.data_prep.marks import BEGINS, LOSS, spans
from weftrain.data_prep.pipeline import Prepared, prepare
from weftrain.data_prep.readers import cerebras
from weftrain.data_prep.readers.documents import Document, Failure
from weftrain.data_prep.readers.listing import list_inputs
from weftrain.data_prep.readers.read_options import ReadOptions
from weftrain.data_prep.stages.settings import Inputs
from weftrain.data_prep.tokens.tokenization import TextEncoder

S, PAD, EOS = 16, 3, 4


def padded(tokens: np.ndarray) -> np.ndarray:
    """[n + 1] ids -> planes [3, S], as the Model Zoo pads a short row."""
    n = len(tokens) - 1
    fill = np.full(S - n, PAD)
    return np.stack([np.append(tokens[:-1], fill), np.append(np.ones(n, int), 0 * fill), np.append(tokens[1:], fill)])


def packed(documents: list[np.ndarray], separator_bears_loss: bool = False) -> np.ndarray:
    """Documents of one row -> planes [5, S], as the Model Zoo packs them: the labels are the row's stream shifted by
    one.
    """
    stream = np.concatenate(documents)
    rows = padded(stream)
    lengths = [len(document) for document in documents]
    lengths[-1] -= 1  # its last token is a label only
    span = np.concatenate([np.arange(length)[::-1] for length in lengths])
    position = np.concatenate([np.arange(length) for length in lengths])
    if not separator_bears_loss:
        rows[1, np.cumsum(lengths)[:-1] - 1] = 0
    tail = np.zeros(S - len(span), int)
    return np.concatenate([rows, np.stack([np.append(span, tail), np.append(position, tail)])])


def write(path: Path, rows: Any, dtype: Any = "<i4") -> Path:
    data = np.stack(rows).astype(dtype)
    with h5py.File(path, "w") as file:
        file.attrs["n_examples"] = len(data)
        file.create_dataset("data", data=data, chunks=(1, *data.shape[1:]), compression="gzip")
    return path


def make(tmp_path: Path, encoder: TextEncoder, path: Path, name: str = "d", **changes: Any) -> Prepared:
    (tmp_path / "tokenizer.json").write_bytes(encoder.data)
    inputs = Inputs(tuple(list_inputs([str(path)], source=None)), "rows", "none", ReadOptions(sequence_length=S))
    settings: dict[str, Any] = {
        "tokenizer": tmp_path / "tokenizer.json",
        "sequence_length": S,
        "heldout_fraction": 0.0,
        "order": "as_read",
    }
    prepared = prepare(inputs, tmp_path / "out", name=name, **settings | changes)
    assert prepared is not None
    return prepared


def rows_of(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    shards = ShardSet(folder, read_dataset_manifest(folder), "train")
    ids, mask = shards.rows(np.arange(shards.num_rows))
    return ids, np.ones_like(ids[:, 1:]) if mask is None else mask


def loss_pairs(ids: np.ndarray, mask: np.ndarray, labels: np.ndarray) -> list[tuple[tuple[int, ...], int]]:
    """Every (inputs up to here, label) that bears loss, of one row."""
    return [(tuple(ids[: place + 1].tolist()), int(labels[place])) for place in np.flatnonzero(mask)]


def random_ids(random: np.random.Generator, count: int) -> np.ndarray:
    return random.integers(10, 300, count)


@pytest.mark.parametrize("dtype", ["<i4", "<u2", "<u4", "<i8"])
def test_padded_rows_keep_every_pair_of_inputs_and_label_that_bears_loss(
    tmp_path: Path, encoder: TextEncoder, dtype: str
) -> None:
    random = np.random.default_rng(0)
    rows = [padded(random_ids(random, length + 1)) for length in (S, 9, 1, S - 1, S, 5)]
    rows[4][1, 3:6] = 0  # labels without loss within a row
    rows[4][2, 4] = 7  # which are not compared
    prepared = make(tmp_path, encoder, write(tmp_path / "t.h5", rows, dtype))
    ids, mask = rows_of(prepared.folder)
    assert ids.shape == (6, S + 1)
    for row, tokens, bears in zip(rows, ids, mask, strict=True):
        assert loss_pairs(tokens[:-1], bears, tokens[1:]) == loss_pairs(*row)
    assert np.array_equal(ids[1], np.append(np.append(rows[1][0, :9], rows[1][2, 8]), np.full(7, PAD)))
    assert prepared.manifest.train.padding_tokens == 7 + 15 + 1 + 11
    table = next(ShardSet(prepared.folder, prepared.manifest, "train").readers()).documents()
    assert [int(end) % (S + 1) for end in table.end] == [0, 10, 0, 2, 0, 16, 0, 0, 6, 0]


def test_packed_rows_keep_their_documents(tmp_path: Path, encoder: TextEncoder) -> None:
    random = np.random.default_rng(1)
    lengths = [[5, 12], [3, 3, 3], [17], [1, 4, 1, 2]]
    documents = [[np.append(random_ids(random, length - 1), EOS) for length in row] for row in lengths]
    rows = [packed(row, separator_bears_loss=number == 0) for number, row in enumerate(documents)]
    prepared = make(tmp_path, encoder, write(tmp_path / "t.h5", rows))
    ids, mask = rows_of(prepared.folder)
    shards = ShardSet(prepared.folder, prepared.manifest, "train")
    reader = next(shards.readers())
    starts = reader.document_starts(np.arange(len(rows)))
    for number, (row, planes) in enumerate(zip(documents, rows, strict=True)):
        stream = np.concatenate(row)
        assert np.array_equal(ids[number, : len(stream)], stream)
        assert loss_pairs(ids[number, :-1], mask[number], ids[number, 1:]) == loss_pairs(*planes[:3])
        text = len(stream) - 1
        position = np.arange(S) - starts[number]
        assert np.array_equal(position[:text], planes[4][:text])
        assert (starts[number][text + 1 :] == len(stream)).all()  # the padding attends to itself
    table = reader.documents()
    assert table.end.tolist() == [5, 17, 20, 23, 26, 34, 51, 52, 56, 57, 59, 68]
    assert table.record.tolist() == [0, 0, 1, 1, 1, -1, 2, 3, 3, 3, 3, -1]
    # of the two that are EOS alone one, and one of all padding
    assert len({identity.tobytes() for identity in table.id}) == 10
    assert prepared.manifest.train.padding_tokens == 8 + 9


def test_planes_of_zeros_tell_no_documents_apart(tmp_path: Path, encoder: TextEncoder) -> None:
    rows = [np.concatenate([padded(random_ids(np.random.default_rng(2), S + 1)), np.zeros((2, S), int)])]
    prepared = make(tmp_path, encoder, write(tmp_path / "t.h5", rows))
    (reader,) = ShardSet(prepared.folder, prepared.manifest, "train").readers()
    assert reader.documents().end.tolist() == [S + 1]
    assert ShardSet(prepared.folder, prepared.manifest, "train").rows(np.arange(1))[1] is None


def test_a_row_of_the_released_fim_scripts(tmp_path: Path, encoder: TextEncoder) -> None:
    """Shorter than before: ids and labels are filled with <fim_pad>, the last label before it is eos, the mask 0 over
    the filling.
    """
    text, short = random_ids(np.random.default_rng(3), 12), 4
    ids, labels = np.append(text, np.full(short, PAD)), np.append(np.append(text[1:], EOS), np.full(short, PAD))
    row = np.stack([ids, np.append(np.ones(12), np.zeros(short)), labels]).astype(int)
    tokens, mask = rows_of(make(tmp_path, encoder, write(tmp_path / "t.h5", [row])).folder)
    assert tokens[0].tolist() == [*text.tolist(), EOS, PAD, PAD, PAD, PAD]
    assert loss_pairs(tokens[0, :-1], mask[0], tokens[0, 1:]) == loss_pairs(*row)


def test_packed_rows_are_the_same_bytes_on_any_number_of_parts(
    tmp_path: Path, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weftrain.data_prep.stages import plan

    random = np.random.default_rng(4)
    rows = [packed([random_ids(random, count) for count in random.multinomial(12, [0.4, 0.6]) + 1]) for _ in range(40)]
    path = write(tmp_path / "t.h5", rows)
    whole = make(tmp_path, encoder, path, "whole", order="shuffled")
    monkeypatch.setattr(plan, "_MEBI", 300)
    cut = make(tmp_path, encoder, path, "cut", order="shuffled")
    assert whole.manifest.train.id == cut.manifest.train.id
    assert whole.manifest.train.n_examples == 40


@pytest.mark.parametrize(
    ("plane", "place", "value", "reason"),
    [
        (2, 4, 9, "the label at 4 is 9, the next id .* not shifted by one"),
        (1, 2, 3, "a loss mask other than 0 and 1"),
        (1, slice(None), 0, "bears no loss anywhere, and is no padding either"),
        (0, 0, -1, r"holds ids -1\.\."),
        (4, 0, 1, "position_ids begin with 1, not 0"),
        (4, 3, 9, "position_ids and attention_span contradict each other at 3"),
        (3, 4, 1, "position_ids and attention_span contradict each other at 4"),
    ],
)
def test_rows_that_contradict_themselves(
    tmp_path: Path, read_all: Callable[..., Any], plane: int, place: Any, value: int, reason: str
) -> None:
    random = np.random.default_rng(5)
    good = packed([random_ids(random, 5), random_ids(random, 9)], separator_bears_loss=True)
    bad = good.copy()
    bad[plane, place] = value
    first, failed = read_all(write(tmp_path / "t.h5", [good, bad]), sequence_length=S)
    assert isinstance(first, Document)
    assert isinstance(failed, Failure)
    assert re.search(reason, failed.reason)


def test_a_row_that_fails_is_within_the_budget_or_named(tmp_path: Path, encoder: TextEncoder) -> None:
    good = padded(random_ids(np.random.default_rng(5), S + 1))
    bad = good.copy()
    bad[2, 4] = 9
    path = write(tmp_path / "t.h5", [good, bad])
    with pytest.raises(DataError, match=r"t\.h5:2: the label at 4 is 9, .* not shifted by one"):
        make(tmp_path, encoder, path)
    assert make(tmp_path, encoder, path, max_failures=1).manifest.train.n_examples == 1


def test_shapes_and_types_that_are_not_read(tmp_path: Path, encoder: TextEncoder) -> None:
    row = padded(random_ids(np.random.default_rng(6), S + 1))
    for rows, dtype, message in (
        ([row[:2]], "<i4", r"not \(N, 3, S\) or \(N, 5, S\)"),
        ([np.concatenate([row, row[:1]])], "<i4", r"not \(N, 3, S\) or \(N, 5, S\)"),
        ([row], "<f4", "has type float32"),
        ([row], ">i4", "has type >i4"),
    ):
        with pytest.raises(DataError, match=message):
            make(tmp_path, encoder, write(tmp_path / "t.h5", rows, dtype))


@settings(deadline=None, max_examples=200)
@given(st.data(), st.sampled_from([3, 5]), st.integers(1, 7))
def test_any_planes_are_a_row_of_the_same_loss_or_say_what_is_wrong(
    data: st.DataObject, planes: int, length: int
) -> None:
    """Small numbers, so that labels often are the next id; a row that is read has the planes' pairs of inputs and
    label, and no other.
    """
    stream = data.draw(st.lists(st.integers(0, 2), min_size=length + 1, max_size=length + 1))
    rows = np.zeros((planes, length), np.int64)
    rows[0], rows[2] = stream[:-1], stream[1:]
    rows[1] = data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
    for _ in range(data.draw(st.integers(0, 3))):
        plane, place = data.draw(st.integers(0, planes - 1)), data.draw(st.integers(0, length - 1))
        rows[plane, place] = data.draw(st.integers(-1, 3))
    found = cerebras._row(rows)
    if isinstance(found, str):
        assert "\n" not in found
        return
    tokens, marks = found
    mask = np.ones(length, int) if marks is None else marks[1:] & LOSS
    assert loss_pairs(tokens[:-1], mask, tokens[1:]) == loss_pairs(*rows[:3])
    if marks is not None:
        split = list(spans(marks))
        assert split[0].start == 0
        assert [piece.stop for piece in split] == [*(piece.start for piece in split[1:]), length + 1]
        assert not any((marks[piece.start : piece.stop] & LOSS).any() for piece in split if piece.padding)
        assert planes == 5 or not (marks & BEGINS).any()
