"""Where the processes of a run find each other: a file in the run's folder, named by a note that rank 0 writes beside
it. The note also holds a hash of what they must agree on.
"""

from __future__ import annotations

import re
import secrets
import time
from pathlib import Path

from weftrain.backends.streaming.options import StreamingOptions, layout_of
from weftrain.core.backend import Job
from weftrain.core.errors import BackendError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json, sha256_json
from weftrain.core.formats.plain_file import read_plain

_NOTE = "replicas.json"
_NOTHING = {"nothing_to_lead": True}


def agreement(job: Job) -> str:
    """A hash of what all ranks must have in common. Each may choose other backend.options for its own machine."""
    assert isinstance(job.options, StreamingOptions)
    return sha256_json(
        {
            "recipe": job.recipe.model_dump(mode="json", exclude={"backend"}),
            "layout": layout_of(job.recipe, job.options).identity,
            "fabric": job.options.fabric,
        }
    )


def open_rendezvous(folder: Path, agreed: str) -> Path:
    """For rank 0: name a new rendezvous file, and write the note that leads the others to it."""
    name = f"rendezvous-{secrets.token_hex(8)}"
    fsops.write_bytes(folder / _NOTE, canonical_json({"rendezvous": name, "agreement": agreed}) + b"\n")
    return folder / name


def read_note(folder: Path) -> tuple[Path, str] | None:
    """For the others: rank 0's rendezvous and agreement; None if there is no note. Only a name that `open_rendezvous`
    can have made is accepted.
    """
    try:
        note = parse_json(read_plain(folder / _NOTE, "record"))
    except FileNotFoundError:
        return None
    if note == _NOTHING:
        return None
    if not isinstance(note, dict) or "agreement" not in note:
        note = {}
    if not re.fullmatch(r"rendezvous-[0-9a-f]{16}", name := str(note.get("rendezvous"))):
        raise BackendError(f"{folder / _NOTE}: names no rendezvous: remove it and start the run again")
    return folder / name, str(note["agreement"])


def release_replicas(folder: Path) -> None:
    """For a process that was to lead a run that is complete: leave a note by which the others, who wait, end."""
    fsops.write_bytes(folder / _NOTE, canonical_json(_NOTHING) + b"\n")


def are_released(folder: Path, within_s: float) -> bool:
    """For the others: whether such a note was written within so many seconds; an older one is of an earlier start."""
    path = folder / _NOTE
    try:
        return time.time() - path.stat().st_mtime < within_s and bool(
            parse_json(read_plain(path, "record")) == _NOTHING
        )
    except FileNotFoundError:
        return False


def remove_rendezvous(folder: Path) -> None:
    """At the end of the run: also what killed runs left. A process that waits at an old file would not notice the next
    note, so nothing is removed earlier.
    """
    for path in (folder / _NOTE, *folder.glob("rendezvous-*")):
        if path.exists():
            fsops.remove_file(path)
