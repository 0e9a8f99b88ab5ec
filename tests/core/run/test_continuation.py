"""A run that goes on with other data: every row once a pass, or counted and said; and what cannot go on is refused with
a remedy.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.test_data import VOCAB, S, make_dataset
from weftrain.core.config import Recipe
from weftrain.core.data import TokenSource, training_source
from weftrain.core.errors import DataError
from weftrain.core.formats.dataset import read_dataset_manifest
from weftrain.core.formats.dataset_manifest import SetName
from weftrain.core.formats.shard_set import ShardSet
from weftrain.core.order import source_sets
from weftrain.core.recipe_file import load_recipe
from weftrain.core.run.continuation import (
    Continued,
    check_amounts,
    check_beginning,
    check_recorded_order,
    continue_data,
    continue_from,
    data_of_start,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    make_dataset(folder / "a", [97])
    make_dataset(folder / "b", [61], first_id=20_000)
    make_dataset(folder / "long", [2000], first_id=30_000)
    make_dataset(folder / "other", [97], first_id=50_000)
    make_dataset(folder / "grown", [97, 40], parents=[ancestor_of(folder / "a")])
    parents = [one.model_dump() for one in read_dataset_manifest(folder / "grown").parents]
    make_dataset(folder / "grown_twice", [97, 40, 23], parents=[*parents, ancestor_of(folder / "grown")])
    return folder


def ancestor_of(folder: Path) -> dict[str, Any]:
    entry = read_dataset_manifest(folder).train
    train = {"id": entry.id, "n_examples": entry.n_examples, "shards": len(entry.shards)}
    return {"name": folder.name, "root": "0" * 64, "files": 1, "num_sources": 1, "train": train, "heldout": None}


@functools.cache
def _shards(folder: Path, name: SetName) -> ShardSet:
    return ShardSet(folder, read_dataset_manifest(folder), name)


@pytest.fixture(autouse=True, scope="module")
def _opened_once() -> Iterator[None]:
    """A dataset is opened at each change; here each is opened once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_sets, "read_dataset_manifest", functools.cache(read_dataset_manifest))
        patch.setattr(source_sets, "ShardSet", lambda folder, manifest, name: _shards(folder, name))
        yield


def recipe(
    root: Path, weights: dict[str, float], *, batch: int = 8, steps: int = 400, data: dict[str, Any] | None = None
) -> Recipe:
    tree = load_recipe("crystal_demo").recipe.model_dump(mode="json")
    tree["model"]["vocab_size"] = VOCAB
    sources = [{"name": name, "path": name, "weight": weight} for name, weight in weights.items()]
    tree["data"] = {"root": str(root), "sequence_length": S, "shuffle_seed": 1, "sources": sources} | (data or {})
    tree["batch"] = {"global_batch_size": batch, "micro_batch_size": batch}
    tree["schedule"]["steps"] = steps
    return Recipe.model_validate(tree)


def skip(*ranges: tuple[int, int], source: str = "a") -> list[dict[str, Any]]:
    return [{"source": source, "rows": list(one), "reason": "garbage"} for one in ranges]


def read(source: TokenSource, first: int, stop: int) -> dict[str, list[int]]:
    """The rows of each source that the steps first..stop-1 read, in order."""
    numbers = np.arange(source.timeline.sample(first), source.timeline.sample(stop))
    of, k = source.mixture.locate(source.timeline.numbers(numbers))
    return {one.name: one.row_numbers(k[of == index]).tolist() for index, one in enumerate(source.sources)}


def opened(asked: Recipe) -> TokenSource:
    source = training_source(asked)
    assert isinstance(source, TokenSource)
    return source


def go_on(asked: Recipe, before: Recipe, step: int) -> tuple[TokenSource, Continued]:
    """Once by what a checkpoint records, and once by the datasets: the same."""
    source = opened(before)
    recorded = {name: cursor.model_dump(mode="json") for name, cursor in source.cursors(step).items()}
    found = continue_data(asked, before, step, source.dataset_id, recorded)
    computed = continue_data(asked, before, step, source.dataset_id, None)
    assert (found.recipe, found.notes) == (computed.recipe, computed.notes)
    again = Recipe.model_validate_json(found.recipe.model_dump_json())  # as a worker process gets it
    assert again == found.recipe
    assert found.position(step) == source.timeline.sample(step)
    return opened(again), found


