"""What the tests of Model Zoo files share."""

from __future__ import annotations

from pathlib import Path

import pytest
from modelzoo_checkpoints import random_state, small

from weftrain.exchange.modelzoo.checkpoint_writer import write_checkpoint


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A CrystalCoder's checkpoint without optimizer state."""
    path = tmp_path / "checkpoint.mdl"
    write_checkpoint(path, small(), random_state(small()), step=3)
    return path
