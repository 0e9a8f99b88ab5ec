"""A checkpoint's manifest: hostile and damaged ones are refused, and version 1 is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import assert_same, forge, save

from weftrain.core import checkpoint
from weftrain.core.errors import CheckpointError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, root_of
from weftrain.core.formats.checkpoint_manifest import MANIFEST, is_manifest_of


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


def test_a_known_root_tells_a_manifest_from_any_other(tmp_path: Path) -> None:
    saved = save(tmp_path, 3)
    file, root = saved.path / MANIFEST, saved.root
    data = file.read_bytes()
    own = b'"root":"%b",' % root.encode()
    assert is_manifest_of(saved.path, root)
    assert not is_manifest_of(saved.path, "a" * 64)
    for other in (b"", data[:-1], data + b"\n", data.replace(b'"step":3', b'"step":4'), data.replace(own, b"", 1)[:-1]):
        file.write_bytes(other)
        assert not is_manifest_of(saved.path, root)
    file.write_bytes(data)
    (tmp_path / "link").symlink_to(saved.path)
    assert not is_manifest_of(tmp_path / "link", root)
