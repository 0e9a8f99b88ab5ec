"""A checkpoint's manifest: its schema, its root hash, and reading it without trust.

The file is canonical JSON to the byte, so that a flipped bit shows even in white space. What a reader would get wrong:
the root proves that nothing was altered since it was computed, not who computed it; provenance is shown by training the
same steps again.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from weftrain.core.formats.canonical import canonical_json, parse_json, sha256_json
from weftrain.core.formats.dataset_manifest import SourceCursor
from weftrain.core.formats.strict_model import Count, Sha256
from weftrain.core.formats.tensor_file import open_regular

FORMAT = "weftrain-checkpoint"
VERSION = 2  # 1 had the hash of each whole file beside its tensors'; it is read
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
STEP_FOLDER = re.compile(r"step_([0-9]{8,})")

FileName = Annotated[str, Field(pattern=r"^state-[0-9]{5}-of-[0-9]{5}\.safetensors$")]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _FileEntry(_Entry):
    size: Count
    header_sha256: Sha256 | None = None  # of the header and its length; the tensors have hashes of their own
    sha256: Sha256 | None = None  # version 1: of the whole file


class _TensorEntry(_Entry):
    dtype: str
    shape: Annotated[tuple[Count, ...], Field(strict=False)]
    file: FileName
    sha256: Sha256  # of the row-major bytes, whichever file they lie in


class _Manifest(_Entry):
    """The schema that a manifest is checked against; it is handed out as the dict that was read."""

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
    # how far each had been read; versions that read skipped rows in another order had none
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


def root_of(manifest: dict[str, Any]) -> str:
    """The hash that names a whole checkpoint: SHA-256 of the canonical manifest without its root."""
    return sha256_json({key: value for key, value in manifest.items() if key != "root"})


def read_checkpoint_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint folder `path`, consistent in itself. Raises ValueError saying what is wrong, or
    OSError.
    """
    if path.is_symlink():
        raise ValueError("the checkpoint's folder is a symbolic link; name the folder itself")
    with open_regular(path / MANIFEST) as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_MANIFEST_BYTES:
            raise ValueError(f"holds {size:,} bytes, more than the {MAX_MANIFEST_BYTES:,} that a manifest may")
        data = file.read(size)
    manifest = parse_json(data)
    if isinstance(manifest, dict) and manifest.get("format") == FORMAT and manifest.get("version") not in (1, VERSION):
        raise ValueError(
            f"format version {manifest.get('version')!r} is not the one this program reads ({VERSION}): use a newer "
            "weftrain"
        )
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"key '{'.'.join(map(str, first['loc']))[:80]}': {first['msg']}") from error
    if canonical_json(manifest) + b"\n" != data:
        raise ValueError("is not in canonical form, so it was altered")
    if root_of(manifest) != manifest["root"]:
        raise ValueError("does not hash to its root, so it was altered")
    if sha256_json(manifest["recipe"]) != manifest["recipe_sha256"]:
        raise ValueError("key 'recipe_sha256' is not the recipe's hash")
    if STEP_FOLDER.fullmatch(path.name) and path.name != folder_name(manifest["step"]):
        raise ValueError(f"is of step {manifest['step']}, so the folder was renamed")
    return manifest
