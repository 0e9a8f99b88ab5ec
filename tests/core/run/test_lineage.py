"""What follows from a ledger for every step, chunk and checkpoint of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_ledgers import GOOD, SOURCE, Tiny, chunked, saved, started

from weftrain.core.config import Recipe
from weftrain.core.errors import RunFolderError
from weftrain.core.formats.canonical import sha256_json
from weftrain.core.run import lineage as lineage_module
from weftrain.core.run.ledger import Ledger, read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import chunk_span, lineage, tokens_before, with_decisions


def test_a_resume_from_a_checkpoint_that_is_not_there_contradicts_the_ledger(tmp_path: Path, tiny_recipe: Tiny) -> None:
    recipe = chunked(tiny_recipe)
    ledger = started(tmp_path, recipe)
    saved(ledger, recipe, 2, None)
    count, where = len(ledger.entries), {"dataset_id": "d" * 64, "environment": {}, "parent": "e" * 64}
    with pytest.raises(RunFolderError, match="resumes from checkpoint eeeeeeeeeeee"):
        ledger.open_run(2, recipe.model_dump(mode="json"), **where)
    assert len(read_ledger(tmp_path / LEDGER)) == count  # it was not written
    ledger.add("resume", step=2, recipe_sha256="f" * 64, **where)
    with pytest.raises(RunFolderError, match="resumes from checkpoint eeeeeeeeeeee"):
        lineage(ledger.entries)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_step_follows_after_any_interruptions(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A model of a run: it is killed anywhere, resumed from its newest checkpoint, rolled back, its batch unchanged."""
    from weftrain.core.recipe_file import load_recipe

    recipe = load_recipe("crystal_demo", [SOURCE, "schedule.steps=240", "data.chunks=6"]).recipe
    ledger = started(tmp_path_factory.mktemp("run"), recipe)
    held: dict[int, str] = {}  # step -> root, as the run's folder has them
    made = [0] * 240  # which segment made each step last
    step = 0
    for _ in range(data.draw(st.integers(1, 10))):
        segment = len([entry for entry in ledger.entries if entry["kind"] in ("start", "resume")])
        stop = data.draw(st.integers(step, 240))
        for number in range(step, stop):
            made[number] = segment
            if (number + 1) % 20 == 0:
                held = {at: root for at, root in held.items() if at <= number}
                held[number + 1] = saved(ledger, recipe, number + 1, held.get(max(held, default=0)), str(segment))
        if held and data.draw(st.booleans()):
            target = data.draw(st.sampled_from(sorted(held)))
            gone = [[at, root] for at, root in held.items() if at > target]
            if gone:
                ledger.add("rollback", step=target, root=held[target], branch=1, abandoned=gone, reason="spike")
                held = {at: root for at, root in held.items() if at <= target}
        step = max(held, default=0)
        ledger.open_run(step, recipe.model_dump(mode="json"), "d" * 64, {}, held.get(step))
    line = lineage(ledger.entries)
    assert {point.step: point.root for point in line.checkpoints} == held
    numbers = {
        entry["n"]: index for index, entry in enumerate(e for e in ledger.entries if e["kind"] in ("start", "resume"))
    }
    for number in range(step):
        segment, samples, span = line.origin(number)
        assert samples == [number * 16, number * 16 + 16]
        assert span is not None
        assert span.chunk == number // 40
        assert numbers[segment.entry] == made[number] - 1
    assert line.origin(step)[0].entry == max(numbers)  # what comes next is the last segment's


def test_chunks_of_a_deferred_run_stand_where_they_are_trained(tiny_recipe: Tiny) -> None:
    recipe = chunked(tiny_recipe, "data.skip=[{chunk: 1, action: defer, reason: spike}]")
    found = [chunk_span(recipe, step) for step in range(6)]
    assert [(span.place, span.chunk) for span in found if span is not None] == [
        (0, 0),
        (0, 0),
        (1, 2),
        (1, 2),
        (2, 1),
        (2, 1),
    ]
    assert chunk_span(tiny_recipe("crystal"), 3) is None


def test_decisions_are_laid_over_the_recipe_once(tiny_recipe: Tiny) -> None:
    decisions: list[dict[str, Any]] = [{"chunk": 1, "action": "defer", "reason": "spike"}]
    data = chunked(tiny_recipe).data
    skip = with_decisions(data, decisions)
    assert skip == [{"reason": "spike", "chunk": 1, "action": "defer", "source": None, "rows": None}]
    again = Recipe.model_validate(
        chunked(tiny_recipe).model_dump(mode="json") | {"data": data.model_dump(mode="json") | {"skip": skip}}
    )
    assert with_decisions(again.data, decisions) == skip


