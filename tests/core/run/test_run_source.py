"""The rows of a whole run: which recipe reads a step, and which step reads a sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from weftrain.core.config import Recipe
from weftrain.core.errors import DataError
from weftrain.core.order.data_section import Continuation
from weftrain.core.run.lineage import Lineage, TrainingSegment
from weftrain.core.run.run_source import run_source

Tiny = Callable[..., Recipe]


@pytest.fixture
def continued(tiny_recipe: Tiny) -> tuple[Recipe, Lineage]:
    """Four samples a step, and from step 3 on eight."""
    before, after = tiny_recipe("crystal"), tiny_recipe("crystal", "batch.global_batch_size=8")
    begun = Continuation(step=3, sample=12)
    after = after.model_copy(update={"data": after.data.model_copy(update={"continues": begun})})
    segments = [
        TrainingSegment(first, stop, one.model_dump(mode="json"), "", {}, None, 0)
        for first, stop, one in ((0, 2, before), (2, 3, before), (3, None, after))
    ]
    return after, Lineage((), tuple(segments), (), ())


def test_each_step_is_read_by_the_recipe_of_its_segment(continued: tuple[Recipe, Lineage]) -> None:
    run = run_source(*continued)
    assert [span.first_step for span in run.spans] == [0, 3]  # segments that read the same are one span
    assert [run.sample(step) for step in range(5)] == [0, 4, 8, 12, 20]
    assert [run.step_of(sample) for sample in (0, 11, 12, 27)] == [(0, 0), (2, 3), (3, 0), (4, 7)]
    assert (run.at(2).rows(2, 0, 4).ids.shape[0], run.at(3).rows(3, 0, 8).ids.shape[0]) == (4, 8)


def test_without_the_ledger_earlier_steps_are_refused(continued: tuple[Recipe, Lineage]) -> None:
    run = run_source(continued[0], None)
    assert run.step_of(12) == (3, 0)
    with pytest.raises(DataError, match="step 2 was read by a recipe from before step 3"):
        run.at(2)
    with pytest.raises(DataError, match="sample 11 was read by an earlier recipe"):
        run.step_of(11)
