"""The store as a transaction: whatever dies or fails, a restart gives the bits of a run that was left in peace."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streaming_runs
import torch
from fault_injection import Death, Faults, injected
from streaming_runs import abandon, assert_same, prepare, source_of, streaming, trained

from weftrain.backends.streaming.store import direct as direct_store
from weftrain.backends.streaming.store import file as file_store
from weftrain.backends.streaming.store.checksums import Running, checksum
from weftrain.backends.streaming.store.file import read_commit
from weftrain.backends.streaming.store.layout import PAGE_BYTES
from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError, NonFiniteError
from weftrain.core.formats import fsops
from weftrain.core.recipe_file import load_recipe

Tiny = Callable[..., Recipe]
FILE_TIERS = ("mapped", "direct")


def small(tiny_recipe: Tiny) -> Recipe:
    return tiny_recipe("crystal", "model.num_layers=3", "schedule.steps=3")


def resumed(recipe: Recipe, folder: Path, tier: str, steps: int = 3) -> tuple[int, State]:
    """Where a restart finds the store, and the state at the end of what it then trains."""
    run = streaming(recipe, folder, tier, steps, poison_freed_slots=False)
    stood = run.store.committed.step
    list(run.train(source_of(recipe)))
    state = run.export_state()
    held = State(state.step, state.optimizer_updates, {name: state.tensors[name] for name in state.tensors})
    run.close()
    return stood, held


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
        *[
            pytest.param(40, tier, kind, marks=pytest.mark.prove)
            for tier in FILE_TIERS
            for kind in ("dies before", "dies after", "EIO")
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


@pytest.mark.parametrize("tier", ["ram", *FILE_TIERS])
def test_evaluation_export_and_gradients_change_nothing(tier: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = small(tiny_recipe)
    wanted = trained(prepare(recipe, steps=3), recipe)[2]
    run = streaming(recipe, tmp_path, tier, 3)
    for result in run.train(source_of(recipe)):
        run.gradients(source_of(recipe).rows(result.step, 0, 4))
        state = run.export_state()
        assert state.step == result.step + 1
    assert_same(run.export_state(), wanted)
    run.close()


def test_a_state_that_is_held_is_read_before_it_changes(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = small(tiny_recipe)
    wanted = trained(prepare(recipe, steps=1), recipe)[2]
    run = streaming(recipe, tmp_path, "direct", 3)
    steps = run.train(source_of(recipe))
    next(steps)
    held = run.export_state()
    list(steps)
    assert_same(held, wanted)
    run.close()


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
def test_state_moves_to_a_checkpoint_and_back(tier: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    """Store -> checkpoint -> local -> checkpoint -> store, tensor by tensor: the state is the same bits everywhere."""
    recipe = small(tiny_recipe)
    run = streaming(recipe, tmp_path / "first", tier, 2)
    list(run.train(source_of(recipe)))
    written = {
        "recipe": {},
        "dataset_id": "x",
        "fingerprint": {},
        "tokens": 0,
        "position": 0,
        "parent": None,
        "kernels": {},
    }
    one = checkpoint.save(tmp_path / "checkpoints", run.export_state(), **written)
    run.close()
    local = prepare(recipe, steps=3, start=2)
    local.import_state(checkpoint.load(one.path)[0])
    other = streaming(recipe, tmp_path / "second", tier, 3, start=2)
    other.import_state(checkpoint.load(one.path)[0])
    for trainer in (local, other):
        list(trainer.train(source_of(recipe)))
    assert_same(other.export_state(), local.export_state())
    other.close()


# Bad input


@pytest.mark.parametrize("tier", FILE_TIERS)
def test_a_store_of_another_recipe_or_format_is_refused(tier: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = small(tiny_recipe)
    streaming(recipe, tmp_path, tier).close()
    other = tiny_recipe("crystal", "model.num_layers=4")
    with pytest.raises(BackendError, match=r"another recipe or format \(model\.num_layers differ\)"):
        streaming(other, tmp_path, tier)
    with pytest.raises(BackendError, match=r"\(format differ\)"):
        streaming(recipe, tmp_path, tier, state_format="split")
    assert resumed(recipe, tmp_path, tier)[0] == 0


@pytest.mark.parametrize("tier", FILE_TIERS)
def test_a_second_process_is_refused(tier: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    run = streaming(small(tiny_recipe), tmp_path, tier)
    with pytest.raises(BackendError, match=f'in use .*"process":{os.getpid()}'):
        streaming(small(tiny_recipe), tmp_path, tier)
    run.close()


def test_a_torn_commit_falls_back_to_the_other_page(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = small(tiny_recipe)
    run = streaming(recipe, tmp_path, "mapped", 2)
    list(run.train(source_of(recipe)))
    abandon(run)
    path = tmp_path / "store" / "commit"
    whole = path.read_bytes()
    newest = read_commit(tmp_path / "store")
    assert newest is not None
    page = newest.sequence % 2 * PAGE_BYTES
    path.write_bytes(whole[:page] + whole[page : page + 100] + bytes(PAGE_BYTES - 100) + whole[page + PAGE_BYTES :])
    older = read_commit(tmp_path / "store")
    assert older is not None
    assert older.sequence == newest.sequence - 1
    path.write_bytes(b"x" * 2 * PAGE_BYTES)
    with pytest.raises(BackendError, match=r"neither page is whole.*newest checkpoint"):
        streaming(recipe, tmp_path, "mapped", 2)


def test_a_stop_of_the_machine_is_noticed(tiny_recipe: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small(tiny_recipe)
    run = streaming(recipe, tmp_path, "mapped", 2)
    list(run.train(source_of(recipe)))
    run.close()
    monkeypatch.setattr(file_store, "boot_id", lambda: "another boot")
    run = streaming(recipe, tmp_path, "mapped", 3)  # closed: nothing was lost
    abandon(run)
    monkeypatch.setattr(file_store, "boot_id", lambda: "a third")
    with pytest.raises(BackendError, match="the machine stopped while the store was open"):
        streaming(recipe, tmp_path, "mapped", 3)


def test_other_damage_is_refused(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = small(tiny_recipe)
    streaming(recipe, tmp_path, "mapped").close()
    folder = tmp_path / "store"
    os.truncate(folder / "state", 4096)
    with pytest.raises(BackendError, match=r"state: holds 4,096 bytes, the layout says"):
        streaming(recipe, tmp_path, "mapped")
    (folder / "layout.json").write_text("{")
    with pytest.raises(BackendError, match="damaged"):
        streaming(recipe, tmp_path, "mapped")
    (folder / "layout.json").unlink()
    streaming(recipe, tmp_path, "mapped").close()
    (folder / "commit").unlink()
    with pytest.raises(BackendError, match="commit: is missing or cut"):
        streaming(recipe, tmp_path, "mapped")
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("mine")
    with pytest.raises(BackendError, match=r"holds 'thesis\.tex', so it is no store"):
        streaming(recipe, tmp_path, "mapped", store=str(strange))
    assert (strange / "thesis.tex").read_text() == "mine"
    link = tmp_path / "link"
    link.mkdir()
    (link / "state").symlink_to(strange / "thesis.tex")
    with pytest.raises(BackendError, match="cannot be opened"):
        streaming(recipe, tmp_path, "mapped", store=str(link))
    assert (strange / "thesis.tex").read_text() == "mine"


def test_too_little_room_is_said_before_anything_is_written(
    tiny_recipe: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(tiny_recipe)
    monkeypatch.setattr(fsops, "free_bytes", lambda path: 1000)
    with pytest.raises(BackendError, match=r"the store needs [\d,]+ bytes on disk .* 1,000 are free.*state_format"):
        streaming(recipe, tmp_path, "direct")
    monkeypatch.undo()
    with pytest.raises(
        BackendError, match=r"needs about [\d,]+ MiB of memory .*1 MiB backend\.options\.memory_limit_mib .*recompute"
    ):
        streaming(recipe, tmp_path, "direct", memory_limit_mib=1)
    with pytest.raises(BackendError, match=r"no folder for it: give backend\.options\.store"):
        prepare(recipe, "streaming", None, tier="mapped")
    assert resumed(recipe, tmp_path, "direct")[0] == 0


def test_a_file_system_without_direct_io_is_named(
    tiny_recipe: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, path: Path, action: Callable[[], Any]) -> Any:
        if name == "open" and path.name == "state":
            raise OSError(22, "Invalid argument", str(path))
        return action()

    monkeypatch.setattr(fsops, "_perform", refuse)
    with pytest.raises(BackendError, match=r"no direct I/O: take backend\.options\.tier=mapped"):
        streaming(small(tiny_recipe), tmp_path, "direct")


def test_an_interrupted_filling_holds_no_state(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = small(tiny_recipe)
    wanted = trained(prepare(recipe, steps=3), recipe)[2]
    for at in range(6, 30, 4):
        folder = tmp_path / str(at)
        with injected(Faults("dies after", at)), pytest.raises(Death):
            abandon(streaming(recipe, folder, "direct"))
        stood, state = resumed(recipe, folder, "direct")
        assert stood == 0
        assert_same(state, wanted)


def test_a_slow_disk_is_reported_and_waited_for(
    tiny_recipe: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(tiny_recipe)
    wanted = trained(prepare(recipe, steps=1), recipe)[2]
    monkeypatch.setattr(direct_store, "STALL_WARNING_S", 0.05)
    run = streaming(recipe, tmp_path, "direct", 1)
    slept = []

    def slow(name: str, path: Path, action: Callable[[], Any]) -> Any:
        if name == "read" and not slept:
            slept.append(name)
            while not any("waited for" in str(item.message) for item in seen):  # however busy the machine is
                time.sleep(0.01)
            time.sleep(0.25)
        return action()

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        patch.setattr(fsops, "_perform", slow)
        list(run.train(source_of(recipe)))
    assert any("waited for embedding to be read: the disk is slow or hangs" in str(item.message) for item in seen)
    assert run.stats()["stall_ms"] > 200
    assert_same(run.export_state(), wanted)
    run.close()


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


def test_bytes_that_the_schedule_does_not_know_are_an_error(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = small(tiny_recipe)
    run = streaming(recipe, tmp_path, "direct", 2)
    original = run.store.spool

    def twice(tile: Any, gradient: Any) -> None:
        original(tile, gradient)
        if tile.index == 0:
            original(tile, gradient)

    run.store.spool = twice
    with pytest.raises(BackendError, match="the schedule says"):
        list(run.train(source_of(recipe)))
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
def test_killed_at_random_moments(tiny_overrides: list[str], tmp_path: Path) -> None:
    assert_same_bits_after_kills("direct", 3, [*tiny_overrides, "model.num_layers=5"], tmp_path)


@pytest.mark.prove
@pytest.mark.parametrize("tier", [pytest.param("mapped", marks=pytest.mark.soak), "direct"])
def test_kill_storm(tier: str, tiny_overrides: list[str], tmp_path: Path) -> None:
    assert_same_bits_after_kills(tier, 12, [*tiny_overrides, "model.num_layers=8"], tmp_path)


# Checksums


@pytest.mark.parametrize("tier", FILE_TIERS)
@pytest.mark.parametrize(
    ("state_format", "samples"),
    [
        ("fp32", 12),
        *[
            pytest.param(form, 60, marks=pytest.mark.prove)
            for form in ("fp32", "split", "bf16_moments", "int8_moments")
        ],
    ],
)
def test_a_changed_bit_is_seen_or_changes_nothing(
    tier: str, state_format: str, samples: int, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    """In each file of a store between two starts: then the run ends in the same bits, or with an error that names what
    was damaged.
    """
    compute = "float32" if state_format == "fp32" else "bfloat16"
    recipe = tiny_recipe("crystal", "model.num_layers=2", "schedule.steps=3", f"precision.compute={compute}")
    options = {"state_format": state_format}
    run = streaming(recipe, tmp_path / "a", tier, 3, **options)
    steps = run.train(source_of(recipe))
    next(steps), next(steps)
    abandon_after_drain(run)  # an update is pending: gradients count too
    kept = {path.name: path.read_bytes() for path in (tmp_path / "a" / "store").iterdir()}
    run = streaming(recipe, tmp_path / "a", tier, 3, **options)
    list(run.train(source_of(recipe)))
    state = run.export_state()
    wanted = State(3, state.optimizer_updates, {name: state.tensors[name].clone() for name in state.tensors})
    run.close()
    generator, seen = random.Random(f"{tier}{state_format}"), 0
    names = [name for name in kept if name != "lock"]
    for number in range(samples):
        name = names[number % len(names)] if number % 2 else "state"
        damaged = bytearray(kept[name])
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        for other, contents in kept.items():
            (tmp_path / "a" / "store" / other).write_bytes(contents if other != name else damaged)
        try:
            run = streaming(recipe, tmp_path / "a", tier, 3, **options)
        except BackendError as error:
            assert re.search(r"remove (its folder|this one)|rename the folder", str(error)), str(error)  # noqa: PT017
            seen += 1
            continue
        try:
            list(run.train(source_of(recipe)))
            assert_same(run.export_state(), wanted)
        except BackendError as error:
            assert "was damaged from outside: remove its folder" in str(error)  # noqa: PT017
            assert "(tile " in str(error)  # noqa: PT017
            seen += 1
        finally:
            run.close()
    assert seen >= samples // 4


def abandon_after_drain(run: Any) -> None:
    run.store.drain()
    abandon(run)


@pytest.mark.parametrize("tier", FILE_TIERS)
@pytest.mark.parametrize("what", ["weights", "exp_avg", "gradient"])
def test_damage_is_named(tier: str, what: str, tiny_recipe: Tiny, tmp_path: Path) -> None:
    """Zeros in place of a page: store file, plane, tensor, step and remedy, before anything wrong is committed."""
    recipe = small(tiny_recipe)
    run = streaming(recipe, tmp_path, tier, 3)
    steps = run.train(source_of(recipe))
    next(steps), next(steps)
    run.store.drain()
    tile = next(
        tile
        for tile in run.store.layout.tiles
        if any(fragment.name == "layers.1.attention.q_proj.weight" for fragment in tile.fragments)
    )
    offset = run.store.layout.offset(tile, run.store.rotation(tile)) + tile.plane_offsets().get(what, (0, None))[0]
    offset = run.store.layout.gradient_offset(tile) if what == "gradient" else offset
    abandon(run)
    with open(tmp_path / "store" / "state", "r+b") as file:
        file.seek(offset)
        file.write(bytes(4096))
    standing = read_commit(tmp_path / "store")
    run = streaming(recipe, tmp_path, tier, 3)
    named = "the gradient of step 1" if what == "gradient" else what
    words = rf"store/state: {named} of .*layers\.1\.attention\.q_proj\.weight.* as of 2 completed steps.*remove"
    with pytest.raises(BackendError, match=words):
        list(run.train(source_of(recipe)))
    run.close()
    after = read_commit(tmp_path / "store")
    assert standing is not None
    assert after is not None
    assert after.step == standing.step


def test_checksums_find_what_damages_a_file() -> None:
    """A bit, a zeroed page, two pages in each other's place, another tile's, an older version: each changes the sum.
    Parts add up.
    """
    data = np.random.default_rng(1).integers(0, 256, 5 * 4096 + 64, dtype=np.uint8)
    whole = checksum(data, 3, 0, 7)
    running = Running(3, 0, 7)
    running.add(data[:8192])
    running.add(data[8192:])
    assert running.value == whole
    changed = [data.copy() for _ in range(4)]
    changed[0][17] ^= 4
    changed[1][4096:8192] = 0
    changed[2][:8192] = np.concatenate([data[4096:8192], data[:4096]])
    changed[3][-1] ^= 128
    assert (
        len({checksum(other, 3, 0, 7) for other in changed} | {whole, checksum(data, 4, 0, 7), checksum(data, 3, 0, 8)})
        == 7
    )
