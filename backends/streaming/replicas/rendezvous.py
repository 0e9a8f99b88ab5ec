"""Where the processes of a run find each other: a file in the run's folder, named by a note that rank 0 writes beside
it. The note also says what they must agree on, as a hash.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from weftrain.backends.streaming.options import StreamingOptions, layout_of
from weftrain.core.backend import Job
from weftrain.core.errors import BackendError
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json, parse_json, sha256_json
from weftrain.core.formats.plain_file import read_plain

_NOTE = "replicas.json"


def agreement(job: Job) -> str:
    """A hash of what all ranks must have in common; the other backend.options each may choose for its machine."""
    assert isinstance(job.options, StreamingOptions)
    return sha256_json(
        {
            "recipe": job.recipe.model_dump(mode="json", exclude={"backend"}),
            "layout": layout_of(job.recipe, job.options).identity,
            "fabric": job.options.fabric,
        }
    )


def open_rendezvous(folder: Path, agreed: str) -> Path:
    """For rank 0: a new file through which the ranks find each other, and the note that names it."""
    name = f"meeting-{secrets.token_hex(8)}"
    fsops.write_bytes(folder / _NOTE, canonical_json({"meeting": name, "agreement": agreed}) + b"\n")
    return folder / name


def read_note(folder: Path) -> tuple[Path, str] | None:
    """For the others: the rendezvous and the agreement that rank 0 wrote; None if there is no note. A file's name is
    accepted only in the form that `open_rendezvous` gives it.
    """
    try:
        note = parse_json(read_plain(folder / _NOTE, "record"))
    except FileNotFoundError:
        return None
    if not isinstance(note, dict) or "agreement" not in note:
        note = {}
    if not re.fullmatch(r"meeting-[0-9a-f]{16}", name := str(note.get("meeting"))):
        raise BackendError(f"{folder / _NOTE}: names no rendezvous: remove it and start the run again")
    return folder / name, str(note["agreement"])


def remove_rendezvous(folder: Path) -> None:
    """When the run ends: also the files of runs that were killed. Not earlier: a process that waits at one of them
    would wait for a file that is gone, not for the next note.
    """
    for path in (folder / _NOTE, *folder.glob("meeting-*")):
        if path.exists():
            fsops.remove_file(path)
