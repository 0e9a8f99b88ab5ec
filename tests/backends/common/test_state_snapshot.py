"""A snapshot reads the run's tensors until the run changes them, and a state that does not fit is refused."""

from __future__ import annotations

import pytest
import torch

from weftrain.backends.common.state_snapshot import SnapshotOwner, StateSnapshot, check_state
from weftrain.core.errors import CheckpointError

SHAPES = {"weights/a": (2,)}


def test_a_held_snapshot_is_copied_before_a_change_and_a_dropped_one_is_not_read() -> None:
    own, reads, owner = torch.zeros(2), [], SnapshotOwner()

    def read(name: str) -> torch.Tensor:
        reads.append(name)
        return own.clone()

    held = owner.track(StateSnapshot(SHAPES, read))
    assert reads == []
    owner.detach()
    own += 1
    assert held["weights/a"].tolist() == [0.0, 0.0]
    owner.track(StateSnapshot(SHAPES, read))
    owner.detach()
    assert reads == ["weights/a"]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "missing \\['weights/a'\\]"),
        ({"weights/a": torch.zeros(2), "weights/b": torch.zeros(1)}, "unknown \\['weights/b'\\]"),
        ({"weights/a": torch.zeros(3)}, r"float32 \[3\], the model's is torch.float32 \[2\]"),
        ({"weights/a": torch.zeros(2, dtype=torch.float64)}, "float64"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(tensors: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        check_state(tensors, SHAPES)
