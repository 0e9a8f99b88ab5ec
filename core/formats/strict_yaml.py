"""YAML that people write, read strictly: every complaint names file, line, key and the nearest valid name.

`yaml.safe_load` silently keeps the last of two equal keys, reads `1e-3` as a string and `no` as a boolean, and expands
aliases without bound. Here scalars follow the YAML 1.2 core schema, and duplicate keys, aliases and tags are refused.
`key.sub=value` overrides are applied to the tree before a schema checks it, so that both meet the same rules.

    lines = LineMap("x.yaml")
    tree = parse_mapping(text, lines)
    override(tree, "schedule.steps=100", lines)
    recipe = validate(Recipe, tree, lines.at)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from weftrain.core.errors import RecipeError, file_problem
from weftrain.core.formats.likely_paths import did_you_mean
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.formats.type_words import keys

MAX_DEPTH = 12
MAX_NUMBER_CHARACTERS = 100
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
Location = tuple[str | int, ...]  # of a value in a tree: ('data', 'sources', 0, 'path')
Model = TypeVar("Model", bound=BaseModel)


class _CoreSchemaLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the implicit types of YAML 1.2's core schema instead of 1.1's."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own class attribute


class _CoreSchemaDumper(yaml.SafeDumper):
    """PyYAML's safe dumper for that loader: it quotes a string exactly where the loader would read something else."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own class attribute

    def ignore_aliases(self, data: Any) -> bool:
        return True  # the loader refuses them


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", "\0", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    for _class in (_CoreSchemaLoader, _CoreSchemaDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})\Z"), _first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """Decimal, 0o octal or 0x hexadecimal. PyYAML's own constructor reads 010 as octal and fails on 09."""
    text = node.value
    if len(text) > MAX_NUMBER_CHARACTERS:
        raise yaml.constructor.ConstructorError(None, None, f"an integer of {len(text)} characters", node.start_mark)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _represent_str(dumper: _CoreSchemaDumper, text: str) -> yaml.ScalarNode:
    """Escaped if the text has Unicode line breaks, which PyYAML would write raw and read as spaces."""
    style = '"' if set(text) & set("\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_CoreSchemaLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_CoreSchemaDumper.add_representer(str, _represent_str)


def dump_yaml(tree: Any) -> str:
    """`tree` (JSON values) as YAML that `parse_mapping` reads back as the same values."""
    return yaml.dump(tree, Dumper=_CoreSchemaDumper, sort_keys=False, allow_unicode=True, width=140)


@dataclass
class LineMap:
    """Which line of the file `name`, or which override, each value of a tree came from."""

    name: str
    marks: dict[Location, str] = field(default_factory=dict)  # location -> 'file:line'

    def at(self, location: Location) -> str:
        """'file:line' of the value, or of the innermost given one around it."""
        for end in range(len(location), -1, -1):
            if location[:end] in self.marks:
                return self.marks[location[:end]]
        return self.name


def read_text(path: Path) -> str:
    """The text of a YAML file. Raises RecipeError."""
    try:
        return read_plain(path, "recipe").decode()
    except OSError as error:
        hint = f"; {meant}" if (meant := did_you_mean(path)) else ""
        raise RecipeError(f"{path}: cannot read the recipe: {file_problem(error)}{hint}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text at byte {error.start}") from None


def builtin_names(package: str) -> list[str]:
    """Names of the files `recipes/NAME.yaml` that ship in `package`, sorted."""
    folder = resources.files(package) / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_builtin(package: str, name: str, kind: str = "recipe") -> str:
    """The text of `recipes/NAME.yaml` in `package`. Raises RecipeError with the nearest name."""
    known = builtin_names(package)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise RecipeError(
            f"unknown {kind} '{name}'; {hint}Built in: {', '.join(known)}; or give the path of a .yaml file"
        )
    return (resources.files(package) / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def read_as(model: type[Model], name: str, text: str, overrides: Iterable[str] = ()) -> Model:
    """`text` of the file `name`, with overrides, as `model`. Raises RecipeError naming file, line, key and remedy."""
    lines = LineMap(name)
    tree = parse_mapping(text, lines)
    for each in overrides:
        override(tree, each, lines)
    return validate(model, tree, lines.at)


def parse_mapping(text: str, lines: LineMap) -> dict[str, Any]:
    """`parse`, for text that must be a mapping."""
    tree = parse(text, lines)
    if not isinstance(tree, dict):
        raise RecipeError(f"{lines.name}: a recipe is a mapping of sections, this file holds {kind_of(tree)}")
    return tree


def parse(text: str, lines: LineMap, *, empty_is_null: bool = False) -> Any:
    """The tree of any YAML text, at most MAX_DEPTH levels deep, with the line of each value in `lines`.

    empty_is_null: for other programs' files. In a recipe an empty value is refused: it usually comes from an unset
    variable, and null would turn something off. Raises RecipeError.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_CoreSchemaLoader):
            start: Any = event.start_mark  # Any: PyYAML's stubs make it optional, and it is not
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH + 1:  # at once: the time of PyYAML's scanner grows with the square of the depth
                raise RecipeError(
                    f"{lines.name}:{start.line + 1}: nested deeper than the {MAX_DEPTH} levels that a recipe may have"
                )
            if isinstance(event, yaml.AliasEvent):
                raise RecipeError(
                    f"{lines.name}:{start.line + 1}: alias '*{event.anchor}': recipes take no aliases, write the value "
                    "out"
                )
        loader = _CoreSchemaLoader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _build(loader, node, (), lines, empty_is_null)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark is not None else 1
        raise RecipeError(f"{lines.name}:{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{lines.name}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{lines.name}: nested deeper than a recipe is") from None


def _build(loader: yaml.SafeLoader, node: yaml.Node, location: Location, lines: LineMap, empty_is_null: bool) -> Any:
    line = f"{lines.name}:{node.start_mark.line + 1}"
    lines.marks.setdefault(location, line)
    if len(location) > MAX_DEPTH:
        raise RecipeError(f"{line}: nested deeper than the {MAX_DEPTH} levels that a recipe may have")
    if node.tag not in _PLAIN_TAGS:
        raise RecipeError(
            f"{line}: tag '{node.tag}': recipes hold plain numbers, strings, booleans, lists and mappings only"
        )
    if isinstance(node, yaml.MappingNode):
        tree: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key_line = f"{lines.name}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{key_line}: a key is a plain word, this is {key_node.id}")
            key, inner = key_node.value, (*location, key_node.value)
            if key in tree:
                raise RecipeError(
                    f"{key_line}: duplicate key '{dotted(inner)}' (first at {lines.at(inner)}); remove one of the two"
                )
            lines.marks[inner] = key_line
            tree[key] = _build(loader, value_node, inner, lines, empty_is_null)
        return tree
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*location, index), lines, empty_is_null) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and node.value == "" and node.style is None and not empty_is_null:
        key = f"'{dotted(location)}' " if location else ""
        raise RecipeError(f"{line}: {key}has an empty value: write null, or give the value")
    return loader.construct_object(node)


def override(tree: dict[str, Any], text: str, lines: LineMap) -> None:
    """Apply `a.b.c=value` to the tree, in place; the value is read as a file's would be. Raises RecipeError."""
    key, equals, given = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"'{text}': an override reads key.sub=value, e.g. schedule.steps=100")
    origin = f"command line '{text}'"
    value = parse(given, LineMap(origin))
    if value is None and given.strip().lower() not in ("null", "~"):
        raise RecipeError(f"{origin}: '{key}' has an empty value: write null, or give the value")
    target: Any = tree
    parts: list[str | int] = []
    *parents, last = key.split(".")
    for part in parents:
        step: Any = int(part) if isinstance(target, list) and part.isdigit() else part
        parts.append(step)
        if isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
            lines.marks[tuple(parts)] = origin
        try:
            target = target[step]
        except (KeyError, IndexError, TypeError):
            raise RecipeError(f"{origin}: no such key '{dotted(parts)}' in {lines.name}") from None
    if isinstance(target, list) and last.isdigit() and int(last) <= len(target):
        target[int(last) : int(last) + 1] = [value]  # the number after the last adds an item
        lines.marks[*parts, int(last)] = origin
    elif isinstance(target, dict):
        target[last] = value
        lines.marks[*parts, last] = origin
    else:
        raise RecipeError(f"{origin}: '{dotted(parts)}' is {kind_of(target)}, it has no key '{last}'")


def validate(
    model: type[Model], tree: Any, at: Callable[[Location], str], other_names: Mapping[str, str] = MappingProxyType({})
) -> Model:
    """`tree` as `model`, or a RecipeError that names the first wrong key at `at(location)` and counts the others.

    other_names: what other programs call a key -> the key that means it.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        # a key that follows from a wrong one is no fault of its own, nor a list that is too short without a wrong item
        problems = error.errors(include_url=False)
        wrong = {one["loc"][:-depth] for one in problems for depth in range(1, len(one["loc"]))}
        problems = [
            one
            for one in problems
            if one["type"] != "default_factory_not_called" and not (one["type"] == "too_short" and one["loc"] in wrong)
        ]
        # name an unknown key first: it often is a misspelling of the missing one
        problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        problem = {**problems[0], "loc": _without_tags(problems[0]["loc"], tree)}
        raise RecipeError(_explain(model, problem, at, other_names) + more) from None


def _without_tags(location: Location, tree: Any) -> Location:
    """A pydantic location without the names of the union's members that it passes through, which no file has."""
    kept: list[str | int] = []
    for part in location:
        inner = tree.get(part) if isinstance(tree, dict) else None
        if inner is None and isinstance(tree, dict) and part in tree.values():
            continue
        kept.append(part)
        tree = tree[part] if isinstance(tree, list) and isinstance(part, int) and part < len(tree) else inner
    return tuple(kept)


def dotted(location: Iterable[str | int]) -> str:
    """('data', 'sources', 0, 'path') -> 'data.sources.0.path'."""
    return ".".join(str(part) for part in location)


def _explain(
    model: type[BaseModel], problem: Any, at: Callable[[Location], str], other_names: Mapping[str, str]
) -> str:
    location: Location = tuple(problem["loc"])
    key, where = dotted(location), at(location)
    if problem["type"] == "extra_forbidden":
        names = dict(keys(model))
        siblings = [name for name in names if name.rpartition(".")[0] == _generic(location[:-1])]
        wrong = _generic(location)
        meant = other_names.get(str(location[-1]))
        if meant is None and isinstance(problem["input"], dict) and len(problem["input"]) == 1:  # training.seq_len=..
            (inner,) = problem["input"]
            if meant := other_names.get(str(inner)):
                key = f"{key}.{inner}"
        near = [meant] if meant else difflib.get_close_matches(wrong, siblings, 1, 0.5)
        near = near or difflib.get_close_matches(wrong, names, 1, 0.6)
        valid = ", ".join(name.rpartition(".")[2] for name in siblings)
        return f"{where}: unknown key '{key}'; " + (f"did you mean '{near[0]}'?" if near else f"valid here: {valid}")
    wanted = dict(keys(model)).get(_generic(location))
    if problem["type"] == "missing":
        return f"{where}: missing key '{key}' ({wanted or 'a value'}); add it"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if problem["type"] == "value_error":
        return f"{where}: {key + ': ' if key else ''}{message}"
    given = repr(problem["input"]) if problem["type"] in _BOUNDS else kind_of(problem["input"])
    if problem["type"].endswith("_type") and wanted is not None:
        message = f"should be {wanted}"
    return f"{where}: {key}: {message.replace('valid tuple', 'list')}, not {given}"


# pydantic's errors for values of the right type outside the bounds
_BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}


def _generic(location: Iterable[str | int]) -> str:
    return dotted("*" if isinstance(part, int) else part for part in location)


def kind_of(value: Any) -> str:
    """A value in words, for messages: 'a string ('x')', 'a list', 'nothing (null)'."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    kinds = {bool: "a boolean", int: "an integer", float: "a number", str: "a string"}
    return f"{kinds.get(type(value), type(value).__name__)} ({value!r})"
