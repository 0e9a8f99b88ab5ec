"""Which input files exist at local paths and fsspec addresses, their formats, and which files beside them are skipped.

The list is sorted by name, and names do not depend on where a folder is, so the same files elsewhere are the same
dataset. Every skipped file has an entry with a reason.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weftrain.core.errors import DataError, file_problem
from weftrain.core.formats.likely_paths import did_you_mean
from weftrain.core.formats.plain_file import real_path
from weftrain.data_prep.inputs import listing_rules as rules
from weftrain.data_prep.inputs.compression import compression_of
from weftrain.data_prep.inputs.file_systems import (
    Entry,
    FileSystem,
    LocalFiles,
    holds_dataset,
    identity_of,
    open_file_system,
)
from weftrain.data_prep.inputs.patterns import fixed_folder, is_pattern, matching
from weftrain.data_prep.readers.contract import HEAD_BYTES, Probe
from weftrain.data_prep.readers.documents import InputFile, SkippedFile
from weftrain.data_prep.readers.json_content import JsonContent
from weftrain.data_prep.readers.registry import detect, goes_with_another, reader_named, reason_not_data

STANDARD_INPUT = ("-", "/dev/stdin", "/dev/fd/0")
_STDIN = "<stdin>"  # the name of standard input, and of its source
_SHOWN = 4
_AT_ONCE = 256  # entries of a folder whose first bytes are asked for together


@dataclass(frozen=True)
class Wanted:
    """Addresses and how to read them. source: the name documents count under; None: the folder's or file's name.

    suffixes: endings of names to read in folders, in any case. format: of all files; None: detected. keys: fields of
    which any distinguishes JSON records from other JSON.
    """

    addresses: tuple[str, ...]
    source: str | None = None
    suffixes: tuple[str, ...] = ()
    format: str | None = None
    keys: tuple[str, ...] = ("text",)


@dataclass(frozen=True)
class Listed:
    """skipped: files found beside the inputs. json_texts: names of JSON files in folders that are read as text."""

    files: tuple[InputFile, ...]
    skipped: tuple[SkippedFile, ...]
    json_texts: tuple[str, ...] = ()


def find_inputs(
    sections: Sequence[Wanted],
    standard_input: Path | None = None,
    progress: Callable[[int], None] = lambda count: None,
    *,
    same_names: bool = False,
) -> Listed:
    """The files of all sections, and skipped ones. standard_input: the file that holds it, if `-` is an address.
    same_names: two files may have one name, as in a dataset that grew.

    An address is a path, folder or pattern (patterns.py), local or of any fsspec file system. A file reached twice is
    read once, under the name that needs no link, else the first. progress: gets the number of entries so far. Raises
    DataError.
    """
    found = _Found(progress)
    for section in sections:
        if section.format is not None:
            reader_named(section.format)
        if not section.addresses:
            raise DataError("no input: name a .jsonl, a text file or a folder")
        for address in section.addresses:
            _list_address(address, section, found, standard_input)
    kept = _without_repetitions(found)
    found.skipped.sort(key=lambda entry: entry.name)
    if not kept:
        addresses = ", ".join(address for section in sections for address in section.addresses)
        raise DataError(f"{addresses}: nothing to read{_not_read(found.skipped)}; name other files")
    named = Counter(file.name for file in kept)
    if len(named) < len(kept) and not same_names:
        twice = min(name for name, count in named.items() if count > 1)
        raise DataError(
            f"two inputs are called {twice!r}, and messages could not tell them apart: name the folder that holds both"
        )
    return Listed(tuple(kept), tuple(found.skipped), tuple(name for name in found.json_texts if name in named))


def list_inputs(
    addresses: Sequence[str], *, source: str | None, suffixes: Sequence[str] = (), format: str | None = None
) -> list[InputFile]:
    """The files of find_inputs alone, for callers that name each file. Raises DataError."""
    return list(find_inputs([Wanted(tuple(addresses), source, tuple(suffixes), format)]).files)


def counted(skipped: Iterable[SkippedFile]) -> dict[str, int]:
    """How many files were skipped for each reason, sorted."""
    return dict(sorted(Counter(entry.reason for entry in skipped).items()))


def by_reason(skipped: Sequence[SkippedFile]) -> list[str]:
    """SkippedFile files, one line per reason, with their number and the first names."""
    lines = []
    for reason, count in counted(skipped).items():
        names = ", ".join(
            entry.name for entry in itertools.islice((entry for entry in skipped if entry.reason == reason), _SHOWN)
        )
        lines.append(f"{reason} ({count:,}): {names}{', …' if count > _SHOWN else ''}")
    return lines


@dataclass
class _Found:
    """What is found so far. linked: addresses reached through symbolic links. other_names: whether hard links exist."""

    progress: Callable[[int], None]
    files: list[InputFile] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)
    json_texts: list[str] = field(default_factory=list)
    linked: set[str] = field(default_factory=set)
    other_names: bool = False
    addresses: int = 0


def _list_address(address: str, wanted: Wanted, found: _Found, standard_input: Path | None) -> None:
    found.addresses += 1
    if not address.strip():
        raise DataError(
            f"an input is named {address!r}, as a variable of the shell does that is not set: name a file or a folder"
        )
    if address in STANDARD_INPUT:
        if standard_input is None:
            raise DataError(f"{address}: standard input can be read once, by one command; write it to a file first")
        entry = LocalFiles().look(str(standard_input))
        assert entry is not None
        _take(LocalFiles(), entry, _STDIN, wanted.source or _STDIN, wanted, found, below=False)
        return
    system, path = open_file_system(address)
    try:
        _list_path(system, path, address, wanted, found)
    except DataError:
        raise
    except (OSError, ValueError) as error:
        where = getattr(error, "filename", None) or address
        raise DataError(f"{rules.printable_name(str(where))}: cannot be listed: {file_problem(error)}") from error


def _list_path(system: FileSystem, path: str, address: str, wanted: Wanted, found: _Found) -> None:
    entry = system.look(path)
    if entry is not None and entry.kind == "folder":
        _list_folder(system, path, _folder_name(system, path), address, wanted, found)
    elif entry is not None and entry.kind == "file":
        _take(system, entry, entry.name, wanted.source or entry.name, wanted, found, below=False)
    elif entry is not None:
        raise DataError(
            f"{rules.printable_name(address)}: is not a regular file, and inputs are read several times; write it to "
            "a file first, or pipe it into `weftrain prep -`"
        )
    elif is_pattern(path):
        fixed = fixed_folder(path)
        for match in matching(system, path, address):
            name = match.path[len(fixed) :].rstrip("/")
            if match.kind == "folder":
                _list_folder(system, match.path, name, address, wanted, found)
            else:
                _take(system, match, name, wanted.source or name, wanted, found, below=True)
    else:
        hint = did_you_mean(Path(address)) or "name a .jsonl, a text file or a folder"
        raise DataError(f"{rules.printable_name(address)}: no such file or folder; {hint}")


def _folder_name(system: FileSystem, path: str) -> str:
    return real_path(path).name if isinstance(system, LocalFiles) else path.rstrip("/").rpartition("/")[2]


def _list_folder(system: FileSystem, path: str, name: str, address: str, wanted: Wanted, found: _Found) -> None:
    if holds_dataset(system.address(path)):
        raise DataError(
            f"{rules.printable_name(system.address(path))}: is a dataset that weftrain made; add inputs to it with "
            "--grow, or name its folder train to prepare its rows again"
        )
    suffixes = tuple(rules.spelled_suffix(suffix) for suffix in wanted.suffixes)
    source = wanted.source or name.rpartition("/")[2]
    files_before, skipped_before = len(found.files), len(found.skipped)
    entries = system.below(path, rules.skips_folder)
    while batch := list(itertools.islice(entries, _AT_ONCE)):
        named = [(entry, f"{name}/{entry.name}" if name else entry.name) for entry in batch]
        reasons = [_reason_by_name(entry, system.address(entry.path), suffixes) for entry in batch]
        left = [entry for entry, reason in zip(batch, reasons, strict=True) if reason is None]
        heads = system.heads([entry.path for entry in left if entry.num_bytes and _needs_head(entry.name)], HEAD_BYTES)
        for (entry, full), reason in zip(named, reasons, strict=True):
            if reason is None:
                _take(system, entry, full, source, wanted, found, below=True, head=heads.get(entry.path))
            else:
                size = 0 if entry.kind == "folder" else entry.num_bytes
                shown = f"{full}/" if entry.kind in ("folder", "same folder", "link loop", "dataset") else full
                found.skipped.append(SkippedFile(rules.printable_name(shown), size, reason))
        found.progress(len(found.files) + len(found.skipped))
    ending = f"file ending in {', '.join(suffixes)}" if suffixes else "text file"
    # all but what links lead to is
    found.files[files_before:] = sorted(found.files[files_before:], key=lambda file: file.name)
    if len(found.files) == files_before:
        raise DataError(
            f"{address}: holds no {ending}{_not_read(found.skipped[skipped_before:])}; name another folder or another "
            "--suffix"
        )


def _needs_head(name: str) -> bool:
    return compression_of(name) is None and rules.may_hold_json(name.lower())


def _not_read(skipped: Sequence[SkippedFile]) -> str:
    return f"; not read: {'; '.join(by_reason(skipped))}" if skipped else ""


def _reason_by_name(entry: Entry, address: str, suffixes: tuple[str, ...]) -> str | None:
    """Why an entry of a folder is skipped by its name; None if its content decides. Raises DataError."""
    last = entry.name.rpartition("/")[2]
    if entry.kind == "folder":
        return rules.folder_reason(last)
    if entry.kind == "dataset":
        return "dataset"
    if last.startswith("."):
        return "hidden file"
    if entry.kind in ("broken link", "link loop"):
        return entry.kind
    if entry.kind == "same folder":
        return "read under another name"
    if suffixes:
        return None if entry.name.lower().endswith(suffixes) else "other suffix"
    if entry.kind == "special":
        return "not a regular file"
    if rules.is_marker(last):
        return "marker file"
    suffix = rules.suffix_of(last)
    if suffix in rules.UNFINISHED:
        if rules.looks_like_data(last[: -len(suffix)]):
            raise DataError(
                f"{rules.printable_name(address)}: looks like an unfinished download or copy; finish it, remove it, "
                "or say with --suffix which files are read"
            )
        return "unfinished file"
    if suffix in rules.ARCHIVES and rules.looks_like_data(last[: -len(suffix)]):
        raise DataError(
            f"{rules.printable_name(address)}: holds data in a compression that is not read; decompress it (or use "
            ".gz or .zst), or say with --suffix which files are read"
        )
    return None


def _take(
    system: FileSystem,
    entry: Entry,
    name: str,
    source: str,
    wanted: Wanted,
    found: _Found,
    *,
    below: bool,
    head: bytes | None = None,
) -> None:
    """Add a file, or why it is skipped. below: it was found in a folder or by a pattern, not named."""
    shown, address = rules.printable_name(name), system.address(entry.path)
    if entry.kind != "file":
        found.skipped.append(
            SkippedFile(shown, 0, "broken link" if entry.kind == "broken link" else "not a regular file")
        )
        return
    where = shown if name == _STDIN else rules.printable_name(address)
    kind, why = _format(Probe(name, address, wanted.keys, head), entry, wanted, found, below, where)
    if why is not None:
        found.skipped.append(SkippedFile(shown, entry.num_bytes, why))
    elif kind is None:
        if not below:
            raise DataError(f"{where}: is read with the file that it belongs to; name that one")
    elif not rules.is_utf8_name(address + name):
        raise DataError(f"{where}: its name is not UTF-8; rename it")
    else:
        found.files.append(InputFile(address, name, source, kind, entry.num_bytes, entry.modified_ns))
        found.other_names |= entry.has_other_names
        if entry.linked:
            found.linked.add(address)


def _format(
    probe: Probe, entry: Entry, wanted: Wanted, found: _Found, below: bool, where: str
) -> tuple[str | None, str | None]:
    """A file's format, or why it is skipped; neither if it is read with another. Raises DataError."""
    if goes_with_another(probe):
        return None, None
    if not entry.num_bytes:
        return None, "empty file"
    if below and not wanted.suffixes and (reason := reason_not_data(probe)) is not None:
        return None, reason
    if wanted.format not in (None, "text"):
        return wanted.format, None
    if wanted.format is None and rules.is_source_text(probe.plain_name):
        return "text", None
    kind = detect(probe).name if wanted.format is None else "text"
    if kind == "text" and not rules.looks_like_data(probe.plain_name) and rules.is_binary(probe.head):
        if below and not wanted.suffixes:
            return None, "archive" if rules.is_archive(probe.name) else "binary file"
        raise DataError(
            f"{where}: is no text by its first bytes; decompress or unpack it, or say with --format what it is"
        )
    content = probe.json if wanted.format is None and not probe.plain_name.endswith((".jsonl", ".ndjson")) else None
    if content is not None and kind in ("text", "jsonl", "json"):
        _check_json(where, wanted.keys, content, kind, below)
        if kind == "text":
            found.json_texts.append(probe.name)
    return kind, None


