"""A release: one folder with which a third party can verify, replay, resume and evaluate a run, and nothing else.

    release.json       every file with size and SHA-256, the links, the licences; `root` is the SHA-256 of all the rest
                       of it
    signature.json     an Ed25519 signature of the root, where somebody signed (exchange/release/signature.py); the one
                       file that release.json omits
    README.md          the model card, written from the record
    recipe.json  recipe.yaml  environment.json  ledger.jsonl  metrics.jsonl
    checkpoints/step_NNNNNNNN/      full state, as the run saved it
    revisions/ckpt_NNN/             weights alone, in a stated dtype, laid out for the Hugging Face hub: one revision a
                                    checkpoint
    data/<source>/                  the datasets, or (data: manifest) what names every shard of them by hash
    analyses/                       evaluations, memorization

A *link* k runs from checkpoint k-1 to checkpoint k over the samples between them: over chunk k where the run has
chunks, else from one checkpoint to the next. Link 1 of a run from scratch begins at the seed. What a reader would get
wrong: every hash here can be made again by whoever edits the files: see exchange/release/verify.py and
exchange/release/replay.py for what shows what.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from pydantic import Field

from weftrain.core import checkpoint
from weftrain.core.config import Recipe
from weftrain.core.errors import ReleaseError, RunFolderError, WeftrainError, file_problem, os_errors_as
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import parse_json, parse_sealed, sealed, sha256_json
from weftrain.core.formats.checkpoint_manifest import folder_name
from weftrain.core.formats.dataset import MANIFEST as DATA_MANIFEST
from weftrain.core.formats.dataset import TOKENIZER, described_by, read_dataset_manifest
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.formats.safe_names import checked_path
from weftrain.core.formats.strict_model import Count, Sha256, StrictModel, validated
from weftrain.core.order.timeline import Timeline, chunk_order
from weftrain.core.recipe_file import recorded_recipe
from weftrain.core.run.ledger import read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import CheckpointEntry, Lineage, lineage
from weftrain.core.run.metrics import METRICS
from weftrain.core.run.run_folder import ENVIRONMENT, READABLE_RECIPE, RECIPE

FORMAT = "weftrain-release"
VERSION = 1
RELEASE = "release.json"
SIGNATURE = "signature.json"
CARD = "README.md"
ANALYSES = "analyses"
_MAX_DEPTH = 16  # folders in folders
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class FileEntry(StrictModel):
    size: Count
    sha256: Sha256


class Link(StrictModel):
    """From the state `start` (None: drawn from the seed) by the steps [first_step, stop_step) to the state `end`; both
    are roots.
    """

    link: Annotated[int, Field(gt=0)]
    chunk: Count | None
    first_step: Count
    stop_step: Count
    samples: Annotated[tuple[Count, ...], Field(min_length=2, max_length=2, strict=False)]
    start: Sha256 | None
    end: Sha256


class Licences(StrictModel):
    """Of the weights and of each source's text, as the run's owner and the datasets' manifests state them."""

    weights: Annotated[str, Field(min_length=1)]
    data: dict[str, str]


class Release(StrictModel):
    """release.json, as it was checked."""

    format: Literal["weftrain-release"]
    version: Literal[1]
    name: Annotated[str, Field(min_length=1)]
    weftrain: str
    weights_dtype: Literal["float32", "bfloat16"]
    licences: Licences
    data: Literal["shards", "manifest", "none"]  # none: synthetic rows, which follow from the seed
    dataset_id: str
    recipe_sha256: Sha256
    ledger: Sha256  # the hash of its last line
    links: Annotated[tuple[Link, ...], Field(strict=False)]
    files: dict[str, FileEntry]
    root: Sha256


# folder, canonical weights, the recipe: the Hugging Face layout
WriteWeights = Callable[[Path, Mapping[str, Any], Recipe], None]


