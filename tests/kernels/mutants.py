"""A copy of a folder of implementations with one fault planted in the text, and the one check that must find it.

What a reader would get wrong: the whole folder is copied, under a package name of its own, because kernels share helper
files. Torch operators are renamed with it: a process can define one only once.
"""

from __future__ import annotations

import importlib
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType

import torch

import weftrain.kernels
from weftrain.kernels import Implementation
from weftrain.kernels.checks import CheckReport, run_checks

_KERNELS = Path(weftrain.kernels.__path__[0])
_NUMBERS = itertools.count()


def in_any_layout(text: str) -> re.Pattern[str]:
    """A pattern for `text` however a formatter lays it out: broken between words and within brackets."""
    words = re.sub(r"(?<=[^\s\\])\\ (?=\S)", r"\\s+", re.escape(text))  # indentation stays as it is
    return re.compile(words.replace(r"\(", r"\(\s*").replace(r"\)", r",?\s*\)"))


def is_there(folder: str, file: str, text: str) -> bool:
    """Whether the source under mutation still has the text that a fault replaces."""
    return in_any_layout(text).search((_KERNELS / folder / file).read_text()) is not None


def mutant(folder: str, op: str, file: str, old: str, new: str, into: Path) -> ModuleType:
    """The module of `op` in a copy of kernels/<folder> with `old` replaced in `file`. Raises AssertionError where it is
    not there.
    """
    name = f"weftrain_mutant_{next(_NUMBERS)}"
    package = into / name
    package.mkdir()
    for path in (path for path in (_KERNELS / folder).iterdir() if path.suffix in (".py", ".cpp", ".h")):
        text = path.read_text()
        if path.name == file:
            text, found = in_any_layout(old).subn(lambda _: new, text)
            assert found, f"kernels/{folder}/{file} no longer has this text; write the fault anew: {old}"
        text = text.replace(f"weftrain.kernels.{folder}", name)
        text = text.replace('Library("weftrain"', f'Library("{name}"')
        (package / path.name).write_text(text)
    sys.path.append(str(into))
    try:
        return importlib.import_module(f"{name}.{op}")
    finally:
        sys.path.remove(str(into))


def examine(
    folder: str, op: str, file: str, old: str, new: str, check: str, example: str, dtype: torch.dtype, into: Path
) -> CheckReport:
    """The findings of one check, asked about one example in one dtype, of the first variant of the faulty copy."""
    offered = mutant(folder, op, file, old, new, into).IMPLEMENTATION
    variants: list[Implementation] = offered if isinstance(offered, list) else [offered]
    return run_checks(dtypes=[dtype], checks=[check], examples=[example], implementations=variants[:1])
