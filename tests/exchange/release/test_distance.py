"""How far a replay is from a release: what the release says is in no denominator."""

from __future__ import annotations

import math

import pytest
import torch

from weftrain.exchange.release.distance import MeasuredLines, movement, state_distances
from weftrain.exchange.release.replay import _fingerprints


def test_a_release_that_went_far_is_not_close() -> None:
    origin = {"weights/a": torch.ones(4)}
    replayed = {"weights/a": torch.ones(4) + 0.1, "exp_avg/a": torch.full((4,), 2.0)}
    for share in (0.5, 100.0):
        released = {
            "weights/a": origin["weights/a"] + (1 + share) * (replayed["weights/a"] - origin["weights/a"]),
            "exp_avg/a": (1 + share) * replayed["exp_avg/a"],
        }
        found = state_distances(origin, released, replayed)
        there = pytest.approx(share, rel=1e-5)
        assert found == {"weights": there, "exp_avg": pytest.approx(share), "movement": there}
    assert state_distances(origin, origin, {"weights/a": torch.ones(4)}) == {"weights": 0.0, "movement": 0.0}
    assert state_distances(origin, released, origin | {"exp_avg/a": torch.zeros(4)})["exp_avg"] == math.inf


def test_a_movement_of_another_length_is_seen_where_one_in_another_direction_hides_it() -> None:
    """Rounding sends weights elsewhere, as far; another learning rate sends them further."""
    origin = {"weights/a": torch.ones(2), "weights/frozen": torch.ones(3)}
    replayed = origin | {"weights/a": torch.tensor([1.5, 1.0])}
    turned = origin | {"weights/a": torch.tensor([1.48, 1.14])}  # by 0.5 as well
    longer = origin | {"weights/a": torch.tensor([1.505, 1.0])}
    found = [state_distances(origin, released, replayed) for released in (turned, longer)]
    assert [one["weights"] for one in found] == pytest.approx([0.2828, 0.01], rel=1e-3)
    assert [one["movement"] for one in found] == pytest.approx([0.0, 0.01], abs=1e-6)
    assert state_distances(origin, origin, replayed)["movement"] == 1.0, "weights that were not trained"
    assert state_distances(origin, replayed, origin)["movement"] == math.inf
    assert "movement" not in state_distances({}, {"exp_avg/a": torch.ones(1)}, {"exp_avg/a": torch.ones(1)})


def test_movement_is_of_the_weights_that_moved() -> None:
    origin = {"weights/a": torch.ones(4), "weights/frozen": torch.full((4,), 100.0), "exp_avg/a": torch.ones(4)}
    assert movement(origin, origin | {"weights/a": torch.full((4,), 1.25)}) == pytest.approx(0.25)
    assert movement(origin, origin) == 0.0


def test_a_number_is_apart_as_a_share_of_the_replays() -> None:
    lines = MeasuredLines()
    lines.compare({"kind": "step", "step": 1, "loss": 4.0}, {"loss": 2.0})
    lines.compare({"kind": "step", "step": 2, "loss": 2.0}, {"loss": 2.0})
    lines.compare({"kind": "score", "step": 2, "set": "a", "accuracy": 0.25}, {"accuracy": 0.5})
    assert lines.distances == {"loss": 1.0, "held-out accuracy": 0.5}
    assert (lines.first, lines.equal["step"]) == (1, 1)


def test_an_entry_that_one_side_lacks_is_neither_equal_nor_different() -> None:
    older, here = {"torch": "2", "threads": 1}, {"torch": "2", "threads": 2, "processor": "x", "code": "y"}
    assert _fingerprints(older, here) == ((("threads", 1, 2),), ("code", "processor"))
    assert _fingerprints(here, older)[1] == ("code", "processor")
    assert _fingerprints(here, here) == ((), ())