def links_of(line: Lineage, recipe: Recipe) -> list[tuple[Link, CheckpointEntry]]:
    """The links of a run's line with the checkpoint each ends in: per chunk where the run has chunks, else per
    checkpoint.

    Raises ReleaseError where a chunk's checkpoint is not there.
    """
    points: list[CheckpointEntry | None] = [None] if _starts_itself(line) else []
    chunk_steps, order = None, None
    if recipe.data.chunks is not None:
        chunk_steps = recipe.schedule.steps // recipe.data.chunks
        order = chunk_order(recipe.data, recipe.schedule.steps, recipe.batch.global_batch_size)
    for point in line.checkpoints:
        if point.step and (chunk_steps is None or point.step % chunk_steps == 0):
            points.append(point)
        elif point.step == 0:
            points = [point]
    timelines: dict[int, Timeline] = {}

    def timeline_at(step: int) -> Timeline:
        segment = line.segment_at(step)
        if segment.entry not in timelines:
            timelines[segment.entry] = Recipe.from_record(segment.recipe).timeline
        return timelines[segment.entry]

    links = []
    for number, (before, after) in enumerate(pairwise(points), 1):
        assert after is not None
        first = 0 if before is None else before.step
        chunk = None if order is None or chunk_steps is None else order.chunk_at(first // chunk_steps)
        if chunk_steps is not None and after.step - first != chunk_steps:
            raise ReleaseError(f"the ledger has no checkpoint at the end of chunk {chunk} (step {first + chunk_steps})")
        link = Link(
            link=number,
            chunk=chunk,
            first_step=first,
            stop_step=after.step,
            samples=(timeline_at(first).sample(first), timeline_at(after.step - 1).sample(after.step)),
            start=None if before is None else before.root,
            end=after.root,
        )
        links.append((link, after))
    return links


def _starts_itself(line: Lineage) -> bool:
    """Whether the run began from its seed, so that its first link needs no checkpoint to begin from."""
    return bool(line.segments) and line.segments[0].first_step == 0 and line.segments[0].parent is None


def build(
    run: Path,
    target: Path,
    *,
    version: str,
    weights_dtype: Literal["float32", "bfloat16"],
    licence: str,
    data: Literal["shards", "manifest"],
    card: Callable[[Release, Lineage, Recipe], str],
    revision_card: Callable[[Release, str, int, Recipe], str],
    write_weights: WriteWeights,
    check: Callable[[Path], object],
    root: Path | None = None,
    progress: Callable[[str], None] = lambda words: None,
) -> Release:
    """Write the release of the run in `run`; it appears under `target` whole and checked, or not at all.

    check: verifies the release that was built, before it gets its name; what it raises is told of the run. root:
    instead of the recipe's data.root. Raises ReleaseError, CheckpointError, DataError, RunFolderError: for a run
    without ledger or links, a damaged checkpoint, a target that exists.
    """
    licence = checked_licence(licence)
    if target.exists():
        raise ReleaseError(f"{target}: is there already: name a new folder; a release is never written over")
    entries = read_ledger(run / LEDGER)
    if not entries:
        raise ReleaseError(
            f"{run / LEDGER}: there is no ledger, so nothing ties the checkpoints to their data: train with this "
            "version"
        )
    line = lineage(entries)
    recipe_json = read_json(run / RECIPE)
    recipe = recorded_recipe(recipe_json, str(run / RECIPE)).recipe
    links = links_of(line, recipe)
    if not links:
        raise ReleaseError(f"{run}: no link: the run needs a checkpoint that training led to: train it further")
    _check_listed(run, line)
    written = os_errors_as(ReleaseError, f"{target}: cannot be written", "make room or check it, then again")
    with written, fsops.temporary_tree(target) as temporary:
        for name in (RECIPE, READABLE_RECIPE, ENVIRONMENT, LEDGER, METRICS):
            if (run / name).exists():
                fsops.copy_file(run / name, temporary / name)
        progress("data")
        licences, kind = _copy_data(_recipes_of(line, [link for link, _ in links], recipe), temporary, data, root)
        _copy_analyses(run, temporary)
        draft = Release(
            format="weftrain-release",
            version=1,
            name=recipe.name,
            weftrain=version,
            weights_dtype=weights_dtype,
            licences=Licences(weights=licence, data=licences),
            data=kind,
            dataset_id=line.segments[-1].dataset_id,
            recipe_sha256=sha256_json(recipe_json),
            ledger=entries[-1]["hash"],
            links=tuple(link for link, _ in links),
            files={},
            root="0" * 64,
        )
        steps = {point.root: point.step for point in line.checkpoints}
        fsops.make_dirs(temporary / "revisions")
        for name, checkpoint_root in revisions(draft):
            progress(f"{name} (step {steps[checkpoint_root]})")
            _copy_checkpoint(run, temporary, steps[checkpoint_root], checkpoint_root)
            state, manifest = checkpoint.load(
                temporary / "checkpoints" / folder_name(steps[checkpoint_root]), verified=True
            )
            then = recorded_recipe(manifest["recipe"], folder_name(state.step)).recipe
            write_weights(temporary / "revisions" / name, checkpoint.Weights(state.tensors), then)
            fsops.write_bytes(
                temporary / "revisions" / name / CARD, revision_card(draft, name, state.step, then).encode()
            )
        fsops.write_bytes(temporary / CARD, card(draft, line, recipe).encode())
        progress("hashes")
        files = hash_files({name: temporary / name for name in sorted(files_below(temporary))})
        value = draft.model_dump(mode="json") | {"files": files}
        fsops.write_bytes(temporary / RELEASE, sealed(value))
        progress("verifying")
        try:
            check(temporary)
        except WeftrainError as error:
            raise ReleaseError(f"{str(error).replace(str(temporary), str(run))}: nothing was released") from error
        fsops.rename(temporary, target)
    return read_release(target)


def checked_licence(expression: str) -> str:
    """An SPDX licence expression in its canonical spelling. Raises ReleaseError for what is none."""
    try:
        return str(canonicalize_license_expression(expression))
    except InvalidLicenseExpression as error:
        raise ReleaseError(
            f"--licence {expression[:80]!r}: is not an SPDX licence expression ({error.args[0][:120]}): give an "
            "identifier of "
            "https://spdx.org/licenses, such as Apache-2.0, or LicenseRef-NAME for a licence that has none"
        ) from None


def _check_listed(run: Path, line: Lineage) -> None:
    """Raises ReleaseError where the run holds a newer checkpoint than its ledger: the release would end before the run
    does.
    """
    last = line.checkpoints[-1].step
    newer = sorted(step for step in checkpoint.step_folders(run / "checkpoints") if step > last)
    if newer:
        raise ReleaseError(
            f"{run}: holds a checkpoint of step {newer[0]}, and its ledger ends with that of step {last}: start the "
            "run again "
            "(`weftrain train`), which enters it or says what is wrong"
        )


def _copy_checkpoint(run: Path, target: Path, step: int, root: str) -> None:
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


def _recipes_of(line: Lineage, links: Sequence[Link], recipe: Recipe) -> list[Recipe]:
    """The recipes by which the links were trained, `recipe` first, which is the run's last: the others may read other
    sources.
    """
    first, stop = min(link.first_step for link in links), max(link.stop_step for link in links)
    found = {
        sha256_json(segment.recipe): segment.recipe for segment in line.segments if segment.trained_within(first, stop)
    }
    return [recipe, *(Recipe.from_record(one) for one in found.values())]


def _copy_data(
    recipes: Sequence[Recipe], target: Path, data: Literal["shards", "manifest"], root: Path | None
) -> tuple[dict[str, str], Any]:
    """Copy the dataset of each source of any recipe, or what describes it; source -> licence, and what was copied.

    All are looked for where the first recipe's are: an earlier one may name a folder that they were moved from.
    """
    if recipes[0].data.synthetic_rows is not None:
        return {}, "none"
    licences: dict[str, str] = {}
    for source in (source for recipe in recipes for source in recipe.data.sources):
        folder = (Path(recipes[0].data.root) if root is None else root) / source.path
        manifest = read_dataset_manifest(folder)
        known = licences.setdefault(source.name, manifest.corpus.licence)
        if known != manifest.corpus.licence:  # of another dataset, which the source of that name read before
            licences[source.path] = manifest.corpus.licence
        names = [
            DATA_MANIFEST,
            *(name for name in described_by(manifest) if name == TOKENIZER or (folder / name).exists()),
        ]
        if data == "shards":
            names += [shard.file for entry in manifest.sets.values() for shard in entry.shards]
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


def checked_name(name: str) -> str:
    """A relative path of plain ASCII segments, as the hub takes them. Raises ReleaseError for one that could lead out
    of its folder.
    """
    try:
        if not all(_SEGMENT.fullmatch(part) for part in checked_path(name).split("/")):
            raise ValueError(f"{name[:80]!a} has other characters than letters, digits and _ . -")
    except ValueError as error:
        raise ReleaseError(f"{error}: rename it, or do not trust the release") from error
    return name


def read_release(folder: Path) -> Release:
    """release.json of a folder, consistent in itself. No other file is looked at. Raises ReleaseError."""
    path = folder / RELEASE
    try:
        release = validated(Release, parse_sealed(read_plain(path, "release", follow=False), FORMAT, (VERSION,)))
    except (OSError, ValueError) as error:
        raise ReleaseError(f"{path}: {file_problem(error)}: name a release's folder, or fetch it again") from error
    for name in release.files:
        checked_name(name)
    return release


def revisions(release: Release) -> list[tuple[str, str]]:
    """(name of the revision, root of the checkpoint whose weights it holds), in the order of training: ckpt_000 is
    where link 1 begins.
    """
    roots = dict.fromkeys(root for link in release.links for root in (link.start, link.end) if root is not None)
    return [
        (f"ckpt_{number:03d}", root)
        for number, root in enumerate(roots, 0 if release.links[0].start is not None else 1)
    ]


def files_below(folder: Path) -> Iterator[str]:
    """Every file below a folder, as relative names. Raises ReleaseError for a link, a device or pipe, and folders too
    deep.
    """
    places = [""]
    while places:
        place = places.pop()
        if place.count("/") > _MAX_DEPTH:
            raise ReleaseError(
                f"{folder / place[:200]}..: lies more than {_MAX_DEPTH} folders deep, and nothing in a release does"
            )
        for entry in os.scandir(folder / place):
            name = f"{place}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                places.append(f"{name}/")
            elif stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                yield name
            else:
                raise ReleaseError(f"{entry.path}: is a symbolic link or no plain file: a release holds neither")


def hash_files(paths: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """name -> size and SHA-256, as many files at a time as there are CPUs: hashlib lets go of the interpreter's
    lock.
    """
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        hashes = dict(zip(paths, pool.map(fsops.sha256_file, paths.values()), strict=True))
    return {name: {"size": paths[name].stat().st_size, "sha256": sha256} for name, sha256 in hashes.items()}


def read_json(path: Path) -> Any:
    try:
        return parse_json(read_plain(path, "record", follow=False))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}: restore it from a copy") from error
