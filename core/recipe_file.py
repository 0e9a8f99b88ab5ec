"""Recipes from YAML files: strict, and every complaint with file, line, key and the nearest valid name.

What a reader would get wrong: this is not `yaml.safe_load`. That keeps the last of two equal keys in silence, reads
`1e-3` as a string and `no` as a boolean, and expands aliases without bound. Here scalars follow the YAML 1.2 core
schema, duplicate keys, aliases and tags are refused, and `key.sub=value` overrides are laid over the tree before it is
checked, so both meet the same rules.
"""

from __future__ import annotations

import copy
import difflib
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from weftrain.core.config import Recipe, with_earlier_keys
from weftrain.core.errors import RecipeError
from weftrain.core.formats.plain_file import read_plain

MAX_DEPTH = 12
MAX_NUMBER_CHARACTERS = 100
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
Location = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


class _CoreSchemaLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the implicit types of YAML 1.2's core schema instead of 1.1's."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own class attribute


class _CoreSchemaDumper(yaml.SafeDumper):
    """PyYAML's safe dumper for that loader: it quotes a string exactly where the loader would read something else."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own class attribute

    def ignore_aliases(self, data: Any) -> bool:
        return True  # the loader takes none


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    firsts = [*_first, ""] if _tag == "null" else list(_first)
    for _class in (_CoreSchemaLoader, _CoreSchemaDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})\Z"), firsts)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """Decimal, 0o octal or 0x hexadecimal. PyYAML's own constructor reads 010 as octal, as YAML 1.1 did, and fails on
    09.
    """
    text = node.value
    if len(text) > MAX_NUMBER_CHARACTERS:
        raise yaml.constructor.ConstructorError(None, None, f"an integer of {len(text)} characters", node.start_mark)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


_CoreSchemaLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _represent_str(dumper: _CoreSchemaDumper, text: str) -> yaml.ScalarNode:
    """Escaped in double quotes where the text has Unicode line breaks, which PyYAML otherwise writes as they are and
    reads as spaces.
    """
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, '"' if set(text) & set("\x85\u2028\u2029\ufeff") else None
    )


_CoreSchemaDumper.add_representer(str, _represent_str)


def dump_yaml(tree: Any) -> str:
    """`tree` (JSON values) as YAML that this module reads back as the same values: a string that looks like a number is
    quoted.
    """
    return yaml.dump(tree, Dumper=_CoreSchemaDumper, sort_keys=False, allow_unicode=True, width=140)


@dataclass
class _Source:
    """Where each value came from, so that an error about a key can name its line."""

    name: str
    marks: dict[Location, str] = field(default_factory=dict)
    empty_is_null: bool = False  # for files of other programs; in a recipe an empty value is refused

    def at(self, location: Location) -> str:
        """'file:line' of the nearest enclosing value that the file (or the command line) holds."""
        for end in range(len(location), -1, -1):
            if location[:end] in self.marks:
                return self.marks[location[:end]]
        return self.name


@dataclass(frozen=True)
class RecipeFile:
    """A checked recipe, and where each of its keys was given: at(('model', 'num_layers')) -> 'recipes/x.yaml:12'."""

    recipe: Recipe
    at: Callable[[Location], str]


def load_recipe(
    recipe: str, overrides: Iterable[str] = (), backend: str | None = None, kept_options: Collection[str] = ()
) -> RecipeFile:
    """A recipe by built-in name or by the path of a .yaml file, with `key.sub=value` overrides laid over it.

    backend: another than the recipe's own, whose options mean nothing to it and are left out, but for those named in
    kept_options; overrides give its options. Raises RecipeError naming file, line, key and remedy.
    """
    name, text = _read(recipe)
    source = _Source(name)
    return _resolve(_for_backend(_parse_mapping(text, source), backend, kept_options), overrides, source)


def read_section(model: type[Model], name: str, text: str, overrides: Iterable[str] = ()) -> Model:
    """A file of another kind than a training recipe, by the same rules: `text` as `model`. name: of the file, for
    messages.

    Raises RecipeError naming file, line, key and remedy.
    """
    source = _Source(name)
    tree = _parse_mapping(text, source)
    for override in overrides:
        _override(tree, override, source)
    return validate_section(model, tree, source.at)


def recorded_recipe(
    tree: Any,
    origin: str,
    overrides: Iterable[str] = (),
    backend: str | None = None,
    kept_options: Collection[str] = (),
) -> RecipeFile:
    """The recipe that a checkpoint or run folder records (`origin`, in messages), with overrides laid over it.

    backend, kept_options: see load_recipe. Raises RecipeError naming the key: what is recorded may be a stranger's, or
    of a version with other keys.
    """
    if not isinstance(tree, dict):
        raise RecipeError(f"{origin}: a recipe is a mapping of sections, this is {_kind(tree)}")
    return _resolve(
        _for_backend(copy.deepcopy(with_earlier_keys(tree)), backend, kept_options), overrides, _Source(origin)
    )


def _for_backend(tree: dict[str, Any], backend: str | None, kept_options: Collection[str]) -> dict[str, Any]:
    own = tree.get("backend")
    if backend is None or (isinstance(own, dict) and own.get("name") == backend):
        return tree
    options = own.get("options") if isinstance(own, dict) else None
    kept = {name: value for name, value in options.items() if name in kept_options} if isinstance(options, dict) else {}
    tree["backend"] = {"name": backend, **({"options": kept} if kept else {})}
    return tree


def builtin_recipes() -> list[str]:
    """Names of the recipes that ship with weftrain, sorted."""
    folder = resources.files("weftrain.core") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def validate_section(model: type[Model], tree: Any, at: Callable[[Location], str]) -> Model:
    """`tree` as `model`, or a RecipeError that names the first wrong key at `at(location)` and counts the others."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # An unknown key often is the missing one misspelled: name it first.
        problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RecipeError(_explain(model, problems[0], at) + more) from None


