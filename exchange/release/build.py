"""Builds the release of a run. See release.py for what is in the folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from weftrain.core import checkpoint
from weftrain.core.config import Recipe
from weftrain.core.errors import ReleaseError, WeftrainError, one_line, os_errors_as
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import sealed, sha256_json
from weftrain.core.formats.checkpoint_manifest import folder_name
from weftrain.core.formats.dataset import MANIFEST as DATA_MANIFEST
from weftrain.core.formats.dataset import TOKENIZER, described_by, read_dataset_manifest
from weftrain.core.formats.reference_file import reference_files
from weftrain.core.formats.strict_model import validated
from weftrain.core.recipe_file import recorded_recipe
from weftrain.core.run.ledger import read_ledger
from weftrain.core.run.ledger_schema import LEDGER, ParentRelease
from weftrain.core.run.lineage import Lineage, lineage
from weftrain.core.run.metrics import METRICS
from weftrain.core.run.run_folder import ENVIRONMENT, READABLE_RECIPE, RECIPE
from weftrain.exchange.release.bom import BOM
from weftrain.exchange.release.described import bom_of, write_croissants
from weftrain.exchange.release.release import (
    ANALYSES,
    CARD,
    RELEASE,
    Licences,
    Link,
    Release,
    Supply,
    checked_name,
    files_below,
    hash_files,
    links_of,
    read_json,
    read_release,
    revisions,
)


@dataclass(frozen=True)
class Writers:
    """What a release takes from its caller: model cards as Markdown, and weights in the Hugging Face layout.

    card(draft, lineage, recipe); revision_card(draft, revision, step, recipe); weights(folder, canonical weights,
    recipe) writes the folder. A draft is the release without its files and root.
    """

    card: Callable[[Release, Lineage, Recipe], str]
    revision_card: Callable[[Release, str, int, Recipe], str]
    weights: Callable[[Path, Mapping[str, Any], Recipe], None]


@dataclass(frozen=True)
class _Record:
    """What a run's ledger and recipe say."""

    lineage: Lineage
    ledger: str  # hash of its last line
    recipe: Recipe
    recipe_sha256: str
    links: tuple[Link, ...]


def build(
    run: Path,
    target: Path,
    writers: Writers,
    *,
    version: str,
    weights_dtype: Literal["float32", "bfloat16"],
    licence: str,
    data: Literal["shards", "manifest"],
    check: Callable[[Path], object],
    data_root: Path | None = None,
    supply: Supply | None = None,
    progress: Callable[[str], None] = lambda words: None,
) -> Release:
    """Write the release of the run in `run`. It appears under `target` whole and checked, or not at all.

    check: verifies the folder before it gets its name; its error is reported as one of the run. data_root: replaces the
    recipe's data.root. supply: what its maker states of the release. Raises ReleaseError, CheckpointError, DataError,
    RunFolderError: for a run without ledger or links, a damaged checkpoint, a target that exists.
    """
    licence = checked_licence(licence)
    if target.exists():
        raise ReleaseError(f"{target}: is there already: name a new folder; a release is never written over")
    record = _read_record(run)
    disk = os_errors_as(ReleaseError, f"{target}: cannot be written", "free space or check the folder, then try again")
    with disk, fsops.temporary_tree(target) as temporary:
        for name in (RECIPE, READABLE_RECIPE, ENVIRONMENT, LEDGER, METRICS):
            if (run / name).exists():
                fsops.copy_file(run / name, temporary / name)
        progress("data")
        licences, kind = _copy_data(_recipes_of(record), temporary, data, data_root)
        _copy_analyses(run, temporary)
        draft = Release(
            format="weftrain-release",
            version=1,
            name=record.recipe.name,
            weftrain=version,
            weights_dtype=weights_dtype,
            licences=Licences(weights=licence, data=licences),
            data=kind,
            dataset_id=record.lineage.segments[-1].dataset_id,
            recipe_sha256=record.recipe_sha256,
            ledger=record.ledger,
            parent=_parent(record.lineage),
            supply=supply,
            links=record.links,
            files={},
            root="0" * 64,
        )
        _write_revisions(run, temporary, draft, record, writers, progress)
        fsops.write_bytes(temporary / CARD, writers.card(draft, record.lineage, record.recipe).encode())
        write_croissants(temporary)
        progress("hashes")
        _write_release(temporary, draft, record.lineage)
        progress("verifying")
        try:
            check(temporary)
        except WeftrainError as error:
            raise ReleaseError(f"{str(error).replace(str(temporary), str(run))}: nothing was released") from error
        fsops.rename(temporary, target)
    return read_release(target)


