"""Whether a run that is prepared for one recipe is prepared for another as well: see core/backend.py, Continues."""

from __future__ import annotations

from typing import Any

from weftrain.core.config import Recipe

# What a backend reads of a recipe at each step, or never: sections, and keys of them.
_RECORD = ("name", "description", "checkpoint", "log", "changes", "alerts", "evaluations")
_EACH_STEP = (*_RECORD, "schedule", "data", "batch.global_batch_size", "batch.micro_batch_size")
_PREPARED = ("document_attention",)  # of the data, which chooses the kernels


def prepared_alike(before: Recipe, after: Recipe) -> bool:
    """Whether the recipes differ in nothing but rows, batch size, schedule and what is recorded and when. What depends
    on the number or the shape of micro-batches is the caller's to compare.
    """
    return _prepared(before) == _prepared(after)


def _prepared(recipe: Recipe) -> dict[str, Any]:
    tree = recipe.model_dump(mode="json")
    data = {key: tree["data"].get(key) for key in _PREPARED}
    for key in _EACH_STEP:
        *section, last = key.split(".")
        (tree[section[0]] if section else tree).pop(last, None)
    return {**tree, "data": data}
