"""Names that become paths: every name read from a file and joined to a folder passes `checked_path` or `path_below`.

No segment is empty, `.` or `..`, so no name leads out of its folder. Whether symbolic links are followed is decided
where the file is opened.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

MAX_SEGMENT_BYTES = 200  # file systems take 255; the rest is for what is added: suffixes, temporary names
MAX_PATH_BYTES = 1024


def checked_path(name: object) -> str:
    """`name`, if it is a relative path of plain segments. Raises ValueError for anything else."""
    if not isinstance(name, str):
        raise ValueError(f"{type(name).__name__} is not a name")
    shown = ascii(name[:80])
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{shown} is not UTF-8 text") from None
    if size > MAX_PATH_BYTES:
        raise ValueError(f"{shown}.. is longer than the {MAX_PATH_BYTES:,} bytes that a path may have")
    for part in name.split("/"):
        if part in ("", ".", ".."):
            raise ValueError(f"{shown} is not a path within the folder: no segment may be empty, '.' or '..'")
        if len(part.encode()) > MAX_SEGMENT_BYTES:
            raise ValueError(f"{shown} has a segment of more than {MAX_SEGMENT_BYTES} bytes")
        bad_end = part != part.strip(" ") or part.endswith(".")
        if bad_end or "\\" in part or any(unicodedata.category(one)[0] == "C" for one in part):
            raise ValueError(
                f"{shown} has a segment with a control character, a backslash, a space at either end or a dot at its "
                "end"
            )
    return name


def checked_segment(name: object) -> str:
    """`name`, if it is one plain segment. Raises ValueError."""
    if isinstance(name, str) and "/" in name:
        raise ValueError(f"{name[:80]!a} is a path where one plain name is meant")
    return checked_path(name)


def path_below(folder: Path, name: object) -> Path:
    """folder/name, for a name that `checked_path` accepts. Raises ValueError."""
    return folder / checked_path(name)


RelativePath = Annotated[str, AfterValidator(checked_path)]  # a recipe's or manifest's key that is joined to a folder
PlainName = Annotated[str, AfterValidator(checked_segment)]
