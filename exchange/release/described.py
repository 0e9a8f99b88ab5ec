"""The files of a release that describe it in other programs' forms: each dataset as Croissant, the whole as an SPDX
bill of materials. Both follow from the rest, and verify makes them again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from weftrain.core.config import Recipe
from weftrain.core.errors import ReleaseError
from weftrain.core.formats import fsops
from weftrain.core.formats.croissant import CROISSANT, croissant
from weftrain.core.formats.dataset import MANIFEST, described_by, read_dataset_manifest
from weftrain.core.formats.dataset_manifest import DatasetManifest
from weftrain.core.formats.reference_file import reference_files
from weftrain.core.recipe_file import recorded_recipe
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import Lineage
from weftrain.exchange.release.bom import BOM, bill_of_materials
from weftrain.exchange.release.claims import Claim
from weftrain.exchange.release.release import Release


def write_croissants(folder: Path) -> None:
    """Write croissant.json of every dataset below data/ of a release that is being built. Raises DataError, OSError."""
    for path, manifest in _datasets(folder, (one.relative_to(folder).as_posix() for one in folder.rglob(MANIFEST))):
        fsops.write_bytes(folder / "data" / path / CROISSANT, croissant(manifest))


def bom_of(folder: Path, release: Release, line: Lineage, files: Mapping[str, str]) -> bytes:
    """The bytes of bom.spdx3.json. files: those of the release with their SHA-256; the bill's own is left out."""
    recipe = recorded_recipe(dict(line.segments[-1].recipe), LEDGER).recipe
    others = {name: sha256 for name, sha256 in files.items() if name != BOM}
    return bill_of_materials(release, line, recipe, dict(_datasets(folder, others)), others)


def check_described(folder: Path, release: Release, line: Lineage, recipes: Sequence[Recipe]) -> Iterator[Claim]:
    """The descriptions are those that follow, and data/ holds nothing but datasets. One that is missing is no error:
    releases of earlier versions have none.

    No file is read: release.json has their hashes, which were compared with every byte. Raises ReleaseError.
    """
    datasets = _datasets(folder, release.files)
    _check_files(folder, release, dict(datasets), recipes)
    there = [path for path, _ in datasets if f"data/{path}/{CROISSANT}" in release.files]
    for path, manifest in datasets:
        if path in there:
            _check(folder, release, f"data/{path}/{CROISSANT}", croissant(manifest), "the dataset's manifest")
    name = "descriptions of the datasets"
    if len(there) == len(datasets):
        if datasets:
            yield Claim(name, "derivation", f"{CROISSANT} of {len(there)} datasets, from their manifests")
    else:
        lacking = next(path for path, _ in datasets if path not in there)
        yield Claim(name, "not covered", f"data/{lacking} has no {CROISSANT}: its manifest is there")
    if BOM in release.files:
        files = {name: entry.sha256 for name, entry in release.files.items()}
        _check(folder, release, BOM, bom_of(folder, release, line, files), "the rest of the release")
        yield Claim("bill of materials", "derivation", f"{BOM} names {len(files) - 1:,} files, from the rest")
    else:
        yield Claim("bill of materials", "not covered", f"there is no {BOM}; release.json names every file")


def _check_files(
    folder: Path, release: Release, datasets: Mapping[str, DatasetManifest], recipes: Sequence[Recipe]
) -> None:
    """No file below data/ is anything but a dataset's. Raises ReleaseError."""
    references = [recipe.objective.reference for recipe in recipes if recipe.objective.reference is not None]
    known = set()
    for path, manifest in datasets.items():
        shards = (shard.file for entry in manifest.sets.values() for shard in entry.shards)
        numbers = (name for reference in references for name in reference_files(reference))
        known |= {f"data/{path}/{name}" for name in (MANIFEST, CROISSANT, *described_by(manifest), *shards, *numbers)}
    for name in release.files:
        if name.startswith("data/") and name not in known:
            raise ReleaseError(f"{folder / name}: is none of the files of a dataset: do not trust the release")


def _check(folder: Path, release: Release, name: str, expected: bytes, source: str) -> None:
    if hashlib.sha256(expected).hexdigest() != release.files[name].sha256:
        raise ReleaseError(f"{folder / name}: is not the description that follows from {source}: one was altered")


def _datasets(folder: Path, names: Iterable[str]) -> list[tuple[str, DatasetManifest]]:
    """Path below data/ and manifest of each dataset of a release, whose files have these names."""
    paths = sorted(name[len("data/") : -len(f"/{MANIFEST}")] for name in names if _is_manifest(name))
    return [(path, read_dataset_manifest(folder / "data" / path)) for path in paths]


def _is_manifest(name: str) -> bool:
    return name.startswith("data/") and name.endswith(f"/{MANIFEST}")
