"""How a range of samples falls into blocks. That plans give the right rows: test_source_order.py, test_data.py."""

from __future__ import annotations

import pytest

from weftrain.core.order.row_plan import block_parts


@pytest.mark.parametrize("samples", [(0, 0), (0, 7), (3, 5), (6, 8), (5, 30)])
def test_parts_of_blocks_are_the_range(samples: tuple[int, int]) -> None:
    parts = list(block_parts(samples, 7))
    assert [7 * block + i for block, part in parts for i in range(part.start, part.stop)] == list(range(*samples))
    assert [block for block, _ in parts] == sorted({sample // 7 for sample in range(*samples)})
