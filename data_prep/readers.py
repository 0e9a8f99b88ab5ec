"""Text in: JSON lines, text files and folders of source files, as documents in an order that does not depend on the file system.

What a reader would get wrong: nothing is repaired. Bad UTF-8, bad JSON or a missing field stops with the file and the line, since text
silently changed here could never be traced afterwards. Only a folder read without suffixes leaves out files that are not text.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from weftrain.core.canonical import parse_json
from weftrain.core.errors import DataError


@dataclass(frozen=True)
class Document:
    """One text. name: for messages and the corpus hash. source: which kind or input it is of, kept for every token.

    belongs_to: another text whose side, training or held-out, this one must be on, because it repeats parts of it.
    """

    name: str
    source: str
    text: str
    belongs_to: str | None = None


@dataclass(frozen=True)
class Inputs:
    """Documents that can be read more than once, in the same order, with what the manifest says about them."""

    description: str
    licence: str
    read: Callable[[], Iterator[Document]]


def file_inputs(paths: Sequence[Path], *, text_key: str = "text", suffixes: Sequence[str] = (), licence: str = "not stated") -> Inputs:
    """Documents of `.jsonl` files (one a line, under `text_key`), of folders, and of any other file (one document each).

    suffixes: which files of a folder, as '.py'; none: every `.jsonl` and every file of UTF-8 text. Hidden files and symbolic links
    within a folder are left out. Raises DataError where a path is missing; reading raises it for what cannot be read.
    """
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; name a .jsonl, a text file or a folder")
    if not paths:
        raise DataError("no input: name a .jsonl, a text file or a folder")
    names = ", ".join(path.name for path in paths)

    def read() -> Iterator[Document]:
        for path in paths:
            yield from _read_folder(path, text_key, tuple(suffixes)) if path.is_dir() else _read_file(path, path.name, path.name, text_key)

    return Inputs(names, licence, read)


def decode(data: bytes, where: str) -> str:
    """UTF-8 text. Raises DataError naming the line of the first bad byte."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{where}:{line}: byte {error.start} is not UTF-8 ({error.reason}); convert the file to UTF-8") from error


def _read_folder(folder: Path, text_key: str, suffixes: tuple[str, ...]) -> Iterator[Document]:
    source = folder.resolve().name
    found = False
    for path in _files(folder):
        if suffixes and path.suffix not in suffixes:
            continue
        name = f"{source}/{path.relative_to(folder).as_posix()}"
        if not suffixes and path.suffix != ".jsonl" and not _is_text(path):
            continue
        for document in _read_file(path, name, source, text_key):
            found = True
            yield document
    if not found:
        wanted = f"file ending in {', '.join(suffixes)}" if suffixes else "text file"
        raise DataError(f"{folder}: holds no {wanted}; name another folder or another --suffix")


def _files(folder: Path) -> Iterator[Path]:
    """Files below a folder, sorted by path, without hidden ones and links."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(root, name)
            if not name.startswith(".") and not path.is_symlink() and path.is_file():
                yield path


def _read_file(path: Path, name: str, source: str, text_key: str) -> Iterator[Document]:
    try:
        if path.suffix == ".jsonl":
            yield from _read_json_lines(path, name, source, text_key)
        else:
            yield Document(name, source, decode(path.read_bytes(), str(path)))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _read_json_lines(path: Path, name: str, source: str, text_key: str) -> Iterator[Document]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                value = parse_json(line)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}: byte {error.start} of the line is not UTF-8 ({error.reason}); convert the file to UTF-8"
                ) from error
            except ValueError as error:
                raise DataError(f"{where}: not JSON: {error}; each line must be one JSON object") from error
            if not isinstance(value, dict) or text_key not in value:
                raise DataError(f"{where}: no field '{text_key}'; name the field that holds the text with --text-key")
            text = value[text_key]
            if not isinstance(text, str):
                raise DataError(f"{where}: field '{text_key}' holds {type(text).__name__}, not text")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise DataError(f"{where}: field '{text_key}' holds a lone surrogate, which is no character; repair the line")
            yield Document(f"{name}:{number}", source, text)


def _is_text(path: Path) -> bool:
    try:
        data = path.read_bytes()
        data.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in data