def _parent(line: Lineage) -> ParentRelease | None:
    told = line.segments[0].parent_release
    return None if told is None else ParentRelease.model_validate(told)


def _read_record(run: Path) -> _Record:
    """Raises ReleaseError where there is no ledger or no link, or the run holds a checkpoint that the ledger lacks."""
    entries = read_ledger(run / LEDGER)
    if not entries:
        raise ReleaseError(
            f"{run / LEDGER}: there is no ledger, so nothing ties the checkpoints to their data: train with this "
            "version"
        )
    line = lineage(entries)
    recipe_json = read_json(run / RECIPE)
    recipe = recorded_recipe(recipe_json, str(run / RECIPE)).recipe
    links = tuple(link for link, _ in links_of(line, recipe))
    if not links:
        raise ReleaseError(f"{run}: no link: the run needs a checkpoint that training led to: train it further")
    last = line.checkpoints[-1].step
    newer = sorted(step for step in checkpoint.step_folders(run / "checkpoints") if step > last)
    if newer:
        raise ReleaseError(
            f"{run}: holds a checkpoint of step {newer[0]}, and its ledger ends with that of step {last}: start the "
            "run again (`weftrain train`), which enters it or says what is wrong"
        )
    return _Record(line, entries[-1]["hash"], recipe, sha256_json(recipe_json), links)


def _write_revisions(
    run: Path, target: Path, draft: Release, record: _Record, writers: Writers, progress: Callable[[str], None]
) -> None:
    """Copy each checkpoint of the links, and write its weights and card as a revision."""
    steps = {entry.root: entry.step for entry in record.lineage.checkpoints}
    fsops.make_dirs(target / "revisions")
    for name, root in revisions(draft):
        progress(f"{name} (step {steps[root]})")
        state, manifest = checkpoint.load(_copy_checkpoint(run, target, steps[root], root), verified=True)
        recipe = recorded_recipe(manifest["recipe"], folder_name(state.step)).recipe
        revision = target / "revisions" / name
        writers.weights(revision, checkpoint.Weights(state.tensors, recipe.tuning.lora), recipe)
        fsops.write_bytes(revision / CARD, writers.revision_card(draft, name, state.step, recipe).encode())


def _write_release(folder: Path, draft: Release, line: Lineage) -> None:
    """Write the bill of materials, and release.json with the hash of every other file, and its root."""
    files = hash_files({name: folder / name for name in sorted(files_below(folder)) if name != RELEASE})
    bom = bom_of(folder, draft, line, {name: entry["sha256"] for name, entry in files.items()})
    fsops.write_bytes(folder / BOM, bom)
    files[BOM] = {"size": len(bom), "sha256": hashlib.sha256(bom).hexdigest()}
    fsops.write_bytes(folder / RELEASE, sealed(draft.model_dump(mode="json") | {"files": files}))


