"""A prepared dataset as Croissant 1.0 describes datasets, so that programs which know no weftrain find its files.

`croissant.json` lies in the dataset's folder and follows from manifest.json alone: each file with its SHA-256, the
sources and the inputs as tables that `mlcroissant` loads, the settings of the preparation. Shards are HDF5, which
Croissant names and does not read: their layout is that of shard_format.py. Nothing here tells who made the dataset, or
when and where it was published, because the manifest does not.

https://docs.mlcommons.org/croissant/docs/croissant-spec-1.0.html
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.formats.dataset import CHAT_TEMPLATE, INPUTS, SOURCES, TOKENIZER
from weftrain.core.formats.dataset_manifest import DatasetManifest
from weftrain.core.formats.plain_file import read_plain

CROISSANT = "croissant.json"
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_LINES = "application/jsonlines"


def croissant(manifest: DatasetManifest) -> bytes:
    """The bytes of croissant.json: JSON-LD, the same for the same manifest."""
    sets = ", ".join(
        f"{name}: {entry.n_examples:,} rows, {entry.tokens:,} tokens, id {entry.id}"
        for name, entry in manifest.sets.items()
    )
    value: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": manifest.name,
        "description": f"Token ids of {manifest.corpus.description}, in rows for training language models. {sets}. "
        f"Licence of the corpus, as its manifest states it: {manifest.corpus.licence}.",
        "version": f"1.{len(manifest.parents)}.0",  # a dataset never changes; each that it grew from counts
        "distribution": _files(manifest),
        "recordSet": _tables(manifest),
        "rai:dataCollection": manifest.corpus.description,
        "rai:dataPreprocessingProtocol": [f"{key}: {value}" for key, value in sorted(manifest.preparation.items())],
    }
    if (licence := licence_url(manifest.corpus.licence)) is not None:
        value["license"] = licence
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def licence_url(stated: str) -> str | None:
    """A licence as Croissant names it: the page of a single one that SPDX lists, an expression of several as it is;
    None where the manifest states none that SPDX knows.
    """
    try:
        expression = str(canonicalize_license_expression(stated))
    except InvalidLicenseExpression:
        return None
    single = re.fullmatch(r"[A-Za-z0-9.-]+", expression) and not expression.startswith("LicenseRef-")
    return f"https://spdx.org/licenses/{expression}.html" if single else expression


def check_croissant(folder: Path, manifest: DatasetManifest) -> bool:
    """Whether croissant.json is there. Raises DataError where it is not the one that follows from the manifest."""
    path = folder / CROISSANT
    if not path.exists():
        return False
    try:
        same = read_plain(path, "dataset manifest") == croissant(manifest)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}: write it again with `weftrain data croissant {folder}`") from error
    if not same:
        raise DataError(
            f"{path}: is not the description that follows from manifest.json: write it again with `weftrain data "
            f"croissant {folder}`"
        )
    return True


def write_croissant(folder: Path, manifest: DatasetManifest) -> Path:
    """Write croissant.json beside the manifest. Raises OSError."""
    fsops.write_bytes(folder / CROISSANT, croissant(manifest))
    return folder / CROISSANT


def _files(manifest: DatasetManifest) -> list[dict[str, Any]]:
    found = [
        _file(shard.file, "application/x-hdf5", shard.sha256, f"{shard.num_bytes} B")
        for entry in manifest.sets.values()
        for shard in entry.shards
    ]
    found.append(_file(TOKENIZER, "application/json", manifest.tokenizer_sha256))
    found.append(_file(INPUTS, _LINES, manifest.inputs_sha256))
    if manifest.version > 2:  # which listed its sources in manifest.json
        found.append(_file(SOURCES, _LINES, manifest.sources_sha256))
    if manifest.chat_template_sha256 is not None:
        found.append(_file(CHAT_TEMPLATE, "text/plain", manifest.chat_template_sha256))
    return found


def _file(name: str, encoding: str, sha256: str, size: str | None = None) -> dict[str, Any]:
    value = {"@type": "cr:FileObject", "@id": name, "name": name, "contentUrl": name, "encodingFormat": encoding}
    return value | ({} if size is None else {"contentSize": size}) | {"sha256": sha256}


def _tables(manifest: DatasetManifest) -> list[dict[str, Any]]:
    found = [
        _table(
            "inputs",
            INPUTS,
            "The files that it was made of, in order; then those that were skipped, with the reason.",
            {"name": "sc:Text", "num_bytes": "sc:Integer"},
        )
    ]
    if manifest.version > 2:
        counts = dict.fromkeys(("documents", "num_bytes", "tokens"), "sc:Integer")
        words = "The sources that documents for training are counted under."
        found.append(_table("sources", SOURCES, words, {"name": "sc:Text", **counts}))
    return found


def _table(name: str, file: str, description: str, columns: dict[str, str]) -> dict[str, Any]:
    """A file of JSON lines as a table."""
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": description,
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"{name}/{column}",
                "name": f"{name}/{column}",
                "dataType": kind,
                "source": {"fileObject": {"@id": file}, "extract": {"column": column}},
            }
            for column, kind in columns.items()
        ],
    }