# -- the faults that were found


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "rows are skipped": ({}, {"data": {"skip": skip((10, 14), (90, 97))}}, 86),
    "rows are skipped no more": ({"data": {"skip": skip((10, 14))}}, {}, 93),
    "another batch size": ({}, {"batch": 3}, 97),
    "a smaller subset": ({}, {"data": {"subset": [0.0, 0.9]}}, 87),
    "a larger subset": ({"data": {"subset": [0.0, 0.5]}}, {}, 97),
    "another weight": ({"weights": {"a": 0.5, "b": 0.5}}, {"weights": {"a": 0.25, "b": 0.75}}, 97),
    "a source less": ({"weights": {"a": 0.5, "b": 0.5}}, {}, 97),
    "a source more": ({}, {"weights": {"a": 0.5, "b": 0.5}}, 97),
    "an order of the Model Zoo": (
        {"data": {"order": "cerebras"}},
        {"data": {"order": "cerebras", "skip": skip((10, 14))}},
        93,
    ),
}


def changed(root: Path, change: dict[str, Any]) -> Recipe:
    data = dict(change.get("data", {}))
    subset = data.pop("subset", [0.0, 1.0])
    made = recipe(root, change.get("weights", {"a": 1.0}), batch=change.get("batch", 8), data=data)
    sources = tuple(
        one.model_copy(update={"subset": tuple(subset)}) if one.name == "a" else one for one in made.data.sources
    )
    return made.model_copy(update={"data": made.data.model_copy(update={"sources": sources})})


def of_path(root: Path, path: str, **change: Any) -> Recipe:
    """`changed`, with source a read from the folder `path`; a sample a step."""
    made = changed(root, {"batch": 1, **change})
    sources = tuple(one.model_copy(update={"path": path}) if one.name == "a" else one for one in made.data.sources)
    return made.model_copy(update={"data": made.data.model_copy(update={"sources": sources})})


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_in_mid_run_repeats_no_row_and_leaves_none_out(root: Path, name: str) -> None:
    was, now, _ = CHANGES[name]
    before, asked, step = changed(root, was), changed(root, now), 5
    source, found = go_on(asked, before, step)
    rows = read(opened(before), 0, step)["a"]
    left = {
        row
        for row in range(97)
        if not any(entry.rows and entry.rows[0] <= row < entry.rows[1] for entry in asked.data.skip)
    }
    low, high = asked.data.sources[0].subset
    left = {row for row in left if int(low * 97) <= row < int(high * 97)} - set(rows)
    told = sum(
        int(number) for line in found.notes for number in re.findall(r"(\d+) of the \d+ rows that are no longer", line)
    )
    later = read(source, step, 60)["a"]
    assert set(later[: len(left) - told]) <= left
    assert len(set(later[: len(left) - told])) == len(left) - told
    assert source.counts(step)["a"] == len(rows)


def test_a_run_that_changes_nothing_gets_no_continuation(root: Path) -> None:
    plain = recipe(root, {"a": 1.0})
    _, found = go_on(plain, plain, 7)
    assert found.recipe == plain
    assert found.notes == ()
    deferred = recipe(root, {"a": 1.0}, steps=12, data={"chunks": 4})
    skipped = [{"chunk": 2, "action": "defer", "reason": "spike"}]
    assert (
        go_on(recipe(root, {"a": 1.0}, steps=12, data={"chunks": 4, "skip": skipped}), deferred, 5)[
            1
        ].recipe.data.continues
        is None
    )


# -- any changes, in any order


@dataclasses.dataclass
class Pass:
    """What one pass over source a has read, by the rows alone. passed_over: rows whose turn had passed, as it was told
    so far.
    """

    seen: set[int] = dataclasses.field(default_factory=set)
    passed_over: int = 0


