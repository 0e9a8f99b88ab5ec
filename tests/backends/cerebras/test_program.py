"""The parts of the training script that need no vendor package. Training itself is compared in test_vendor.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weftrain.backends.cerebras.program import check_mask, to_inputs, traced_model
from weftrain.core.errors import BackendError
from weftrain.core.order.batch import Batch
from weftrain.core.recipe_file import load_recipe
from weftrain.core.rotary import rotary_tables


def test_labels_are_the_next_ids_and_a_masked_label_is_ignored() -> None:
    inputs, labels = to_inputs(Batch(np.array([[3, 1, 4, 1]]), np.array([[True, False, True]])))
    assert inputs.tolist() == [[3, 1, 4]]
    assert labels.tolist() == [[1, -100, 1]]


def test_a_loss_mask_that_a_constant_divisor_would_not_follow_is_refused() -> None:
    """A traced step divides by all positions: the same thing where nothing is masked, and else only what all_positions
    asks for.
    """
    ids, mask = np.zeros((2, 5), np.int64), np.ones((2, 4), bool)
    masked = mask.copy()
    masked[1, 0] = False
    for batch in (Batch(ids), Batch(ids, mask)):
        check_mask(batch, 3, False)
    check_mask(Batch(ids, masked), 3, True)
    with pytest.raises(
        BackendError,
        match=r"step 3: objective\.normalizer is bearing_tokens, .* set objective\.normalizer=all_positions",
    ):
        check_mask(Batch(ids, masked), 3, False)


def test_rotary_tables_end_where_a_sequence_does_and_are_the_same_until_there() -> None:
    overrides = ["data.sources=[]", "data.synthetic_rows=64", "data.sequence_length=100"]
    recipe = load_recipe("llama31_8b", [*overrides, "model.max_position_embeddings=131072"]).recipe
    short, whole = rotary_tables(traced_model(recipe)), rotary_tables(recipe.model)
    assert short.keys() == whole.keys() == {"scaled"}
    for kind, tables in short.items():
        assert all(table.shape == (128, 64) for table in tables)
        assert all(torch.equal(a, b[:128]) for a, b in zip(tables, whole[kind], strict=True))
    whole_length = load_recipe("amber_7b").recipe
    assert traced_model(whole_length) == whole_length.model
