"""How a complete run is continued: the overrides that make it longer, checked by the code that will be asked when they
are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from weftrain.core.config import Recipe
from weftrain.core.errors import WeftrainError
from weftrain.core.formats.canonical import canonical_json, parse_json
from weftrain.core.order.batch import BatchSource
from weftrain.core.run.continuation import check_amounts, continue_data
from weftrain.core.run.ledger import read_ledger
from weftrain.core.run.ledger_schema import LEDGER
from weftrain.core.run.lineage import lineage, with_decisions
from weftrain.core.run.run_folder import RunFolder, differences, follows

Load = Callable[[Sequence[str]], Recipe]  # overrides -> the recipe that `train` would make of them


@dataclass(frozen=True)
class LongerRun:
    """steps: of the longer run. overrides: of the whole command; allow: keys of the recipe that change with them."""

    steps: int
    overrides: tuple[str, ...]
    allow: tuple[str, ...]


def longer_run(
    folder: Path, recipe: Recipe, source: BatchSource, done: int, overrides: Sequence[str], load: Load
) -> LongerRun | str:
    """How the run in `folder`, complete after `done` steps by `recipe`, trains twice as long; or, in words, what must
    be decided first.

    overrides: of the command that made it. Nothing is written.
    """
    steps = 2 * max(done, recipe.schedule.steps)
    replaced = ("schedule.steps",) if recipe.data.chunks is None else ("schedule.steps", "data.chunks")
    given = [item for item in overrides if item.partition("=")[0] not in replaced]
    given.append(f"schedule.steps={steps}")
    if recipe.data.chunks is not None:
        given.append(f"data.chunks={steps // (recipe.schedule.steps // recipe.data.chunks)}")
    if (missing := steps - sum(segment.steps for segment in recipe.schedule.learning_rate)) > 0:
        last = recipe.schedule.learning_rate[-1]
        rate = last.start if last.end is None else last.end
        key = f"schedule.learning_rate.{len(recipe.schedule.learning_rate)}"
        if not rate:
            return (
                f"the learning rate ends at 0, so more steps need one: add schedule.steps={steps} and "
                f"'{key}={{shape: constant, steps: {missing}, start: RATE}}'"
            )
        given.append(f"{key}={{shape: constant, steps: {missing}, start: {rate!r}}}")
    try:
        asked = load(given).at(done)
        skip = with_decisions(asked.data, lineage(read_ledger(folder / LEDGER)).decisions)
        asked = Recipe.model_validate(
            asked.model_dump(mode="json") | {"data": asked.data.model_dump(mode="json") | {"skip": skip}}
        )
        cursors = {name: cursor.model_dump(mode="json") for name, cursor in source.cursors(done).items()}
        continued = continue_data(asked, recipe, done, source.dataset_id, cursors)
        list(check_amounts(continued.recipe, continued.source))
        now, then = (parse_json(canonical_json(one.model_dump(mode="json"))) for one in (recipe, continued.recipe))
        allow = tuple(key for key, _, _ in differences(now, then) if not follows(key))
        RunFolder(folder, then).check_recipe(set(allow))
    except (WeftrainError, ValueError) as error:
        return f"more steps need another recipe: {error}"
    return LongerRun(steps, tuple(given), allow)
