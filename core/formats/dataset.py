"""A prepared dataset: a folder with `manifest.json`, `tokenizer.json`, `inputs.jsonl` (the files it was made of, a line
each), `sources.jsonl` (what its documents are counted as, a line each) and the shards of its sets, `train/` and perhaps
`heldout/`.

The dataset id is a Merkle root over the shards' `digest`s, not over their files' SHA-256. A digest commits to every
token, document and mask, and is checked whenever a shard is opened, in milliseconds; so a shard swapped for another
valid one is refused before step 0, which file hashes would need a day for at full scale. The SHA-256 are in the
manifest too, for `sha256sum`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json, sha256_json
from weftrain.core.formats.dataset_manifest import (
    DatasetManifest,
    InputEntry,
    SourceEntry,
    merkle_root,
)
from weftrain.core.formats.line_table import Lines, LineTable, WrittenLines, write_lines
from weftrain.core.formats.plain_file import read_plain, real_path
from weftrain.core.formats.shard_format import PADDING

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
INPUTS = "inputs.jsonl"
SOURCES = "sources.jsonl"
FAILURES = "failures.jsonl"  # what could not be read, where anything could not
VERSION: Literal[3] = 3
RESTORE = "put it back, or remove the dataset and prepare it again"


def write_dataset_manifest(folder: Path, manifest: DatasetManifest) -> None:
    """Write manifest.json, as canonical JSON with its own hash, `root`. Raises OSError."""
    assert manifest.version == VERSION, "a manifest of an older version stays as it is"
    value = manifest.model_dump(mode="json")
    fsops.write_bytes(folder / MANIFEST, canonical_json(value | {"root": sha256_json(value)}) + b"\n")


def read_dataset_manifest(folder: Path) -> DatasetManifest:
    """The folder's manifest, checked in itself and against tokenizer.json. Raises DataError."""
    path = folder / MANIFEST
    try:
        value = _manifest_value(folder)
        manifest = DatasetManifest.model_validate(_with_counted_sources(value) if value.get("version") == 2 else value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))[:80]
        raise DataError(f"{path}: key '{key}': {first['msg']}; remove the dataset and prepare it again") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}; remove the dataset and prepare it again") from error
    tokenizer_sha256 = hashlib.sha256(read_tokenizer(folder)).hexdigest()
    if tokenizer_sha256 != manifest.tokenizer_sha256:
        raise DataError(
            f"{folder / TOKENIZER}: SHA-256 {tokenizer_sha256[:12]}… is not the manifest's "
            f"{manifest.tokenizer_sha256[:12]}…: the shards "
            "were made with another tokenizer; put that file back, or remove the dataset and prepare it again"
        )
    return manifest


def manifest_root(folder: Path) -> str:
    """The SHA-256 that manifest.json holds of itself, checked: it commits to all that the dataset is. Raises
    DataError.
    """
    try:
        return sha256_json(_manifest_value(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST}: {error}; remove the dataset and prepare it again") from error


def _manifest_value(folder: Path) -> dict[str, Any]:
    """What manifest.json holds, without its root, which it must hash to. Raises ValueError, OSError."""
    data = _read_regular(folder, MANIFEST)
    value = parse_json(data)
    if (
        isinstance(value, dict)
        and value.get("format") == "weftrain-dataset"
        and value.get("version") not in (2, VERSION)
    ):
        raise ValueError(f"version {value.get('version')!r} is not one that this program reads (2, {VERSION})")
    if canonical_json(value) + b"\n" != data:
        raise ValueError("is not in canonical form, so it was altered")
    if not isinstance(value, dict) or value.pop("root", None) != sha256_json(value):
        raise ValueError("does not hash to its root, so it was altered")
    return value


def _with_counted_sources(value: dict[str, Any]) -> dict[str, Any]:
    """A manifest of version 2, which lists the sources, as one that counts them. Raises ValueError."""
    if {"num_sources", "sources_sha256"} & value.keys() or not isinstance(value.get("sources"), list):
        raise ValueError("key 'sources': is missing or no list")
    entries = [SourceEntry.model_validate(entry).model_dump(mode="json") for entry in value["sources"]]
    digest = hashlib.sha256(b"".join(canonical_json(entry) + b"\n" for entry in entries)).hexdigest()
    rest = {key: item for key, item in value.items() if key != "sources"}
    return rest | {"num_sources": len(entries), "sources_sha256": digest}


def _sources_of_version_2(folder: Path) -> list[SourceEntry]:
    try:
        return [SourceEntry.model_validate(entry) for entry in _manifest_value(folder)["sources"]]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder / MANIFEST}: changed since it was read: {error}; {RESTORE}") from error


