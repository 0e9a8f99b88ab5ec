"""The files of a checkpoint: how tensors are divided among them, and what does not belong there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkpoint_cases import assert_same, save

from weftrain.core import checkpoint
from weftrain.core.errors import CheckpointError
from weftrain.core.formats import checkpoint_files


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
