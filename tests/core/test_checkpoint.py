"""Checkpoints: bit-exact, atomic under every fault, damaged ones found and passed over, hostile ones refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from checkpoint_cases import RECIPE, assert_same, header_sha256, save, state_of
from fault_injection import DEATHS, KINDS, Death, Faults, injected

from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.errors import CheckpointError
from weftrain.core.formats import fsops, tensor_file
from weftrain.core.formats.canonical import root_of
from weftrain.core.formats.lazy_tensors import LazyTensors


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    lines: list[str] = []
    return checkpoint.newest(folder, lines.append), lines


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


# What a checkpoint is


def test_round_trip_and_manifest(tmp_path: Path) -> None:
    info = save(tmp_path / "checkpoints", 3, parent="a" * 64)
    assert info.path == tmp_path / "checkpoints" / "step_00000003"
    assert_same(info.path, 3)
    manifest = checkpoint.verify(info.path)
    assert manifest["root"] == info.root == root_of(manifest)
    assert manifest["recipe"] == RECIPE
    assert manifest["parent"] == "a" * 64
    assert {
        name: (path.stat().st_size, header_sha256(path.read_bytes()))
        for name in manifest["files"]
        for path in [info.path / name]
    } == {name: (entry["size"], entry["header_sha256"]) for name, entry in manifest["files"].items()}
    assert info.size_bytes == sum(entry["size"] for entry in manifest["files"].values())


def test_the_same_state_has_the_same_bytes_whatever_the_order_of_its_mapping(tmp_path: Path) -> None:
    state = state_of(3)
    reversed_state = State(3, 2, dict(reversed(state.tensors.items())))
    assert contents(save(tmp_path / "a", 3, state).path) == contents(save(tmp_path / "b", 3, reversed_state).path)
    assert save(tmp_path / "c", 3, fingerprint={"torch": "2", "threads": 1}).root != save(tmp_path / "a", 3).root


class Lazy(LazyTensors):
    """Counts how often each tensor is read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors, self.reads = tensors, dict.fromkeys(tensors, 0)
        super().__init__({name: tensor.to("meta") for name, tensor in tensors.items()}, self.counted)

    def counted(self, name: str) -> torch.Tensor:
        self.reads[name] += 1
        return self.tensors[name].clone()


def test_a_lazy_state_is_read_once_and_a_loaded_one_can_be_saved_again(tmp_path: Path) -> None:
    lazy = Lazy(state_of(3).tensors)
    info = save(tmp_path / "a", 3, State(3, 2, lazy))
    assert set(lazy.reads.values()) == {1}
    loaded, _ = checkpoint.load(info.path)
    assert save(tmp_path / "b", 3, loaded).root == info.root


# Never overwritten


def test_saving_the_same_step_again_keeps_the_equal_and_moves_the_other_aside(tmp_path: Path) -> None:
    first = save(tmp_path, 3)
    before = (first.path / "manifest.json").stat()
    again = save(tmp_path, 3)
    assert (again.root, again.set_aside) == (first.root, None)
    assert (first.path / "manifest.json").stat() == before

    other = save(tmp_path, 3, parent="b" * 64)
    assert other.set_aside == tmp_path / "step_00000003.superseded-1"
    assert json.loads((other.set_aside / "manifest.json").read_text())["root"] == first.root
    flip(other.path / "manifest.json", 5)
    damaged = contents(other.path)
    assert save(tmp_path, 3).set_aside == tmp_path / "step_00000003.damaged-1"
    assert contents(tmp_path / "step_00000003.damaged-1") == damaged
    assert_same(tmp_path / "step_00000003", 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000003",
        "step_00000003.damaged-1",
        "step_00000003.superseded-1",
    ]


# Faults


QUICK = {("ENOSPC", False), ("dies before", True), ("dies torn", False)}  # the other combinations are for `make prove`
FAULTS = [
    pytest.param(
        kind, over, id=f"{kind}{', over a damaged one' * over}", marks=[pytest.mark.prove] * ((kind, over) not in QUICK)
    )
    for kind in KINDS
    for over in (False, True)
]


