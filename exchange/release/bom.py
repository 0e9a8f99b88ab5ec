"""The bill of materials of a release in SPDX 3.0.1: the model, its datasets, the software that trained it, their
licences, and every file with its SHA-256.

`bom.spdx3.json` is JSON-LD and follows from the rest of the release (described.py): nothing in it is known from
elsewhere. Where the release states its supplier (`weftrain release --supplier`), the bill conforms to the AI profile,
which asks for that, a place of download, a time of release, and a declared and a concluded licence; nobody concluded
one, and it says so. It uses the classes of the Dataset profile and does not claim conformance to it, because that asks
who originated each dataset and when, which no dataset records.

https://spdx.github.io/spdx-spec/v3.0.1/
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from weftrain.core.config import Recipe
from weftrain.core.errors import ReleaseError
from weftrain.core.formats.canonical import canonical_json
from weftrain.core.formats.dataset_manifest import DatasetManifest
from weftrain.core.model_config import in_words
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import Lineage
from weftrain.exchange.release.release import RELEASE, Release, Supply, revisions

BOM = "bom.spdx3.json"
_CONTEXT = "https://spdx.org/rdf/3.0.1/spdx-context.jsonld"
_SPEC = "3.0.1"
_CREATION = "_:creation"
_NO_ASSERTION = "expandedlicensing_NoAssertionLicense"
_SOFTWARE = ("weftrain", "python", "torch", "cuda", "cudnn", "cublas", "nccl", "driver", "mkl", "onednn")
_HYPERPARAMETERS = ("model", "optimizer", "schedule", "batch", "precision", "objective")  # sections of the recipe
_Element = dict[str, Any]


def bill_of_materials(
    release: Release,
    line: Lineage,
    recipe: Recipe,
    datasets: Mapping[str, DatasetManifest],
    files: Mapping[str, str],
) -> bytes:
    """The bytes of bom.spdx3.json: canonical JSON, the same for the same release.

    recipe: the ledger's last. datasets: by their paths below data/. files: every other file of the release but
    release.json and signatures, with its SHA-256. Raises ReleaseError for a ledger that ends outside of any calendar.
    """
    base = f"urn:weftrain:release:{release.ledger}"  # its root would depend on this file
    model, tool = f"{base}/model", f"{base}/weftrain"
    elements: list[_Element] = [
        {"type": "SoftwareAgent", "spdxId": f"{base}/agent", "name": f"weftrain {release.weftrain}"},
        {"type": "Tool", "spdxId": tool, "name": f"weftrain {release.weftrain}"},
        _model(model, release, line, recipe) | _supplied(base, release.supply),
        *_licence(base, "weights", release.licences.weights, model),
        *_supplier(base, model, release.supply),
        *_datasets(base, datasets),
        *_software(base, model, line),
        *_files(base, model, datasets, files),
    ]
    if datasets:
        elements.append(_relation(base, "trained-on", model, "trainedOn", _packages(base, datasets)))
        if held := [path for path, manifest in datasets.items() if manifest.heldout is not None]:
            elements.append(_relation(base, "tested-on", model, "testedOn", _packages(base, held)))
    ids = sorted(element["spdxId"] for element in elements)
    profiles = ["core", "software", "simpleLicensing"]
    if release.supply is not None:
        profiles.append("ai")
    bom: _Element = {"type": "software_Sbom", "spdxId": f"{base}/bom", "rootElement": [model], "element": ids}
    document: _Element = {
        "type": "SpdxDocument",
        "spdxId": f"{base}/document",
        "name": release.name,
        "rootElement": [bom["spdxId"]],
        "element": [*ids, bom["spdxId"]],
    }
    creation = {
        "type": "CreationInfo",
        "@id": _CREATION,
        "specVersion": _SPEC,
        "created": _time(line.ended, f"{LEDGER}: its last line was written at"),
        "createdBy": [f"{base}/agent"],
        "createdUsing": [tool],
    }
    for collection in (bom, document):
        collection["profileConformance"] = profiles
    graph = [creation, *({**element, "creationInfo": _CREATION} for element in (document, bom, *elements))]
    return canonical_json({"@context": _CONTEXT, "@graph": graph}) + b"\n"


def _time(seconds: float, what: str) -> str:
    try:
        return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ").zfill(20)
    except (ValueError, OverflowError, OSError) as error:
        raise ReleaseError(f"{what} {seconds:g} s, which is no time: altered") from error


def _model(spdx_id: str, release: Release, line: Lineage, recipe: Recipe) -> _Element:
    done, tokens = release.links[-1].stop_step, line.tokens_read(release.links[-1].stop_step)
    return {
        "type": "ai_AIPackage",
        "spdxId": spdx_id,
        "name": release.name,
        "description": recipe.description,
        "software_packageVersion": revisions(release)[-1][0],
        "software_primaryPurpose": "model",
        "ai_typeOfModel": [in_words(recipe.model)],
        "ai_informationAboutTraining": f"{done:,} steps and {tokens:,} tokens in {len(release.links)} links, by the "
        f"recipe {release.recipe_sha256}, as {LEDGER} records",
        "ai_hyperparameter": [
            {"type": "DictionaryEntry", "key": key, "value": value} for key, value in _hyperparameters(recipe)
        ],
    }


def _supplied(base: str, supply: Supply | None) -> _Element:
    """What the AI profile requires of a model besides its name, version, purpose and licences."""
    if supply is None:
        return {}
    return {
        "suppliedBy": f"{base}/supplier",
        "software_downloadLocation": supply.download_location,
        "releaseTime": _time(supply.time, f"{RELEASE}: was made at"),
    }


def _supplier(base: str, model: str, supply: Supply | None) -> Iterator[_Element]:
    """The supplier, and the concluded licence, which nobody has concluded."""
    if supply is not None:
        yield {"type": "Agent", "spdxId": f"{base}/supplier", "name": supply.name}
        yield _relation(base, "concluded-licence", model, "hasConcludedLicense", [_NO_ASSERTION])


def _hyperparameters(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The settings of a recipe as dotted keys and texts."""
    tree = recipe.model_dump(mode="json")
    yield "seed", str(recipe.seed)
    yield "data.sequence_length", str(recipe.data.sequence_length)
    for section in _HYPERPARAMETERS:
        yield from _leaves(section, tree[section])