CANDIDATES = ((3, 5), (20, 31), (60, 61), (88, 97))
SUBSETS = ((0.0, 1.0), (0.0, 0.6), (0.3, 1.0))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_changes_at_any_steps_read_every_row_once_a_pass(root: Path, data: st.DataObject) -> None:
    weights, batch, subset, skipped, was_skipped = {"a": 1.0}, 4, (0.0, 1.0), set[int](), set[int]()
    paths = ["a", "grown", "grown_twice"]  # each grew from the one before
    asked = changed(root, {"weights": weights, "batch": batch, "data": {"subset": subset}})
    source, step, state = opened(asked), 0, Pass()
    for _ in range(data.draw(st.integers(1, 5))):
        stop = step + data.draw(st.integers(0, 9))
        allowed = allowed_rows(subset, skipped, paths[0])
        follow(read(source, step, stop)["a"], state, allowed)
        step = stop
        match data.draw(st.sampled_from(("skip", "unskip", "weights", "batch", "subset", "grow"))):
            case "skip":
                new = set(data.draw(st.sets(st.integers(0, 3), max_size=2))) - was_skipped
                skipped, was_skipped = skipped | new, was_skipped | new
            case "unskip":
                skipped = set()
            case "weights":
                weights = data.draw(st.sampled_from(({"a": 1.0}, {"a": 0.75, "b": 0.25}, {"b": 0.5, "a": 0.5})))
            case "grow":
                paths = paths[data.draw(st.integers(0, len(paths) - 1)) :]
            case "batch":
                batch = data.draw(st.sampled_from((1, 3, 4, 8)))
            case _:
                subset = data.draw(st.sampled_from(SUBSETS))
        rows = {"subset": subset, "skip": skip(*(CANDIDATES[i] for i in skipped))}
        wanted = of_path(root, paths[0], weights=weights, batch=batch, data=rows)
        source, found = go_on(wanted, asked, step)
        asked = found.recipe
        state.passed_over += sum(
            int(n) for line in found.notes for n in re.findall(r"'a': (\d+) of the \d+ rows that are no longer", line)
        )
    follow(read(source, step, step + 400 // batch)["a"], state, allowed_rows(subset, skipped, paths[0]))


def allowed_rows(subset: tuple[float, float], skipped: set[int], path: str) -> set[int]:
    low, high = (
        math.floor(Fraction(repr(bound)) * {"a": 97, "grown": 137, "grown_twice": 160}[path]) for bound in subset
    )
    return set(range(low, high)) - {row for index in skipped for row in range(*CANDIDATES[index])}


def follow(rows: list[int], state: Pass, allowed: set[int]) -> None:
    for row in rows:
        assert row in allowed
        if row in state.seen:
            assert len(allowed - state.seen) <= state.passed_over  # the pass is complete but for what was told
            state.seen = set()  # a row that was passed over may begin this pass, and then stands in the one before
        state.seen.add(row)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_chunks_are_put_off_dropped_and_added_and_no_sample_comes_twice(root: Path, data: st.DataObject) -> None:
    """Chunks of 3 steps. What waits to be read forbids another stream of samples; all else goes on."""
    chunks, batch, entries, ranges = 4, 4, list[dict[str, Any]](), list[tuple[int, int]]()

    def wanted() -> Recipe:
        rows = [{"source": "long", "rows": list(one), "reason": "garbage"} for one in ranges]
        return recipe(
            root, {"long": 1.0}, batch=batch, steps=3 * chunks, data={"chunks": chunks, "skip": [*entries, *rows]}
        )

    asked, step, rows = wanted(), 0, list[int]()
    source, dropped = opened(asked), 0
    for _ in range(data.draw(st.integers(1, 5))):
        stop = data.draw(st.integers(step, 3 * chunks))
        rows += read(source, step, stop)["long"]
        step = stop
        before = (chunks, batch, list(entries), list(ranges))
        match data.draw(st.sampled_from(("defer", "drop", "extend", "batch", "skip"))):
            case "defer" | "drop" as action:
                entries.append({"chunk": data.draw(st.integers(0, chunks - 1)), "action": action, "reason": "spike"})
            case "extend":
                chunks += data.draw(st.integers(1, 3))
            case "batch":
                batch = data.draw(st.sampled_from((2, 4, 6)))
            case _:
                ranges = [(10 * len(ranges), 10 * len(ranges) + 3), *ranges]
        try:
            source, found = go_on(wanted(), asked, step)
        except (DataError, ValueError):  # begun already, named twice, all dropped, or another stream while one waits
            chunks, batch, entries, ranges = before
            continue
        asked = found.recipe
    last = 3 * chunks
    rows += read(source, step, last)["long"]
    assert len(set(rows)) == len(rows)
    cursor, times = source.cursors(last)["long"], source.timeline
    assert times.chunks is not None
    skipped = 2000 - source.sources[0].num_rows
    dropped = sum(
        4 * 3 for entry in entries if entry["action"] == "drop" and entry["chunk"] not in times.read_chunks(last)
    )
    if (
        cursor.turn == 0
        and batch == 4
        and not any(entry["action"] == "drop" and entry["chunk"] < times.front(last)[0] for entry in entries)
    ):
        assert len(rows) <= cursor.place <= len(rows) + skipped
    assert dropped >= 0


def test_what_waits_to_be_read_forbids_another_stream(root: Path) -> None:
    defer = [{"chunk": 1, "action": "defer", "reason": "spike"}]
    asked = recipe(root, {"long": 1.0}, steps=12, data={"chunks": 4, "skip": defer})
    with pytest.raises(DataError, match=r"chunk 1 was deferred and is not read yet.*action: drop"):
        go_on(recipe(root, {"long": 1.0}, steps=12, batch=4, data={"chunks": 4, "skip": defer}), asked, 6)
    drop = [{"chunk": 1, "action": "drop", "reason": "spike"}]
    go_on(recipe(root, {"long": 1.0}, steps=12, batch=4, data={"chunks": 4, "skip": drop}), asked, 6)
    go_on(recipe(root, {"long": 1.0}, steps=12, batch=4, data={"chunks": 4, "skip": defer}), asked, 12)
    with pytest.raises(
        DataError, match=r"chunk 0 cannot be dropped: it was begun at step 0; begin another run, with another --run"
    ):
        more = [*defer, {"chunk": 0, "action": "drop", "reason": "spike"}]
        go_on(recipe(root, {"long": 1.0}, steps=12, data={"chunks": 4, "skip": more}), asked, 6)


def test_chunks_keep_their_length(root: Path) -> None:
    asked = recipe(root, {"long": 1.0}, steps=12, data={"chunks": 3})
    with pytest.raises(
        DataError, match=r"24 steps in 3 chunks are 8 steps a chunk.*have 4: set schedule.steps=24 data.chunks=6"
    ):
        go_on(recipe(root, {"long": 1.0}, steps=24, data={"chunks": 3}), asked, 12)
    with pytest.raises(DataError, match=r"cut in chunks when it begins: set data.chunks=3"):
        go_on(recipe(root, {"long": 1.0}, steps=24), asked, 12)


@pytest.mark.parametrize("deferred", [(), (1,)])
def test_a_run_of_chunks_is_extended_without_repeating_a_sample(root: Path, deferred: tuple[int, ...]) -> None:
    entries = [{"chunk": chunk, "action": "defer", "reason": "spike"} for chunk in deferred]
    asked = recipe(root, {"long": 1.0}, steps=12, data={"chunks": 3, "skip": entries})
    source, found = go_on(recipe(root, {"long": 1.0}, steps=24, data={"chunks": 6, "skip": entries}), asked, 12)
    rows = read(opened(asked), 0, 12)["long"] + read(source, 12, 24)["long"]
    assert sorted(rows) == sorted(read(opened(recipe(root, {"long": 1.0})), 0, 24)["long"])
    assert (found.recipe.data.continues is None) is (not deferred)


# -- what cannot go on, in numbers


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (
            {"data": {"shuffle_seed": 2}},
            "source 'a' is read in another order: 36 rows of the pass under way come again",
        ),
        ({"data": {"shuffle_seed": 2, "subset": [0.0, 0.5]}}, "source 'a' is read in another order"),
        ({"weights": {"other": 1.0}}, "source 'other' is new: it begins at its first row"),
        (
            {"data": {"sources": [{"name": "z", "path": "a", "weight": 1.0}]}},
            "under another name than before ('a'): 36 rows",
        ),
        (
            {"data": {"sources": [{"name": "a", "path": "other", "weight": 1.0}]}},
            "another dataset than before.*former one 40 samples",
        ),
    ],
)
def test_what_comes_again_is_counted(root: Path, now: dict[str, Any], told: str) -> None:
    before, asked, step = changed(root, {"data": {"skip": skip((0, 5))}}), changed(root, now), 5
    rows = read(opened(before), 0, step)["a"]
    if asked.data.sources[0].path == "a":
        asked = asked.model_copy(update={"data": asked.data.model_copy(update={"skip": ()})})
    source, found = go_on(asked, before, step)
    lines = "\n".join(found.notes)
    again = set(rows) & set(read(source, step, step + 13)[asked.data.sources[0].name])
    if asked.data.sources[0].path == "a":
        assert f"{len(again)} rows of the pass under way come again" in lines
        assert re.search(re.sub(r": 36 rows.*", "", told).replace("(", r"\(").replace(")", r"\)"), lines)
    else:
        assert re.search(told, lines)


