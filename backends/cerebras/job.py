"""The messages between the main process and the worker: one JSON object a line, checked on both sides.

The first line to the worker is the job; commands follow, one at a time. Each command is answered by events, the last of
which ends it (`ENDS`). Held-out rows and state go through folders in the checkpoint format, never as pickle or in JSON,
and the output of the vendor's packages goes to a log.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from weftrain.core import checkpoint
from weftrain.core.backend import State
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.formats.strict_model import Count, StrictModel

PROTOCOL = 1
ENDS = {"lowered", "compiled", "trained", "evaluated", "exported", "imported", "failed"}


class WorkerJob(StrictModel):
    """What the worker builds, once.

    mode: `validate` stops after the front end, `compile` after the cluster's compiler, `train` answers commands.
    """

    protocol: int = PROTOCOL
    mode: Literal["validate", "compile", "train"]
    target: Literal["csx", "cpu"]
    recipe: Recipe
    artifacts: str  # folder of this job alone
    vendor_version: str  # of cerebras-pytorch; the worker refuses another
    micro_batch: Literal["recipe", "auto"] = "recipe"
    precision_level: Count = 1  # the vendor's precision optimization level
    management_address: str | None = None
    management_namespace: str | None = None
    credentials_path: str | None = None
    python_paths: tuple[str, ...] = ()


def encode(message: dict[str, Any]) -> str:
    """One line. Floats that are not finite are NaN and Infinity, which Python's json reads back."""
    return json.dumps(message, separators=(",", ":")) + "\n"


def decode(line: str, origin: str) -> dict[str, Any]:
    """The object of one line. Raises BackendError for anything else, with the line."""
    try:
        message = json.loads(line)
    except ValueError as error:
        raise BackendError(f"{origin} sent a line that is not JSON ({error}): {line[:120]!r}") from None
    if not isinstance(message, dict) or not isinstance(message.get("event", message.get("command")), str):
        raise BackendError(f"{origin} sent a line that is no event: {line[:120]!r}")
    return message


def save_state(folder: Path, state: State) -> Path:
    """Write a state for the other process, as a checkpoint whose record has the step alone. Returns its folder."""
    info = checkpoint.save(
        folder, state, recipe={}, dataset_id="", fingerprint={}, tokens=0, position=0, parent=None, kernels={}
    )
    return info.path
