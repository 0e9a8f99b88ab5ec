"""Whether the front matter of a model card is what the Hugging Face hub's own library reads from it."""

from __future__ import annotations

import importlib
from typing import Any

from weftrain.core.errors import one_line
from weftrain.core.formats.strict_yaml import LineMap, parse_mapping


def has_library() -> bool:
    try:
        importlib.import_module("huggingface_hub")
    except ImportError:
        return False
    return True


def card_problem(text: str) -> str | None:
    """What is wrong with a model card's metadata by `huggingface_hub`; None for nothing. No network is asked.

    It must be read without leaving a key or an evaluation out, and name a licence and a task: the hub's search needs
    both. Front matter with aliases or duplicate keys is refused before the library sees it.
    """
    hub: Any = importlib.import_module("huggingface_hub")
    begin, _, rest = text.partition("---\n")
    front, end, _ = rest.partition("\n---\n")
    if begin or not end:
        return "has no front matter between two lines of ---"
    try:
        told = parse_mapping(front + "\n", LineMap("its front matter"))
        read = hub.ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    except Exception as error:  # of YAML and of the library, which has many
        return f"is not read by huggingface_hub: {one_line(error, 160)}"
    if lost := sorted(key for key in told.keys() | read.keys() if told.get(key) != read.get(key)):
        return f"is read otherwise by huggingface_hub: key {lost[0]!r} is {read.get(lost[0])!r}"
    lacking = [key for key in ("license", "pipeline_tag") if not isinstance(read.get(key), str)]
    return f"has no {lacking[0]}" if lacking else None
