"""A recipe's text, and what is said of one that is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from weftrain.core.errors import RecipeError
from weftrain.core.formats.strict_yaml import read_builtin
from weftrain.core.recipe_file import load_recipe

TEXT = read_builtin("weftrain.core", "bench_70m")


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)
