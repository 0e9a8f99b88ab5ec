"""Reads documentation pages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path


def commands(page: Path) -> list[str]:
    """The command lines of a page's `bash` blocks, continued lines joined, without what stands behind three spaces and #."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = (line for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [line.split("   #")[0].strip() for line in lines if line.strip()]


def needs_vendor(command: str) -> bool:
    """Whether the Cerebras vendor's environment has to be there: to lower a recipe, or for its backend."""
    words = shlex.split(command)
    return words[1] == "lower" or "--backend cerebras" in command
