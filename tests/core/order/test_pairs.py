"""The two rows of a preference pair stay side by side whatever orders, mixes, skips, defers or continues the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from written_datasets import S, config, make_dataset

from weftrain.core.data import open_training
from weftrain.core.errors import DataError
from weftrain.core.order.data_section import DataConfig

ROWS = {"a": 37, "b": 11}
FIRST = {"a": 0, "b": 30_000}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets of pairs, of S // 2 tokens a side; their tokens count up."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, rows in ROWS.items():
        told = {"seed": 0, "eos": None, "preferences": "pairs"}
        make_dataset(folder / name, [rows - 5, 5], None, FIRST[name], masked=True, preparation=told, packing="rows")
    return folder


def section(root: Path, seed: int, weight: float, **changes: Any) -> DataConfig:
    found = config(root, {"name": "a", "weight": weight}, {"name": "b", "weight": 1 - weight}, seed=seed)
    tree = found.model_dump() | {"sequence_length": S // 2, "row_length": S}
    return DataConfig.model_validate(tree | changes)


SKIPS = st.lists(
    st.sampled_from(
        [
            {"chunk": 1, "action": "defer", "reason": "spike"},
            {"chunk": 2, "action": "drop", "reason": "poison"},
            {"source": "a", "rows": (3, 9), "reason": "bad"},
        ]
    ),
    unique_by=str,
)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 50),
    weight=st.floats(0.1, 0.9),
    order=st.sampled_from(["feistel", "cerebras"]),
    skip=SKIPS,
    half_batch=st.integers(1, 7),
    begun=st.integers(0, 9),
    half_before=st.integers(1, 5),
)
def test_rows_of_a_pair_are_neighbours_in_every_batch(
    root: Path, seed: int, weight: float, order: str, skip: list[Any], half_batch: int, begun: int, half_before: int
) -> None:
    batch, steps = 2 * half_batch, 12
    changes: dict[str, Any] = {"order": order, "chunks": 4, "skip": skip}
    if begun:  # another batch size before step `begun`
        changes = {"order": order, "continues": {"step": begun, "sample": begun * 2 * half_before}}
    source = open_training(section(root, seed, weight, **changes), batch, vocab_size=60_000, steps=steps)
    for step in range(begun, begun + steps):
        whole = source.rows(step, 0, batch).ids
        first = whole[:, 0]
        sides = np.where(first < FIRST["b"], first - FIRST["a"], first - FIRST["b"])
        assert (sides[0::2] % S == 0).all()  # the chosen side
        assert (first[1::2] == first[0::2] + S // 2).all()  # the rejected one of the same pair
        assert (whole[0::2, -1] == whole[1::2, 0]).all()
        for place in range(0, batch, 2):  # as micro-batches read it
            assert np.array_equal(source.rows(step, place, 2).ids, whole[place : place + 2])


def test_pairs_are_refused_where_they_would_be_read_whole_or_in_other_pieces(root: Path) -> None:
    for changes in ({"sequence_length": S, "row_length": None}, {"sequence_length": S // 4, "row_length": S}):
        with pytest.raises(DataError, match=f"set data.sequence_length={S // 2} data.row_length={S}"):
            open_training(section(root, 1, 0.5, **changes), 4, vocab_size=60_000)
