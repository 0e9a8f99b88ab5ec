"""How Hugging Face's config.json says a decoder's fields: parts that read and write them, for exchange/families.py.

A part reads keys of config.json into fields of ModelConfig, and writes them back. Keys are read in the forms of
transformers 4 (`rope_theta` with `rope_scaling`, whose kind stands under `type` or `rope_type`) and of transformers 5
(`rope_parameters`); both forms are written, so that either release computes the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weftrain.core.errors import RecipeError
from weftrain.core.model_config import LayerKind, ModelConfig
from weftrain.core.mup import resolve_scales
from weftrain.exchange.known_keys import Keys, as_number, short

Fields = dict[str, Any]
_SCALINGS = {  # rope_type -> our field: needed; and needed with a default
    "linear": ({"factor"}, {}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, {}),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None, "truncate": True},
    ),
}
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Part:
    """Some fields of ModelConfig and the keys of config.json that say them. `keys`: all that `read` looks at."""

    keys: tuple[str, ...]
    read: Callable[[Keys], Fields]
    write: Callable[[ModelConfig], Fields]


def named(**names: str) -> Part:
    """Fields that stand in config.json as they are, under another name: ours=theirs."""
    return Part(
        tuple(names.values()),
        lambda keys: {ours: keys.get(theirs) for ours, theirs in names.items()},
        lambda config: {theirs: getattr(config, ours) for ours, theirs in names.items()},
    )


# Sizes


def heads(
    grouped: bool = True, free_head_dim: bool = True, head_dim_stands: bool = False, multiple: bool = False
) -> Part:
    """hidden_size and the heads. head_dim_stands: head_dim is written even where it follows from the others, since the
    config class has a default of its own. multiple: the config class refuses a hidden_size that heads do not divide.
    """

    def read(keys: Keys) -> Fields:
        hidden, count = keys.count("hidden_size"), keys.count("num_attention_heads")
        if multiple and hidden % count:
            raise RecipeError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {count}")
        kv = keys.optional_count("num_key_value_heads", count) if grouped else count
        return {"hidden_size": hidden, "num_heads": count, "num_kv_heads": kv, "head_dim": _head_dim(keys)}

    def write(config: ModelConfig) -> Fields:
        found: Fields = {"hidden_size": config.hidden_size, "num_attention_heads": config.num_heads}
        if grouped:
            found["num_key_value_heads"] = config.num_kv_heads
        if free_head_dim and (head_dim_stands or config.head_dim != config.hidden_size // config.num_heads):
            found["head_dim"] = config.head_dim
        return found

    optional = (("num_key_value_heads",) if grouped else ()) + (("head_dim",) if free_head_dim else ())
    return Part(("hidden_size", "num_attention_heads", *optional), read, write)


def _head_dim(keys: Keys) -> int:
    follows = keys.count("hidden_size") // keys.count("num_attention_heads")
    return keys.optional_count("head_dim", follows)


def _read_biases(keys: Keys) -> Fields:
    bias = keys.flag("attention_bias")  # on o too
    if keys.flag("mlp_bias") is not bias:
        raise RecipeError(f"config.json: mlp_bias is {not bias}; this decoder does {bias!r} only")
    return {"linear_bias": bias, "qkv_bias": bias}


BIASES = Part(
    ("attention_bias", "mlp_bias"),
    _read_biases,
    lambda config: {"attention_bias": config.linear_bias, "mlp_bias": config.linear_bias},
)


def _read_std(keys: Keys) -> Fields:
    std = keys.get("initializer_range")
    stds = dict.fromkeys(("embedding_std", "matrix_std", "output_matrix_std"), std)
    return {"initialization": {"distribution": "normal", **stds}}


INITIALIZATION = Part(
    ("initializer_range",), _read_std, lambda config: {"initializer_range": resolve_scales(config).matrix_std}
)

PARALLEL = Part(
    ("use_parallel_residual",),
    lambda keys: {"residual": "parallel" if keys.flag("use_parallel_residual") else "sequential"},
    lambda config: {"use_parallel_residual": config.residual == "parallel"},
)


# Rotary positions


def rope(theta: float = 10000.0, *, theta_key: str = "rope_theta", share_key: str = "", share: float = 1.0) -> Part:
    """One table for all layers. theta: the config class's default. share_key: names the part of each head that rotates,
    in transformers 4, and `share` its default; without one, all of it must.
    """

    def read(keys: Keys) -> Fields:
        own_theta = keys.number(theta_key) if theta_key in keys.given else None
        given = _rope_of(keys)
        if own_theta is not None and "rope_theta" in given and given["rope_theta"] != own_theta:
            raise RecipeError(
                f"config.json: {theta_key} is {own_theta:g} and rope_theta of rope_parameters is "
                f"{short(given['rope_theta'])}: releases of transformers differ in which one counts"
            )
        own_part = keys.given.get(share_key or "partial_rotary_factor", share)
        part = given.pop("partial_rotary_factor", own_part)
        if (not share_key and part != 1.0) or (share_key in keys.given and part != own_part):
            raise RecipeError(f"config.json: partial_rotary_factor is {short(part)}; this decoder does {own_part} only")
        found_theta = as_number("rope_theta", given.pop("rope_theta", own_theta or theta))
        scaling = _read_scaling(given, keys)
        rotary_dim = int(_head_dim(keys) * as_number("partial_rotary_factor", part))
        return {"rope_theta": found_theta, "rotary_dim": rotary_dim, "rotary_scaling": scaling}

    def write(config: ModelConfig) -> Fields:
        scaling = _write_scaling(config)
        found: Fields = {theta_key: config.rope_theta}
        partial: Fields = {}
        if share_key:
            found[share_key] = partial["partial_rotary_factor"] = config.rotary_dim / config.head_dim
        if config.later_fields():  # the files of models that need none of these fields keep their bytes
            found["rope_parameters"] = {**scaling, "rope_theta": config.rope_theta, **partial}
        if config.rotary_scaling is not None:
            found["rope_scaling"] = {**scaling, **partial}
        return found

    keys = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", theta_key, share_key)
    return Part(tuple(dict.fromkeys(key for key in keys if key)), read, write)


def _rope_of(keys: Keys) -> Fields:
    """rope_parameters and rope_scaling as one, the kind under `rope_type`. Raises RecipeError where they differ."""
    found: Fields = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = keys.given.get(key)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise RecipeError(f"config.json: {key} is not an object; is the file damaged?")
        for name, entry in _plain_rope(value, key).items():
            if found.setdefault(name, entry) != entry:
                raise RecipeError(
                    f"config.json: rope_parameters and rope_scaling differ in {name}: {short(found[name])} and "
                    f"{short(entry)}"
                )
    return found


def _plain_rope(value: Mapping[str, Any], where: str) -> Fields:
    kinds = {value[key] for key in ("rope_type", "type") if isinstance(value.get(key), str)}
    if len(kinds) > 1:
        raise RecipeError(f"config.json: {where}: rope_type and type differ: {' and '.join(sorted(kinds))}")
    rest = {name: entry for name, entry in value.items() if name not in ("rope_type", "type") and entry is not None}
    return {"rope_type": kinds.pop() if kinds else "default", **rest}


def _read_scaling(given: Fields, keys: Keys) -> Fields | None:
    """The scaling in a plain object without rope_theta. Raises RecipeError for a kind or a key that is not known."""
    given = dict(given)
    kind = given.pop("rope_type", "default")
    if kind not in ("default", *_SCALINGS):
        raise RecipeError(f"config.json: rope_type is {short(kind)}; this decoder does default, {', '.join(_SCALINGS)}")
    if kind in ("llama3", "yarn"):
        given.setdefault("original_max_position_embeddings", keys.get("max_position_embeddings"))
    needed, defaults = _SCALINGS.get(kind, (set(), {}))
    if kind == "yarn" and given.get("attention_factor") is not None:
        given = {name: entry for name, entry in given.items() if name not in ("mscale", "mscale_all_dim")}
    given.pop("finetuned", None)  # says that YaRN was trained with; changes nothing
    if kind in ("default", "linear"):
        given.pop("original_max_position_embeddings", None)  # written beside kinds that do not read it, too
    if missing := sorted(needed - given.keys()):
        raise RecipeError(f"config.json: rope_type '{kind}' needs '{missing[0]}', which is missing")
    if unknown := sorted(given.keys() - needed - defaults.keys()):
        raise RecipeError(
            f"config.json: '{unknown[0]}' is not known for rope_type '{kind}', and may change what the model computes"
        )
    if kind == "default":
        return None
    numbers = {
        name: entry if type(entry) is not int or "position" in name else float(entry) for name, entry in given.items()
    }
    return {"kind": kind, **numbers}


def _write_scaling(config: ModelConfig) -> Fields:
    if config.rotary_scaling is None:
        return {"rope_type": "default"}
    said = config.rotary_scaling.model_dump()
    kind = said.pop("kind")
    defaults = _SCALINGS[kind][1]
    return {"rope_type": kind, **{name: value for name, value in said.items() if value != defaults.get(name, ...)}}


# What differs between layers


def pattern(kinds: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """The shortest pattern that repeats to these layers."""
    count = len(kinds)
    for length in range(1, count):
        if count % length == 0 and all(kinds[layer] == kinds[layer % length] for layer in range(count)):
            return tuple(kinds[:length])
    return tuple(kinds)


def layer_kinds(config: ModelConfig) -> list[LayerKind]:
    """The kind of every layer; one that is scaled by nothing is called unscaled, and one without rotary positions
    none."""
    plain = {"scaled": "unscaled" if config.rotary_scaling is None else "scaled"}
    kinds = [config.kind_of(layer) for layer in range(config.num_layers)]
    return [LayerKind(window=kind.window, rotary=plain.get(kind.rotary, kind.rotary)) for kind in kinds]  # type: ignore[arg-type]


def _windows(config: ModelConfig) -> list[int | None]:
    return [config.kind_of(layer).window for layer in range(config.num_layers)]


def _first_window(config: ModelConfig) -> int | None:
    return next((window for window in _windows(config) if window is not None), None)


def _types(config: ModelConfig) -> list[str]:
    return [_FULL if window is None else _SLIDING for window in _windows(config)]


def _read_types(keys: Keys, otherwise: Callable[[int], str]) -> list[str]:
    """layer_types, one a layer; `otherwise` gives a layer's where the key is missing or null."""
    count, types = keys.count("num_hidden_layers"), keys.given.get("layer_types")
    if count > 10_000:  # ModelConfig's own bound, before a list of them is made
        raise RecipeError(f"config.json: num_hidden_layers is {count}, more than 10000; is the file damaged?")
    if types is None:
        return [otherwise(layer) for layer in range(count)]
    if not isinstance(types, list) or len(types) != count:
        raise RecipeError(
            f"config.json: layer_types is {short(types)}, not a list of num_hidden_layers {count} entries"
        )
    if other := next((kind for kind in types if kind not in (_SLIDING, _FULL)), None):
        raise RecipeError(f"config.json: layer_types names {short(other)}; this decoder does {_SLIDING} and {_FULL}")
    return types


