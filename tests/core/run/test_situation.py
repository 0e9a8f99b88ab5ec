"""What `examine` finds in a run's folder; that it writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from small_ledgers import started

from weftrain.backends.null import BACKEND
from weftrain.core.config import Recipe
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.metrics import METRICS
from weftrain.core.run.run_folder import RunFolder
from weftrain.core.run.situation import FoundRun, Situation, examine

Tiny = Callable[..., Recipe]


def found_in(folder: Path, recipe: Recipe, said: list[str]) -> FoundRun:
    run = RunFolder(folder, recipe.model_dump(mode="json"))
    return examine(run, recipe, BACKEND, BACKEND.options(), said.append, False, ())


def test_an_empty_folder_holds_nothing(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe, said = tiny_recipe(), list[str]()
    found = found_in(tmp_path, recipe, said)
    assert found.situation(recipe, False) == Situation(recipe.schedule.steps)
    assert (found.manifest, found.told_unfinished(recipe), said) == (None, None, [])
    entry = found.entry("a" * 32, {}, from_scratch=True, repair_ledger=True)
    assert {key: value for key, value in entry.items() if value} == {"stretch": "a" * 32}
    assert list(tmp_path.iterdir()) == []


def test_torn_and_damaged_lines_are_told_and_left(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe, said = tiny_recipe(), list[str]()
    started(tmp_path, recipe)
    for name, torn in ((LEDGER, b'{"n":'), (METRICS, b'nonsense\n{"kind": "step"')):
        with (tmp_path / name).open("ab") as file:
            file.write(torn)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    found = found_in(tmp_path, recipe, said)
    assert (len(found.entries), found.damaged_metrics) == (1, (1,))
    assert [line.split(": ")[2].split(" ")[0] for line in said] == ["a", "not"]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_the_stored_state_only_that_is_forgotten(tiny_recipe: Tiny, tmp_path: Path) -> None:
    found = found_in(tmp_path, tiny_recipe(), [])
    assert found.without_stored_state() == found