def _resolve(tree: dict[str, Any], overrides: Iterable[str], source: _Source) -> RecipeFile:
    for override in overrides:
        _override(tree, override, source)
    return RecipeFile(validate_section(Recipe, tree, source.at), source.at)


def read_recipe_text(path: Path) -> str:
    """The text of a recipe's file. Raises RecipeError where it cannot be one."""
    try:
        return read_plain(path, "recipe").decode()
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the recipe: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text at byte {error.start}") from None


def _read(recipe: str) -> tuple[str, str]:
    if recipe.endswith((".yaml", ".yml")) or "/" in recipe:
        return str(Path(recipe)), read_recipe_text(Path(recipe))
    known = builtin_recipes()
    if recipe not in known:
        near = difflib.get_close_matches(recipe, known, 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise RecipeError(
            f"unknown recipe '{recipe}'; {hint}Built in: {', '.join(known)}; or give the path of a .yaml file"
        )
    return f"recipes/{recipe}.yaml", (resources.files("weftrain.core") / "recipes" / f"{recipe}.yaml").read_text(
        encoding="utf-8"
    )


def parse_mapping(text: str, name: str) -> dict[str, Any]:
    """YAML of any origin as a mapping, within the bounds of a recipe: no aliases, no tags, MAX_DEPTH levels. Raises
    RecipeError.

    name: of the file, for messages.
    """
    return _parse_mapping(text, _Source(name))


def _parse_mapping(text: str, source: _Source) -> dict[str, Any]:
    tree = _parse(text, source)
    if not isinstance(tree, dict):
        raise RecipeError(f"{source.name}: a recipe is a mapping of sections, this file holds {_kind(tree)}")
    return tree


def _parse(text: str, source: _Source) -> Any:
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_CoreSchemaLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH + 1:  # at once: the time of PyYAML's scanner grows with the square of the depth
                start: Any = event.start_mark
                raise RecipeError(
                    f"{source.name}:{start.line + 1}: nested deeper than the {MAX_DEPTH} levels that a recipe may have"
                )
            if isinstance(event, yaml.AliasEvent):
                mark: Any = event.start_mark  # Any: PyYAML's stubs make it optional, and it is not
                raise RecipeError(
                    f"{source.name}:{mark.line + 1}: alias '*{event.anchor}': recipes take no aliases, write the value "
                    "out"
                )
        loader = _CoreSchemaLoader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _build(loader, node, (), source)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark is not None else 1
        raise RecipeError(f"{source.name}:{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{source.name}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{source.name}: nested deeper than a recipe is") from None


def _build(loader: yaml.SafeLoader, node: yaml.Node, location: Location, source: _Source) -> Any:
    line = f"{source.name}:{node.start_mark.line + 1}"
    source.marks.setdefault(location, line)
    if len(location) > MAX_DEPTH:
        raise RecipeError(f"{line}: nested deeper than the {MAX_DEPTH} levels that a recipe may have")
    if node.tag not in _PLAIN_TAGS:
        raise RecipeError(
            f"{line}: tag '{node.tag}': recipes hold plain numbers, strings, booleans, lists and mappings only"
        )
    if isinstance(node, yaml.MappingNode):
        tree: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key_line = f"{source.name}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{key_line}: a key is a plain word, this is {key_node.id}")
            key = key_node.value
            if key in tree:
                first = source.at((*location, key))
                raise RecipeError(
                    f"{key_line}: duplicate key '{dotted((*location, key))}' (first at {first}); remove one of the two"
                )
            source.marks[*location, key] = key_line
            tree[key] = _build(loader, value_node, (*location, key), source)
        return tree
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*location, index), source) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and node.value == "" and node.style is None and not source.empty_is_null:
        # The core schema reads an empty scalar as null. In a recipe it mostly is a variable that was never set, and
        # null turns things off.
        key = f"'{dotted(location)}' " if location else ""
        raise RecipeError(f"{line}: {key}has an empty value: write null, or give the value")
    return loader.construct_object(node)