def _sliding_layers(keys: Keys, types: Sequence[str], used: bool) -> list[int | None]:
    """Each layer's window. used: whether windows are switched on."""
    if _SLIDING not in types:
        return [None] * len(types)
    if not used or keys.get("sliding_window") is None:
        raise RecipeError(
            f"config.json: layer_types names {_SLIDING}, and there is no window: sliding_window is "
            f"{short(keys.get('sliding_window'))}" + ("" if used else ", use_sliding_window is False")
        )
    window = keys.count("sliding_window")
    return [window if kind == _SLIDING else None for kind in types]


def _read_every_window(keys: Keys) -> Fields:
    window = None if keys.get("sliding_window") is None else keys.count("sliding_window")
    return {"layer_pattern": [LayerKind(window=window)]}


EVERY_WINDOW = Part(("sliding_window",), _read_every_window, lambda config: {"sliding_window": _first_window(config)})


def _read_last_windows(keys: Keys) -> Fields:
    used = keys.flag("use_sliding_window") and keys.get("sliding_window") is not None
    first = keys.get("max_window_layers") if used else 0
    if used and (type(first) is not int or first < 0):
        raise RecipeError(f"config.json: max_window_layers is {short(first)}, not a number of layers")
    types = _read_types(keys, lambda layer: _SLIDING if used and layer >= first else _FULL)
    return {"layer_pattern": pattern([LayerKind(window=window) for window in _sliding_layers(keys, types, used)])}


