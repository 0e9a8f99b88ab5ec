"""Contrast is sufficient in light and dark."""

from __future__ import annotations

import re
from collections.abc import Sequence

from weftrain.analysis.report.style import STYLE


def luminance(colour: Sequence[float]) -> float:
    """WCAG 2: of sRGB in 0..1."""
    red, green, blue = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_sufficient_in_light_and_dark() -> None:
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[:2]
    for scheme in (light, dark):
        colours = {
            name: [int(value[index : index + 2], 16) / 255 for index in (0, 2, 4)]
            for name, value in re.findall(r"--([a-z0-9-]+): #([0-9a-f]{6})", scheme)
        }
        for ground in ("paper", "card"):
            for ink in ("ink", "soft", "c0", "restart", "rollback", "skip", "recipe", "defer"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
            for curve in ("c1", "c2", "c3", "c4", "c5"):
                assert contrast(colours[curve], colours[ground]) >= 3, (curve, ground)
        heated = [0.55 * heat + 0.45 * card for heat, card in zip(colours["heat"], colours["card"], strict=True)]
        assert contrast(colours["ink"], heated) >= 4.5
        assert contrast(colours["ink"], colours["changed"]) >= 4.5
