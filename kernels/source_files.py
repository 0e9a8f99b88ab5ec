"""The files that a kernel is made of, and one hash over all of them, so that a record says which code computed.

A kernel usually has more than its function's module: helpers, the check of its arguments, C++ sources. The closure of
its imports within its own package is found by reading the files; what is not Python is named by `Implementation.files`.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch.library import CustomOpDef

_OURS = "weftrain."  # a namespace, whose folders are packages of their own


def defined(function: Callable[..., Any]) -> Callable[..., Any]:
    """What somebody wrote behind torch.library.custom_op or triton_op, or behind functools.partial."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif isinstance(function, CustomOpDef):
            written = function._init_fn
            # triton_op puts a function of its own around what was written, which is its fake implementation too
            fake = function._abstract_fn
            function = fake if fake is not None and written.__module__.startswith("torch.") else written
        else:
            return function


def module_of(function: Callable[..., Any]) -> str:
    """The name of the module that defines a callable, or the class of a callable object."""
    function = defined(function)
    return getattr(function, "__module__", None) or type(function).__module__


def hash_files(function: Callable[..., Any], files: Iterable[Path] = ()) -> tuple[str | None, dict[str, str]]:
    """(SHA-256 over the names and contents of all, name -> SHA-256) of the files that `function` is made of; (None, {})
    for a builtin.

    Names are paths below the top folder of the function's package: "torch_ops/attention.py", "cpp_ops/attention.cpp".
    """
    name = module_of(function)
    root = _root(name)
    top = _folder(root)
    if top is None:  # a module that is no package, or a builtin
        file = getattr(sys.modules.get(name), "__file__", None)
        paths = {Path(file).resolve()} if file else set()
    else:
        paths = _closure(name, root, top)
    paths |= {Path(file).resolve() for file in files}
    if not paths:
        return None, {}
    hashes = {}
    for path in sorted(paths):
        shown = path.relative_to(top).as_posix() if top is not None and path.is_relative_to(top) else path.name
        hashes[shown] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashlib.sha256(
        "\n".join(f"{hashes[shown]} {shown}" for shown in sorted(hashes)).encode()
    ).hexdigest(), hashes


def _root(module: str) -> str:
    """The package within which imports are followed: weftrain.kernels, or a third party's top package."""
    parts = module.split(".")
    return ".".join(parts[: 2 if module.startswith(_OURS) else 1])


def _folder(package: str) -> Path | None:
    """The folder of a package that is imported; None for what is no package."""
    paths = getattr(sys.modules.get(package), "__path__", None)
    return Path(next(iter(paths))).resolve() if paths else None


def _closure(module: str, root: str, top: Path) -> set[Path]:
    """The files of a module and of every module of `root` that it imports, directly or not.

    By files alone, never by what happens to be imported already: the hash must not depend on who asks first.
    """
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file(name, root, top)
        if name in found or path is None:
            continue
        found[name] = path
        if path.suffix == ".py":
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            waiting += _imports(path.read_bytes(), path, package)
    return set(found.values())


@functools.lru_cache(maxsize=1024)
def _imports(source: bytes, path: Path, package: str) -> tuple[str, ...]:
    """What a file of `package` may name as modules in its import statements, those within functions too:
    `from a.b import c` names a.b and a.b.c. Cached by content: each kernel of a selection asks for much the same files.
    """
    names: list[str] = []
    for node in ast.walk(ast.parse(source, str(path))):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            names += (base, *(f"{base}.{alias.name}" for alias in node.names))
    return tuple(names)


def _file(module: str, root: str, top: Path) -> Path | None:
    """The file of a module within `root`, whose folder is `top`; None for any other name."""
    if module != root and not module.startswith(f"{root}."):
        return None
    place = top.joinpath(*module.removeprefix(root).strip(".").split(".")) if module != root else top
    candidates = (place / "__init__.py", place.with_suffix(".py"), *place.parent.glob(f"{place.name}.*.so"))
    return next((candidate.resolve() for candidate in candidates if candidate.is_file()), None)