def test_a_source_that_comes_back_goes_on(root: Path) -> None:
    both, alone = changed(root, {"weights": {"a": 0.5, "b": 0.5}}), changed(root, {})
    _, without_b = go_on(alone, both, 5)
    source, _ = go_on(both, without_b.recipe, 9)
    first, later = read(opened(both), 0, 5)["b"], read(source, 9, 15)["b"]
    assert not set(first) & set(later)
    assert source.counts(9)["b"] == len(first)


# -- a dataset that grew


@pytest.mark.parametrize(
    ("first", "second"), [(5, 9), (5, 100), (96, 120), (97, 136), (0, 3), (150, 200), (97, 97 + 137)]
)
def test_a_run_goes_on_with_the_dataset_that_grew_from_its_own(root: Path, first: int, second: int) -> None:
    """The pass under way is finished in its order, then what was added comes; each row once. Then all of them anew.
    Grown twice.
    """
    before, grown, twice = (of_path(root, path) for path in ("a", "grown", "grown_twice"))
    rows = read(opened(before), 0, first)["a"]
    source, found = go_on(grown, before, first)
    assert any("has grown by 40 rows" in note for note in found.notes)
    assert not any("come again" in note for note in found.notes)
    rows += read(source, first, second)["a"]
    source, found = go_on(twice, found.recipe, second)
    assert any("has grown by 23 rows" in note for note in found.notes)
    rows += read(source, second, second + 400)["a"]
    assert source.counts(second + 400)["a"] == len(rows)
    start = passes = 0
    while start + 160 <= len(rows):
        size = 97
        for step, count in ((first, 137), (second, 160)):
            # a pass that is under way, or just complete, takes in what is added
            size = count if step <= start + size else size
        assert sorted(rows[start : start + size]) == list(range(size))
        start, passes = start + size, passes + 1
    assert passes >= 2
    again, told = go_on(twice, found.recipe, second + 50)
    assert told.recipe == found.recipe
    assert read(again, second + 50, second + 99)["a"] == rows[second + 50 : second + 99]


