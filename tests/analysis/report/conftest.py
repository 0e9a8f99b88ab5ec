"""A run to which everything happened, which the tests of reports share."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_runs import Made


@pytest.fixture
def eventful(tmp_path: Path) -> Made:
    """A crash that loses two steps, a skipped step, a rollback of one checkpoint, another machine, a chunk put off, and
    the end.
    """
    made = Made(tmp_path / "eventful")
    made.go(0, 8, save=[6])
    made.go(6, 18, save=[12, 18], skip=[9, 14], loss=3.0)
    made.roll_back(12, 1, "the loss rose")
    made.ledger.add("defer", step=12, chunk=2, action="defer", reason="a spike")
    made.environment = {
        **made.environment,
        "device": "other",
        "kernels": {"ops": {"attention": [{"source": "triton"}]}},
    }
    made.go(12, 24, save=[18, 24], loss=1.0)
    made.ledger.add("end", step=24)
    return made
