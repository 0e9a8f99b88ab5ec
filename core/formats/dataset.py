"""A prepared dataset is a folder: `manifest.json`, `tokenizer.json`, `inputs.jsonl` (the files it was made of, one a
line), `sources.jsonl` (the sources that its documents are counted under, one a line), `chat_template.jinja` if it holds
conversations, and the shards of its sets below `train/` and perhaps `heldout/`. This module reads and writes all but
the shards; core/formats/shard_set.py reads those.

The dataset id is a Merkle root over the shards' `digest`s, not over the SHA-256 of their files. A digest commits to
every token, document and mask, and is checked in milliseconds whenever a shard is opened; hashing the files would take
a day at full scale. So a shard swapped for another valid one is refused before step 0. The manifest holds the files'
SHA-256 too, for `sha256sum`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from weftrain.core.errors import DataError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import parse_sealed, sealed
from weftrain.core.formats.dataset_manifest import DatasetManifest, InputEntry, SourceEntry, merkle_root
from weftrain.core.formats.line_table import Lines, LineTable, WrittenLines, lines_sha256, write_lines
from weftrain.core.formats.plain_file import Kind, read_plain, real_path
from weftrain.core.formats.shard_format import PADDING
from weftrain.core.formats.strict_model import M, validated

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"  # of a dataset of conversations
INPUTS = "inputs.jsonl"
SOURCES = "sources.jsonl"
FAILURES = "failures.jsonl"  # the documents that could not be read, if any
VERSION: Literal[3] = 3
VERSION_4: Literal[4] = 4  # with weights of tokens
_PREPARE_AGAIN = "remove the dataset and prepare it again"
RESTORE = "put it back, or remove the dataset and prepare it again"


def write_dataset_manifest(folder: Path, manifest: DatasetManifest) -> None:
    """Write manifest.json. Raises OSError."""
    assert manifest.version in (VERSION, VERSION_4), "a manifest of an older version stays as it is"
    fsops.write_bytes(folder / MANIFEST, sealed(manifest.model_dump(mode="json")))


def read_dataset_manifest(folder: Path) -> DatasetManifest:
    """The folder's manifest, checked in itself and against tokenizer.json. Raises DataError."""
    value = _manifest_value(folder)
    del value["root"]
    try:
        manifest = validated(DatasetManifest, _with_counted_sources(value) if value["version"] == 2 else value)
    except ValueError as error:
        raise DataError(f"{folder / MANIFEST}: {error}; {_PREPARE_AGAIN}") from error
    tokenizer_sha256 = hashlib.sha256(read_tokenizer(folder)).hexdigest()
    if tokenizer_sha256 != manifest.tokenizer_sha256:
        raise DataError(
            f"{folder / TOKENIZER}: SHA-256 {tokenizer_sha256[:12]}… is not the manifest's "
            f"{manifest.tokenizer_sha256[:12]}…: the shards were made with another tokenizer; put that one back, "
            "or remove the dataset and prepare it again"
        )
    return manifest


def manifest_root(folder: Path) -> str:
    """The root of manifest.json, checked: it commits to everything in the dataset. Raises DataError."""
    return str(_manifest_value(folder)["root"])


def _manifest_value(folder: Path) -> dict[str, Any]:
    """The object in manifest.json, which hashes to its root. Raises DataError."""
    data = _read_inside(folder, MANIFEST, "dataset manifest")
    try:
        return parse_sealed(data, "weftrain-dataset", (2, VERSION, VERSION_4))
    except ValueError as error:
        raise DataError(f"{folder / MANIFEST}: {error}; {_PREPARE_AGAIN}") from error


def _with_counted_sources(value: dict[str, Any]) -> dict[str, Any]:
    """A manifest of version 2, which lists the sources, as version 3, which counts and hashes them: or ValueError."""
    if {"num_sources", "sources_sha256"} & value.keys() or not isinstance(value.get("sources"), list):
        raise ValueError("key 'sources': is missing or no list")
    entries = [SourceEntry.model_validate(entry).model_dump(mode="json") for entry in value["sources"]]
    rest = {key: item for key, item in value.items() if key != "sources"}
    return rest | {"num_sources": len(entries), "sources_sha256": lines_sha256(entries)}


def _sources_of_version_2(folder: Path) -> list[SourceEntry]:
    try:
        return [SourceEntry.model_validate(entry) for entry in _manifest_value(folder)["sources"]]
    except (ValueError, KeyError) as error:
        raise DataError(f"{folder / MANIFEST}: changed since it was read: {error}; {RESTORE}") from error