def _write_windows(config: ModelConfig) -> Fields:
    window = _first_window(config)
    return {"sliding_window": window, "use_sliding_window": window is not None, "layer_types": _types(config)}


# Full attention in the first max_window_layers layers, then windows, if use_sliding_window; or as layer_types says.
LAST_WINDOWS = Part(
    ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"), _read_last_windows, _write_windows
)


def _read_unrotated_layers(keys: Keys) -> Fields:
    count, listed = keys.count("num_hidden_layers"), keys.given.get("no_rope_layers")
    if listed is None:
        every = keys.count("no_rope_layer_interval")
        _read_types(keys, lambda layer: _FULL)  # bounds num_hidden_layers
        listed = [int((layer + 1) % every != 0) for layer in range(count)]
    if not isinstance(listed, list) or len(listed) < count or any(entry not in (0, 1) for entry in listed):
        raise RecipeError(
            f"config.json: no_rope_layers is {short(listed)}, not a list of at least num_hidden_layers {count} times "
            "0 (no rotary positions) or 1"
        )
    used = keys.flag("use_sliding_window") and keys.get("sliding_window") is not None
    types = _read_types(keys, lambda layer: _SLIDING if used and not listed[layer] else _FULL)
    windows = _sliding_layers(keys, types, used)
    kinds = [
        LayerKind(window=window, rotary="scaled" if turns else "none")
        for window, turns in zip(windows, listed, strict=False)
    ]
    return {"layer_pattern": pattern(kinds)}


