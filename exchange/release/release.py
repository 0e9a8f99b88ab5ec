"""A release: one folder with which a third party can verify, replay, resume and evaluate a run. Its layout, and how
release.json is read.

    release.json       every file with size and SHA-256, the links, the licences; `root` is the SHA-256 of the rest
    model.sig          a Sigstore bundle with a signature of every file (bundle.py), where there is one
    signature.json     an Ed25519 signature of the root (signature.py), where there is one; these two are the only
                       files that release.json does not name
    README.md          the model card, written from the record
    recipe.json  recipe.yaml  environment.json  ledger.jsonl  metrics.jsonl
    checkpoints/step_NNNNNNNN/      full state, as the run saved it
    revisions/ckpt_NNN/             weights alone in a stated dtype, laid out for the Hugging Face hub, one revision for
                                    each checkpoint
    bom.spdx3.json     a bill of materials, written from the record (bom.py)
    data/<source>/                  the datasets or, with `data: manifest`, the hashes of all their shards
    analyses/                       evaluations, memorization

Link k runs from checkpoint k-1 to checkpoint k: over chunk k where the run has chunks, else from one checkpoint to the
next. Link 1 of a run from scratch begins at the seed. `build.py` writes a release, `verify.py` checks it, `replay.py`
trains a link of it again.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from weftrain.core.config import Recipe
from weftrain.core.errors import ReleaseError, RunFolderError, file_problem
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import parse_json, parse_sealed
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.formats.safe_names import checked_path
from weftrain.core.formats.strict_model import Count, Sha256, StrictModel, validated
from weftrain.core.order.timeline import Timeline, chunk_order
from weftrain.core.run.ledger_schema import ParentRelease
from weftrain.core.run.lineage import CheckpointEntry, Lineage

FORMAT = "weftrain-release"
VERSION = 1
RELEASE = "release.json"
SIGNATURE = "signature.json"
BUNDLE = "model.sig"
UNNAMED = frozenset({RELEASE, SIGNATURE, BUNDLE})  # the files that release.json does not name
CARD = "README.md"
CARD_MARK = "<!-- weftrain card 2 -->"  # ends a card whose every line follows from the record
ANALYSES = "analyses"
_MAX_DEPTH = 16  # folders in folders
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class ReleasedFile(StrictModel):
    size: Count
    sha256: Sha256


class Link(StrictModel):
    """The steps [first_step, stop_step) from the checkpoint with root `start` (None: the seed) to the one with root
    `end`. samples: the range of samples that they read.
    """

    link: Annotated[int, Field(gt=0)]
    chunk: Count | None
    first_step: Count
    stop_step: Count
    samples: Annotated[tuple[Count, ...], Field(min_length=2, max_length=2, strict=False)]
    start: Sha256 | None
    end: Sha256


class Licences(StrictModel):
    """The licence of the weights as the run's owner states it, and of each source as its manifest states it."""

    weights: Annotated[str, Field(min_length=1)]
    data: dict[str, str]


class Supply(StrictModel):
    """Who supplies a release, where it is downloaded and when it was made, in seconds of Unix time: what its maker
    states for those who need a whole bill of materials.
    """

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
    download_location: Annotated[str, Field(max_length=2000, pattern=r"^[a-z][a-z0-9+.-]*://[!-~]+$")]
    time: Count