@pytest.mark.parametrize(("kind", "over_damaged"), FAULTS)
def test_every_operation_of_a_save_may_fail_or_be_the_last(tmp_path: Path, kind: str, over_damaged: bool) -> None:
    base = tmp_path / "base"
    for step in (1, 2):
        save(base, step)
    if over_damaged:
        flip(save(base, 3).path / "state-00001-of-00001.safetensors", -1)
    shutil.copytree(base, tmp_path / "count")
    with injected(Faults()) as counted:
        save(tmp_path / "count", 3)
    assert len(counted.trace) > 15
    for at in range(len(counted.trace)):
        folder = tmp_path / f"{at}"
        shutil.copytree(base, folder)
        message = ""
        with injected(Faults(kind, at)), suppress(Death):
            try:
                save(folder, 3)
            except CheckpointError as error:
                message = str(error)
        if message:
            assert message.startswith(f"{folder / 'step_00000003'}: ")
            assert "\n" not in message
            assert ("needed" in message) == (kind in ("ENOSPC", "disk stays full"))
        assert kind in DEATHS or not list(folder.glob(".tmp-*"))
        for step in (1, 2):
            assert_same(folder / f"step_{step:08d}", step)
        path, lines = newest(folder)
        assert path is not None
        assert_same(path, int(path.name[-8:]))
        assert path.name[-1] in "23"
        assert len(lines) <= over_damaged
        fsops.remove_leftovers(folder)
        save(folder, 3)
        assert newest(folder) == (folder / "step_00000003", [])
        assert_same(folder / "step_00000003", 3)
        assert not list(folder.glob(".tmp-*"))
        shutil.rmtree(folder)


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with injected(Faults()) as counted:
        path = save(tmp_path / "checkpoints", 3).path
    operations = counted.trace
    final = operations.index(("rename", path))
    temporary = operations[0][1]
    written = {target for name, target in operations if name == "write"}
    assert len(written) == 2  # one tensor file and the manifest
    for target in written:
        last_write = max(index for index, operation in enumerate(operations) if operation == ("write", target))
        assert last_write < operations.index(("sync_file", target)) < final
    assert operations.index(("sync_dir", temporary), operations.index(("rename", temporary / "manifest.json"))) < final
    assert operations[final + 1 :] == [("sync_dir", path.parent)]
    assert operations.index(("rename", temporary / "manifest.json")) == max(
        index for index, (name, _) in enumerate(operations[:final]) if name == "rename"
    )


def test_too_little_space_is_known_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(fsops, "free_bytes", lambda path: 1234)
    with (
        injected(Faults()) as counted,
        pytest.raises(CheckpointError, match=r"step_00000002: the disk is full: 1,0.* needed, 1,234 free"),
    ):
        save(tmp_path, 2)
    assert counted.trace == []


def test_unwritable_tensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'weights/x': dtype torch.complex64 cannot be stored"):
        save(tmp_path, 1, State(1, 1, {"weights/x": torch.zeros(2, dtype=torch.complex64)}))
    for name in ("../../x", "/etc/x", "a//b", "", "a b", "a/../b", "x" * 600, "a\n"):
        with pytest.raises(CheckpointError, match="tensor"):
            save(tmp_path, 1, State(1, 1, {name: torch.zeros(2)}))
    lying = Lazy({"weights/x": torch.zeros(2)})
    lying.meta = lambda name: torch.zeros(3)  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="announced as"):
        save(tmp_path, 1, State(1, 1, lying))
    assert list(tmp_path.iterdir()) == []


# Damage


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def assert_found(folder: Path, damaged: Path, whole: Path) -> str:
    path, lines = newest(folder)
    assert path == whole
    assert len(lines) == 1
    assert str(damaged) in lines[0]
    assert "\n" not in lines[0]
    assert "restore" in lines[0]
    with pytest.raises(CheckpointError):
        checkpoint.load(damaged)
    return lines[0]


