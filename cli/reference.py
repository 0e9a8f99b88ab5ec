"""The reference of recipe keys, backend options and verbs, generated from the code that reads them.

A key's meaning is the comment at its field in the source: behind it on the line, or in the lines above. The pages of
the documentation (`verbs_page`, `recipe_page`, `backend_options_page`) and `weftrain backends` are made from it.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import textwrap
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from weftrain.core.formats.type_words import models_in, type_words


class Key(NamedTuple):
    """One key of a section: its type in words, its default as YAML ("" where it must be given), what it means."""

    name: str
    type: str
    default: str
    meaning: str


def keys(model: type[BaseModel]) -> list[Key]:
    """The keys of a section, inherited ones first."""
    comments = _field_comments(model)
    return [
        Key(name, type_words(field.annotation, field.metadata), _default(field), comments.get(name, ""))
        for name, field in model.model_fields.items()
    ]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    if field.default_factory_takes_validated_data:
        return "follows from other keys"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its own defaults"
    return value if isinstance(value, str) and value else json.dumps(value, default=str)


def _field_comments(model: type[BaseModel]) -> dict[str, str]:
    """Each field's comment: the one on its last line, and those that fill the lines right above it."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not issubclass(cls, BaseModel) or cls is BaseModel:
            continue
        try:
            source = textwrap.dedent(inspect.getsource(cls))
        except (OSError, TypeError):  # made at run time: there is nothing to read
            continue
        lines = source.splitlines()
        comments = {
            token.start[0]: token.string.lstrip("# ").strip()
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        (body,) = ast.parse(source).body
        assert isinstance(body, ast.ClassDef)
        for field in body.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                above, number = list[str](), field.lineno - 1
                while lines[number - 1].lstrip().startswith("#"):
                    above.insert(0, comments[number])
                    number -= 1
                behind = comments.get(field.end_lineno or field.lineno)
                found[field.target.id] = " ".join([*above, *([behind] if behind else [])])
    return found


def _sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """(dotted path, section) of a model and of every section below it; '*' stands for a list's items."""
    yield path.removesuffix("."), model
    for name, field in model.model_fields.items():
        for inner, step in models_in(field.annotation):
            yield from _sections(inner, f"{path}{name}.{step}")


def recipe_keys() -> list[tuple[str, str]]:
    """(dotted key, meaning) of every key of a recipe that an override can name; items of lists are left out."""
    from weftrain.core.config import Recipe

    return [
        (f"{path}.{key.name}" if path else key.name, key.meaning)
        for path, model in _sections(Recipe)
        if "*" not in path
        for key in keys(model)
    ]


def key_table(model: type[BaseModel]) -> str:
    """The keys of a section as a Markdown table."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys(model):
        shown = f"`{key.default}`" if key.default else "must be given"
        rows.append(
            "| "
            + " | ".join(cell.replace("|", "\\|") for cell in (f"`{key.name}`", key.type, shown, key.meaning))
            + " |"
        )
    return "\n".join(rows)


def recipe_page() -> str:
    """Every key of a recipe, by section."""
    from weftrain.core.config import Recipe

    parts = [
        "# Keys of a recipe",
        "A recipe is YAML. An unknown, missing, duplicate or mistyped key is refused with file, line and the nearest "
        "valid name. `weftrain train RECIPE key.sub=value` overrides one. `weftrain recipe NAME > my.yaml` copies a "
        "built-in one.",
    ]
    for path, model in _sections(Recipe):
        parts += [f"## {path or 'the recipe'}", inspect.cleandoc(model.__doc__ or ""), key_table(model)]
    return "\n\n".join(part for part in parts if part) + "\n"


def backend_options_page() -> str:
    """Every backend's options."""
    from weftrain.backends.common.registry import find_backends

    parts = ["# Options of the backends", "`backend.options.NAME=VALUE` on the command line, or in a recipe:"]
    for name, backend in sorted(find_backends().items()):
        parts += [f"## {name}", f"{backend.summary[:1].upper()}{backend.summary[1:]}."]
        parts.append(key_table(backend.options) if backend.options.model_fields else "It has no options.")
    return "\n\n".join(parts) + "\n"


def verbs_page() -> str:
    """The help of every verb and of its subcommands, by group."""
    from weftrain.cli.main import VERBS, main

    parts = ["# Verbs", "What `weftrain VERB --help` prints."]
    root = click.Context(main, info_name="weftrain", terminal_width=100, max_content_width=100)
    for group, members in VERBS.items():
        parts.append(f"## {group}")
        for name, verb in members.items():
            parts.append(f"### {name}\n\n{verb.summary[:1].upper()}{verb.summary[1:]}.")
            command = main.get_command(root, name)
            assert command is not None
            parts += [f"```text\n{text}\n```" for text in _helps(command, click.Context(command, root, name))]
    return "\n\n".join(parts) + "\n"


def _helps(command: click.Command, context: click.Context) -> Iterator[str]:
    yield command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _helps(inner, click.Context(inner, context, name))
