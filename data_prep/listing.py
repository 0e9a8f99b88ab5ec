"""Which input files there are, at local paths and any fsspec address, and the format of each.

The list is sorted by name, and names do not depend on where a folder lies: the same files in another place, listed in another order, are
the same dataset.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from weftrain.core.errors import DataError
from weftrain.core.plain_file import real_path
from weftrain.data_prep.documents import InputFile
from weftrain.data_prep.files import file_system, is_local
from weftrain.data_prep.readers.contract import Probe
from weftrain.data_prep.readers.registry import detect, reader_named


def list_inputs(
    addresses: Sequence[str], *, source: str | None, suffixes: Sequence[str] = (), format: str | None = None
) -> list[InputFile]:
    """The files of addresses: paths, folders, patterns with `*`, of this machine or of any fsspec file system (`s3://…`, `memory://…`).

    source: what their documents are counted as; None: the folder's name, or the file's. suffixes: of a folder, only files that end so;
    none: every file of a format that is known by its suffix, and every other one that is UTF-8 text. Hidden files and links in a folder
    are left out. Raises DataError.
    """
    if format is not None:
        reader_named(format)
    if not addresses:
        raise DataError("no input: name a .jsonl, a text file or a folder")
    files = [file for address in addresses for file in (_local if is_local(address) else _remote)(address, source, tuple(suffixes), format)]
    names = {file.name for file in files}
    if len(names) < len(files):
        twice = next(name for name in sorted(names) if sum(file.name == name for file in files) > 1)
        raise DataError(f"two inputs are called {twice!r}, and messages could not tell them apart: name the folder that holds both")
    return files


def _local(address: str, source: str | None, suffixes: tuple[str, ...], format: str | None) -> list[InputFile]:
    path = Path(address)
    if "*" in address and not path.exists():
        found = sorted(glob.glob(address, recursive=True))
        if not found:
            raise DataError(f"{address}: matches no file")
        return [file for match in found for file in _local(match, source, suffixes, format)]
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; name a .jsonl, a text file or a folder")
    if not path.is_dir():
        if not path.is_file():
            raise DataError(f"{path}: is not a regular file, and inputs are read several times; write it to a file first")
        return [_file(str(path), path.name, source or path.name, path.stat(), format)]
    folder_name = real_path(path).name
    files = []
    for found_path in sorted(_below(path), key=lambda found: found.relative_to(path).as_posix()):
        if suffixes and found_path.suffix not in suffixes:
            continue
        kind = format or _format_of(found_path.name, str(found_path))
        if kind is None or (kind == "text" and not suffixes and format is None and not _is_text(found_path)):
            continue
        name = f"{folder_name}/{found_path.relative_to(path).as_posix()}"
        files.append(_file(str(found_path), name, source or folder_name, found_path.stat(), kind))
    if not files:
        wanted = f"file ending in {', '.join(suffixes)}" if suffixes else "text file"
        raise DataError(f"{path}: holds no {wanted}; name another folder or another --suffix")
    return files


def _remote(address: str, source: str | None, suffixes: tuple[str, ...], format: str | None) -> list[InputFile]:
    system, root = file_system(address)
    try:
        if "*" in root:
            found = dict.fromkeys(system.glob(root))
        elif system.isdir(root):
            found = dict.fromkeys(system.find(root), root)
        elif system.exists(root):
            found = {root: None}
        else:
            found = {}
        folder_name = root.rstrip("/").rpartition("/")[2]
        files = []
        for path in sorted(found):
            inside = found[path] is not None
            relative = path.removeprefix(root).lstrip("/") if inside else path.rpartition("/")[2]
            hidden = any(part.startswith(".") for part in relative.split("/"))
            if inside and (hidden or (suffixes and not path.endswith(suffixes))):
                continue
            full = system.unstrip_protocol(path)
            kind = format or _format_of(path, full)
            if kind is None:
                continue
            name = f"{folder_name}/{relative}" if inside else relative
            files.append(InputFile(full, name, source or (folder_name if inside else relative), kind, int(system.size(path)), None))
    except OSError as error:
        raise DataError(f"{address}: cannot be listed: {error}") from error
    if not files:
        raise DataError(f"{address}: no such file or folder there; name a .jsonl, a text file or a folder")
    return files


def _file(address: str, name: str, source: str, status: os.stat_result, format: str | None) -> InputFile:
    kind = format or _format_of(name, address) or "text"
    return InputFile(address, name, source, kind, status.st_size, status.st_mtime_ns)


def _below(folder: Path) -> Iterator[Path]:
    """Files below a folder, in any order, without hidden ones and links."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(root, name)
            if not name.startswith(".") and not path.is_symlink() and path.is_file():
                yield path


def _format_of(name: str, address: str) -> str | None:
    """What a file is; None for one that goes with another."""
    reader = detect(Probe(name, address))
    return None if reader is None else reader.name


def _is_text(path: Path) -> bool:
    try:
        data = path.read_bytes()
        data.decode()
    except UnicodeDecodeError:
        return False
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return b"\0" not in data
