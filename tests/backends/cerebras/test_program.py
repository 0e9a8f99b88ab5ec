"""The parts of the training script that need no vendor package. Training itself is compared in test_vendor.py."""

from __future__ import annotations

import numpy as np
import pytest

from weftrain.backends.cerebras.program import check_mask, to_inputs
from weftrain.core.errors import BackendError
from weftrain.core.order.batch import Batch


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
        check_mask(batch, 3, "bearing_tokens")
    check_mask(Batch(ids, masked), 3, "all_positions")
    with pytest.raises(
        BackendError,
        match=r"step 3: objective\.normalizer is bearing_tokens, .* set objective\.normalizer=all_positions",
    ):
        check_mask(Batch(ids, masked), 3, "bearing_tokens")