def write_inputs(folder: Path, entries: Iterable[InputEntry]) -> WrittenLines:
    """Write inputs.jsonl, whose SHA-256 the manifest holds. Raises OSError."""
    return write_lines(folder / INPUTS, (entry.model_dump(mode="json", exclude_defaults=True) for entry in entries))


def open_inputs(folder: Path, manifest: DatasetManifest) -> LineTable[InputEntry]:
    """The files that a dataset was made of, then those that were skipped. `doc_file` of a shard is an index into it.
    Raises DataError.
    """
    expected = manifest.corpus.files + sum(manifest.inputs_skipped.values())
    return _open_table(folder, INPUTS, InputEntry, manifest.inputs_sha256, expected, "files")


def write_sources(folder: Path, entries: Iterable[SourceEntry]) -> WrittenLines:
    """Write sources.jsonl, whose SHA-256 and number of lines the manifest holds. Raises OSError, ValueError."""
    return write_lines(folder / SOURCES, (entry.model_dump(mode="json") for entry in entries))


def open_sources(folder: Path, manifest: DatasetManifest) -> Lines[SourceEntry]:
    """The sources of a dataset's documents. `doc_source` of a shard is an index into it. Raises DataError."""
    if manifest.version == 2:
        return _sources_of_version_2(folder)
    return _open_table(folder, SOURCES, SourceEntry, manifest.sources_sha256, manifest.num_sources, "sources")


def _open_table(folder: Path, name: str, entry: type[M], sha256: str, expected: int, what: str) -> LineTable[M]:
    try:
        path = inside_folder(folder, name)
    except ValueError as error:
        raise DataError(f"{folder / name}: {error}; {RESTORE}") from error
    table = LineTable(path, partial(validated, entry), sha256=sha256, remedy=RESTORE)
    if len(table) != expected:
        raise DataError(f"{path}: has {len(table):,} lines, the manifest counts {expected:,} {what}; {RESTORE}")
    return table


def source_name(sources: Lines[SourceEntry], index: int) -> str:
    """The name of the source with that `doc_source`; padding (-1) has one too. Raises DataError."""
    return PADDING if index < 0 else sources[index].name


def described_by(manifest: DatasetManifest) -> list[str]:
    """The files that describe a dataset's shards, besides the manifest."""
    template = [] if manifest.chat_template_sha256 is None else [CHAT_TEMPLATE]
    return [TOKENIZER, INPUTS] if manifest.version == 2 else [TOKENIZER, INPUTS, SOURCES, *template]


def verify_tables(folder: Path, manifest: DatasetManifest) -> None:
    """Check inputs.jsonl and sources.jsonl, hash and lines, the corpus' root over the inputs, and the chat template.
    Raises DataError.
    """
    read_chat_template(folder, manifest)
    with open_inputs(folder, manifest) as inputs:
        files = islice(inputs, manifest.corpus.files)
        if merkle_root(sha256 for entry in files for sha256 in entry.sha256) != manifest.corpus.sha256:
            raise DataError(
                f"{inputs.path}: the files' hashes do not lead to the corpus' {manifest.corpus.sha256[:12]}…; {RESTORE}"
            )
    for _ in open_sources(folder, manifest):
        pass


def read_tokenizer(folder: Path) -> bytes:
    """The bytes of tokenizer.json. Raises DataError."""
    return _read_inside(folder, TOKENIZER, "tokenizer")


def read_chat_template(folder: Path, manifest: DatasetManifest) -> str | None:
    """The chat template of a dataset of conversations, which has the manifest's hash; else None. Raises DataError."""
    if manifest.chat_template_sha256 is None:
        return None
    data = _read_inside(folder, CHAT_TEMPLATE, "chat template")
    if hashlib.sha256(data).hexdigest() != manifest.chat_template_sha256:
        raise DataError(f"{folder / CHAT_TEMPLATE}: is not the one that the dataset was made with; {RESTORE}")
    return data.decode()


def _read_inside(folder: Path, name: str, kind: Kind) -> bytes:
    """The bytes of a file of the dataset. Raises DataError."""
    try:
        return read_plain(inside_folder(folder, name), kind)
    except FileNotFoundError:
        raise DataError(f"{folder / name}: is missing; {_PREPARE_AGAIN}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / name}: {error}; {_PREPARE_AGAIN}") from error


def inside_folder(folder: Path, name: str) -> Path:
    """folder/name. Raises ValueError if a symbolic link leads it out of the folder."""
    path = folder / name
    if not real_path(path).is_relative_to(real_path(folder)):
        raise ValueError("leads out of the dataset's folder through a symbolic link")
    return path
