"""Updates in the order of records, at their load or beside the computation."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from weftrain.backends.streaming.options import StreamingOptions, layout_of
from weftrain.backends.streaming.store.layout import Record
from weftrain.backends.streaming.updates import Updates
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError


@pytest.mark.parametrize("beside", [False, True])
def test_order(beside: bool, tiny_recipe: Callable[..., Recipe]) -> None:
    records = layout_of(tiny_recipe(), StreamingOptions()).records
    made: list[int] = []
    updates = Updates(lambda record: made.append(record.index), beside=beside)
    updates.begin(records)
    updates.wait_for(records[0])
    assert made[:1] == [0]
    for record in records[1:]:
        updates.wait_for(record)
    assert made == [record.index for record in records]
    updates.close()


def test_beside_means_that_nobody_waits_before_the_record_is_needed(tiny_recipe: Callable[..., Recipe]) -> None:
    first, second, *_ = layout_of(tiny_recipe(), StreamingOptions()).records
    gate = threading.Event()

    def update(record: Record) -> None:
        assert record is first or gate.wait(10)
        if record is not first:
            raise BackendError("no gradient")

    updates = Updates(update, beside=True)
    updates.begin([first, second])
    updates.wait_for(first)
    assert not updates.made(second)
    gate.set()
    with pytest.raises(BackendError, match="no gradient"):
        updates.wait_for(second)
    updates.close()