def test_a_subset_of_a_dataset_that_grew(root: Path) -> None:
    """Half of what was, then half of what there is: what the larger half adds comes at the end of the pass."""
    half = {"data": {"subset": [0.0, 0.5]}}
    before, grown = of_path(root, "a", **half), of_path(root, "grown", **half)
    source, _ = go_on(grown, before, 20)
    rows = read(opened(before), 0, 20)["a"] + read(source, 20, 68 + 68)["a"]
    assert sorted(rows[:48]) == list(range(48))
    assert sorted(rows[:68]) == sorted(rows[68:136]) == list(range(68))


def test_rows_that_growth_brings_into_a_subset_and_whose_turn_has_passed_are_told(root: Path) -> None:
    """Six tenths of 97 rows leave out rows that six tenths of 137 hold: some of them had been stepped over."""
    whole, part = of_path(root, "a"), of_path(root, "a", data={"subset": [0.0, 0.6]})
    _, smaller = go_on(part, whole, 10)
    source, grown = go_on(of_path(root, "grown", data={"subset": [0.0, 0.6]}), smaller.recipe, 50)
    told, left = (
        int(re.search(pattern, "\n".join(grown.notes))[1])  # type: ignore[index]
        for pattern in (r"(\d+) of the \d+ rows that are no longer", r"(\d+) rows are left of the pass")
    )
    rows = (
        read(opened(whole), 0, 10)["a"] + read(opened(smaller.recipe), 10, 50)["a"] + read(source, 50, 50 + left)["a"]
    )
    assert len(set(rows)) == 50 + left
    read_before = len(set(rows[:10]) & set(range(58, 82)))  # when they were not left out yet
    assert len(set(range(82)) - set(rows)) + read_before == told > 5


