"""Forges a release: after an edit every hash, root, parent, ledger line, link, revision and card is made again, so that
nothing contradicts anything.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from weftrain.analysis.report.model_card import model_card, revision_card
from weftrain.cli.release import write_weights
from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.config import Recipe
from weftrain.core.errors import WeftrainError
from weftrain.core.formats.canonical import canonical_json, sha256_json
from weftrain.core.formats.croissant import CROISSANT, write_croissant
from weftrain.core.formats.dataset import read_dataset_manifest
from weftrain.core.formats.fsops import sha256_file
from weftrain.core.formats.strict_model import validated
from weftrain.core.formats.strict_yaml import dump_yaml
from weftrain.core.run.lineage import lineage
from weftrain.core.run.metrics import Digest, read_metrics
from weftrain.exchange.release.bom import BOM
from weftrain.exchange.release.described import bom_of
from weftrain.exchange.release.release import Release, links_of, read_release, revisions

Tensors = dict[str, torch.Tensor]
Edit = Callable[[dict[str, Any]], None]


def forge(
    folder: Path,
    *,
    tensors: Callable[[int, Tensors], None] = lambda step, tensors: None,
    recipe: Callable[[dict[str, Any]], None] = lambda recipe: None,
    dataset_id: str | None = None,
    drop_step: int | None = None,
    keep_parents: bool = False,
    chunks: dict[int, int] | None = None,
    manifest: Edit = lambda manifest: None,
    metrics: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None,
    ledger: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda entries: entries,
    of_release: Edit = lambda release: None,
    files: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Edit the release in place. tensors: edits a checkpoint's state. recipe: every recorded recipe. drop_step: leaves
    a link out. keep_parents: what followed the dropped checkpoint still names it. manifest: edits every checkpoint's.
    metrics, ledger: give other lines. of_release: edits release.json. files: edits any file last.
    """
    if metrics is not None:
        records = metrics([json.loads(text) for text in (folder / "metrics.jsonl").read_bytes().splitlines()])
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    release = json.loads((folder / "release.json").read_bytes())
    places = sorted((folder / "checkpoints").iterdir())
    before = json.loads((places[0] / "manifest.json").read_bytes())["parent"]  # of another run, or None
    roots: dict[str | None, str | None] = {None: None, before: before}
    for path in places:
        state, told = checkpoint.load(path)
        whole = {name: state.tensors[name].clone() for name in state.tensors}
        shutil.rmtree(path)
        if told["step"] == drop_step:
            continue
        tensors(told["step"], whole)
        recipe(told["recipe"])
        manifest(told)
        saved = checkpoint.save(
            path.parent,
            State(told["step"], told["optimizer_updates"], whole),
            recipe=told["recipe"],
            dataset_id=dataset_id or told["dataset_id"],
            fingerprint=told["fingerprint"],
            tokens=told["tokens"],
            position=told["position"],
            parent=roots.get(told["parent"], told["parent"]) if keep_parents else before,
            kernels=told["kernels"],
            sources=told.get("sources"),
        )
        roots[told["root"]] = before = saved.root
    entries = _ledger(folder, roots, recipe, dataset_id, drop_step, keep_parents, chunks or {}, ledger)
    stored = json.loads((folder / "recipe.json").read_bytes())
    recipe(stored)
    (folder / "recipe.json").write_bytes(canonical_json(stored) + b"\n")
    model = Recipe.model_validate(stored)
    release |= {
        "recipe_sha256": sha256_json(stored),
        "ledger": entries[-1]["hash"],
        "dataset_id": dataset_id or release["dataset_id"],
    }
    of_release(release)
    try:
        release["links"] = [link.model_dump(mode="json") for link, _ in links_of(lineage(entries), model)]
    except Exception:  # a link is missing: the forger leaves the others as they were, under their new roots
        release["links"] = [
            link | {"start": roots.get(link["start"]), "end": roots.get(link["end"], link["end"])}
            for link in release["links"]
        ]
        release["links"] = [link for link in release["links"] if link["stop_step"] != drop_step]
    write_release(folder, release)
    write_revisions(folder, files=files)


