"""Types of a schema in words, for messages and for the reference of keys: 'integer > 0', 'list of Segment sections'."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_UNBOUNDED = 1 << 53  # a limit from here on only says that a float64 holds the number


def type_words(annotation: Any, metadata: Any = ()) -> str:
    """A type as its user knows it, never a Python type's name. metadata: bounds of a pydantic field."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [
            bound for item in arguments[1:] for bound in (item.metadata if isinstance(item, FieldInfo) else [item])
        ]
        return type_words(arguments[0], [*inner, *metadata])
    if origin in (Union, types.UnionType):
        words = [type_words(argument, metadata) for argument in arguments if argument is not type(None)]
        return " or ".join([*words, *(["null"] if type(None) in arguments else [])])
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin in (tuple, list):
        if arguments[-1] is Ellipsis or origin is list:
            item = type_words(arguments[0])
            return f"list of {item}s" if item.endswith(" section") else f"list of {item}"
        return f"list of {len(arguments)}: {', '.join(map(type_words, arguments))}"
    if origin is dict:
        return f"mapping of {type_words(arguments[0])} to {type_words(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"{annotation.__name__.removesuffix('Config').removesuffix('Section')} section"
    bounds = [
        f"{sign} {limit}"
        for item in metadata
        for name, sign in _BOUNDS.items()
        if (limit := getattr(item, name, None)) is not None and abs(limit) < _UNBOUNDED
    ]
    return " ".join([_WORDS.get(annotation, "value"), *([", ".join(bounds)] if bounds else [])])


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every dotted key of a model and its type in words; '*' stands for a list's items."""
    for name, info in model.model_fields.items():
        yield prefix + name, type_words(info.annotation, info.metadata)
        for inner, step in models_in(info.annotation):
            yield from keys(inner, f"{prefix}{name}.{step}")


def models_in(annotation: Any, step: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """(section, step to it) of each section in a type; the step of a list's or a mapping's items is '*.'."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, step
    origin = get_origin(annotation)
    for argument in get_args(annotation):
        if origin is not Literal:
            yield from models_in(argument, step + "*." if origin in (tuple, list, dict) else step)
