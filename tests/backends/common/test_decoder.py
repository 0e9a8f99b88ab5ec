"""What a run computes with: which kernels a recipe chooses, and in which order they are asked."""

from __future__ import annotations

from typing import Any

import pytest

from weftrain.backends.common import decoder


@pytest.mark.parametrize("compiled", [True, False])
def test_the_default_order_knows_whether_the_model_is_compiled(
    compiled: bool, tiny_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    select = decoder.select

    def recorded(*arguments: Any, compiled: bool) -> Any:
        asked.append(compiled)
        return select(*arguments, compiled=compiled)

    monkeypatch.setattr(decoder, "select", recorded)
    decoder.select_kernels(tiny_recipe("amber", f"backend.options.compile={str(compiled).lower()}"), "cpu")
    assert asked == [compiled]
