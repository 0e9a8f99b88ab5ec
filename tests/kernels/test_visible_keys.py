"""The first key that a query sees: of a document, of a window, of both."""

from __future__ import annotations

import pytest
import torch

from weftrain.kernels.visible_keys import first_visible_keys

START = torch.tensor([[0, 0, 2, 2, 2], [0, 1, 1, 3, 3]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("window", "documents", "expected"),
    [
        (None, False, None),
        (5, False, None),  # a window of the whole row hides nothing
        (1, False, [[0, 1, 2, 3, 4]] * 2),
        (3, False, [[0, 0, 0, 1, 2]] * 2),
        (None, True, START.tolist()),
        (9, True, START.tolist()),
        (2, True, [[0, 0, 2, 2, 3], [0, 1, 1, 3, 3]]),
    ],
)
def test_the_later_of_document_and_window(
    window: int | None, documents: bool, expected: list[list[int]] | None
) -> None:
    first = first_visible_keys(torch.empty(2, 5, 1, 8), START if documents else None, window)
    if expected is None:
        assert first is None
        return
    assert first is not None
    assert (first.dtype, first.is_contiguous(), first.tolist()) == (torch.int32, True, expected)
