"""Params files for the tests of this folder: CrystalCoder's released ones, ours, and how two of them differ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from places import SHARED

from weftrain.core.config import Recipe
from weftrain.core.recipe_file import load_recipe
from weftrain.exchange.modelzoo.params_export import dump, export_params
from weftrain.exchange.modelzoo.params_import import Imported, import_params

RELEASED = SHARED / "data" / "crystalcoder"
PHASES = pytest.mark.parametrize("phase", [1, 2, 3])


def released(phase: int) -> Path:
    path = RELEASED / f"phase{phase}.yaml"
    if not path.exists():
        pytest.skip("the released params files are not beside this checkout")
    return path


def shipped(phase: int) -> Recipe:
    return load_recipe(f"crystalcoder_7b_phase{phase}").recipe


def leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no mapping or list."""
    if not isinstance(tree, dict | list | tuple):
        yield key, tree
        return
    for name, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from leaves(item, f"{key}.{name}" if key else str(name))


def differing(one: Any, other: Any) -> set[str]:
    """Keys that one side lacks or has another value for; list positions are written '*'."""
    left, right = dict(leaves(one)), dict(leaves(other))
    absent = object()
    keys = {key for key in left.keys() | right.keys() if left.get(key, absent) != right.get(key, absent)}
    return {".".join("*" if part.isdigit() else part for part in key.split(".")) for key in keys}


def written(folder: Path, params: dict[str, Any] | str) -> Path:
    path = folder / "params.yaml"
    path.write_text(params if isinstance(params, str) else dump(params))
    return path


def base() -> dict[str, Any]:
    return export_params(shipped(1))


def put(params: dict[str, Any], key: str, value: Any) -> None:
    """Set (or, with ..., remove) the dotted key."""
    target: Any = params
    *parents, last = key.split(".")
    for part in parents:
        target = target[int(part)] if part.isdigit() else target.setdefault(part, {})
    index: Any = int(last) if last.isdigit() else last
    if value is ...:
        del target[index]
    else:
        target[index] = value


def imported(tmp_path: Path, *changes: tuple[str, Any], **arguments: Any) -> Imported:
    params = base()
    for key, value in changes:
        put(params, key, value)
    return import_params(written(tmp_path, params), name="x", **({"micro_batch_size": 66} | arguments))