def each_flip(folder: Path, stride: int, bits: tuple[int, ...]) -> None:
    whole, damaged = save(folder, 1).path, save(folder, 2).path
    for file in sorted(damaged.iterdir()):
        original = file.read_bytes()
        for position in range(0, len(original), stride):
            for bit in bits:
                flip(file, position, (position + bit) % 8)
                assert file.name in assert_found(folder, damaged, whole)
                file.write_bytes(original)
    assert newest(folder) == (damaged, [])


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    each_flip(tmp_path, stride=41, bits=(0,))


@pytest.mark.soak
def test_a_flipped_bit_in_every_byte_is_found(tmp_path: Path) -> None:
    each_flip(tmp_path, stride=1, bits=(0,))


def test_a_damaged_tensor_is_named(tmp_path: Path) -> None:
    whole, damaged = save(tmp_path, 1).path, save(tmp_path, 2).path
    file = damaged / "state-00001-of-00001.safetensors"
    with tensor_file.open_regular(file) as opened:
        place = tensor_file.read_header(opened)["weights/layers.0.q.weight"]
    flip(file, place.begin)
    assert "damaged tensor 'weights/layers.0.q.weight'" in assert_found(tmp_path, damaged, whole)


def test_another_header_of_the_same_meaning_is_found(tmp_path: Path) -> None:
    whole, damaged = save(tmp_path, 1).path, save(tmp_path, 2).path
    file = damaged / "state-00001-of-00001.safetensors"
    assert b"]}}  " in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(b"]}}  ", b"]}}\n "))
    assert "SHA-256 differs" in assert_found(tmp_path, damaged, whole)


@pytest.mark.parametrize("name", ["manifest.json", "state-00001-of-00001.safetensors"])
def test_truncated_and_missing_files_are_found(tmp_path: Path, name: str) -> None:
    whole, damaged = save(tmp_path, 1).path, save(tmp_path, 2).path
    original = (damaged / name).read_bytes()
    for size in (0, 1, 7, 8, 9, len(original) // 2, len(original) - 1):
        (damaged / name).write_bytes(original[:size])
        assert name in assert_found(tmp_path, damaged, whole)
    (damaged / name).write_bytes(original + b"\0")
    assert name in assert_found(tmp_path, damaged, whole)
    (damaged / name).unlink()
    assert name in assert_found(tmp_path, damaged, whole)


def test_a_file_changed_after_verification_does_not_reach_a_model(tmp_path: Path) -> None:
    path = save(tmp_path, 1).path
    loaded, _ = checkpoint.load(path)
    file = path / "state-00001-of-00001.safetensors"
    with tensor_file.open_regular(file) as opened:
        flip(file, tensor_file.read_header(opened)["count/updates"].begin)
    with pytest.raises(CheckpointError, match="'count/updates' has changed"):
        loaded.tensors["count/updates"]
    os.truncate(file, 200)
    with pytest.raises(CheckpointError, match="too early"):
        loaded.tensors["mask/used"]


def test_what_is_no_checkpoint_does_not_count(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") == (None, [])
    path = save(tmp_path, 1).path
    for name in (".tmp-step_00000009-1-aa", "step_00000009.damaged-1", "step_9", "notes"):
        shutil.copytree(path, tmp_path / name)
    assert newest(tmp_path) == (path, [])
    shutil.copytree(path, tmp_path / "step_00000009")
    found, lines = newest(tmp_path)
    assert found == path
    assert "renamed" in lines[0]


def test_deaths_are_simulated_truly(tmp_path: Path) -> None:
    """The harness itself: a dead process carries out nothing more, so its leftovers stay."""
    for kind in DEATHS:
        with injected(Faults(kind, 4)) as faults, pytest.raises(Death):
            save(tmp_path / kind, 1)
        assert faults.dead
        assert list((tmp_path / kind).glob(".tmp-*"))