def test_skipped_steps_of_the_line_that_counts(tmp_path: Path, tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe()
    ledger = started(tmp_path, recipe)
    root = None
    for step in (2, 3, 5):
        ledger.add("skip", step=step, samples=[4 * step - 4, 4 * step])
        root = saved(ledger, recipe, step, root)
    assert lineage(ledger.entries).skips == (2, 3, 5)
    ledger.open_run(5, recipe.model_dump(mode="json"), "d" * 64, {}, root)
    ledger.add("skip", step=6, samples=[20, 24])
    assert lineage(ledger.entries).skips == (2, 3, 5, 6)
    ledger.add("rollback", step=3, root=saved_root(ledger, 3), branch=1, abandoned=[[5, root]], reason="a spike")
    assert lineage(ledger.entries).skips == (2, 3)


def saved_root(ledger: Ledger, step: int) -> str:
    return next(point.root for point in lineage(ledger.entries).checkpoints if point.step == step)


def test_tokens_before_a_step_are_the_checkpoints_and_then_the_ledgers(tmp_path: Path, tiny_recipe: Tiny) -> None:
    """A backend that keeps its own state stands beyond the newest checkpoint, in steps whose recipe the ledger alone
    has.
    """
    recipe, longer = tiny_recipe(), tiny_recipe("crystal", "batch.global_batch_size=8")
    ledger = started(tmp_path, recipe)
    resolved = longer.model_dump(mode="json")
    ledger.add("recipe", step=2, changes=[], recipe=resolved, recipe_sha256=sha256_json(resolved))
    ledger.open_run(2, resolved, "d" * 64, {}, None)
    line = lineage(ledger.entries)
    assert [line.tokens_read(step) for step in range(5)] == [0, 52, 104, 208, 312]
    assert tokens_before(4, None, line) == 312
    assert tokens_before(4, {"step": 1, "tokens": 1000}, line) == 1000 + 52 + 2 * 104
    assert tokens_before(0, None, lineage([])) == 0


def test_a_run_starts_once(tmp_path: Path, tiny_recipe: Tiny) -> None:
    ledger = started(tmp_path, chunked(tiny_recipe))
    ledger.add("start", step=2, **GOOD["start"])
    with pytest.raises(RunFolderError, match=rf"{LEDGER}:2: starts a run that was started before"):
        lineage(read_ledger(tmp_path / LEDGER))


class CountedStep(int):
    """A step that counts how often one is compared with another."""

    comparisons = 0

    def __lt__(self, other: int) -> bool:
        CountedStep.comparisons += 1
        return int(self) < int(other)

    def __gt__(self, other: int) -> bool:
        CountedStep.comparisons += 1
        return int(self) > int(other)

    def __le__(self, other: int) -> bool:
        return not self > other

    def __ge__(self, other: int) -> bool:
        return not self < other


def test_following_a_ledger_takes_time_in_proportion_to_its_lines() -> None:
    """Each checkpoint and segment is entered once and taken off at most once, however many restarts there are."""
    entries: list[dict[str, Any]] = [{"kind": "start", "n": 0, "step": CountedStep(0), **GOOD["start"]}]
    for step in range(1, 2001):
        root, at = f"{step:064x}", CountedStep(step)
        entries.append({"kind": "checkpoint", "n": len(entries), "step": at, **GOOD["checkpoint"], "root": root})
        entries.append({"kind": "resume", "n": len(entries), "step": at, **GOOD["resume"], "parent": root})
    CountedStep.comparisons = 0
    line = lineage(entries)
    assert CountedStep.comparisons < 10 * len(entries)
    assert len(line.checkpoints) == 2000
    assert line.segment_at(1500).entry == 3000
    assert CountedStep.comparisons < 11 * len(entries)


def test_a_long_ledger_is_followed_on_from_where_it_ended(
    tmp_path: Path, tiny_recipe: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lineage_module, "_LONG", 2)
    recipe = tiny_recipe()
    ledger = started(tmp_path, recipe)
    roots = [saved(ledger, recipe, step, None) for step in (2, 4)]
    seen: list[int] = []
    follow = lineage_module._Line.on_checkpoint
    monkeypatch.setattr(
        lineage_module._Line, "on_checkpoint", lambda line, entry: (seen.append(entry["n"]), follow(line, entry))
    )
    first = lineage(ledger.entries)
    assert lineage(list(ledger.entries)) == first
    assert seen == [1, 2]
    roots.append(saved(ledger, recipe, 6, None))
    assert [point.root for point in lineage(ledger.entries).checkpoints] == roots
    assert [point.root for point in first.checkpoints] == roots[:2]
    assert seen == [1, 2, 3]
    assert lineage(ledger.entries[:3]) == first  # of which more was followed before
    assert seen == [1, 2, 3, 1, 2]