def test_a_new_run_starts_behind_one_that_read_what_the_dataset_grew_from(root: Path) -> None:
    other = of_path(root, "a")
    cursors = {name: cursor.model_dump(mode="json") for name, cursor in opened(other).cursors(50).items()}
    manifest = {
        "recipe": other.model_dump(mode="json"),
        "step": 50,
        "dataset_id": opened(other).dataset_id,
        "sources": cursors,
    }
    begin = of_path(root, "grown_twice").model_dump(mode="json") | {
        "start_from": {"run": "other", "state": "weights", "data": "continue"}
    }
    onward = continue_from(Recipe.model_validate(begin), manifest)
    rows = read(opened(other), 0, 50)["a"] + read(opened(onward.recipe), 0, 110)["a"]
    assert sorted(rows) == list(range(160))


def test_what_a_dataset_says_it_grew_from_is_checked(root: Path, tmp_path: Path) -> None:
    """Its first shards must be the ancestor's."""
    for change, problem in (
        ({"id": "1" * 64}, "do not begin with"),
        ({"n_examples": 96}, "do not begin"),
        ({"shards": 2}, "do not begin"),
    ):
        ancestor = ancestor_of(root / "a")
        ancestor["train"] |= change
        with pytest.raises(ValueError, match=f"parents: the shards {problem}"):
            make_dataset(tmp_path / problem / next(iter(change)), [97, 40], parents=[ancestor])


def test_datasets_that_are_gone_are_said(root: Path, tmp_path: Path) -> None:
    before = changed(root, {})
    gone = before.model_copy(update={"data": before.data.model_copy(update={"root": str(tmp_path)})})
    found = continue_data(changed(root, {"data": {"shuffle_seed": 3}}), gone, 5, "0" * 64, None)
    assert "every source begins at its first row" in found.notes[1]


# -- beginnings


def test_a_run_that_starts_from_another_reads_on_behind_it(root: Path) -> None:
    other = changed(root, {})
    cursors = {name: cursor.model_dump(mode="json") for name, cursor in opened(other).cursors(5).items()}
    manifest = {
        "recipe": other.model_dump(mode="json"),
        "step": 5,
        "dataset_id": opened(other).dataset_id,
        "sources": cursors,
    }

    def start(data: str, name: str = "a") -> Recipe:
        made = recipe(root, {name: 1.0})
        return Recipe.model_validate(
            made.model_dump(mode="json") | {"start_from": {"run": "other", "state": "weights", "data": data}}
        )

    again = continue_from(start("from_start"), manifest)
    assert again.recipe.data.continues is None
    assert (
        "run 'other' read 40 samples of the same dataset: start_from.data=continue begins after those" in again.notes[0]
    )
    onward = continue_from(start("continue"), manifest)
    assert not set(read(opened(onward.recipe), 0, 7)["a"]) & set(read(opened(other), 0, 5)["a"])
    assert onward.position(0) == 0
    with pytest.raises(DataError, match=r"start_from\.data: no source reads a dataset that run 'other' has read"):
        continue_from(start("continue", "b"), manifest)


def test_a_recipe_of_a_runs_middle_is_refused_at_a_beginning(root: Path) -> None:
    _, found = go_on(changed(root, {"batch": 4}), changed(root, {}), 5)
    with pytest.raises(DataError, match=r"goes on at step 5 .* add data\.continues=null"):
        check_beginning(found.recipe)
    with pytest.raises(ValueError, match=r"step 4 lies before step 5"):
        found.recipe.timeline.sample(4)


