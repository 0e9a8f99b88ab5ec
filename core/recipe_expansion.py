"""Short forms of a recipe, written out before it is checked: the recipe that a run records has none of them.

    schedule: {tokens: 2e9, ..}              the steps that read so many tokens; or epochs: 1.5
    schedule.learning_rate: [{shape: linear, share: 0.01, ..}, {shape: constant, rest: true, ..}, {.., tokens: 2e8}]
    batch: {global_batch_size: 256, ramp: {from: 32, increment: 32, steps: 1000}, ..}   as `changes` of the batch size

With changes of batch or sequence length the tokens of each step are those of its own stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import Field

from weftrain.core.errors import DataError, RecipeError
from weftrain.core.formats.strict_model import PositiveInt, StrictModel
from weftrain.core.formats.strict_yaml import Location, validate

At = Callable[[Location], str]
LENGTHS = ("steps", "tokens", "epochs")  # of a schedule: one of them
_PART_LENGTHS = ("steps", "tokens", "share", "rest")  # of a segment of the learning rate


class Ramp(StrictModel):
    """The global batch grows from `from` to batch.global_batch_size by `increment`, in equal parts of `steps` steps."""

    from_: Annotated[int, Field(gt=0, alias="from")]
    increment: PositiveInt
    steps: PositiveInt


def one_length(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Overrides of which the last that gives the schedule's length counts, in whatever unit; the schedule's own length
    is dropped then, in place.
    """
    lengths = {f"schedule.{name}" for name in LENGTHS}
    given = [place for place, item in enumerate(overrides) if item.partition("=")[0] in lengths]
    schedule = tree.get("schedule")
    if given and isinstance(schedule, dict):
        tree["schedule"] = {key: value for key, value in schedule.items() if key not in LENGTHS}
    return [item for place, item in enumerate(overrides) if place not in given[:-1]]


def expand(tree: dict[str, Any], at: At) -> None:
    """Write a recipe's short forms out, in place. Raises RecipeError; what is wrong beside them is left to be found."""
    batch, schedule = tree.get("batch"), tree.get("schedule")
    if isinstance(batch, dict) and "ramp" in batch:
        _expand_ramp(tree, batch, at)
    if not isinstance(schedule, dict):
        return
    given = [name for name in LENGTHS if name in schedule]
    if len(given) > 1:
        raise RecipeError(f"{at(('schedule', given[1]))}: schedule gives {' and '.join(given)}: give one of them")
    if given and given[0] != "steps":
        wanted = _number(schedule.pop(given[0]), ("schedule", given[0]), at)
        tokens = wanted if given[0] == "tokens" else wanted * _tokens_of_an_epoch(tree, at)
        schedule["steps"] = _in_chunks(tree, _steps_of(tree, tokens, 0, at))
    if isinstance(schedule.get("learning_rate"), list) and type(schedule.get("steps")) is int:
        _expand_segments(tree, schedule, at)


