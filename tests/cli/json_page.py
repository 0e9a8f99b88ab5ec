"""The fields that docs/json-output.md names."""

from __future__ import annotations

import re

from places import ROOT


def documented(command: str) -> set[str]:
    """The fields in backticks of the page's row of a command."""
    page = (ROOT / "docs" / "json-output.md").read_text()
    (row,) = re.findall(rf"^\| `{re.escape(command)}` \| (.*) \|$", page, re.MULTILINE)
    return set(re.findall(r"`(\w+)`", row))