def _write_unrotated_layers(config: ModelConfig) -> Fields:
    rotated = [int(config.kind_of(layer).rotary != "none") for layer in range(config.num_layers)]
    return {**_write_windows(config), "no_rope_layers": rotated}


# Layers without rotary positions, listed (0) or every no_rope_layer_interval-th, and windows.
UNROTATED_LAYERS = Part(
    ("no_rope_layers", "no_rope_layer_interval", "use_sliding_window", "sliding_window", "layer_types"),
    _read_unrotated_layers,
    _write_unrotated_layers,
)


def _tables_by_window(keys: Keys, theta: float) -> tuple[dict[str, Fields], float]:
    """rope_parameters of layers with a window and of layers without, and the theta of both."""
    by_type = keys.given.get("rope_parameters")
    found = {}
    if by_type is None:
        if keys.given.get("rope_theta", theta) != theta:
            raise RecipeError(
                f"config.json: rope_theta is {short(keys.given['rope_theta'])}, which releases of transformers "
                f"read differently for layers with a window: give rope_parameters for {_SLIDING} and {_FULL}"
            )
        found = {_SLIDING: {"rope_type": "default"}, _FULL: {"rope_type": "default"}}
    elif not isinstance(by_type, Mapping) or not by_type.keys() <= {_SLIDING, _FULL}:
        raise RecipeError(f"config.json: rope_parameters is not an object of {_SLIDING} and {_FULL}")
    else:
        for kind in (_SLIDING, _FULL):
            entry = by_type.get(kind) or {}
            if not isinstance(entry, Mapping):
                raise RecipeError(f"config.json: rope_parameters.{kind} is not an object; is the file damaged?")
            found[kind] = _plain_rope(entry, f"rope_parameters.{kind}")
    if keys.given.get("rope_scaling") is not None:
        whole = Keys({"rope_parameters": by_type and found[_FULL], "rope_scaling": keys.given["rope_scaling"]}, {})
        found[_FULL] |= _rope_of(whole)
    thetas = {as_number("rope_theta", entry.pop("rope_theta", theta)) for entry in found.values()}
    if len(thetas) > 1:
        raise RecipeError(f"config.json: rope_theta is {sorted(thetas)} by kind of layer; this decoder has one")
    if keys.given.get("rope_theta", *thetas) not in thetas:
        raise RecipeError(f"config.json: rope_theta is {short(keys.given['rope_theta'])} and {thetas.pop():g}")
    for entry in found.values():
        if entry.pop("truncate", True) is not True:  # transformers does not look for it here
            raise RecipeError("config.json: rope_parameters: truncate is false, which transformers does not read")
    return found, thetas.pop()


def rope_by_window(theta: float) -> Part:
    """OLMo 3: windows on three of four layers or as layer_types says, and rotary tables of their own for layers with a
    window and for layers without. In transformers 4 `rope_scaling` is that of the layers without.
    """

    def read(keys: Keys) -> Fields:
        types = _read_types(keys, lambda layer: _FULL if (layer + 1) % 4 == 0 else _SLIDING)
        windows = _sliding_layers(keys, types, True)
        found, rope_theta = _tables_by_window(keys, theta)
        scalings = {kind: _read_scaling(entry, keys) for kind, entry in found.items()}
        used = {kind: scalings[kind] for kind in dict.fromkeys(types)}
        scaled = [scaling for scaling in used.values() if scaling is not None]
        if len(scaled) == 2 and scaled[0] != scaled[1]:
            raise RecipeError("config.json: rope_parameters scale layers with a window and layers without differently")
        kinds = [
            LayerKind(window=window, rotary="scaled" if used[kind] is not None or not scaled else "unscaled")
            for window, kind in zip(windows, types, strict=True)
        ]
        scaling = scaled[0] if scaled else None
        head_dim = _head_dim(keys)
        return {
            "rope_theta": rope_theta,
            "rotary_dim": head_dim,
            "rotary_scaling": scaling,
            "layer_pattern": pattern(kinds),
        }

    def write(config: ModelConfig) -> Fields:
        plain, scaling = {"rope_type": "default"}, _write_scaling(config)
        tables = {_SLIDING: plain, _FULL: plain}
        for kind, layer in zip(_types(config), layer_kinds(config), strict=True):
            tables[kind] = scaling if layer.rotary == "scaled" else plain
        return {
            "rope_parameters": {kind: {**table, "rope_theta": config.rope_theta} for kind, table in tables.items()},
            "rope_theta": config.rope_theta,
            **({} if tables[_FULL] is plain else {"rope_scaling": scaling}),
            "sliding_window": _first_window(config),
            "layer_types": _types(config),
        }

    return Part(("rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "layer_types"), read, write)
