"""Standard input as an input: copied to a file beside the work folder, since inputs are read several times.

The file is named by its content's hash and has a fixed time, so the same bytes give the same plan, and an interrupted
run resumes when the same text is piped in again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from weftrain.core.errors import DataError, file_problem
from weftrain.core.formats import fsops
from weftrain.core.formats.safe_names import path_below
from weftrain.data_prep.inputs.files import BLOCK_BYTES

_MODIFIED_NS = 0


def spool(stream: IO[bytes], output: Path, name: str) -> Path:
    """Copy a stream into a file beside dataset `name` of `output`, replacing earlier copies. Raises DataError."""
    try:
        folder = path_below(output, name)
    except ValueError as error:
        raise DataError(f"--name: {error}") from error
    digest = hashlib.sha256()

    def blocks() -> Iterator[bytes]:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
            yield block

    try:
        fsops.make_dirs(folder.parent)
        with fsops.held_lock(folder.parent / f".{folder.name}.lock", b""):
            partial = folder.parent / f"{_prefix(folder)}partial"
            fsops.write_blocks(partial, blocks())
            os.utime(partial, ns=(_MODIFIED_NS, _MODIFIED_NS))
            target = folder.parent / f"{_prefix(folder)}{digest.hexdigest()[:32]}"
            fsops.rename(partial, target)
            for path in _kept(folder):
                if path != target:
                    fsops.remove_file(path)
    except BlockingIOError:
        raise DataError(
            f"{folder}: is being prepared by another process; wait for it, or give another --name"
        ) from None
    except OSError as error:
        place = f"{error.filename or folder}: {file_problem(error)}"
        raise DataError(
            f"standard input cannot be kept: {place}; free space or choose another folder for the datasets"
        ) from error
    return target


def forget(output: Path, name: str) -> None:
    """Remove the copy of standard input, unless an interrupted run needs it to resume. Raises OSError."""
    try:
        dataset = path_below(output, name)
    except ValueError:
        return  # nothing was kept under such a name
    if not dataset.parent.is_dir() or not _kept(dataset):
        return
    # else another's
    with contextlib.suppress(BlockingIOError), fsops.held_lock(dataset.parent / f".{dataset.name}.lock", b""):
        if not (dataset.parent / f".{dataset.name}.partial").exists():
            for path in _kept(dataset):
                fsops.remove_file(path)


def _kept(dataset: Path) -> list[Path]:
    return [path for path in dataset.parent.iterdir() if path.name.startswith(_prefix(dataset))]


def _prefix(dataset: Path) -> str:
    return f".{dataset.name}.stdin-"
