"""muP derived back from a params file's numbers, and the numbers themselves where muP does not give them."""

from __future__ import annotations

from pathlib import Path

import pytest
from params_cases import base, imported

from weftrain.core.errors import RecipeError


def test_numbers_that_muP_does_not_give_are_taken_as_they_stand(tmp_path: Path) -> None:  # noqa: N802
    """Without a multiplier, or with a multiplier of 1; a multiplier of 1 that muP gives stays muP."""
    for change in (("optimizer.adjust_learning_rate", ...), ("optimizer.adjust_learning_rate.decoder_kernel", 1.0)):
        model = imported(tmp_path, change).recipe.model
        assert model.mup is None
        assert model.initialization is not None
        stds = (
            model.initialization.embedding_std,
            model.initialization.matrix_std,
            model.initialization.output_matrix_std,
        )
        assert stds == (0.073, 0.01825, 0.00228125)
        assert (model.embedding_scale, model.logits_scale) == (14.6, 0.13875)


@pytest.mark.parametrize(
    ("key", "factor", "named"),
    [
        (
            "model.output_layer_initializer",
            1.001,
            "model.output_layer_initializer.std would be 0.00228125, not 0.0022835312",
        ),
        ("model.initializer", 0.5, "model.initializer.std would be 0.01825, not 0.009125"),
    ],
)
def test_a_multiplier_without_mup_is_refused(tmp_path: Path, key: str, factor: float, named: str) -> None:
    given = base()["model"][key.split(".")[1]]
    changes = [(f"{key}.{name}", given[name] * factor) for name in ("std", "a", "b")]
    with pytest.raises(
        RecipeError, match=rf"decoder_kernel is 0\.0625, and muP does not explain it: {named}; a recipe has"
    ):
        imported(tmp_path, *changes)
