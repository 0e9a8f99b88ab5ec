"""Which of the faults planted in kernels CI looks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def parameters(faults: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Of faults (op, file, what, check, ...): the first of each op and check is for `make prove`, the others for
    `make soak`. Each takes seconds, as it is compiled or interpreted.
    """
    seen: set[tuple[str, str]] = set()
    found = []
    for fault in faults:
        op, _, what, check, *_ = fault
        marks = pytest.mark.soak if (op, check) in seen else pytest.mark.prove
        found.append(pytest.param(fault, marks=marks, id=f"{op}-{what.replace(' ', '_')}"))
        seen.add((op, check))
    return found
