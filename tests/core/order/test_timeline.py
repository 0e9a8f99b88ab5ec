"""The chunks of a run, deferred and dropped ones, and how many samples of each source they hold."""

from __future__ import annotations

import numpy as np
from data_configs import config
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.core.order.mixture import make_mixture
from weftrain.core.order.timeline import ChunkOrder, chunk_order, row_counts


def test_deferred_chunks_come_last_and_dropped_ones_make_room() -> None:
    skip = [
        {"chunk": 1, "action": "defer", "reason": "loss spike"},
        {"chunk": 3, "action": "drop", "reason": "poisoned"},
    ]
    order = chunk_order(config(chunks=5, skip=skip), 50, 4)  # a chunk is 10 steps of 4
    assert order == ChunkOrder(5, 40, (0, 2, 4, 1))
    assert [order.chunk_at(place) for place in range(7)] == [0, 2, 4, 1, 5, 6, 7]
    renumbered = order.renumber(np.arange(280))
    assert renumbered.tolist() == [chunk * 40 + within for chunk in (0, 2, 4, 1, 5, 6, 7) for within in range(40)]
    none = chunk_order(config(chunks=5), 50, 4)
    assert none.renumber(np.arange(280)).tolist() == list(range(280))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1200), st.permutations(range(4)), st.integers(0, 2))
def test_counts_are_what_is_read(samples: int, order: list[int], dropped: int) -> None:
    data = config()
    mixture = make_mixture(data.sources, 1)
    chunks = ChunkOrder(4, 250, tuple(order[dropped:]))
    source, _ = mixture.locate(chunks.renumber(np.arange(samples)))
    assert row_counts(mixture, chunks, samples) == [int((source == index).sum()) for index in (0, 1)]
