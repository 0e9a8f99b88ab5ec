"""Ledgers of small runs, and a line of each kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from weftrain.core.config import Recipe
from weftrain.core.formats.canonical import sha256_json
from weftrain.core.run.ledger import Ledger
from weftrain.core.run.metrics import digest

Tiny = Callable[..., Recipe]
SOURCE = "data.sources=[{name: a, path: a, weight: 1}]"


def chunked(tiny_recipe: Tiny, *overrides: str) -> Recipe:
    return tiny_recipe("crystal", "data.synthetic_rows=null", SOURCE, "data.chunks=3", *overrides)


def started(folder: Path, recipe: Recipe, clock: Callable[[], float] = lambda: 1.0) -> Ledger:
    ledger = Ledger(folder, clock=clock)
    ledger.open_run(0, recipe.model_dump(mode="json"), "d" * 64, {"backend": "local"}, None)
    return ledger


def saved(ledger: Ledger, recipe: Recipe, step: int, parent: str | None, salt: str = "") -> str:
    root = sha256_json([step, parent, salt])
    ledger.checkpoint(recipe, "d" * 64, step=step, root=root, parent=parent, metrics_after=0, metrics_sha256=digest([]))
    return root


HEX = "a" * 64
GOOD: dict[str, dict[str, Any]] = {
    "start": {"recipe": {}, "recipe_sha256": HEX, "dataset_id": "d", "environment": {}, "parent": None},
    "resume": {"recipe_sha256": HEX, "dataset_id": "d", "environment": {}, "parent": HEX},
    "recipe": {"changes": [["a.b", 1, None]], "recipe": {}, "recipe_sha256": HEX},
    "chunk_begin": {"chunk": 0, "place": 0, "samples": [0, 8], "dataset_id": "d", "parent": None},
    "chunk_end": {"chunk": 0, "place": 0, "samples": [0, 8], "dataset_id": "d", "root": HEX},
    "checkpoint": {"root": HEX, "parent": None, "metrics_after": 0, "metrics_sha256": HEX},
    "skip": {"samples": [0, 8]},
    "rollback": {"root": HEX, "branch": 1, "abandoned": [[4, HEX], [6, "damaged"]], "reason": "a spike"},
    "defer": {"chunk": 1, "action": "defer", "reason": "a spike"},
    "alert": {"action": "halt", "rule": "loss_spike", "words": "loss 9 is far above 2"},
    "end": {},
}
