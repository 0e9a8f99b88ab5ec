"""Helpers of the tests of releases: read verdicts, edit release.json consistently, damage a byte."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from click.testing import Result

from weftrain.core.formats.canonical import canonical_json, sha256_json


def verdicts(result: Result) -> list[str]:
    """The last word of each row of the table of links: equal, tolerance, covered (not covered), different."""
    rows = re.findall(r"^ *\d+ +[-\d]+ +\d+\.\.\d+ .*$", result.output, re.MULTILINE)
    return [row.split()[-1] for row in rows]


def edited(release: Path, **changes: Any) -> None:
    value = json.loads((release / "release.json").read_bytes()) | changes
    value["root"] = sha256_json({key: item for key, item in value.items() if key != "root"})
    (release / "release.json").write_bytes(canonical_json(value) + b"\n")


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
