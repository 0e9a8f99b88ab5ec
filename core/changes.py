"""Changes that a recipe plans: at which step of the run which keys take which values.

    changes:
      - {step: 1000, set: {batch.global_batch_size: 64}, reason: "ramp of the batch"}

`Recipe.at` (core/config.py) is the recipe as it stands after so many completed steps: a pure function of the recipe. A
change is a resume that was allowed beforehand: at its step the run saves, and goes on by the changed recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Annotated, Any, get_args

from pydantic import Field, model_serializer, model_validator
from pydantic import SerializerFunctionWrapHandler as Handler

from weftrain.core.formats.strict_model import PositiveInt, StrictModel
from weftrain.core.model_config import ChangeableKey

MAX_CHANGES = 256  # each is a start of its own, with a checkpoint before it

# Section, or key, that a change may set -> keys of it that it may not, and why.
_OF_THE_RUN = "it belongs to the run as a whole"
_ORDER = "the rows that were read would come again in another order"
_REFUSED = {
    "name": _OF_THE_RUN,
    "description": _OF_THE_RUN,
    "seed": _OF_THE_RUN,
    "start_from": "it says what step 0 starts from",
    "changes": "a change cannot change the plan of changes",
    "backend.name": "a run goes over to another backend by a start of its own: stop there, and go on with --backend",
    "batch.replicas": "the processes of a run are started with it: stop there, and start as many again",
    "data.continues": "`train` writes it",
    "data.chunks": "a run is cut in chunks when it begins",
    "data.root": "the folder of the datasets is the machine's: move the datasets, or set it when the run is resumed",
    "data.shuffle_seed": _ORDER,
    "data.order": _ORDER,
    "data.synthetic_rows": "rows without a dataset are for measuring speed",
    "optimizer.name": "the state of another optimizer is another one",
    "tuning": "it decides which parameters are trained and have optimizer state, and their groups",
}
# Keys of the model that may change: those that change what the same weights compute, and the limit of the positions.
_ABSENT = object()
_MODEL_KEYS = (*get_args(ChangeableKey), "max_position_embeddings", "dropout")


class Change(StrictModel):
    """What changes after `step` completed steps: dotted key -> value. The step `step`, counted from 0, is the first one
    with it.
    """

    step: PositiveInt
    set: Annotated[dict[str, Any], Field(min_length=1)]
    reason: Annotated[str, Field(min_length=1, max_length=10_000)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Change:
        for key in self.set:
            if why := refused(key):
                raise ValueError(f"set: '{key}' cannot be changed within a run: {why}")
        return self

    @model_serializer(mode="wrap")
    def _dump(self, handler: Handler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


def refused(key: str) -> str:
    """Why a key cannot be changed within a run; "" where it can."""
    for one, why in _REFUSED.items():
        if key == one or key.startswith(f"{one}."):
            return why
        if one.startswith(f"{key}."):
            return f"it holds {one}: name the keys of it that change"
    section, _, rest = key.partition(".")
    if section == "model" and rest.split(".")[0] not in _MODEL_KEYS:
        return "it decides the shape of the weights, or what they are"
    return ""


def changed(tree: Mapping[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """A recipe's tree of JSON values with the changes made. Raises ValueError for a key that it does not have."""
    result: dict[str, Any] = dict(tree)
    for change in changes:
        for key, value in change.set.items():
            result = _with(result, key.split("."), value, key)
    return result


def restored(tree: Mapping[str, Any], there: Mapping[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """A recipe's tree with the keys of `changes` as another recipe of the same run has them; lists as a whole."""
    result: Any = dict(tree)
    for key in (key for change in changes for key in change.set):
        parts: list[str] = list(takewhile(lambda part: not part.isdigit(), key.split(".")))
        value: Any = there
        for part in parts:
            value = value.get(part, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        result = _with(result, parts, value, key)
    return dict(result)


def _with(tree: Any, parts: Sequence[str], value: Any, key: str) -> Any:
    """A copy of `tree` in which the value at `parts` is another one; what lies beside it is shared."""
    if not parts:
        return value
    first, *rest = parts
    if isinstance(tree, list | tuple) and first.isdigit() and int(first) <= len(tree) - bool(rest):
        at, items = int(first), list(tree)
        items[at : at + 1] = [_with(items[at] if at < len(items) else None, rest, value, key)]
        return items
    if isinstance(tree, dict) or (tree is None and not first.isdigit()):
        inner = {} if tree is None else tree
        if value is _ABSENT and not rest:
            return {name: one for name, one in inner.items() if name != first}
        return {**inner, first: _with(inner.get(first), rest, value, key)}
    raise ValueError(f"set: there is no key '{key}'")
