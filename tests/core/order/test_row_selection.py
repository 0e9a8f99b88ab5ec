"""Rows that are left out move no other row; ranges are merged, subtracted and cut."""

from __future__ import annotations

import numpy as np
import pytest

from weftrain.core.order import row_selection
from weftrain.core.order.row_order import RowOrder, row_ranges


def test_a_skipped_row_moves_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the places left out are counted by blocks instead of listed."""
    plain = RowOrder(1, "source", row_ranges([(3, 9000), (9003, 5000)], None))
    skipped = RowOrder(1, "source", plain.row_ranges, ((0, 17), (40, 6000), (10_000, 13_001)))
    kept = [
        row
        for row in plain.rows(np.arange(28_000)).tolist()
        if not any(low <= row < high for low, high in skipped.skipped)
    ]
    k = np.arange(2 * skipped.num_rows)
    assert skipped.rows(k).tolist() == kept
    places = [skipped.place(number) for number in range(0, 6000, 499)]
    counts = [skipped.samples_before(turn, place) for turn, place in places]
    passed = skipped.num_passed(skipped.skipped, 0, 12_000)
    assert counts == list(range(0, 6000, 499))
    monkeypatch.setattr(row_selection, "MAX_LISTED", 10)
    row_selection.kept_places.cache_clear()
    assert skipped.rows(k).tolist() == kept
    assert [skipped.place(number) for number in range(0, 6000, 499)] == places
    assert [skipped.samples_before(turn, place) for turn, place in places] == counts
    assert skipped.num_passed(skipped.skipped, 0, 12_000) == passed == 12_000 - skipped.samples_before(0, 12_000)
    row_selection.kept_places.cache_clear()


def test_ranges_are_sets_of_rows() -> None:
    ranges = [(5, 9), (0, 3), (8, 12), (20, 20), (3, 4)]
    assert row_selection.merged(ranges) == ((0, 4), (5, 12))
    assert row_selection.without(ranges, [(2, 6), (11, 30)]) == ((0, 2), (6, 11))
    assert row_selection.within(ranges, 3, 10) == ((0, 1), (2, 7))
