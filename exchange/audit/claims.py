"""What a revision's config.json claims, against that of its neighbours and against the tensors' shapes and dtypes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from weftrain.core.errors import WeftrainError
from weftrain.core.formats.canonical import canonical_json
from weftrain.core.model_config import ModelConfig
from weftrain.core.parameters import parameter_specs
from weftrain.exchange.audit.findings import Finding, named
from weftrain.exchange.audit.headers import Shapes
from weftrain.exchange.huggingface.config import config_from_huggingface
from weftrain.exchange.layouts import foreign_tensors, is_buffer

# What says by which program a config was written, or where it lay, and nothing about the model.
_NO_CLAIM = ("transformers_version", "_name_or_path", "_commit_hash", "use_cache")
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d{1,6})\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|wte|word_embeddings|tok_embeddings|embedding)\.weight$")
_MAX_SHOWN = 4


@dataclass(frozen=True)
class Stretch:
    """Neighbouring revisions that are alike in something."""

    value: Any
    names: tuple[str, ...]


def stretches(values: Sequence[tuple[str, Any]]) -> list[Stretch]:
    """(name, value) in order as stretches of equal values."""
    found: list[tuple[Any, list[str]]] = []
    for name, value in values:
        if found and found[-1][0] == value:
            found[-1][1].append(name)
        else:
            found.append((value, [name]))
    return [Stretch(value, tuple(names)) for value, names in found]


def changes(values: Sequence[tuple[str, Any]]) -> Iterator[tuple[Stretch, Stretch, bool]]:
    """(before, after, whether it changes back behind `after`) of each place where values change in mid-series."""
    found = stretches(values)
    index = 1
    while index < len(found):
        back = index + 1 < len(found) and found[index + 1].value == found[index - 1].value
        yield found[index - 1], found[index], back
        index += 2 if back else 1


def where_changed(before: Stretch, after: Stretch, back: bool) -> tuple[tuple[str, ...], str]:
    """The revisions of a change, and the place in words."""
    if back:
        return after.names, f"in {named(after.names)} only"
    return (before.names[-1], after.names[0]), f"from {after.names[0][:80]} on"


def shape_findings(before: Shapes, after: Shapes, names: tuple[str, ...], where: str) -> Iterator[Finding]:
    """What differs between two layouts: dtypes, and tensors or shapes."""
    common = before.keys() & after.keys()
    dtypes = Counter((before[name][0], after[name][0]) for name in common if before[name][0] != after[name][0])
    for (old, new), count in dtypes.most_common(_MAX_SHOWN):
        words = f"{count:,} of {len(after):,} tensors change from {old} to {new} {where}"
        yield Finding("dtype change", names, words, "header")
    shapes = sorted(name for name in common if before[name][1] != after[name][1])
    parts = [f"{name[:120]} {list(before[name][1])} -> {list(after[name][1])}" for name in shapes[:_MAX_SHOWN]]
    for what, apart in (("missing", before.keys() - after.keys()), ("new", after.keys() - before.keys())):
        if gone := sorted(name for name in apart if not is_buffer(name)):
            parts.append(f"{len(gone):,} {what} tensors ({gone[0][:120]})")
    if parts:
        more = f" and {len(shapes) - _MAX_SHOWN:,} more" if len(shapes) > _MAX_SHOWN else ""
        yield Finding("shape change", names, f"{where}: {'; '.join(parts)}{more}", "header")


def claims_of(config: Mapping[str, Any]) -> dict[str, str]:
    """What a config claims: key -> canonical value, in which two names of one key are one."""
    found = {"dtype" if key == "torch_dtype" else key: value for key, value in config.items() if key not in _NO_CLAIM}
    return {key: canonical_json(value).decode() for key, value in found.items()}


def config_finding(
    before: Mapping[str, str], after: Mapping[str, str], names: tuple[str, ...], where: str
) -> Finding | None:
    """The keys in which two configs differ."""
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if not keys:
        return None
    shown = (
        f"{key[:60]}: {before.get(key, '(absent)')[:80]} -> {after.get(key, '(absent)')[:80]}"
        for key in keys[:_MAX_SHOWN]
    )
    more = f" and {len(keys) - _MAX_SHOWN:,} more keys" if len(keys) > _MAX_SHOWN else ""
    return Finding("config change", names, f"{where}: {'; '.join(shown)}{more}", "config")


def contradictions(config: Mapping[str, Any], shapes: Shapes, prefix: str = "") -> list[str]:
    """Where a config and its tensors contradict each other, in words.

    A family that weftrain converts is compared tensor by tensor; of any other, the embedding and the number of layers.
    prefix: of the tensors of our own checkpoints, whose config is a recipe's model.
    """
    try:
        wanted = _expected(config, prefix)
    except (WeftrainError, ValidationError, ValueError, TypeError, OverflowError):
        wanted = None
    found = _at_large(config, shapes) if wanted is None else list(_compared(wanted[0], wanted[1], shapes))
    return found + _dtype(config, shapes)


def _expected(config: Mapping[str, Any], prefix: str) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """The tensors that a config asks for with their shapes, and those that may be there too."""
    if prefix:
        model = ModelConfig.model_validate_json(canonical_json(config))
        return {prefix + spec.name: spec.shape for spec in parameter_specs(model)}, set()
    if type(layers := config.get("num_hidden_layers")) is int and layers > 10_000:
        raise ValueError("more layers than any model has")
    tensors = foreign_tensors(config_from_huggingface(config), str(config.get("model_type")))
    return {one.name: one.shape for one in tensors}, {copy for one in tensors for copy in one.copies}


def _compared(wanted: Mapping[str, tuple[int, ...]], copies: set[str], shapes: Shapes) -> Iterator[str]:
    others = [name for name in wanted if name in shapes and shapes[name][1] != wanted[name]]
    for name in others[:_MAX_SHOWN]:
        yield f"{name[:120]} is {list(shapes[name][1])}, the config makes it {list(wanted[name])}"
    if len(others) > _MAX_SHOWN:
        yield f"and {len(others) - _MAX_SHOWN:,} more tensors have other shapes"
    missing = [name for name in wanted if name not in shapes]
    unknown = sorted(name for name in shapes.keys() - wanted.keys() - copies if not is_buffer(name))
    for what, names in (("that the config asks for are missing", missing), ("are not the config's", unknown)):
        if names:
            yield f"{len(names):,} tensors {what} ({names[0][:120]})"


def _at_large(config: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """Of a family that weftrain does not convert: the embedding's rows and width, and the number of layers."""
    found = []
    rows, width = config.get("vocab_size"), config.get("hidden_size")
    if any("embed" in key and key.endswith(("dim", "size")) for key in config):
        width = None  # its embedding has a width of its own
    for name, (_, shape) in sorted(shapes.items()):
        if _EMBEDDING.search(name) and len(shape) == 2:
            wanted = [one if type(one) is int else size for one, size in zip((rows, width), shape, strict=True)]
            if list(shape) != wanted:
                found.append(f"{name[:120]} is {list(shape)}, the config makes it {wanted}")
            break
    layers = {int(match[1]) for name in shapes if (match := _LAYER.search(name))}
    said, extra = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
    if layers and type(said) is int and max(layers) + 1 not in (said, said + (extra if type(extra) is int else 0)):
        found.append(f"the tensors have {max(layers) + 1:,} layers, the config says {said:,}")
    return found


def _dtype(config: Mapping[str, Any], shapes: Shapes) -> list[str]:
    said = config.get("torch_dtype", config.get("dtype"))
    said = said.removeprefix("torch.") if isinstance(said, str) else None
    counted = Counter(dtype for dtype, shape in shapes.values() if len(shape) >= 2 and dtype in _DTYPES.values())
    if said not in _DTYPES or not counted or counted[_DTYPES[said]]:
        return []
    return [f"the tensors are {counted.most_common(1)[0][0]}, the config says {said}"]