def test_rows_skipped_in_the_order_of_an_earlier_version_are_refused(root: Path) -> None:
    made = changed(root, {"data": {"skip": skip((0, 5))}}).model_dump(mode="json")
    with pytest.raises(DataError, match="read the others in another order"):
        check_recorded_order({"recipe": made, "step": 3})
    check_recorded_order({"recipe": made, "step": 3, "sources": {}})
    check_recorded_order({"recipe": changed(root, {}).model_dump(mode="json"), "step": 3})


def test_more_than_the_recipe_states_is_refused_and_passes_are_said(root: Path) -> None:
    source = [{"name": "a", "path": "a", "epochs": 2.0}]
    fits = recipe(root, {}, steps=25, data={"sources": source})
    list(check_amounts(fits, opened(fits)))
    much = recipe(root, {}, steps=230, data={"sources": source})
    with pytest.raises(
        DataError,
        match=r"epochs of all sources come to 194 samples, and 230 steps of 8 read 1,840 \('a': 1,840 of its 97 rows, 19 passes\).*most 25",
    ):
        list(check_amounts(much, opened(much)))
    weighted = recipe(root, {"a": 1.0}, steps=230)
    assert list(check_amounts(weighted, opened(weighted))) == [
        "source 'a': 1,840 samples are 19.0 passes over its 97 rows"
    ]
    wide = recipe(root, {"a": 1.0}, steps=1, batch=128)
    (line,) = check_amounts(wide, opened(wide))
    assert "has 97 rows, and a batch takes 128 samples of it" in line


def test_what_a_later_change_of_the_batch_reads_counts_too(root: Path) -> None:
    source = [{"name": "a", "path": "a", "epochs": 2.0}]  # 194 rows

    def planned(steps: int, first: int, later: int) -> Recipe:
        tree = recipe(root, {}, steps=steps, batch=first, data={"sources": source}).model_dump(mode="json")
        batch = {"batch.global_batch_size": later, "batch.micro_batch_size": 2}
        return Recipe.model_validate(tree | {"changes": [{"step": 20, "set": batch}]})

    fits = planned(25, 8, 2)
    assert list(check_amounts(fits, opened(fits))) == [
        "source 'a': 160 samples until step 20, where the recipe changes, are 1.6 passes over its 97 rows"
    ]
    fits = planned(36, 8, 2)  # by the first batch size alone it would be 288
    list(check_amounts(fits, opened(fits)))
    much = planned(60, 2, 8)  # by the first batch size alone it would be 120
    with pytest.raises(
        DataError, match=r"194 samples, and 60 steps of 2 to 8 read 360: set schedule\.steps to at most 40"
    ):
        list(check_amounts(much, opened(much)))


def test_a_run_that_starts_from_another_may_pass_over_the_first_samples(root: Path) -> None:
    made = recipe(root, {"a": 0.5, "b": 0.5})
    plain = opened(made)
    start = {"start_from": {"folder": "away", "state": "weights", "offset": 24}}
    asked = Recipe.model_validate(made.model_dump(mode="json") | start)
    foreign = {"recipe": made.model_dump(mode="json"), "step": 3, "dataset_id": plain.dataset_id}
    found = data_of_start(root, asked, plain, 0, None, foreign, None)
    assert found.notes == ("start_from: the first 24 samples of the data are passed over",)
    skipped, rest = read(plain, 0, 3), read(opened(found.recipe), 0, 9)
    for name in ("a", "b"):
        assert not set(skipped[name]) & set(rest[name])
        assert rest[name][:8] == read(plain, 0, 20)[name][len(skipped[name]) :][:8]
    assert opened(found.recipe).counts(0) == {"a": 0, "b": 0}
    cut = made.model_copy(update={"data": made.data.model_copy(update={"row_length": S, "sequence_length": S // 4})})
    with pytest.raises(DataError, match="26 samples cannot be passed over of rows of 4 samples each"):
        other = asked.start_from.model_copy(update={"offset": 26})  # type: ignore[union-attr]
        data_of_start(root, cut.model_copy(update={"start_from": other}), plain, 0, None, foreign, None)
