"""Kernels of the Hugging Face Hub, through its package `kernels`, which is optional: pinned, and never downloaded by a
run.

A module of an implementation says which one it means, by commit and by the hash of each build that its author vouches
for, and asks for the module when it is called:

    KERNEL = HubKernel("kernels-community/activation", "<commit>", {"torch210-cxx11-cu128-x86_64-linux": "<SHA-256>"})

    def swiglu(gate, up):
        check_swiglu(gate, up)
        return KERNEL.load().swiglu(gate, up)

    IMPLEMENTATION = Implementation("swiglu", "hub", swiglu, KERNEL.unavailable, version=KERNEL.version)

`weftrain kernels fetch REPOSITORY --revision COMMIT` downloads builds and prints their hashes. The commit and the
hashes stand in the module's source, so the manifest's hash of the module covers the kernel too.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weftrain.kernels.contract import KernelError, Spec
from weftrain.kernels.plugins import one_line

_INSTALL = "the package `kernels` is not installed: pip install kernels"
_KINDS = ("kernel", "model")  # of a repository: older ones are models


@dataclass(frozen=True)
class HubKernel:
    """One kernel at one commit. builds: name of a build ("torch210-cxx11-cu128-x86_64-linux") -> SHA-256 of its files,
    as `weftrain kernels fetch` prints them.
    """

    repository: str  # "owner/name"
    revision: str  # a commit
    builds: Mapping[str, str]
    _loaded: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_names(self.repository, self.revision)
        for build, sha256 in self.builds.items():
            if not re.fullmatch(r"[0-9a-f]{64}", sha256):
                raise KernelError(f"{self.repository}: '{sha256}' of build {build} is no SHA-256 of 64 hex digits")
        if not self.builds:
            raise KernelError(f"{self.repository} has no build that is vouched for; {_fetch(self)}")

    @property
    def version(self) -> str:
        return f"{self.repository} {self.revision[:12]}"

    def unavailable(self, spec: Spec | None = None) -> str | None:
        """Why it cannot be loaded, or None. Looks at files, and downloads and imports nothing."""
        if "module" in self._loaded:
            return None
        if reason := _no_package():
            return reason
        folder = local_folder(self.repository, self.revision)
        found = {} if folder is None else builds_in(folder)
        if not found:
            return f"{self.version} is not on this machine, and a run downloads nothing; {_fetch(self)}"
        for build, sha256 in found.items():
            if build not in self.builds:
                return f"build {build} of {self.version} is on this machine, and nobody vouches for it"
            if sha256 != self.builds[build]:
                return (
                    f"build {build} of {self.version} has the SHA-256 {sha256}, and {self.builds[build]} is asked for"
                )
        return None

    def load(self) -> Any:
        """The kernel's module, its files compared first. Raises KernelError with the reason why not."""
        if "module" not in self._loaded:
            if reason := self.unavailable():
                raise KernelError(reason)
            self._loaded["module"] = _imported(self)
        return self._loaded["module"]


def _no_package() -> str | None:
    """Why the package `kernels` cannot be imported. A checkout of weftrain has a folder of that name, too."""
    found = importlib.util.find_spec("kernels")
    if found is None:
        return _INSTALL
    if found.origin is not None and Path(found.origin).resolve().parent == Path(__file__).resolve().parent:
        return "the folder kernels/ of this directory hides the package `kernels`: run from another directory"
    return None


def check_names(repository: str, revision: str) -> None:
    """Raises KernelError for what is no "owner/name", and for a branch or a tag, which move."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or ".." in repository:
        raise KernelError(f"'{repository}' is no repository of the Hub: it is written owner/name")
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise KernelError(
            f"{repository}: '{revision}' is no commit of 40 hex digits; branches and tags move, and are not taken"
        )


def _fetch(kernel: HubKernel) -> str:
    return f"fetch it: weftrain kernels fetch {kernel.repository} --revision {kernel.revision}"


def builds_in(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 over the names and contents of a build's files, of each build of a snapshot. What Python writes
    beside them when it imports is no part of them.
    """
    builds = {}
    for build in sorted((folder / "build").glob("*/")):
        files = sorted(path for path in build.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        lines = [
            f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.relative_to(build).as_posix()}" for path in files
        ]
        builds[build.name] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return builds


def local_folder(repository: str, revision: str) -> Path | None:
    """Where the Hub's cache on this machine has that commit; None where it has not."""
    for kind in _KINDS:
        folder = _snapshot(repository, revision, kind, local_files_only=True)
        if folder is not None:
            return folder
    return None


def fetch(repository: str, revision: str, build: str | None = None) -> dict[str, str]:
    """Download the builds (one, or all) into the Hub's cache, and give their hashes; runs nothing of them. Raises
    KernelError.
    """
    check_names(repository, revision)
    reasons: list[str] = []
    for kind in _KINDS:
        folder = _snapshot(repository, revision, kind, [f"build/{build or '*'}/**"], reasons)
        if folder is not None and (found := builds_in(folder)):
            return found
    raise KernelError(f"{repository} at {revision} has no such build: {'; '.join(reasons) or build or 'none at all'}")


def _snapshot(
    repository: str,
    revision: str,
    kind: str,
    patterns: list[str] | None = None,
    reasons: list[str] | None = None,
    local_files_only: bool = False,
) -> Path | None:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise KernelError(_INSTALL)
    hub = importlib.import_module("huggingface_hub")
    try:
        return Path(
            hub.snapshot_download(
                repository, repo_type=kind, revision=revision, allow_patterns=patterns,
                cache_dir=os.environ.get("KERNELS_CACHE"),  # where the package `kernels` looks
                local_files_only=local_files_only,
            )
        )  # fmt: skip
    except Exception as error:  # of the Hub's client, its network and its versions: an absent file, in one line
        if reasons is not None:
            reasons.append(one_line(error))
        return None


def _imported(kernel: HubKernel) -> Any:
    """By the package `kernels`, which chooses the build, with the Hub's client offline."""
    package = importlib.import_module("kernels")
    constants: Any = importlib.import_module("huggingface_hub.constants")
    takes = inspect.signature(package.get_kernel).parameters
    # its own list of trusted owners says less than a hash
    more = {"trust_remote_code": True} if "trust_remote_code" in takes else {}
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        module = package.get_kernel(kernel.repository, revision=kernel.revision, **more)
    except Exception as error:
        raise KernelError(f"{kernel.version} cannot be loaded: {one_line(error)}") from error
    finally:
        constants.HF_HUB_OFFLINE = before
    folder = local_folder(kernel.repository, kernel.revision)
    if folder is None or not Path(module.__file__).is_relative_to(folder):
        raise KernelError(f"{kernel.version} was loaded from {module.__file__}, which is not what was compared")
    return module
