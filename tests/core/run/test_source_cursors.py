"""How far each source had been read: as it was recorded, else by the datasets, else unknown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from weftrain.core.config import Recipe
from weftrain.core.data import training_source
from weftrain.core.formats.dataset_manifest import SourceCursor
from weftrain.core.run.source_cursors import continued_sources, cursors_of

Tiny = Callable[..., Recipe]


def test_the_record_comes_before_the_datasets(tiny_recipe: Tiny, tmp_path: Path) -> None:
    cursor = SourceCursor(dataset_id="d" * 64, read=9, turn=0, place=9, subsets=((0.0, 1.0),))
    sources = "data.sources=[{name: a, path: a, weight: 1}]"
    gone = tiny_recipe("crystal", "data.synthetic_rows=null", sources, f"data.root={tmp_path}")
    assert cursors_of(gone, gone, 3, None, {"a": cursor.model_dump(mode="json")}) == {"a": cursor}
    assert cursors_of(gone, gone, 3, None) is None


def test_synthetic_rows_have_no_sources(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("crystal")
    assert cursors_of(recipe, recipe, 3, None) == {}
    assert continued_sources(recipe, recipe, training_source(recipe), None) == ({}, [])
