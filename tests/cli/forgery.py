"""Forges a release: after an edit every hash, root, parent and ledger line is made again, so that nothing contradicts
anything.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.config import Recipe
from weftrain.core.formats.canonical import canonical_json, sha256_json
from weftrain.core.formats.fsops import sha256_file
from weftrain.core.run.lineage import lineage
from weftrain.exchange.huggingface.folder import write_huggingface
from weftrain.exchange.release.release import links_of, read_release, revisions

Tensors = dict[str, torch.Tensor]


def forge(
    folder: Path,
    *,
    tensors: Callable[[int, Tensors], None] = lambda step, tensors: None,
    recipe: Callable[[dict[str, Any]], None] = lambda recipe: None,
    dataset_id: str | None = None,
    drop_step: int | None = None,
    keep_parents: bool = False,
    chunks: dict[int, int] | None = None,
) -> None:
    """Edit the release in place. tensors: edits a checkpoint's state. recipe: every recorded recipe. drop_step: leaves
    a link out.

    keep_parents: what followed the dropped checkpoint still names it.
    """
    release = json.loads((folder / "release.json").read_bytes())
    roots: dict[str | None, str | None] = {None: None}
    before = None
    for path in sorted((folder / "checkpoints").iterdir()):
        state, manifest = checkpoint.load(path)
        whole = {name: state.tensors[name].clone() for name in state.tensors}
        shutil.rmtree(path)
        if manifest["step"] == drop_step:
            continue
        tensors(manifest["step"], whole)
        recipe(manifest["recipe"])
        saved = checkpoint.save(
            path.parent,
            State(manifest["step"], manifest["optimizer_updates"], whole),
            recipe=manifest["recipe"],
            dataset_id=dataset_id or manifest["dataset_id"],
            fingerprint=manifest["fingerprint"],
            tokens=manifest["tokens"],
            position=manifest["position"],
            parent=roots.get(manifest["parent"], manifest["parent"]) if keep_parents else before,
            kernels=manifest["kernels"],
        )
        roots[manifest["root"]] = before = saved.root
    entries = _ledger(folder, roots, recipe, dataset_id, drop_step, keep_parents, chunks or {})
    stored = json.loads((folder / "recipe.json").read_bytes())
    recipe(stored)
    (folder / "recipe.json").write_bytes(canonical_json(stored) + b"\n")
    model = Recipe.model_validate(stored)
    release |= {
        "recipe_sha256": sha256_json(stored),
        "ledger": entries[-1]["hash"],
        "dataset_id": dataset_id or release["dataset_id"],
    }
    try:
        release["links"] = [link.model_dump(mode="json") for link, _ in links_of(lineage(entries), model)]
    except Exception:  # a link is missing: the forger leaves the others as they were, under their new roots
        release["links"] = [
            link | {"start": roots.get(link["start"]), "end": roots.get(link["end"], link["end"])}
            for link in release["links"]
        ]
        release["links"] = [link for link in release["links"] if link["stop_step"] != drop_step]
    write_release(folder, release)
    shutil.rmtree(folder / "revisions")
    (folder / "revisions").mkdir()
    steps = {
        manifest["root"]: (path, manifest)
        for path in (folder / "checkpoints").iterdir()
        for manifest in [checkpoint.verify(path)]
    }
    for name, root in revisions(read_release(folder)):
        if root in steps:
            state, manifest = checkpoint.load(steps[root][0])
            write_huggingface(
                folder / "revisions" / name,
                checkpoint.Weights(state.tensors),
                Recipe.model_validate(manifest["recipe"]).model,
                torch.float32,
            )
    write_release(folder, release)


def _ledger(
    folder: Path,
    roots: dict[str | None, str | None],
    recipe: Callable[[dict[str, Any]], None],
    dataset_id: str | None,
    drop_step: int | None,
    keep_parents: bool,
    chunks: dict[int, int],
) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for line in (folder / "ledger.jsonl").read_bytes().splitlines():
        entry = json.loads(line)
        if drop_step is not None and entry["step"] == drop_step:
            continue
        for key in ("root", "parent"):
            if key in entry:
                lost = entry[key] if keep_parents else entries[-1].get("root") if entries else None
                entry[key] = roots.get(entry[key], lost)
        if "recipe" in entry:
            recipe(entry["recipe"])
            entry["recipe_sha256"] = sha256_json(entry["recipe"])
        if dataset_id is not None and "dataset_id" in entry:
            entry["dataset_id"] = dataset_id
        if "chunk" in entry:
            entry["chunk"] = chunks.get(entry["chunk"], entry["chunk"])
        entry |= {"n": len(entries), "previous": entries[-1]["hash"] if entries else None}
        del entry["hash"]
        entry["hash"] = sha256_json(entry)
        entries.append(entry)
    (folder / "ledger.jsonl").write_bytes(b"".join(canonical_json(entry) + b"\n" for entry in entries))
    return entries


def write_release(folder: Path, release: dict[str, Any] | None = None) -> None:
    """Make release.json again, over the files as they are."""
    value = json.loads((folder / "release.json").read_bytes()) if release is None else dict(release)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    kept = [name for name in names if name not in ("release.json", "signature.json")]
    value["files"] = {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in kept
    }
    value.pop("root", None)
    value["root"] = sha256_json(value)
    (folder / "release.json").write_bytes(canonical_json(value) + b"\n")
