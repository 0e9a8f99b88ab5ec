"""Checks a release: every byte, and every claim against all others.

What a reader would get wrong: whoever edits a release can make every hash again. What follows from something else in it
(derived.py) then still has to agree, and the claims that nothing here covers are listed as such (claims.py): that the
states were trained as it says, only `exchange/release/replay.py` shows, and whose it is, a signature.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weftrain.core import checkpoint
from weftrain.core.config import Recipe
from weftrain.core.errors import ReleaseError
from weftrain.core.formats.canonical import sha256_json
from weftrain.core.formats.checkpoint_manifest import folder_name
from weftrain.core.formats.dataset import read_dataset_manifest
from weftrain.core.formats.reference_file import read_reference, reference_root, training_id
from weftrain.core.formats.shard_set import open_set
from weftrain.core.recipe_file import recorded_recipe
from weftrain.core.run.ledger import read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import Lineage, going_back, lineage
from weftrain.core.run.metrics import METRICS, Digest, effective_records
from weftrain.core.run.metrics_lines import MEASURED
from weftrain.core.run.run_folder import RECIPE
from weftrain.core.run.scores import SCORE, score_sha256
from weftrain.exchange.huggingface.config import layout_of
from weftrain.exchange.huggingface.files import check_no_other_code
from weftrain.exchange.huggingface.folder import HuggingFaceWeights
from weftrain.exchange.layouts import foreign_tensors, import_weights
from weftrain.exchange.release import derived
from weftrain.exchange.release.ancestry import check_parent
from weftrain.exchange.release.bundle import Signer, Trust, check_bundle
from weftrain.exchange.release.claims import HELD_OUT, LOSSES, SCORES, STATES, TEXTS, Claim
from weftrain.exchange.release.described import check_described
from weftrain.exchange.release.notes import Notes
from weftrain.exchange.release.reading import WhatWasRead, read_once
from weftrain.exchange.release.release import (
    ANALYSES,
    BUNDLE,
    RELEASE,
    SIGNATURE,
    UNNAMED,
    Release,
    checked_name,
    files_below,
    links_of,
    read_json,
    read_release,
    revisions,
)
from weftrain.exchange.release.scores import check_scores
from weftrain.exchange.release.signature import check_signature


@dataclass(frozen=True)
class Verified:
    """A release whose every byte was read. signer: the public key of a valid signature.json, in hexadecimal. bundle:
    who signed model.sig. None: it is not there.
    """

    release: Release
    lineage: Lineage
    signer: str | None
    bundle: Signer | None
    num_bytes: int
    claims: tuple[Claim, ...]


# The model cards that follow from a verified record: file -> text.
WriteCards = Callable[[Release, Lineage, Mapping[str, Recipe]], Mapping[str, str]]


def verify(
    folder: Path,
    *,
    cards: WriteCards,
    signature: bool = True,
    trust: Trust | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    notes: Notes | None = None,
) -> Verified:
    """Read every byte of a release and check every claim in it against the others. Raises ReleaseError and its kin,
    naming the file.

    cards: writes the model cards again; its recipes are by the checkpoints' roots. signature: whether one that is
    there is checked too; not where it is about to be made again. trust: whose signature the reader knows. progress:
    called with the bytes read and all that will be. notes: what an interrupted reading of this release has found
    (notes.py).
    """
    release = read_release(folder)
    present = set(files_below(folder)) - UNNAMED
    for name in sorted(present ^ release.files.keys()):
        what = "is missing" if name in release.files else "does not belong there: release.json does not name it"
        raise ReleaseError(f"{folder / name}: {what}: fetch the release again, and verify before use")
    found = read_once(folder, release, progress, notes)
    manifests = found.manifests
    line = _check_record(folder, release, manifests)
    _check_data(folder, release, manifests)
    recipes = {
        root: recorded_recipe(manifest["recipe"], f"checkpoint of step {manifest['step']}").recipe
        for root, manifest in manifests.items()
    }
    _check_revisions(folder, release, recipes, found)
    steps = {root: manifest["step"] for root, manifest in manifests.items()}
    signer, bundle = _signers(folder, release, trust) if signature else (None, None)
    claims = (
        *_covered_by_hashes(release, manifests, signer, bundle),
        *check_parent(folder, release, line),
        *derived.check_header(folder, line, release, list(recipes.values())),
        *derived.check_counts(folder, line, manifests),
        *derived.check_length(line, release),
        *derived.check_lines(folder, line, release, derived.tokens_before(line, manifests)),
        *derived.check_beside(folder, line, read_json(folder / RECIPE)),
        *derived.check_beside_weights(folder, release, steps, recipes),
        *derived.check_cards(folder, cards(release, line, recipes)),
        *check_described(folder, release, line, list(recipes.values())),
        *derived.check_apart(folder, release, list(recipes.values())),
        *check_scores(folder, line, manifests),
        *_left_to_replay(folder, release),
    )
    return Verified(release, line, signer, bundle, sum(entry.size for entry in release.files.values()), claims)


def _covered_by_hashes(
    release: Release, manifests: Mapping[str, Mapping[str, Any]], signer: str | None, bundle: Signer | None
) -> Iterator[Claim]:
    yield Claim("every file", "hash", f"{len(release.files):,} files, named with their SHA-256 by release.json")
    if bundle is not None and bundle.known:
        yield Claim("who made it", "signature", f"the {bundle.name}, which leads to what you named")
    elif signer is None and bundle is not None:
        yield Claim("who made it", "not covered", f"signed by an unknown {bundle.name}: name what you trust")
    elif signer is None:
        yield Claim("who made it", "not covered", "not signed: whoever edits it can make every hash again")
    else:
        yield Claim("who made it", "signature", f"the key {signer[:16]}..; whose it is must be known from elsewhere")
    yield Claim("chain of checkpoints", "hash", f"{len(manifests)} checkpoints, each names the one before it")
    if release.data == "none":
        yield Claim("training data", "derivation", "synthetic rows, from the seed")
    elif release.data == "shards":
        yield Claim("training data", "hash", f"every shard of the dataset {release.dataset_id[:12]} of the checkpoints")
        yield Claim(TEXTS, "not covered", "the texts are not here: --inputs prepares them again and compares")
    else:
        yield Claim("training data", "not covered", "only its hashes are here: give the shards to `replay --data-root`")
    yield Claim("weights of the revisions", "derivation", f"those of the checkpoints in {release.weights_dtype}")


def _signers(folder: Path, release: Release, trust: Trust | None) -> tuple[str | None, Signer | None]:
    """The key of signature.json, and who signed model.sig."""
    signer = check_signature(folder / SIGNATURE, release.root) if (folder / SIGNATURE).exists() else None
    return signer, check_bundle(folder, release, trust or Trust()) if (folder / BUNDLE).exists() else None


def _left_to_replay(folder: Path, release: Release) -> Iterator[Claim]:
    links = f"{len(release.links)} links: `weftrain replay` trains them again"
    yield Claim(STATES, "not covered", links)
    yield Claim(LOSSES, "not covered", links)
    yield Claim(HELD_OUT, "not covered", links)
    if (folder / ANALYSES).exists():
        yield Claim(SCORES, "not covered", "bound to their checkpoints by hashes; measure them again to compare")


def _check_record(folder: Path, release: Release, manifests: Mapping[str, dict[str, Any]]) -> Lineage:
    """Ledger, links, checkpoints, metrics and recipe tell the same story."""
    entries = read_ledger(folder / LEDGER)
    if not entries or entries[-1]["hash"] != release.ledger:
        raise ReleaseError(
            f"{folder / LEDGER}: does not end in the line that release.json names: lines were removed or added"
        )
    line = lineage(entries)
    if not line.segments:
        raise ReleaseError(f"{folder / LEDGER}: has no line of kind start: lines were removed")
    recipe = read_json(folder / RECIPE)
    if sha256_json(recipe) != release.recipe_sha256 or sha256_json(recipe) != sha256_json(line.segments[-1].recipe):
        raise ReleaseError(f"{folder / RECIPE}: is not the recipe of the ledger's last segment: one was altered")
    expected = tuple(link for link, _ in links_of(line, recorded_recipe(recipe, str(folder / RECIPE)).recipe))
    if release.links != expected:
        raise ReleaseError(
            f"{folder / RELEASE}: its {len(release.links)} links are not the {len(expected)} that follow from the "
            "ledger"
        )
    points = {point.root: point for point in line.checkpoints}
    wanted = {root for link in release.links for root in (link.start, link.end) if root is not None}
    for root in sorted(wanted ^ manifests.keys()):
        what = "is missing" if root in wanted else "is on no link"
        raise ReleaseError(f"{folder / 'checkpoints'}: the checkpoint {root[:12]} {what}: the chain of links is broken")
    for root, manifest in manifests.items():
        point, step = points[root], manifest["step"]
        try:
            segment = line.segment_of(step)
        except ValueError as error:
            raise ReleaseError(
                f"{folder / LEDGER}: {error}, and a checkpoint of step {step} is there: lines were removed"
            ) from error
        told = (manifest["parent"], step, manifest["recipe_sha256"], manifest["dataset_id"])
        if told != (point.parent, point.step, sha256_json(segment.recipe), segment.dataset_id):
            raise ReleaseError(
                f"{folder / 'checkpoints' / folder_name(step)}: parent, step, recipe or dataset are not the ledger's: "
                "one was altered"
            )
    for before, after in pairwise(line.checkpoints):
        if after.parent != before.root:
            raise ReleaseError(
                f"{folder / LEDGER}: the checkpoint of step {after.step} does not follow that of step {before.step}: a "
                "link was removed"
            )
    _check_metrics(folder, line)
    return line


def _check_metrics(folder: Path, line: Lineage) -> None:
    """The measurements that each checkpoint covers, (metrics_after, step], hash to what the ledger says. One pass over
    the file.
    """
    ends, before = [point.step for point in line.checkpoints], 0
    for point in line.checkpoints:
        if point.metrics_after < before:
            raise ReleaseError(
                f"{folder / LEDGER}: the measurements of step {point.step} begin before step {before}: one line was "
                "altered"
            )
        before = point.step
    found, scores = [Digest() for _ in ends], dict(line.scores)
    for record in effective_records(folder):
        if record["kind"] == SCORE and scores.pop((record["step"], record["set"]), None) != score_sha256(record):
            raise ReleaseError(
                f"{folder / METRICS}: the score {record['set']} of step {record['step']} is not the ledger's: one was "
                "altered: restore the file from a copy"
            )
        if record["kind"] in MEASURED:
            place = bisect_left(ends, record["step"])
            if place < len(ends) and line.checkpoints[place].metrics_after < record["step"]:
                found[place].add(record)
    for step, name in scores:
        raise ReleaseError(f"{folder / METRICS}: lacks the score {name} of step {step}: restore the file from a copy")
    for point, digest in zip(line.checkpoints, found, strict=True):
        if digest.hexdigest() != point.metrics_sha256:
            raise ReleaseError(
                f"{folder / METRICS}: the measurements up to step {point.step} are not those of the ledger: one was "
                "altered or lost: "
                f"restore the file from a copy; for a run also: {going_back(point.metrics_after)} and train on"
            )


def _check_data(folder: Path, release: Release, manifests: Mapping[str, dict[str, Any]]) -> None:
    """The datasets are those that the checkpoints name."""
    if release.data == "none":
        return
    for manifest in manifests.values():
        recipe = recorded_recipe(manifest["recipe"], f"checkpoint of step {manifest['step']}").recipe
        ids = [
            _train_id(folder / "data" / checked_name(source.path), release.data == "shards")
            for source in recipe.data.sources
        ]
        found = training_id(ids, _references(folder, recipe, release.data == "shards"))
        if found != manifest["dataset_id"]:
            raise ReleaseError(
                f"{folder / 'data'}: holds dataset {found[:12]}, step {manifest['step']} was trained on "
                f"{manifest['dataset_id'][:12]}: "
                "restore that dataset; one that takes its place in a run needs a path of its own in data.sources"
            )


def _references(folder: Path, recipe: Recipe, whole: bool) -> list[str]:
    """The roots of the references that pairs were held against; `whole`: their numbers are there and are read."""
    name, roots = recipe.objective.reference, list[str]()
    if name is None:
        return []
    for source in recipe.data.sources:
        place = folder / "data" / checked_name(source.path)
        if whole:
            roots.append(read_reference(place, name, read_dataset_manifest(place)).root)
        else:
            roots.append(reference_root(place, name))
    return roots


def _same(found: Tensor, wanted: Tensor, merged: bool) -> bool:
    """Bit for bit; where an adapter was added to a weight, within the rounding of that sum on another machine."""
    if not merged or torch.equal(found, wanted):
        return torch.equal(found, wanted)
    return found.dtype == wanted.dtype and torch.allclose(
        found.float(), wanted.float(), rtol=2 * torch.finfo(wanted.dtype).eps, atol=1e-12
    )


def _check_revisions(folder: Path, release: Release, recipes: Mapping[str, Recipe], what: WhatWasRead) -> None:
    """The weights for the hub are the checkpoints' own, bit for bit after the cast to the stated dtype; and no code but
    ours. Those whose hashes do not say so are read once more (reading.py).
    """
    steps = {link.end: link.stop_step for link in release.links} | {
        link.start: link.first_step for link in release.links if link.start
    }
    for name, root in revisions(release):
        place, home = folder / "revisions" / name, f"checkpoints/{folder_name(steps[root])}"
        recipe, config = recipes[root], recipes[root].model
        check_no_other_code(place, {path.name for path in place.iterdir()}, config)
        published = HuggingFaceWeights(place)
        equal = _equal_by_hash(release, what, what.manifests[root], (home, f"revisions/{name}"), recipe, published)
        state, manifest = checkpoint.load(folder / home, verified=True)
        weights = checkpoint.Weights(state.tensors, recipe.tuning.lora)
        for key, tensor in import_weights(published, config, layout_of(config), equal):
            merged = recipe.tuning.lora is not None and f"weights/{key.removesuffix('.weight')}.lora_a" in state.tensors
            if not _same(tensor, weights[key].to(getattr(torch, release.weights_dtype)), merged):
                raise ReleaseError(
                    f"{place}: weight '{key}' is not that of step {manifest['step']} in {release.weights_dtype}: one "
                    "was altered"
                )


def _equal_by_hash(
    release: Release,
    what: WhatWasRead,
    manifest: Mapping[str, Any],
    places: tuple[str, str],
    recipe: Recipe,
    published: HuggingFaceWeights,
) -> set[str]:
    """The tensors of a revision that hold one parameter as it is, with the hash of the checkpoint's in this dtype.

    places: of the checkpoint and of the revision.
    """
    if recipe.tuning.lora is not None:
        return set()
    wanted = getattr(torch, release.weights_dtype)
    found = {
        name: sha256 for file in published.files for name, sha256 in what.files[f"{places[1]}/{file}"].parts.items()
    }
    equal = set()
    for foreign in foreign_tensors(recipe.model, layout_of(recipe.model)):
        names = [foreign.name, *(copy for copy in foreign.copies if copy in published)]
        if foreign.is_as_canonical and all(
            name in published
            and published.meta(name).dtype == wanted
            and tuple(published.meta(name).shape) == foreign.shape
            for name in names
        ):
            sha256 = what.weight_hash(places[0], manifest, foreign.parameters[0], release.weights_dtype)
            if sha256 is not None and all(found[name] == sha256 for name in names):
                equal.add(foreign.name)
    return equal


def _train_id(folder: Path, whole: bool) -> str:
    if whole:
        open_set(folder, "train")  # every shard's digest is the manifest's
    return read_dataset_manifest(folder).train.id
