"""A checkpoint's manifest: its schema, and reading it without trust.

The file is sealed (core/formats/canonical.py), so a flipped bit shows even in white space, and its root identifies the
whole checkpoint. Who made a checkpoint is shown only by training the same steps again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from weftrain.core.formats.canonical import parse_sealed, sha256_json
from weftrain.core.formats.dataset_manifest import SourceCursor
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.formats.strict_model import Count, Sha256, StrictModel, validated

FORMAT = "weftrain-checkpoint"
VERSION = 2  # version 1, which hashed whole files besides their tensors, can still be read
MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step_([0-9]{8,})")

FileName = Annotated[str, Field(pattern=r"^state-[0-9]{5}-of-[0-9]{5}\.safetensors$")]


class _FileEntry(StrictModel):
    size: Count
    header_sha256: Sha256 | None = None  # of the header and its length; the tensors have hashes of their own
    sha256: Sha256 | None = None  # version 1: of the whole file


class _TensorEntry(StrictModel):
    dtype: str
    shape: Annotated[tuple[Count, ...], Field(strict=False)]
    file: FileName
    sha256: Sha256  # of the row-major bytes, whichever file they lie in


class _Manifest(StrictModel):
    """The schema that a manifest is checked against; readers get the dict that was read."""

    format: Literal["weftrain-checkpoint"]
    version: Literal[1, 2]
    step: Count
    optimizer_updates: Count
    position: Count  # the next sample's number
    tokens: Count
    parent: Sha256 | None
    recipe: dict[str, Any]
    recipe_sha256: Sha256
    dataset_id: str
    fingerprint: dict[str, Any]
    kernels: dict[str, Any]
    # how far each source had been read; earlier versions, which ordered rows around skipped ones differently, had none
    sources: dict[str, SourceCursor] | None = None
    files: dict[FileName, _FileEntry]
    tensors: dict[str, _TensorEntry]
    root: Sha256

    @model_validator(mode="after")
    def _check(self) -> _Manifest:
        for name, entry in self.files.items():
            if (entry.sha256 is None, entry.header_sha256 is None) != (self.version != 1, self.version == 1):
                raise ValueError(f"file {name}: its hash is not the kind that version {self.version} has")
        return self


def folder_name(step: int) -> str:
    """The name of the checkpoint after `step` completed steps."""
    return f"step_{step:08d}"


def read_checkpoint_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint folder `path`, consistent in itself. Raises ValueError, OSError."""
    if path.is_symlink():
        raise ValueError("the checkpoint's folder is a symbolic link; name the folder itself")
    manifest = parse_sealed(read_plain(path / MANIFEST, "manifest", follow=False), FORMAT, (1, VERSION))
    validated(_Manifest, manifest)
    if sha256_json(manifest["recipe"]) != manifest["recipe_sha256"]:
        raise ValueError("key 'recipe_sha256' is not the recipe's hash")
    if STEP_FOLDER.fullmatch(path.name) and path.name != folder_name(manifest["step"]):
        raise ValueError(f"is of step {manifest['step']}, so the folder was renamed")
    return manifest


def is_manifest_of(path: Path, root: str) -> bool:
    """Whether the manifest of the checkpoint folder `path` has this root, which is known from a record that is trusted:
    its bytes then are what was recorded, and are not parsed. Raises OSError.
    """
    own = b'"root":"%b",' % root.encode()
    before, _, after = read_plain(path / MANIFEST, "manifest", follow=False).partition(own)
    rest, end = (before + after)[:-1], after[-1:]
    return not path.is_symlink() and end == b"\n" and hashlib.sha256(rest).hexdigest() == root


def weights_sha256_of(manifest: Mapping[str, Any]) -> str:
    """Over the hashes of a checkpoint's weights by name, which also names a state that no checkpoint was made of."""
    tensors = manifest["tensors"].items()
    return sha256_json(
        {name.removeprefix("weights/"): one["sha256"] for name, one in tensors if name.startswith("weights/")}
    )