class Release(StrictModel):
    """release.json."""

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
    parent: ParentRelease | None = None  # the release that the run began from (ancestry.py)
    supply: Supply | None = None
    links: Annotated[tuple[Link, ...], Field(strict=False)]
    files: dict[str, ReleasedFile]
    root: Sha256

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not stated, so that such a release has the bytes it had before."""
        later = ("parent", "supply")
        return {key: value for key, value in handler(self).items() if key not in later or value is not None}


def checked_name(name: str) -> str:
    """`name`, a relative path of plain ASCII segments as the hub takes them. Raises ReleaseError for any other."""
    try:
        if not all(_SEGMENT.fullmatch(part) for part in checked_path(name).split("/")):
            raise ValueError(f"{name[:80]!a} has other characters than letters, digits and _ . -")
    except ValueError as error:
        raise ReleaseError(f"{error}: rename it, or do not trust the release") from error
    return name


def read_release(folder: Path) -> Release:
    """release.json of a folder, checked against its own root; no other file is read. Raises ReleaseError."""
    path = folder / RELEASE
    try:
        release = validated(Release, parse_sealed(read_plain(path, "release", follow=False), FORMAT, (VERSION,)))
    except (OSError, ValueError) as error:
        raise ReleaseError(f"{path}: {file_problem(error)}: name a release's folder, or fetch it again") from error
    for name in release.files:
        checked_name(name)
    return release


def revisions(release: Release) -> list[tuple[str, str]]:
    """(name of the revision, root of the checkpoint whose weights it holds) in the order of training. ckpt_000 is the
    checkpoint that link 1 starts from, where there is one.
    """
    roots = dict.fromkeys(root for link in release.links for root in (link.start, link.end) if root is not None)
    return [
        (f"ckpt_{number:03d}", root)
        for number, root in enumerate(roots, 0 if release.links[0].start is not None else 1)
    ]


def files_below(folder: Path) -> Iterator[str]:
    """Every file below a folder as a relative name. Raises ReleaseError for links, devices, pipes and folders that are
    nested too deeply.
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


def hash_files(
    paths: Mapping[str, Path], progress: Callable[[int], None] = lambda num_bytes: None
) -> dict[str, dict[str, Any]]:
    """Name -> size and SHA-256, in as many threads as there are CPUs: hashlib releases the interpreter's lock.

    progress: called with the size of each file that was read, in bytes.
    """
    files: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        for (name, path), sha256 in zip(paths.items(), pool.map(fsops.sha256_file, paths.values()), strict=True):
            files[name] = {"size": path.stat().st_size, "sha256": sha256}
            progress(files[name]["size"])
    return files


def read_json(path: Path) -> Any:
    try:
        return parse_json(read_plain(path, "record", follow=False))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}: restore it from a copy") from error


def links_of(line: Lineage, recipe: Recipe) -> list[tuple[Link, CheckpointEntry]]:
    """The links of a run, each with the checkpoint that it ends in: one for each chunk where the run has chunks, else
    one for each checkpoint. Checkpoints that were removed are passed over, so that a link may hold several chunks, and
    then names none. Raises ReleaseError where a chunk has no checkpoint at its end.
    """
    checkpoints: list[CheckpointEntry | None] = [None] if _starts_from_seed(line) else []
    recorded = {point.step for point in line.checkpoints}
    chunk_steps, order = None, None
    if recipe.data.chunks is not None:
        chunk_steps = recipe.schedule.steps // recipe.data.chunks
        order = chunk_order(recipe.data, recipe.schedule.steps, recipe.batch.global_batch_size)
    for checkpoint in (point for point in line.checkpoints if point.root not in line.removed):
        if checkpoint.step and (chunk_steps is None or checkpoint.step % chunk_steps == 0):
            checkpoints.append(checkpoint)
        elif checkpoint.step == line.segments[0].first_step:
            checkpoints = [checkpoint]
    timelines: dict[int, Timeline] = {}

    def timeline_at(step: int) -> Timeline:
        segment = line.segment_at(step)
        if segment.entry not in timelines:
            timelines[segment.entry] = Recipe.from_record(segment.recipe).timeline
        return timelines[segment.entry]

    links = []
    for number, (before, after) in enumerate(pairwise(checkpoints), 1):
        assert after is not None
        first = 0 if before is None else before.step
        chunk = None
        if order is not None and chunk_steps is not None:
            for end in range(first + chunk_steps, after.step, chunk_steps):
                if end not in recorded:
                    place = order.chunk_at(end // chunk_steps - 1)
                    raise ReleaseError(f"the ledger has no checkpoint at the end of chunk {place} (step {end})")
            if after.step - first == chunk_steps:
                chunk = order.chunk_at(first // chunk_steps)
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


def _starts_from_seed(line: Lineage) -> bool:
    """Whether the run began from its seed, so that its first link starts from no checkpoint."""
    return bool(line.segments) and line.segments[0].first_step == 0 and line.segments[0].parent is None
