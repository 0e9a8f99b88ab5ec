"""Copies of a state in the memory of nodes: where they lie, which are taken, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import LAYOUTS, on_ranks, source_of

from weftrain.backends.cuda import memory_copies as module
from weftrain.backends.cuda.copied_state import Claims
from weftrain.backends.cuda.memory_copies import Spread, choose, find
from weftrain.backends.cuda.world import World
from weftrain.core.config import Recipe
from weftrain.core.stop import StopRequest

SHAPE = ["model.num_heads=4", "model.intermediate_size=72", "data.sequence_length=12", "model.rotary_dim=4"]
CLAIMS = Claims(40, 39, "a" * 32, "d" * 64, "layout", 2, {"loss": 1.5})


@pytest.mark.parametrize(
    ("spread", "written", "given"),
    [
        (Spread(4, 4, 1), [0, 1, 2, 3], [0, 1, 2, 3]),  # a rank a node: every part goes to the next node
        (Spread(4, 4, 2), [0, 1, 2, 3], [0, 1, 2, 3]),
        (Spread(4, 4, 4), [0, 1, 2, 3], []),  # there is no other node
        (Spread(4, 1, 2), [0, 2], []),  # every rank has the whole state: one of each node writes it
        (Spread(4, 2, 2), [0, 1, 2, 3], []),  # each node has a sharded copy
        (Spread(4, 2, 4), [0, 1], []),
    ],
)
def test_which_rank_writes_and_which_part_goes_to_another_node(
    spread: Spread, written: list[int], given: list[int]
) -> None:
    assert [rank for rank in range(spread.ranks) if spread.writes(rank)] == written
    assert [rank for rank in range(spread.ranks) if spread.gives(rank)] == given
    assert all(spread.before(spread.after(rank)) == rank for rank in range(spread.ranks))
    if given:
        assert all(spread.node(spread.after(rank)) != spread.node(rank) for rank in given)


def copies(claims: Claims, *parts: int) -> list[dict[str, object]]:
    return [{**vars(claims), "part": part} for part in parts]


@pytest.mark.parametrize(
    ("newer", "step", "holders", "told"),
    [
        ([[0, 1], [1, 0]], 50, (0, 0), ""),
        ([[], [0, 1]], 50, (1, 1), ""),  # the first node was lost
        ([[0], []], 40, (0, 1), ""),  # it was lost while the copy was written: the state before
    ],
)
def test_the_newest_state_that_is_complete_is_taken(
    newer: list[list[int]], step: int, holders: tuple[int, ...], told: str
) -> None:
    found = [copies(CLAIMS, part) + copies(replace(CLAIMS, step=50), *newer[part]) for part in range(2)]
    state, why = choose(found, "layout", Path("/m"))
    assert state is not None
    assert (state.claims.step, state.holders, why) == (step, holders, told)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ([[], []], ""),
        ([copies(CLAIMS, 0), copies(replace(CLAIMS, segment="b"), 1)], "of step 40 the parts 1 are lost"),
        ([copies(replace(CLAIMS, layout="other"), 0, 1), []], "divide the state otherwise"),
    ],
)
def test_parts_of_different_states_make_none(found: list[list[dict[str, object]]], told: str) -> None:
    state, why = choose(found, "layout", Path("/m"))
    assert state is None
    assert told in why


class Alone(World):
    """The first of the ranks of a node, whose others say nothing."""

    def gathered(self, own: str, what: str = "") -> list[str]:
        return [own]


def alone(monkeypatch: pytest.MonkeyPatch) -> Alone:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    world = Alone(torch.device("cpu"), torch.distributed.HashStore(), 0, 2, 1.0, StopRequest())
    world.host = "here"
    return world


def flip(path: Path) -> None:
    data = bytearray((path / "pieces.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "pieces.safetensors").write_bytes(data)


def tear(path: Path) -> None:
    os.truncate(path / "pieces.safetensors", 300)


def forge(path: Path) -> None:
    record = json.loads((path / "copy.json").read_text())
    (path / "copy.json").write_text(json.dumps({**record, "step": 60}, separators=(",", ":"), sort_keys=True) + "\n")


def without_record(path: Path) -> None:
    (path / "copy.json").unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (flip, "has changed since it was written"),
        (tear, "the tensors end at byte"),
        (forge, "does not hash to its root"),
        (without_record, "No such file"),
    ],
)
def test_a_damaged_copy_is_refused_by_its_hash_and_told_in_one_line(
    damage: Callable[[Path], None], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, folder = alone(monkeypatch), tmp_path / "own" / "run"
    own = module._make_own(folder / "here")
    monkeypatch.setattr(module, "_PIECE_ELEMENTS", 100)
    for step in (30, 40):
        for part in (0, 1):
            module._write_copy(own, part, replace(CLAIMS, step=step), torch.arange(250.0) + part)
    state, lines = find(world, folder, "layout")
    assert state is not None
    assert (state.claims.step, lines) == (40, [])
    damage(own / "step_00000040-part_00001")
    state, (line,) = find(world, folder, "layout")
    assert state is not None
    assert state.claims.step == 30  # the one before is complete
    assert line.startswith("a copy of the state in memory is passed over: here: step_00000040-part_00001: ")
    assert told in line
    part = module._read(own / "step_00000030-part_00001", 250)
    assert torch.equal(part, torch.arange(250.0) + 1)


def test_another_users_folder_is_neither_read_nor_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, folder = alone(monkeypatch), tmp_path / "own" / "run"
    for part in (0, 1):
        module._write_copy(module._make_own(folder / "here"), part, CLAIMS, torch.ones(3))
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    assert find(world, folder, "layout") == (None, [])
    with pytest.raises(PermissionError, match="belongs to another user"):
        module._make_own(folder / "here")


@pytest.mark.prove
@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "ddp"])
def test_every_layout_goes_on_from_memory_with_the_same_bits(
    layout: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """A run of six steps against one of five that goes on from its copy of the fourth; a complete run keeps none."""
    # DDP forms its buckets anew after a process's first step, which changes the order of sums, but not of a fixed tree.
    numerics = f"precision.numerics={'replayable' if layout == 'ddp' else 'fast'}"
    recipe = tiny_recipe("crystal", "schedule.steps=6", "batch.micro_batch_size=1", numerics, *SHAPE)
    options = {**LAYOUTS[layout], "memory_copies_every_steps": 2, "memory_copies_folder": str(tmp_path)}
    straight = on_ranks(recipe, **options)
    list(straight.train(source_of(recipe)))
    wanted = dict(straight.export_state().tensors)
    straight.close()
    assert not list(tmp_path.glob("*/*/*/step_*"))
    cut = on_ranks(recipe, **options)
    steps = cut.train(source_of(recipe))
    for _ in range(5):
        next(steps)
    steps.close()
    measured = cut.stats()
    assert measured["memory_copy_stall_ms"] > 0
    assert measured["memory_max_bytes"] >= measured["memory_bytes"]  # of all ranks, and of this one
    cut.close()
    assert {path.name[:13] for path in tmp_path.glob("*/*/*/step_*")} == {"step_00000002", "step_00000004"}
    again = on_ranks(recipe, start=4, **options)
    assert again.step_number == 4
    list(again.train(source_of(recipe)))
    found = again.export_state().tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    again.close()
