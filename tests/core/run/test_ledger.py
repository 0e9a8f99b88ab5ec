"""The ledger: its chain, what a crash leaves, and what follows from it for every step."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_injection import KINDS, Death, Faults, injected
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.core.config import Recipe
from weftrain.core.errors import RunFolderError
from weftrain.core.formats.canonical import canonical_json, sha256_json
from weftrain.core.run.ledger import TORN, Ledger, read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import chunk_span, lineage, tokens_before, with_decisions
from weftrain.core.run.metrics import digest

Tiny = Callable[..., Recipe]
SOURCE = "data.sources=[{name: a, path: a, weight: 1}]"


def chunked(tiny_recipe: Tiny, *overrides: str) -> Recipe:
    return tiny_recipe("crystal", "data.synthetic_rows=null", SOURCE, "data.chunks=3", *overrides)


def started(folder: Path, recipe: Recipe, clock: Callable[[], float] = lambda: 1.0) -> Ledger:
    ledger = Ledger(folder, clock=clock)
    ledger.open_run(0, recipe.model_dump(mode="json"), "d" * 64, {"backend": "local"}, None)
    return ledger


def saved(ledger: Ledger, recipe: Recipe, step: int, parent: str | None, salt: str = "") -> str:
    root = sha256_json([step, parent, salt])
    ledger.checkpoint(recipe, "d" * 64, step=step, root=root, parent=parent, metrics_after=0, metrics_sha256=digest([]))
    return root


def test_every_line_commits_to_the_one_before(tmp_path: Path, tiny_recipe: Tiny) -> None:
    recipe = chunked(tiny_recipe)
    ledger = started(tmp_path, recipe)
    ledger.chunk_begin(0, recipe, "d" * 64, None)
    root = saved(ledger, recipe, 2, None)
    ledger.add("end", step=2)
    entries = read_ledger(tmp_path / LEDGER)
    assert [entry["kind"] for entry in entries] == ["start", "chunk_begin", "checkpoint", "chunk_end", "end"]
    assert [entry["previous"] for entry in entries] == [None, *(entry["hash"] for entry in entries[:-1])]
    assert entries[3] | {"chunk": 0, "place": 0, "samples": [0, 8], "root": root} == entries[3]
    assert Ledger(tmp_path).entries == entries


@pytest.mark.parametrize("line", range(5))
@pytest.mark.parametrize("what", ["step", "time", "kind", "remove", "swap", "space", "append"])
def test_whatever_is_done_to_a_line_is_seen(line: int, what: str, tmp_path: Path, tiny_recipe: Tiny) -> None:
    recipe = chunked(tiny_recipe)
    ledger = started(tmp_path, recipe)
    root = saved(ledger, recipe, 2, None)
    saved(ledger, recipe, 4, root)
    path = tmp_path / LEDGER
    lines = path.read_bytes().splitlines()
    assert len(lines) == 5
    entry = json.loads(lines[line])
    if what in ("step", "time"):
        lines[line] = canonical_json(entry | {what: entry[what] + 1})
    elif what == "kind":
        lines[line] = canonical_json(entry | {"kind": "miracle"})
    elif what == "remove":
        del lines[line]
        if line == 4:
            lines.append(canonical_json(entry | {"n": 9}))
    elif what == "swap":
        other = (line + 1) % 5
        lines[line], lines[other] = lines[other], lines[line]
    elif what == "space":
        lines[line] += b" "
    else:
        lines.insert(line, lines[line])
    path.write_bytes(b"".join(text + b"\n" for text in lines))
    with pytest.raises(RunFolderError, match=rf"{LEDGER}:\d"):
        Ledger(tmp_path)


def test_a_torn_last_line_is_moved_and_told(tmp_path: Path, tiny_recipe: Tiny) -> None:
    recipe = chunked(tiny_recipe)
    started(tmp_path, recipe)
    path = tmp_path / LEDGER
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"chunk":0,"hash":"12')
    assert len(read_ledger(path)) == 1  # a reader leaves it out
    ledger = Ledger(tmp_path)
    assert path.read_bytes() == whole
    assert (tmp_path / TORN).read_bytes() == b'{"chunk":0,"hash":"12\n'
    assert ledger.add("end", step=0)["torn_bytes"] == 21
    assert "torn_bytes" not in ledger.add("end", step=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", range(3))
def test_whatever_fails_while_a_line_is_written_the_ledger_stays_whole(
    kind: str, at: int, tmp_path: Path, tiny_recipe: Tiny
) -> None:
    recipe = chunked(tiny_recipe)
    ledger = started(tmp_path, recipe)
    with injected(Faults(kind, at)) as faults, contextlib.suppress(Death, RunFolderError):
        ledger.add("end", step=0)
    assert len(faults.trace) > at
    if not faults.dead:
        ledger.add("end", step=1)  # the same process goes on
    reopened = Ledger(tmp_path)
    reopened.add("end", step=2)
    steps = [entry["step"] for entry in read_ledger(tmp_path / LEDGER) if entry["kind"] == "end"]
    assert steps in ([0, 1, 2], [1, 2]) if not faults.dead else steps in ([0, 2], [2])


def test_a_checkpoint_that_a_crash_left_out_is_entered_at_the_resume(tmp_path: Path, tiny_recipe: Tiny) -> None:
    recipe = chunked(tiny_recipe)
    ledger = started(tmp_path, recipe)
    root = saved(ledger, recipe, 2, None)
    records = [{"kind": "step", "step": step, "loss": 1.0 / step} for step in (1, 2, 3, 4, 5)]
    manifest = {
        "root": "a" * 64,
        "step": 4,
        "parent": root,
        "recipe": recipe.model_dump(mode="json"),
        "dataset_id": "d" * 64,
    }
    for _ in range(2):
        ledger.adopt(manifest, records)
    point = lineage(ledger.entries).checkpoints[-1]
    assert (point.step, point.root, point.parent, point.metrics_after) == (4, "a" * 64, root, 2)
    assert point.metrics_sha256 == digest(records[2:4])
    assert [entry["kind"] for entry in ledger.entries][-2:] == ["checkpoint", "chunk_end"]


def test_a_chunk_whose_end_a_crash_left_out_is_ended_once(tmp_path: Path, tiny_recipe: Tiny) -> None:
    recipe = chunked(tiny_recipe)
    ledger = started(tmp_path, recipe)
    saved(ledger, recipe, 4, None)
    lines = (tmp_path / LEDGER).read_bytes().splitlines(keepends=True)
    last = ledger.entries[-1]
    assert last["kind"] == "chunk_end"
    (tmp_path / LEDGER).write_bytes(b"".join(lines[:-1]))
    for _ in range(2):
        ledger = Ledger(tmp_path, clock=lambda: last["time"])
        ledger.finish_chunk()
    assert dict(ledger.entries[-1]) == dict(last)
    assert len(ledger.entries) == len(lines)


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


@settings(max_examples=60, deadline=None)
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


def test_a_line_hashed_with_another_number_is_seen(tmp_path: Path, tiny_recipe: Tiny) -> None:
    ledger = started(tmp_path, chunked(tiny_recipe))
    entry = dict(ledger.add("end", step=0)) | {"n": 7}
    entry["hash"] = sha256_json({key: value for key, value in entry.items() if key != "hash"})
    path = tmp_path / LEDGER
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0] + canonical_json(entry) + b"\n")
    with pytest.raises(RunFolderError, match=f"{LEDGER}:2: does not follow"):
        read_ledger(path)


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


HEX = "a" * 64
GOOD: dict[str, dict[str, Any]] = {
    "start": {"recipe": {}, "recipe_sha256": HEX, "dataset_id": "d", "environment": {}, "parent": None},
    "resume": {"recipe_sha256": HEX, "dataset_id": "d", "environment": {}, "parent": HEX},
    "recipe": {"changes": [["a.b", 1, None]], "recipe": {}, "recipe_sha256": HEX},
    "chunk_begin": {"chunk": 0, "place": 0, "samples": [0, 8], "dataset_id": "d", "parent": None},
    "chunk_end": {"chunk": 0, "place": 0, "samples": [0, 8], "dataset_id": "d", "root": HEX},
    "checkpoint": {"root": HEX, "parent": None, "metrics_after": 0, "metrics_sha256": HEX},
    "skip": {"samples": [0, 8]},
    "rollback": {"root": HEX, "branch": 1, "abandoned": [[4, HEX], [6, "damaged"]], "reason": "a spike"},
    "defer": {"chunk": 1, "action": "defer", "reason": "a spike"},
    "end": {},
}
ODD: list[Any] = [None, True, 1.5, -1, 10**300, "", "x", [], [1], [[1]], {"a": 1}]
# What of ODD a key may be.
TAKEN: dict[str, list[Any]] = {
    "parent": [None],
    "dataset_id": ["x"],
    "reason": ["x"],
    "environment": [{"a": 1}],
    "recipe": [{"a": 1}],
    "changes": [[]],
    "abandoned": [[]],
    "time": [1.5],
}


@pytest.mark.parametrize("kind", GOOD)
def test_every_kind_has_a_schema_that_names_what_is_wrong(kind: str, tmp_path: Path) -> None:
    """What is written and what is read meet the same one; a chain that is right does not help."""
    line = {"n": 0, "previous": None, "time": 1.0, "kind": kind, "step": 4, **GOOD[kind]}

    def refusal(entry: dict[str, Any]) -> str | None:
        (tmp_path / LEDGER).write_bytes(canonical_json(entry | {"hash": sha256_json(entry)}) + b"\n")
        try:
            read_ledger(tmp_path / LEDGER)
        except RunFolderError as error:
            return str(error)
        return None

    assert refusal(line) is None
    for key in ("time", "step", *GOOD[kind]):
        without = {name: value for name, value in line.items() if name != key}
        assert f"{LEDGER}:1: key '{key}" in (refusal(without) or "")
        for odd in ODD:
            if not any(odd is one or (type(odd) is not bool and odd == one) for one in TAKEN.get(key, [])):
                assert f"{LEDGER}:1: key '{key}" in (refusal(line | {key: odd}) or ""), (key, odd)
    assert "use a newer weftrain" in (refusal(line | {"another": 1}) or "")
    with pytest.raises(ValueError, match="key 'step'"):
        Ledger(tmp_path / "new").add(kind, step=-1, **GOOD[kind])


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
