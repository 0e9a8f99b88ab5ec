"""`weftrain recipe`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from click.testing import Result

from weftrain.core.recipe_file import builtin_recipes, load_recipe


def test_a_copy_is_the_recipe(weftrain: Callable[..., Result], tmp_path: Path) -> None:
    assert weftrain("recipe").output.split() == builtin_recipes()
    copy = tmp_path / "my.yaml"
    copy.write_text(weftrain("recipe", "crystal_demo").output)
    assert "# " in copy.read_text()
    assert load_recipe(str(copy)).recipe == load_recipe("crystal_demo").recipe


def test_a_misspelt_name(weftrain: Callable[..., Result]) -> None:
    result = weftrain("recipe", "crystal_dem")
    assert result.exit_code == 2
    assert "did you mean 'crystal_demo'?" in result.output
