"""Held-out sets, and datasets that are not the recipe's, refused before step 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from written_datasets import VOCAB, S, config, make_dataset

from weftrain.core.data import open_training
from weftrain.core.errors import DataError
from weftrain.core.formats.dataset import read_dataset_manifest
from weftrain.core.order.source_sets import open_heldout


def test_heldout_is_read_in_order_and_cut(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", [4], heldout=[3, 6])
    make_dataset(tmp_path / "none", [4])
    data = config(tmp_path, {"name": "a"}, {"name": "none"})
    (whole,) = open_heldout(data, VOCAB, 100)
    assert (whole.name, whole.num_rows, whole.sequence_length) == ("a", 9, S)
    assert np.array_equal(whole.rows(2, 5).ids[:, 0], 50_000 + S * np.arange(2, 7))
    assert whole.dataset_id == read_dataset_manifest(tmp_path / "a").heldout.id  # type: ignore[union-attr]
    (cut,) = open_heldout(data, VOCAB, 4)
    assert cut.num_rows == 4
    with pytest.raises(ValueError, match="of 4"):
        cut.rows(0, 5)


def test_a_dataset_that_is_not_the_recipes(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", [5])
    with pytest.raises(
        DataError, match=r"prepared with sequence_length 8, the recipe says 16: set data\.sequence_length=8"
    ):
        open_training(config(tmp_path, {"name": "a"}, sequence_length=16), 2, vocab_size=VOCAB)
    with pytest.raises(DataError, match="a vocabulary of 60000, the model has 32000"):
        open_training(config(tmp_path, {"name": "a"}), 2, vocab_size=32_000)
    with pytest.raises(
        DataError, match=r"fim None, the recipe's source 'a' says \{'rate': 0.9, 'spm_share': 0.5, 'mode': 'exact'\}"
    ):
        open_training(config(tmp_path, {"name": "a", "fim": {"rate": 0.9, "spm_share": 0.5}}), 2, vocab_size=VOCAB)
    with pytest.raises(DataError, match=r"subset \[0.1, 0.15\] of source 'a' holds no row of 5"):
        open_training(config(tmp_path, {"name": "a", "subset": [0.1, 0.15]}), 2, vocab_size=VOCAB)
    make_dataset(tmp_path / "fim", [5], fim={"rate": 0.9, "spm_share": 0.5, "mode": "exact", "seed": 0})
    with pytest.raises(DataError, match="says None"):
        open_heldout(config(tmp_path, {"name": "fim"}), VOCAB, 4)
    assert open_training(config(tmp_path, {"name": "a"}), 2, vocab_size=VOCAB + 9).sources[0].num_rows == 5
