"""Which nodes take part in a run: the rule, and what nodes see of each other in a folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from weftrain.backends.cuda.node_meeting import Meeting, Round, next_members


@pytest.mark.parametrize(
    ("before", "waiting", "alive", "expected"),
    [
        ([], {1, 2}, {1, 2}, None),  # too few
        ([], {1, 2, 3, 4}, {1, 2, 3, 4}, [1, 2, 3]),  # 4 stands by
        ([1, 2, 3], {4}, {1, 2, 3, 4}, None),  # a spare alone breaks nothing
        ([1, 2, 3], {1, 3, 4}, {1, 2, 3, 4}, None),  # 2 still runs
        ([1, 2, 3], {1, 3, 4}, {1, 3, 4}, [1, 4, 3]),  # 2 is lost: the others keep their places
        ([3, 2, 1], {1, 2, 4, 5}, {1, 2, 4, 5}, [4, 2, 1]),  # the first is lost
        ([1, 2, 3], {3, 4, 5}, {3, 4, 5}, [4, 5, 3]),  # two are lost
        ([1, 2, 3], {1, 2, 3, 4}, {1, 2, 3, 4}, [1, 2, 3]),  # a rank failed, and its node is well
        ([1, 2, 3], {1, 3}, {1, 3}, None),  # no spare is left
        ([1, 2], {1, 2, 3}, {1, 2, 3}, [1, 2, 3]),  # another number of nodes than before
    ],
)
def test_who_takes_part_next(before: list[int], waiting: set[int], alive: set[int], expected: list[int] | None) -> None:
    assert next_members(before, waiting, alive, 3) == expected


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def meetings(folder: Path, count: int, clock: Clock, **identity: str) -> list[Meeting]:
    return [Meeting(folder, {"weftrain": "1"} | identity, f"host{host}", 10, clock) for host in range(count)]


def test_a_node_whose_beat_stands_still_is_lost_by_ones_own_clock(tmp_path: Path) -> None:
    clock = Clock()
    first, second = meetings(tmp_path, 2, clock)
    assert not first.is_lost(second.own.number)
    clock.now = 11
    second.beat()
    assert not first.is_lost(second.own.number)
    clock.now = 20
    assert not first.is_lost(second.own.number)
    assert first.beats(second.own.number)
    clock.now = 22
    assert first.is_lost(second.own.number)
    second.beat()  # it was only slow
    assert not first.is_lost(second.own.number)
    second.leave()
    assert first.is_lost(second.own.number)


def test_a_process_of_this_host_that_is_gone_is_lost_at_once(tmp_path: Path) -> None:
    clock = Clock()
    first, second = (Meeting(tmp_path, {}, "here", 10, clock) for _ in range(2))
    path = tmp_path / "node-000002.json"
    path.write_text(path.read_text().replace(f'"process":{os.getpid()}', '"process":999999999'))
    assert first.is_lost(second.own.number)


def test_a_round_is_made_once_and_by_nodes_that_run_the_same(tmp_path: Path) -> None:
    clock = Clock()
    first = meetings(tmp_path, 1, clock)[0]
    other = meetings(tmp_path, 1, clock, weftrain="2")[0]
    last = meetings(tmp_path, 1, clock)[0]
    for one in (other, last, first, last):
        one.propose(Round(), 2)
    assert first.newest() == Round(1, (1, 3))
    assert other.refusal() is None  # nobody was seen to be there: these may be files of an earlier attempt
    first.beat()
    found = other.refusal()
    assert found is not None
    assert (found[0].number, found[1]) == (1, "weftrain")
    assert first.refusal() is None


def test_a_node_that_runs_is_not_taken_for_one_that_waits(tmp_path: Path) -> None:
    first, second, spare = meetings(tmp_path, 3, Clock())
    first.propose(Round(), 2)
    for node in (first, second):
        node.beat(left=0)  # they take part in round 1
    spare.propose(first.newest(), 2)
    assert spare.newest().number == 1
    first.beat(left=1)
    second.leave()
    spare.beat(left=1)
    spare.propose(spare.newest(), 2)
    assert spare.newest() == Round(2, (1, 3))
