"""The coordinate check itself: flat with muP, growing without."""

from __future__ import annotations

from pathlib import Path

import pytest

from weftrain.analysis.coordinate_check import ActivationSize, coordinate_check, growth, plot

STEPS = 3
OUTPUTS = ("layers.0", "layers.1", "logits")


@pytest.fixture(scope="module")
def points() -> list[ActivationSize]:
    return coordinate_check(steps=STEPS)


def test_activations_change_alike_at_every_width_with_mup(points: list[ActivationSize]) -> None:
    for activation in ("embedding", *OUTPUTS):
        for step in range(1, STEPS + 1):
            assert abs(growth(points, "mup", activation, step)) < 0.25, (activation, step)


def test_activations_change_the_more_the_wider_without_mup(points: list[ActivationSize]) -> None:
    for activation in OUTPUTS:
        for step in range(1, STEPS + 1):
            assert growth(points, "standard", activation, step) > 0.6, (activation, step)


def test_both_start_with_flat_block_outputs(points: list[ActivationSize]) -> None:
    for activation in ("embedding", "layers.0", "layers.1"):
        scales = [point.scale for point in points if point.activation == activation and point.step == 0]
        assert max(scales) < 1.1 * min(scales)


def test_growth_is_the_exponent() -> None:
    made_up = [ActivationSize("mup", width, 1, "logits", 0.0, 3 * width**0.7) for width in (64, 128, 512)]
    assert growth(made_up, "mup", "logits", 1) == pytest.approx(0.7)


def test_plot_is_a_png(points: list[ActivationSize], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(points, tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")


def test_grouped_heads_with_norms_are_told_apart_too() -> None:
    """Two query heads to a key head and norms of q and k, after two steps at two widths."""
    points = coordinate_check(widths=(64, 192), steps=2, seeds=1, shape="grouped")
    for activation in OUTPUTS:
        assert abs(growth(points, "mup", activation, 2)) < 0.35, activation
        assert growth(points, "standard", activation, 2) > 0.7, activation


def test_muon_moves_activations_alike_at_every_width_with_the_scale_spectral_alone() -> None:
    """match_adamw keeps the elements of an update, as AdamW does: without muP's multiplier, which Muon does not have,
    what they do together grows with the width.
    """
    points = coordinate_check(("muon_spectral", "muon_match_adamw"), widths=(64, 128, 256), steps=2, seeds=1)
    for activation in ("layers.0", "layers.1"):
        assert abs(growth(points, "muon_spectral", activation, 2)) < 0.2, activation
        assert growth(points, "muon_match_adamw", activation, 2) > 0.45, activation
