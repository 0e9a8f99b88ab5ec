"""What a misspelt path may mean: the names beside it that are alike."""

from __future__ import annotations

import contextlib
import difflib
import os
from pathlib import Path


def likely_paths(path: Path) -> list[Path]:
    """Paths like one that is not there: its first missing part is replaced by what lies beside it, the likest first."""
    for place in (*reversed(path.parents), path):
        if not os.path.lexists(place):
            with contextlib.suppress(OSError):
                names = difflib.get_close_matches(
                    place.name, os.listdir(place.parent), cutoff=0.7
                )  # a shared .json is not enough
                found = [place.parent / name / path.relative_to(place) for name in names]
                return [one for one in found if os.path.lexists(one)] or [place.parent / name for name in names]
            return []
    return []


def did_you_mean(path: Path) -> str:
    """'did you mean runs/a?', or nothing where nothing is alike or the path is there."""
    return f"did you mean {' or '.join(map(str, found))}?" if (found := likely_paths(path)) else ""