def write_revisions(folder: Path, files: Callable[[Path], None] = lambda folder: None) -> None:
    """Make revisions and cards again, as `weftrain release` writes them. files: edits any file last."""
    recipes, steps, states = {}, {}, {}
    for path in (folder / "checkpoints").iterdir():
        state, manifest = checkpoint.load(path)
        root = manifest["root"]
        recipes[root], steps[root], states[root] = Recipe.from_record(manifest["recipe"]), manifest["step"], state
    shutil.rmtree(folder / "revisions")
    (folder / "revisions").mkdir()
    made = read_release(folder)
    for name, root in revisions(made):
        if root in states:
            place = folder / "revisions" / name
            weights = checkpoint.Weights(states[root].tensors)
            write_weights(made.weights_dtype, folder / "data", place, weights, recipes[root])
            (place / "README.md").write_text(revision_card(made, name, steps[root], recipes[root]))
    line = lineage([json.loads(text) for text in (folder / "ledger.jsonl").read_bytes().splitlines()])
    last = Recipe.from_record(line.segments[-1].recipe)
    (folder / "recipe.yaml").write_text(dump_yaml(json.loads((folder / "recipe.json").read_bytes())))
    (folder / "README.md").write_text(model_card(folder, made, line, last))
    described = [BOM, *(path.relative_to(folder).as_posix() for path in folder.rglob(CROISSANT))]
    before = {name: (folder / name).read_bytes() for name in described if (folder / name).exists()}
    files(folder)
    edited = {name for name, data in before.items() if (folder / name).read_bytes() != data}
    for name in before.keys() - edited - {BOM}:
        place = (folder / name).parent
        write_croissant(place, read_dataset_manifest(place))
    write_release(folder, keep_bom=BOM in edited)


def _ledger(
    folder: Path,
    roots: dict[str | None, str | None],
    recipe: Callable[[dict[str, Any]], None],
    dataset_id: str | None,
    drop_step: int | None,
    keep_parents: bool,
    chunks: dict[int, int],
    edit: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    measured = [record for record in read_metrics(folder) if record["kind"] in ("step", "evaluation")]
    for entry in edit([json.loads(line) for line in (folder / "ledger.jsonl").read_bytes().splitlines()]):
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
        if entry["kind"] == "checkpoint":
            digest = Digest()
            for record in measured:
                if entry["metrics_after"] < record["step"] <= entry["step"]:
                    digest.add(record)
            entry["metrics_sha256"] = digest.hexdigest()
        entry |= {"n": len(entries), "previous": entries[-1]["hash"] if entries else None}
        del entry["hash"]
        entry["hash"] = sha256_json(entry)
        entries.append(entry)
    (folder / "ledger.jsonl").write_bytes(b"".join(canonical_json(entry) + b"\n" for entry in entries))
    return entries


def write_release(folder: Path, release: dict[str, Any] | None = None, *, keep_bom: bool = False) -> None:
    """Make release.json again, over the files as they are, and the bill of materials if there is one to keep up."""
    value = json.loads((folder / "release.json").read_bytes()) if release is None else dict(release)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    kept = [name for name in names if name not in ("release.json", "signature.json", "model.sig")]
    value["files"] = {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in kept
    }
    value["root"] = "0" * 64
    if BOM in value["files"] and not keep_bom:
        line = lineage([json.loads(text) for text in (folder / "ledger.jsonl").read_bytes().splitlines()])
        hashes = {name: entry["sha256"] for name, entry in value["files"].items()}
        with contextlib.suppress(WeftrainError):  # of a release that is damaged on purpose
            bom = bom_of(folder, validated(Release, value), line, hashes)
            (folder / BOM).write_bytes(bom)
            value["files"][BOM] = {"size": len(bom), "sha256": sha256_file(folder / BOM)}
    value.pop("root")
    value["root"] = sha256_json(value)
    (folder / "release.json").write_bytes(canonical_json(value) + b"\n")
