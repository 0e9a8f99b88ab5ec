"""Small checkpoints, and forged ones whose manifest agrees with what was altered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.checkpoint import CheckpointInfo
from weftrain.core.formats import tensor_file
from weftrain.core.formats.canonical import canonical_json, root_of

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


def header_sha256(data: bytes) -> str:
    return hashlib.sha256(data[: 8 + int.from_bytes(data[:8], "little")]).hexdigest()


def forge(path: Path, alter: Callable[[dict[str, Any]], None], data: bytes | None = None) -> None:
    file = path / "state-00001-of-00001.safetensors"
    if data is not None:
        file.write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][file.name] = {"size": file.stat().st_size, "header_sha256": header_sha256(file.read_bytes())}
    alter(manifest)
    (path / "manifest.json").write_bytes(canonical_json(manifest | {"root": root_of(manifest)}) + b"\n")