def write_inputs(folder: Path, entries: Iterable[InputEntry]) -> WrittenLines:
    """Write inputs.jsonl, whose SHA-256 the manifest holds. Raises OSError."""
    return write_lines(folder / INPUTS, (entry.model_dump(mode="json", exclude_defaults=True) for entry in entries))


def open_inputs(folder: Path, manifest: DatasetManifest) -> LineTable[InputEntry]:
    """The files that a dataset was made of, then those that were skipped; `doc_file` counts them from 0. Raises
    DataError.
    """
    table = LineTable(
        _table_path(folder, INPUTS), InputEntry.model_validate, sha256=manifest.inputs_sha256, remedy=RESTORE
    )
    expected = manifest.corpus.files + sum(manifest.inputs_skipped.values())
    if len(table) != expected:
        raise DataError(f"{table.path}: has {len(table):,} lines, the manifest counts {expected:,} files; {RESTORE}")
    return table


def write_sources(folder: Path, entries: Iterable[SourceEntry]) -> WrittenLines:
    """Write sources.jsonl, whose SHA-256 and number of lines the manifest holds. Raises OSError, ValueError."""
    return write_lines(folder / SOURCES, (entry.model_dump(mode="json") for entry in entries))


def open_sources(folder: Path, manifest: DatasetManifest) -> Lines[SourceEntry]:
    """The sources of a dataset's documents; `doc_source` counts them from 0. Raises DataError."""
    if manifest.version == 2:
        return _sources_of_version_2(folder)
    table = LineTable(
        _table_path(folder, SOURCES), SourceEntry.model_validate, sha256=manifest.sources_sha256, remedy=RESTORE
    )
    if len(table) != manifest.num_sources:
        raise DataError(
            f"{table.path}: has {len(table):,} lines, the manifest counts {manifest.num_sources:,} sources; {RESTORE}"
        )
    return table


def source_name(sources: Lines[SourceEntry], index: int) -> str:
    """The name that a `doc_source` stands for, that of padding too. Raises DataError."""
    return PADDING if index < 0 else sources[index].name


def described_by(manifest: DatasetManifest) -> list[str]:
    """The files of a dataset that say what its shards are, beside the manifest."""
    return [TOKENIZER, INPUTS] if manifest.version == 2 else [TOKENIZER, INPUTS, SOURCES]


def verify_tables(folder: Path, manifest: DatasetManifest) -> None:
    """Check the hashes and every line of inputs.jsonl and sources.jsonl, and the corpus' root over the inputs. Raises
    DataError.
    """
    with open_inputs(folder, manifest) as inputs:
        files = islice(inputs, manifest.corpus.files)
        if merkle_root(sha256 for entry in files for sha256 in entry.sha256) != manifest.corpus.sha256:
            raise DataError(
                f"{inputs.path}: the files' hashes do not lead to the corpus' {manifest.corpus.sha256[:12]}…; {RESTORE}"
            )
    for _ in open_sources(folder, manifest):
        pass


def _table_path(folder: Path, name: str) -> Path:
    try:
        return inside_folder(folder, name)
    except ValueError as error:
        raise DataError(f"{folder / name}: {error}; {RESTORE}") from error


def read_tokenizer(folder: Path) -> bytes:
    """The bytes of tokenizer.json. Raises DataError."""
    try:
        return _read_regular(folder, TOKENIZER)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / TOKENIZER}: {error}; remove the dataset and prepare it again") from error


def _read_regular(folder: Path, name: str) -> bytes:
    path = inside_folder(folder, name)
    try:
        return read_plain(path, "tokenizer" if name == TOKENIZER else "dataset manifest")
    except FileNotFoundError:
        raise ValueError("is missing") from None


def inside_folder(folder: Path, name: str) -> Path:
    """folder/name, which no symbolic link may lead out of the folder."""
    path = folder / name
    if not real_path(path).is_relative_to(real_path(folder)):
        raise ValueError("leads out of the dataset's folder through a symbolic link")
    return path