def _leaves(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}", item)
    elif value is not None:
        yield key, value if isinstance(value, str) else canonical_json(value).decode()


def _datasets(base: str, datasets: Mapping[str, DatasetManifest]) -> Iterator[_Element]:
    for path, manifest in sorted(datasets.items()):
        spdx_id = _package(base, path)
        yield {
            "type": "dataset_DatasetPackage",
            "spdxId": spdx_id,
            "name": manifest.name,
            "software_packageVersion": manifest.train.id,
            "software_primaryPurpose": "data",
            "dataset_datasetType": ["text"],
            "dataset_datasetSize": sum(one.num_bytes for entry in manifest.sets.values() for one in entry.shards),
            "dataset_dataCollectionProcess": manifest.corpus.description,
            "dataset_dataPreprocessing": [f"{key}: {value}" for key, value in sorted(manifest.preparation.items())],
        }
        yield from _licence(base, f"data/{path}", manifest.corpus.licence, spdx_id)


def _software(base: str, model: str, line: Lineage) -> Iterator[_Element]:
    """What the last start of the run was computed with, as its fingerprint names it."""
    told = line.segments[-1].environment
    ids = []
    for name in _SOFTWARE:
        if isinstance(version := told.get(name), (str, int, float)) and not isinstance(version, bool):
            ids.append(f"{base}/software/{name}")
            yield {
                "type": "software_Package",
                "spdxId": ids[-1],
                "name": name,
                "software_packageVersion": str(version),
            }
    if ids:
        relation = _relation(base, "software", model, "dependsOn", ids)
        yield relation | {"type": "LifecycleScopedRelationship", "scope": "build"}


def _files(
    base: str, model: str, datasets: Mapping[str, DatasetManifest], files: Mapping[str, str]
) -> Iterator[_Element]:
    contained: dict[str, list[str]] = {}
    for name, sha256 in sorted(files.items()):
        spdx_id = f"{base}/file/{name}"
        owner = next((path for path in datasets if name.startswith(f"data/{path}/")), None)
        contained.setdefault(model if owner is None else _package(base, owner), []).append(spdx_id)
        yield {
            "type": "software_File",
            "spdxId": spdx_id,
            "name": f"./{name}",
            "verifiedUsing": [{"type": "Hash", "algorithm": "sha256", "hashValue": sha256}],
        }
    for number, (owner, ids) in enumerate(contained.items(), 1):
        yield _relation(base, f"contains-{number}", owner, "contains", ids)


def _licence(base: str, name: str, stated: str, of: str) -> Iterator[_Element]:
    """The licence that is stated of an element; what is no SPDX expression is a text of its own."""
    spdx_id = f"{base}/licence/{name}"
    element: _Element = {"type": "simplelicensing_LicenseExpression", "spdxId": spdx_id}
    try:
        expression = str(canonicalize_license_expression(stated))
        yield element | {"simplelicensing_licenseExpression": expression}
    except InvalidLicenseExpression:
        reference = f"LicenseRef-{re.sub('[^A-Za-z0-9.-]', '-', name)}"
        yield {
            "type": "simplelicensing_SimpleLicensingText",
            "spdxId": f"{spdx_id}/text",
            "simplelicensing_licenseText": stated,
        }
        own = [{"type": "DictionaryEntry", "key": reference, "value": f"{spdx_id}/text"}]
        yield element | {
            "simplelicensing_licenseExpression": reference,
            "simplelicensing_customIdToUri": own,
        }
    yield _relation(base, f"licence-{name}", of, "hasDeclaredLicense", [spdx_id])


def _relation(base: str, name: str, source: str, kind: str, targets: Iterable[str]) -> _Element:
    return {
        "type": "Relationship",
        "spdxId": f"{base}/relationship/{name}",
        "from": source,
        "relationshipType": kind,
        "to": sorted(targets),
    }


def _package(base: str, path: str) -> str:
    return f"{base}/data/{path}"


def _packages(base: str, paths: Iterable[str]) -> list[str]:
    return [_package(base, path) for path in paths]
