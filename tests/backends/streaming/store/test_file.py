"""Stores in a folder: what is not this run's whole, undamaged store is refused or named."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from streaming_runs import (
    abandon,
    abandon_after_drain,
    assert_same,
    prepare,
    resumed,
    small,
    source_of,
    streaming,
)

from weftrain.backends.streaming.store import file as file_store
from weftrain.backends.streaming.store.file import read_commit
from weftrain.backends.streaming.store.layout import PAGE_BYTES
from weftrain.core.backend import State
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.formats import fsops

Tiny = Callable[..., Recipe]

FILE_TIERS = ("mapped", "direct")


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
        BackendError,
        match=r"needs about [\d.]+ GiB of memory .*0\.000977 GiB backend\.options\.memory_limit_mib .*recompute",
    ):
        streaming(recipe, tmp_path, "direct", memory_limit_mib=1)
    with pytest.raises(BackendError, match=r"no folder for it: give backend\.options\.store"):
        prepare(recipe, "streaming", None, tier="mapped")
    assert resumed(recipe, tmp_path, "direct")[0] == 0


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
