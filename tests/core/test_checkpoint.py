"""Checkpoints: bit-exact, atomic under every fault, damaged ones found and passed over, hostile ones refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fault_injection import DEATHS, KINDS, Death, Faults, injected
from safetensors.torch import load_file

from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.checkpoint import CheckpointInfo
from weftrain.core.errors import CheckpointError
from weftrain.core.formats import checkpoint_files, fsops, tensor_file
from weftrain.core.formats.canonical import canonical_json, root_of
from weftrain.core.formats.lazy_tensors import LazyTensors

RECIPE = {"name": "tiny", "optimizer": {"eps": 1e-08, "betas": [0.9, 0.95]}, "note": "größer"}


def state_of(step: int) -> State:
    """A small state, a function of the step, with odd sizes, special values and every dtype that a plane may have."""
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "weights/layers.0.q.weight": torch.randn(7, 5, generator=generator),
        "exp_avg/layers.0.q.weight": torch.randn(5, 7, generator=generator).T,  # not contiguous
        "weights/norm.weight": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "weights/scale": torch.tensor(3.5),
        "weights/empty": torch.empty(0, 3),
        "high/head.weight": torch.randn(3, 3, generator=generator).bfloat16(),
        "low/head.weight": torch.arange(9, dtype=torch.int16),
        "count/updates": torch.tensor([step, 2**40]),
        "mask/used": torch.tensor([True, False, True]),
    }
    return State(step, max(step - 1, 0), tensors)


def save(folder: Path, step: int, state: State | None = None, **changes: Any) -> CheckpointInfo:
    arguments: dict[str, Any] = {
        "recipe": RECIPE,
        "dataset_id": "d" * 64,
        "fingerprint": {"torch": "2", "threads": 2},
        "tokens": step * 640,
        "position": step * 10,
        "parent": None,
        "kernels": {"attention": "reference"},
    }
    return checkpoint.save(folder, state or state_of(step), **arguments | changes)


def assert_same(path: Path, step: int) -> None:
    """The checkpoint holds state_of(step), bit for bit."""
    loaded, manifest = checkpoint.load(path)
    expected = state_of(step)
    assert (loaded.step, loaded.optimizer_updates, manifest["position"]) == (
        step,
        expected.optimizer_updates,
        step * 10,
    )
    assert set(loaded.tensors) == set(expected.tensors)
    for name, tensor in expected.tensors.items():
        found = loaded.tensors[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert tensor_file.tensor_memory(found) == tensor_file.tensor_memory(tensor), name


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    lines: list[str] = []
    return checkpoint.newest(folder, lines.append), lines


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


# What a checkpoint is


def header_sha256(data: bytes) -> str:
    return hashlib.sha256(data[: 8 + int.from_bytes(data[:8], "little")]).hexdigest()


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


def test_other_programs_read_the_tensors(tmp_path: Path) -> None:
    read = load_file(save(tmp_path, 3).path / "state-00001-of-00001.safetensors")
    for name, tensor in state_of(3).tensors.items():
        assert tensor_file.tensor_memory(read[name]) == tensor_file.tensor_memory(tensor)


def test_the_same_state_has_the_same_bytes_whatever_the_order_of_its_mapping(tmp_path: Path) -> None:
    state = state_of(3)
    reversed_state = State(3, 2, dict(reversed(state.tensors.items())))
    assert contents(save(tmp_path / "a", 3, state).path) == contents(save(tmp_path / "b", 3, reversed_state).path)
    assert save(tmp_path / "c", 3, fingerprint={"torch": "2", "threads": 1}).root != save(tmp_path / "a", 3).root


def test_tensors_are_divided_among_files_under_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "MAX_FILE_BYTES", 160)
    monkeypatch.setattr(checkpoint_files, "HASH_BACKLOG_BYTES", 100)
    path = save(tmp_path, 3).path
    names = sorted(file.name for file in path.glob("*.safetensors"))
    assert names == [f"state-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    assert len(names) == 3  # 16 + 140 bytes, 140 + 0 + 16 + 4, and the rest
    assert_same(path, 3)
    (path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{names[1]}: is missing"):
        checkpoint.verify(path)


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


def test_writing_does_not_copy_a_contiguous_tensor() -> None:
    tensor = torch.randn(5, 3)
    assert np.shares_memory(np.frombuffer(tensor_file.tensor_memory(tensor), np.uint8), tensor.numpy())


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


@pytest.mark.prove
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


def as_version_1(path: Path) -> None:
    """Make the manifest what an earlier version wrote: the hash of each whole file."""
    manifest = json.loads((path / "manifest.json").read_text()) | {"version": 1}
    manifest["files"] = {
        name: {"size": entry["size"], "sha256": fsops.sha256_file(path / name)}
        for name, entry in manifest["files"].items()
    }
    (path / "manifest.json").write_bytes(canonical_json(manifest | {"root": root_of(manifest)}) + b"\n")


def test_a_checkpoint_of_version_1_is_read_and_checked(tmp_path: Path) -> None:
    path = save(tmp_path, 3).path
    as_version_1(path)
    assert_same(path, 3)
    file = path / "state-00001-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[10] ^= 32  # in the header, which no tensor's hash covers
    file.write_bytes(data)
    with pytest.raises(CheckpointError):
        checkpoint.verify(path)
    manifest = json.loads((path / "manifest.json").read_text()) | {"version": 2}
    (path / "manifest.json").write_bytes(canonical_json(manifest | {"root": root_of(manifest)}) + b"\n")
    with pytest.raises(CheckpointError, match="its hash is not the kind that version 2 has"):
        checkpoint.verify(path)


# Malice: the manifest is made to agree with whatever was altered, so that no hash gives it away


def forge(path: Path, alter: Callable[[dict[str, Any]], None], data: bytes | None = None) -> None:
    file = path / "state-00001-of-00001.safetensors"
    if data is not None:
        file.write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][file.name] = {"size": file.stat().st_size, "header_sha256": header_sha256(file.read_bytes())}
    alter(manifest)
    (path / "manifest.json").write_bytes(canonical_json(manifest | {"root": root_of(manifest)}) + b"\n")


def header(text: str, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text.encode() + data


def entry(begin: int = 0, end: int = 4, dtype: str = "F32", shape: str = "[1]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'


HOSTILE_FILES = {
    "duplicate name": (header(f'{{"a":{entry()},"a":{entry(4, 8)}}}', bytes(8)), "'a' appears twice"),
    "path as a name": (header(f'{{"../../x":{entry()}}}', bytes(4)), r"tensor name '\.\./\.\./x'"),
    "header larger than the file": (header("{}", length=2**62), "claims a header"),
    "header larger than allowed": (header("{}", length=10**8 + 1), "claims a header"),
    "not JSON": (header("{"), "Expecting|delimiter|property name"),
    "not an object": (header("[]"), "not (one this program writes|a JSON object)"),
    "nested": (header("[" * 100_000), "nested too deeply|Expecting"),
    "foreign metadata": (header('{"__metadata__":{"x":"y"}}'), "not (one this program writes|a JSON object)"),
    "unknown dtype": (header(f'{{"a":{entry(dtype="F1024")}}}', bytes(4)), "unknown dtype"),
    "size that does not fit the shape": (header(f'{{"a":{entry(shape="[2]")}}}', bytes(4)), "do not hold"),
    "shape bomb": (header(f'{{"a":{entry(shape="[9999999999999999999999]")}}}', bytes(4)), "short lists of numbers"),
    "negative shape": (header(f'{{"a":{entry(shape="[-1,-1]")}}}', bytes(4)), "short lists of numbers"),
    "shape of floats": (header(f'{{"a":{entry(shape="[1.0]")}}}', bytes(4)), "short lists of numbers"),
    "overlap": (header(f'{{"a":{entry()},"b":{entry()}}}', bytes(4)), "begins at byte"),
    "hole": (header(f'{{"a":{entry()},"b":{entry(8, 12)}}}', bytes(12)), "begins at byte"),
    "beyond the end": (header(f'{{"a":{entry()},"b":{entry(4, 8)}}}', bytes(4)), "the tensors end at"),
    "bytes after the end": (header(f'{{"a":{entry()}}}', bytes(5)), "the tensors end at"),
    "extra key": (
        header('{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"x":1}}'),
        "not dtype, shape and data_offsets",
    ),
    "other tensors": (header(f'{{"a":{entry()}}}', bytes(4)), "is missing|not in the manifest"),
}


@pytest.mark.parametrize("case", HOSTILE_FILES)
def test_hostile_tensor_files_are_refused(tmp_path: Path, case: str) -> None:
    data, message = HOSTILE_FILES[case]
    path = save(tmp_path, 1).path
    forge(path, lambda manifest: None, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.verify(path)
    assert "\n" not in str(caught.value)
    assert "state-00001" in str(caught.value)


def set_tensor(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["tensors"]["weights/scale"].update({key: value})


HOSTILE_MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer version": (lambda m: m.update(version=3), "version 3 is not one"),
    "another format": (lambda m: m.update(format="x"), "is not a file of the format"),
    "missing key": (lambda m: m.pop("position"), "key 'position'"),
    "extra key": (lambda m: m.update(extra=1), "key 'extra'"),
    "string for a number": (lambda m: m.update(step="1"), "key 'step'"),
    "true for a number": (lambda m: m.update(step=True), "key 'step'"),
    "negative step": (lambda m: m.update(step=-1), "key 'step'"),
    "another step": (lambda m: m.update(step=2), "renamed"),
    "another recipe": (lambda m: m["recipe"].update(name="other"), "recipe_sha256"),
    "wrong dtype": (set_tensor("dtype", "I32"), "is F32 .*says I32"),
    "wrong shape": (set_tensor("shape", [1]), r"is F32 \[\].*says F32 \[1\]"),
    "wrong hash": (set_tensor("sha256", "0" * 64), "damaged tensor 'weights/scale'"),
    "path out of the folder": (set_tensor("file", "../../x.safetensors"), "weights/scale.file"),
    "file that is not there": (
        set_tensor("file", "state-00002-of-00002.safetensors"),
        "'weights/scale' is not in the manifest",
    ),
    "tensor too many": (lambda m: m["tensors"].update(x=m["tensors"]["weights/scale"]), "tensor 'x' is missing"),
    "tensor too few": (lambda m: m["tensors"].pop("weights/scale"), "'weights/scale' is not in the manifest"),
    "file elsewhere": (
        lambda m: m["files"].update({"../x": m["files"]["state-00001-of-00001.safetensors"]}),
        r"files\.\.\./x",
    ),
    "no files": (lambda m: m["files"].clear(), "does not belong there"),
}


@pytest.mark.parametrize("case", HOSTILE_MANIFESTS)
def test_hostile_manifests_are_refused(tmp_path: Path, case: str) -> None:
    alter, message = HOSTILE_MANIFESTS[case]
    path = save(tmp_path, 1).path
    forge(path, alter)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.verify(path)
    assert "\n" not in str(caught.value)


def test_manifest_text_is_canonical_and_small(tmp_path: Path) -> None:
    path = save(tmp_path, 1).path
    file = path / "manifest.json"
    good = file.read_bytes()
    altered = {
        "appears twice": good.replace(b'"step":1', b'"step":1,"step":1'),
        "not in canonical form": json.dumps(json.loads(good), indent=1).encode(),
        "NaN is not a JSON number": good.replace(b'"threads":2', b'"threads":NaN'),
        "nested too deeply|Expecting": b"[" * 200_000,
        "not a file of the format": b"[]\n",
        "codec can't decode": b"\xff" + good,
        "Exceeds the limit": good.replace(b'"step":1', b'"step":' + b"1" * 5000),
    }
    for message, data in altered.items():
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.verify(path)
    file.write_bytes(b"")
    os.truncate(file, 65 << 20)  # sparse
    with pytest.raises(CheckpointError, match="more than the"):
        checkpoint.verify(path)


def test_links_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 1).path
    outside = tmp_path / "outside"
    for name in ("manifest.json", "state-00001-of-00001.safetensors"):
        shutil.move(path / name, outside)
        (path / name).symlink_to(outside)
        with pytest.raises(CheckpointError, match=f"{name}: is a symbolic link"):
            checkpoint.load(path)
        (path / name).unlink()
        shutil.move(outside, path / name)
    (path / "payload.pkl").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"payload\.pkl: does not belong there"):
        checkpoint.verify(path)
    (path / "payload.pkl").unlink()
    (tmp_path / "step_00000001").symlink_to(path)
    with pytest.raises(CheckpointError, match="symbolic link"):
        checkpoint.verify(tmp_path / "step_00000001")
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.verify(tmp_path / "step_00000002")


def test_deaths_are_simulated_truly(tmp_path: Path) -> None:
    """The harness itself: a dead process carries out nothing more, so its leftovers stay."""
    for kind in DEATHS:
        with injected(Faults(kind, 4)) as faults, pytest.raises(Death):
            save(tmp_path / kind, 1)
        assert faults.dead
        assert list((tmp_path / kind).glob(".tmp-*"))