def _expand_ramp(tree: dict[str, Any], batch: dict[str, Any], at: At) -> None:
    where: Location = ("batch", "ramp")
    ramp = validate(Ramp, batch.pop("ramp"), lambda location: at((*where, *location)))
    last = batch.get("global_batch_size")
    if type(last) is not int:
        return
    count, rest = divmod(last - ramp.from_, ramp.increment)
    if count < 1 or rest or ramp.steps < count:
        raise RecipeError(
            f"{at(where)}: batch.ramp: from {ramp.from_} to {last} by {ramp.increment} in {ramp.steps} steps: "
            "global_batch_size must be larger by a multiple of increment, and each size last a step or more"
        )
    batch["global_batch_size"] = ramp.from_
    sizes = {ramp.steps * number // count: ramp.from_ + ramp.increment * number for number in range(1, count + 1)}
    changes: dict[int, dict[str, Any]] = {
        step: {"step": step, "set": {"batch.global_batch_size": size}} for step, size in sizes.items()
    }
    others: list[Any] = []  # what is wrong with these is found when the recipe is checked
    for own in tree.get("changes") or ():
        step = own.get("step") if isinstance(own, dict) else None
        if type(step) is not int or not isinstance(own.get("set"), dict):
            others.append(own)
            continue
        if "batch.global_batch_size" in own["set"]:
            raise RecipeError(f"{at(('changes',))}: both changes and batch.ramp set batch.global_batch_size")
        values = changes[step]["set"] if step in changes else {}
        changes[step] = {**own, "set": {**values, **own["set"]}}
    tree["changes"] = [*(changes[step] for step in sorted(changes)), *others]


def _expand_segments(tree: dict[str, Any], schedule: dict[str, Any], at: At) -> None:
    """Give each segment its steps. The last one takes what rounding shares leaves, where they come to the whole."""
    steps, segments = schedule["steps"], [dict(one) for one in schedule["learning_rate"] if isinstance(one, dict)]
    if len(segments) < len(schedule["learning_rate"]) or not any(
        key in one for one in segments for key in _PART_LENGTHS[1:]
    ):
        return
    if sum("rest" in one for one in segments) > 1:
        raise RecipeError(f"{at(('schedule', 'learning_rate'))}: learning_rate: give 'rest' in one segment")
    shares, first = 0.0, 0
    for number, one in enumerate(segments):
        where: Location = ("schedule", "learning_rate", number)
        kinds = [kind for kind in _PART_LENGTHS if kind in one]
        if len(kinds) != 1:
            raise RecipeError(f"{at(where)}: learning_rate.{number}: give one of {', '.join(_PART_LENGTHS)}")
        if kinds[0] == "share":
            share = _number(one.pop("share"), (*where, "share"), at)
            shares += share
            whole = number == len(segments) - 1 and math.isclose(shares, 1)
            one["steps"] = steps - first if whole else max(1, round(share * steps))
        elif kinds[0] == "tokens":
            one["steps"] = _steps_of(tree, _number(one.pop("tokens"), (*where, "tokens"), at), first, at)
        if "rest" not in one:
            first += one["steps"] if type(one["steps"]) is int else 0
    for number, one in enumerate(segments):
        if "rest" in one:
            if one.pop("rest") is not True or first >= steps:
                raise RecipeError(
                    f"{at(('schedule', 'learning_rate', number))}: learning_rate.{number}: the other segments come to "
                    f"{first} of {steps} steps, and `rest: true` takes what is left"
                )
            one["steps"] = steps - first
    schedule["learning_rate"] = segments


def _steps_of(tree: dict[str, Any], tokens: float, first: int, at: At) -> int:
    """How many steps from `first` on read at least so many tokens, each by the batch and length of its stage."""
    keys = ("batch.global_batch_size", "data.sequence_length")
    size, length = (_found(tree, key.split(".")) for key in keys)
    stages: list[tuple[Any, Any, Any]] = [(0, size, length)]
    changes = [one for one in tree.get("changes") or () if isinstance(one, dict) and isinstance(one.get("set"), dict)]
    for change in changes:
        size, length = (change["set"].get(key, now) for key, now in zip(keys, (size, length), strict=True))
        stages.append((change.get("step"), size, length))
    if not all(type(part) is int and part >= 0 for stage in stages for part in stage) or not all(
        stage[1] and stage[2] for stage in stages
    ):
        raise RecipeError(
            f"{at(('schedule',))}: a length in tokens or epochs follows from batch.global_batch_size and "
            "data.sequence_length, and of each change: give them as numbers"
        )
    left, step = tokens, float(first)
    for (start, size, length), end in zip(stages, [*(stage[0] for stage in stages[1:]), math.inf], strict=True):
        if step >= end:
            continue
        needed = math.ceil(left / (size * length) - 1e-9)
        if max(step, start) + needed <= end:
            return int(max(step, start) + needed - first)
        left, step = left - (end - max(step, start)) * size * length, end
    raise AssertionError("the last stage has no end")


def _tokens_of_an_epoch(tree: dict[str, Any], at: At) -> float:
    """Positions in one pass over the sources: of the one source, or of what every source states of itself."""
    from weftrain.core.order.data_section import DataConfig
    from weftrain.core.order.source_order import ordered_source
    from weftrain.core.order.source_sets import open_set

    where = at(("schedule", "epochs"))
    data = validate(DataConfig, tree.get("data"), lambda location: at(("data", *location)))
    length = data.row_length or data.sequence_length
    if data.synthetic_rows is not None:
        return float(data.synthetic_rows * length)
    if data.sources[0].tokens is not None:
        return float(sum(source.tokens or 0 for source in data.sources))
    if data.sources[0].weight is not None and len(data.sources) > 1:
        raise RecipeError(
            f"{where}: schedule.epochs: sources with weights end their epochs at different steps: give each source "
            "epochs instead of weight, of which schedule.epochs: 1 reads all, or give schedule.tokens"
        )
    rows = 0.0
    for source in data.sources:
        try:
            shards = open_set(data, source, "train", None, 1 << 31)
            assert shards is not None
            order = ordered_source(data.model_copy(update={"continues": None}), source, shards).order
        except DataError as error:
            raise RecipeError(f"{where}: schedule.epochs is counted in the rows of the datasets: {error}") from None
        rows += (source.epochs or 1) * (order.num_rows // order.num_epochs)
    return rows * length


def _in_chunks(tree: dict[str, Any], steps: int) -> int:
    """`steps` raised to a multiple of data.chunks."""
    chunks = _found(tree, ["data", "chunks"])
    return -(-steps // chunks) * chunks if type(chunks) is int and chunks > 0 else steps


def _number(value: Any, location: Location, at: At) -> float:
    if type(value) not in (int, float) or not 0 < value < 1 << 53:
        key = ".".join(map(str, location))
        raise RecipeError(f"{at(location)}: {key}: should be a number > 0, not {value!r}")
    return float(value)


def _found(tree: Any, parts: Sequence[str]) -> Any:
    for part in parts:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