def checked_supply(name: str | None, download_location: str | None, seconds: int) -> Supply | None:
    """Who supplies a release and where it is downloaded, made at this Unix time; None where neither is stated. Raises
    ReleaseError for one without the other, or what is no name or no address.
    """
    if name is None and download_location is None:
        return None
    if name is None or download_location is None:
        raise ReleaseError("--supplier, --download-location: a bill of materials needs both: give both, or neither")
    try:
        return validated(Supply, {"name": name, "download_location": download_location, "time": seconds})
    except ValueError as error:
        raise ReleaseError(
            f"--supplier, --download-location: {one_line(error, 120)}: give a name in one line, and an address such as "
            "https://huggingface.co/ORGANISATION/MODEL"
        ) from None


def checked_licence(expression: str) -> str:
    """An SPDX licence expression in its canonical spelling. Raises ReleaseError for anything else."""
    try:
        return str(canonicalize_license_expression(expression))
    except InvalidLicenseExpression as error:
        raise ReleaseError(
            f"--licence {expression[:80]!r}: is not an SPDX licence expression ({error.args[0][:120]}): give an "
            "identifier of "
            "https://spdx.org/licenses, such as Apache-2.0, or LicenseRef-NAME for a licence that has none"
        ) from None


def _copy_checkpoint(run: Path, target: Path, step: int, root: str) -> Path:
    """Verify a checkpoint of the run and copy it into the release; returns the copy."""
    source = run / "checkpoints" / folder_name(step)
    manifest = checkpoint.verify(source)
    if manifest["root"] != root:
        raise ReleaseError(
            f"{source}: its root {manifest['root'][:12]} is not the ledger's {root[:12]}: restore the run's own "
            "checkpoint"
        )
    folder = target / "checkpoints" / source.name
    fsops.make_dirs(folder)
    for name in sorted([*manifest["files"], "manifest.json"]):
        fsops.copy_file(source / name, folder / name)
    return folder


def _recipes_of(record: _Record) -> list[Recipe]:
    """The run's recipe, then every other one by which a link was trained: those may read other sources."""
    first, stop = min(link.first_step for link in record.links), max(link.stop_step for link in record.links)
    trained = [segment.recipe for segment in record.lineage.segments if segment.trained_within(first, stop)]
    distinct = {sha256_json(recipe): recipe for recipe in trained}
    return [record.recipe, *map(Recipe.from_record, distinct.values())]


def _copy_data(
    recipes: Sequence[Recipe], target: Path, data: Literal["shards", "manifest"], root: Path | None
) -> tuple[dict[str, str], Any]:
    """Copy the dataset of each source of any recipe, or the files that describe it. Returns the licence of each source,
    and what was copied.

    All are looked for below the data.root of the first recipe: an earlier one may name a folder they were moved from.
    """
    if recipes[0].data.synthetic_rows is not None:
        return {}, "none"
    licences: dict[str, str] = {}
    for recipe, source in ((one, source) for one in recipes for source in one.data.sources):
        folder = (Path(recipes[0].data.root) if root is None else root) / source.path
        manifest = read_dataset_manifest(folder)
        known = licences.setdefault(source.name, manifest.corpus.licence)
        if known != manifest.corpus.licence:  # the source of this name read another dataset before
            licences[source.path] = manifest.corpus.licence
        names = [
            DATA_MANIFEST,
            *(name for name in described_by(manifest) if name == TOKENIZER or (folder / name).exists()),
        ]
        if data == "shards":
            names += [shard.file for entry in manifest.sets.values() for shard in entry.shards]
        if recipe.objective.reference is not None:
            names += reference_files(recipe.objective.reference)[: 2 if data == "shards" else 1]
        for name in names:
            place = target / "data" / checked_name(source.path) / checked_name(name)
            if not place.exists():  # two sources may read one dataset
                fsops.make_dirs(place.parent)
                fsops.copy_file(folder / name, place)
    return licences, data


def _copy_analyses(run: Path, target: Path) -> None:
    for path in sorted((run / ANALYSES).rglob("*")) if (run / ANALYSES).is_dir() else []:
        if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
            place = target / checked_name(path.relative_to(run).as_posix())
            fsops.make_dirs(place.parent)
            fsops.copy_file(path, place)