def _override(tree: dict[str, Any], override: str, source: _Source) -> None:
    """Lay `a.b.c=value` over the tree; the value is read as a recipe file would read it."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"'{override}': an override reads key.sub=value, e.g. schedule.steps=100")
    origin = f"command line '{override}'"
    value = _parse(text, _Source(origin))
    if value is None and text.strip().lower() not in ("null", "~"):
        raise RecipeError(f"{origin}: '{key}' has an empty value: write null, or give the value")
    target: Any = tree
    parts: list[str | int] = []
    *parents, last = key.split(".")
    for part in parents:
        step: Any = int(part) if isinstance(target, list) and part.isdigit() else part
        parts.append(step)
        if isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
            source.marks[tuple(parts)] = origin
        try:
            target = target[step]
        except (KeyError, IndexError, TypeError):
            raise RecipeError(f"{origin}: no such key '{dotted(parts)}' in {source.name}") from None
    if isinstance(target, list) and last.isdigit() and int(last) <= len(target):
        target[int(last) : int(last) + 1] = [value]  # the number after the last adds an item
        source.marks[*parts, int(last)] = origin
    elif isinstance(target, dict):
        target[last] = value
        source.marks[*parts, last] = origin
    else:
        raise RecipeError(f"{origin}: '{dotted(parts)}' is {_kind(target)}, it has no key '{last}'")


def dotted(location: Iterable[str | int]) -> str:
    """('data', 'sources', 0, 'path') -> 'data.sources.0.path'."""
    return ".".join(str(part) for part in location)


def _explain(model: type[BaseModel], problem: Any, at: Callable[[Location], str]) -> str:
    location: Location = tuple(problem["loc"])
    key, where = dotted(location), at(location)
    if problem["type"] == "extra_forbidden":
        names = dict(_keys(model))
        siblings = [name for name in names if name.rpartition(".")[0] == _generic(location[:-1])]
        wrong = _generic(location)
        near = difflib.get_close_matches(wrong, siblings, 1, 0.5) or difflib.get_close_matches(wrong, names, 1, 0.6)
        hint = (
            f"did you mean '{near[0]}'?"
            if near
            else f"valid here: {', '.join(name.rpartition('.')[2] for name in siblings)}"
        )
        return f"{where}: unknown key '{key}'; {hint}"
    if problem["type"] == "missing":
        wanted = dict(_keys(model)).get(_generic(location), "a value")
        return f"{where}: missing key '{key}' ({wanted}); add it"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if problem["type"] == "value_error":
        return f"{where}: {key + ': ' if key else ''}{message}"
    given = repr(problem["input"]) if problem["type"] in _BOUNDS else _kind(problem["input"])
    return f"{where}: {key}: {message}, not {given}"


# pydantic's names of errors whose value has the right kind and is too small or too large
_BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}


def _generic(location: Iterable[str | int]) -> str:
    return dotted("*" if isinstance(part, int) else part for part in location)


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every dotted key of a model with a word on its type; list items stand as '*'."""
    for name, info in model.model_fields.items():
        yield prefix + name, str(getattr(info.annotation, "__name__", info.annotation)).replace("typing.", "")
        for inner, step in _models(info.annotation):
            yield from _keys(inner, f"{prefix}{name}.{step}")


def _models(annotation: Any, step: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, step
    origin = typing.get_origin(annotation)
    for argument in typing.get_args(annotation):
        if origin in (typing.Union, types.UnionType, typing.Annotated):
            yield from _models(argument, step)
        elif origin is tuple and argument is not Ellipsis:
            yield from _models(argument, step + "*.")


def _kind(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    names = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "a mapping",
    }
    shown = "" if isinstance(value, list | dict) else f" ({value!r})"
    return names.get(type(value), type(value).__name__) + shown
