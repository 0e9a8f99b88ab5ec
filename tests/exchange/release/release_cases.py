"""Helpers of the tests of releases: read verdicts, edit release.json consistently, damage a byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import Result

from weftrain.core.formats.canonical import canonical_json, sha256_json


def verdicts(result: Result) -> list[str]:
    rows = [line.split() for line in result.output.splitlines() if line.strip()[:1].isdigit() and " of " in line]
    return [row[-1] for row in rows]


def edited(release: Path, **changes: Any) -> None:
    value = json.loads((release / "release.json").read_bytes()) | changes
    value["root"] = sha256_json({key: item for key, item in value.items() if key != "root"})
    (release / "release.json").write_bytes(canonical_json(value) + b"\n")


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