def _check_json(where: str, keys: tuple[str, ...], content: JsonContent, kind: str, below: bool) -> None:
    """Raises DataError for JSON that is neither records with a text nor a document."""
    fields = "" if not content.first else f" but {', '.join(map(repr, list(content.first)[:8]))}"
    without, several = repr(keys[0]), len(keys) > 1
    if several:
        without = ", ".join(map(repr, keys[:-1])) + f" or {keys[-1]!r}"
    remedy = "rename it" if several else "name it with --text-key, or read each file as one text with --format text"
    if kind != "text" or content.is_records:
        if not content.has_any(keys):
            raise DataError(f"{where}: its JSON objects have no field {without}{fields}; {remedy}")
    elif not below:
        raise DataError(
            f"{where}: is JSON without a field {without}{fields}; say what it is: --format jsonl (an object a "
            "line), json (an array of objects) or text (one text as it is), or name the field with --text-key"
        )


def _without_repetitions(found: _Found) -> list[InputFile]:
    """The files, each once; a second path to one is skipped."""
    if found.addresses == 1 and not found.linked and not found.other_names:
        return found.files
    try:
        identities = [identity_of(file.address) for file in found.files]
    except OSError as error:
        raise DataError(
            f"{error.filename}: cannot be read: {file_problem(error)}; run again when nobody writes there"
        ) from error
    first: dict[tuple[int, int] | str, int] = {}
    for place, (identity, file) in enumerate(zip(identities, found.files, strict=True)):
        other = first.setdefault(identity, place)
        if file.address not in found.linked and found.files[other].address in found.linked:
            first[identity] = place
    kept = []
    for place, (identity, file) in enumerate(zip(identities, found.files, strict=True)):
        if first[identity] == place:
            kept.append(file)
        else:
            found.skipped.append(SkippedFile(file.name, file.num_bytes, "read under another name"))
    return kept
