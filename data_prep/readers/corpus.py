"""The embedded corpus: the running interpreter's standard library, as sources and, as prose, documentation strings.

It differs with the Python version; the manifest's corpus hash says what was read. Licence: the Python Software
Foundation License (https://docs.python.org/3/license.html).
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
from pathlib import Path

from weftrain.core.errors import DataError
from weftrain.data_prep.readers.documents import InputFile

LICENCE = "PSF-2.0"
SOURCES = "python-source"
DOCUMENTATION = "python-documentation"
MIN_DOCUMENTATION_CHARACTERS = 400
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib-dynload",
    "_bundled",
}
SKIPPED_PREFIX = "_sysconfigdata"  # generated on the machine that built the interpreter


def embedded_inputs(folder: Path | None = None) -> tuple[list[InputFile], str, str]:
    """The library's modules, sorted, a description, the licence. folder: another library. Raises DataError."""
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    files = []
    for path in sorted(_source_files(root), key=lambda found: found.relative_to(root).as_posix()):
        status = path.stat()
        files.append(
            InputFile(
                str(path), path.relative_to(root).as_posix(), SOURCES, "python", status.st_size, status.st_mtime_ns
            )
        )
    if not files:
        raise DataError(f"{root}: holds no standard library sources; install them, or name your own text")
    description = (
        f"{platform.python_implementation()} {platform.python_version()} standard library: sources and documentation "
        "strings"
    )
    return files, description, LICENCE


def documentation_text(source: str, name: str) -> str:
    """The documentation strings of a module, its classes and functions, in order, joined by blank lines."""
    try:
        with warnings.catch_warnings():  # an invalid escape in a library's string is not our user's business
            warnings.simplefilter("ignore")
            tree = ast.parse(source, name)
    except SyntaxError:  # a template, or code for another version: it has no documentation that can be found
        return ""
    documented = (
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    )
    in_order = sorted(documented, key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(text for text in (ast.get_docstring(node) for node in in_order) if text)


def _source_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        for name in files:
            if name.endswith(".py") and not name.startswith(SKIPPED_PREFIX):
                yield Path(folder, name)


def source_text(data: bytes, where: str) -> str:
    """Text in the encoding that a source file declares (PEP 263), line ends unchanged. Raises DataError."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: cannot be read as Python source: {error}; repair the Python installation") from error
