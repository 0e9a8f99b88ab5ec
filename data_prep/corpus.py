"""The embedded corpus: the running interpreter's standard library, its sources and, as prose, its documentation strings.

What a reader would get wrong: it differs in every Python version, so the manifest's corpus hash, not this code, says what was read.
Licence: the Python Software Foundation License (https://docs.python.org/3/license.html).
"""

from __future__ import annotations

import ast
import io
import os
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from weftrain.core.errors import DataError
from weftrain.data_prep.readers import Document, Inputs

LICENCE = "PSF-2.0"
SOURCES = "python-source"
DOCUMENTATION = "python-documentation"
MIN_DOCUMENTATION_CHARACTERS = 400
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload", "_bundled"}
SKIPPED_PREFIX = "_sysconfigdata"  # generated on the machine that built the interpreter


def embedded_corpus(folder: Path | None = None) -> Inputs:
    """The standard library's documents, in sorted order; `folder` instead of where it is installed. Reading raises DataError."""
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    description = f"{platform.python_implementation()} {platform.python_version()} standard library: sources and documentation strings"
    return Inputs(description, LICENCE, lambda: iter(_read(root)))


@lru_cache(maxsize=1)
def _read(root: Path) -> tuple[Document, ...]:
    """All documents: some 14 MB, kept, since finding the documentation takes longer than anything done with it."""
    documents = []
    for path in _source_files(root):
        name = path.relative_to(root).as_posix()
        text = _source_text(path)
        documents.append(Document(name, SOURCES, text))
        documentation = documentation_text(text, name)
        if len(documentation) >= MIN_DOCUMENTATION_CHARACTERS:
            documents.append(Document(f"{name} (documentation)", DOCUMENTATION, documentation, belongs_to=text))
    if not documents:
        raise DataError(f"{root}: holds no standard library sources; install them, or name your own text")
    return tuple(documents)


def documentation_text(source: str, name: str) -> str:
    """The documentation strings of a module, its classes and functions, in order, joined by blank lines."""
    try:
        with warnings.catch_warnings():  # an invalid escape in a library's string is not our user's business
            warnings.simplefilter("ignore")
            tree = ast.parse(source, name)
    except SyntaxError:  # a template, or code for another version: it has no documentation that can be found
        return ""
    documented = (node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)))
    in_order = sorted(documented, key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(text for text in (ast.get_docstring(node) for node in in_order) if text)


def _source_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith(SKIPPED_PREFIX):
                yield Path(folder, name)


def _source_text(path: Path) -> str:
    """Text in the encoding that the file declares (PEP 263), line ends as they are."""
    try:
        data = path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding)
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as Python source: {error}; repair the Python installation") from error
