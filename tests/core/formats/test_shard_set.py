"""A set of a dataset: its rows are numbered across shards, and only sets that exist are opened."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from written_datasets import S, make_dataset

from weftrain.core.errors import DataError
from weftrain.core.formats.shard_set import open_set


def test_rows_are_numbered_across_shards_in_a_copy_too(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", [5, 7, 3])
    manifest, train = open_set(tmp_path / "a", "train")
    ids, mask = train.rows(np.array([14, 0, 5, 4]))
    assert mask is None
    assert (ids - ids[1, 0]).tolist() == [list(range(row * S, row * S + S + 1)) for row in (14, 0, 5, 4)]
    assert np.array_equal(pickle.loads(pickle.dumps(train)).rows(np.array([14]))[0], ids[:1])
    assert [reader.num_rows for reader in train.readers()] == [5, 7, 3]
    assert manifest.train.n_examples == 15
    train.verify()
    for row in (-1, 15):
        with pytest.raises(IndexError):
            train.rows(np.array([row]))
    with pytest.raises(DataError, match="has no set 'heldout'; it has train"):
        open_set(tmp_path / "a", "heldout")
