"""The store as a transaction: whatever dies or fails, a restart gives the bits of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import streaming_runs
import torch
from fault_injection import Death, Faults, injected
from streaming_runs import abandon, assert_same, prepare, resumed, small, source_of, streaming, trained

from weftrain.backends.streaming.store.file import read_commit
from weftrain.backends.streaming.store.layout import PAGE_BYTES
from weftrain.core.backend import State
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError, NonFiniteError
from weftrain.core.formats import fsops
from weftrain.core.recipe_file import load_recipe

Tiny = Callable[..., Recipe]

FILE_TIERS = ("mapped", "direct")


def operations(recipe: Recipe, folder: Path, tier: str) -> list[str]:
    """The kinds of file operations of three steps on a store that is there already."""
    run = streaming(recipe, folder, tier, 3, poison_freed_slots=False)
    with injected(Faults()) as faults:
        list(run.train(source_of(recipe)))
    run.close()
    return [name for name, _ in faults.trace]


@pytest.mark.parametrize(
    ("places", "tier", "kind"),
    [
        *[(8, tier, "ENOSPC") for tier in FILE_TIERS],
        pytest.param(40, "mapped", "EIO", marks=pytest.mark.prove),
        *[
            pytest.param(40, tier, kind, marks=[pytest.mark.prove, pytest.mark.soak])
            for tier, kind in (
                *((tier, "dies before") for tier in FILE_TIERS),
                ("direct", "EIO"),
                *((tier, "dies after") for tier in FILE_TIERS),
            )
        ],
    ],
)
def test_any_operation_may_fail_or_be_the_last(
    places: int, tier: str, kind: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    """Also torn: each write is made to take half of what it is given, so that the next half is an operation of its
    own.
    """
    recipe = small(tiny_recipe)
    wanted = trained(prepare(recipe, steps=3), recipe)[2]
    total = len(operations(recipe, tmp_path / "count", tier))
    chosen = sorted(random.Random(f"{tier}{kind}").sample(range(2 * total), places))
    for at in chosen:
        folder = tmp_path / f"run-{at}"
        run = streaming(recipe, folder, tier, 3, poison_freed_slots=False)
        completed, said = 0, "completed steps, resume"
        with pytest.MonkeyPatch.context() as patch, injected(Faults(kind, at)):
            patch.setattr(fsops.os, "pwrite", half_writes)
            try:
                for result in run.train(source_of(recipe)):
                    completed = result.step + 1
            except Death:
                pass
            except BackendError as error:
                said = str(error)
            abandon(run)
        assert "completed steps" in said
        assert "resume" in said
        stood, state = resumed(recipe, folder, tier)
        assert completed - 1 <= stood <= completed + 1, (
            at,
            "a step that was reported may wait for its last writes, no more",
        )
        assert_same(state, wanted)


_pwrite = os.pwrite


def half_writes(descriptor: int, data: Any, offset: int) -> int:
    pages = len(data) // PAGE_BYTES
    return _pwrite(descriptor, data[: pages // 2 * PAGE_BYTES] if pages > 1 else data, offset)


@pytest.mark.parametrize("tier", FILE_TIERS)
def test_a_store_is_continued_and_keeps_what_was_skipped(tier: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = small(tiny_recipe)
    wanted = trained(prepare(recipe, steps=6), recipe)[2]
    for steps in (1, 2, 4, 6):
        run = streaming(recipe, tmp_path, tier, steps)
        list(run.train(source_of(recipe)))
        run.close()
    stood, state = resumed(recipe, tmp_path, tier, 6)
    assert stood == 6
    assert_same(state, wanted)


@pytest.mark.parametrize("state_format", ["split", "bf16_moments", "int8_moments"])
@pytest.mark.parametrize("tier", ["ram", *FILE_TIERS])
def test_formats_that_round_start_alike_and_stay_close(
    tier: str, state_format: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    """All tiers the same bits; the first loss the local one's; the state within what the format's rounding explains."""
    recipe = tiny_recipe("crystal", "precision.compute=bfloat16", "schedule.steps=6")
    losses, _, wanted = trained(prepare(recipe), recipe)
    found = {}
    for name, where in ((tier, tmp_path / "a"), ("ram", tmp_path / "b")):
        run = streaming(recipe, where, name, state_format=state_format)
        found[where.name] = trained(run, recipe)
        run.close() if name != tier else None
        if name == tier:
            state = found[where.name][2]
            held = State(
                state.step, state.optimizer_updates, {key: state.tensors[key].clone() for key in state.tensors}
            )
            run.close()
    assert found["a"][:2] == found["b"][:2]
    assert found["a"][0][0] == pytest.approx(losses[0], rel=1e-3)
    assert max(abs(a - b) for a, b in zip(found["a"][0], losses, strict=True)) < 0.05
    for name, tensor in wanted.tensors.items():
        if name.startswith("weights/") and name.endswith("proj.weight"):
            assert (held.tensors[name] - tensor).norm() < 0.05 * tensor.norm(), name


@pytest.mark.parametrize("tier", FILE_TIERS)
def test_a_halted_step_leaves_the_last_one(tier: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = small(tiny_recipe)
    run = streaming(recipe, tmp_path, tier, 3)
    steps = run.train(source_of(recipe))
    next(steps)
    state = run.export_state()
    tensors = {name: state.tensors[name].clone() for name in state.tensors}
    tensors["weights/final_norm.weight"][3] = torch.inf
    run.import_state(State(1, 1, tensors))
    with pytest.raises(NonFiniteError):
        list(run.train(source_of(recipe)))
    after = run.export_state()
    assert after.step == 1
    assert all(torch.equal(after.tensors[name], tensors[name]) for name in tensors)
    run.close()


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from streaming_runs import streaming, source_of
from weftrain.core.recipe_file import load_recipe
import json, torch
torch.set_num_threads(2)
recipe = load_recipe("crystal_demo", json.loads(sys.argv[4])).recipe
run = streaming(recipe, Path(sys.argv[2]), sys.argv[3], 12, poison_freed_slots=False)
print("ready", flush=True)
for result in run.train(source_of(recipe)):
    print(result.step + 1, flush=True)
run.close()
"""


def assert_same_bits_after_kills(tier: str, kills: int, recipe_overrides: list[str], tmp_path: Path) -> None:
    recipe = load_recipe("crystal_demo", recipe_overrides).recipe
    wanted = trained(prepare(recipe, steps=12), recipe)[2]
    randomness, done = random.Random(tier), 0
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(Path(streaming_runs.__file__).parent),
        str(tmp_path),
        tier,
        json.dumps(recipe_overrides),
    ]
    for _ in range(20 * kills):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        time.sleep(randomness.uniform(0, 0.12))
        process.send_signal(signal.SIGKILL)
        process.wait()
        done += 1
        standing = read_commit(tmp_path / "store")
        assert standing is not None
        if done >= kills or standing.step >= 12:
            break
    assert done >= min(kills, 3)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    run = streaming(recipe, tmp_path, tier, 12)
    assert_same(run.export_state(), wanted)
    run.close()


@pytest.mark.prove
@pytest.mark.parametrize(
    ("tier", "kills"),
    [("direct", 4), *(pytest.param(tier, 12, marks=pytest.mark.soak) for tier in ("mapped", "direct"))],
)
def test_kill_storm(tier: str, kills: int, tiny_overrides: list[str], tmp_path: Path) -> None:
    """tests/cli/test_process_histories.py kills at chosen file operations; here a death falls within one too."""
    assert_same_bits_after_kills(tier, kills, [*tiny_overrides, "model.num_layers=8"], tmp_path)
