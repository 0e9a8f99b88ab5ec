"""The rows of a whole run: which recipe reads a step, and which step reads a sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from weftrain.core.config import Recipe
from weftrain.core.errors import DataError
from weftrain.core.order.data_section import Continuation
from weftrain.core.recipe_file import recorded_recipe
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


def test_planned_changes_are_spans_and_what_their_data_lack_is_said_of_their_steps(tiny_recipe: Tiny) -> None:
    plan = "changes=[{step: 3, set: {batch.global_batch_size: 8}}, {step: 5, set: {batch.global_batch_size: 2}}]"
    run = run_source(tiny_recipe("crystal", "batch.micro_batch_size=2", "schedule.steps=9", plan), None)
    assert [span.first_step for span in run.spans] == [0, 3, 5]
    assert [run.sample(step) for step in (2, 3, 4, 5, 6)] == [8, 12, 20, 28, 30]
    assert run.step_of(29) == (5, 1)
    assert run.at(4).rows(4, 0, 8).ids.shape[0] == 8
    sources = "[{name: b, path: b, weight: 1}]"
    gone = f"changes=[{{step: 4, set: {{data.sources: {sources}, data.row_length: null}}}}]"
    tree = tiny_recipe("crystal", "schedule.steps=9").model_dump(mode="json")
    tree["data"] |= {"synthetic_rows": None, "sources": [{"name": "a", "path": "a", "weight": 1.0}]}
    planned = recorded_recipe(tree, "here", [gone]).recipe
    later = run_source(planned, None)
    with pytest.raises(DataError, match=r"step 6: the recipe changes at step 4: .*no dataset for source 'b'"):
        later.at(6)
