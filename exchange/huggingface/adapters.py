"""Adapters of low rank in peft's format: a folder with adapter_config.json and adapter_model.safetensors.

A linear module of ours is one of the Hugging Face model's, so A and B are the same numbers, in fp32, under other names.
A family that keeps q, k and v in one matrix, or stores matrices transposed, has no such module and is refused.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weftrain.core.config import Recipe
from weftrain.core.errors import CheckpointError, os_errors_as
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import parse_json
from weftrain.core.formats.lazy_tensors import LazyTensors, meta
from weftrain.core.formats.plain_file import read_plain
from weftrain.core.formats.tensor_file import (
    DTYPES,
    open_regular,
    pack_header,
    read_header,
    read_tensor,
    tensor_memory,
)
from weftrain.core.parameters import ParameterSpec, is_adapter
from weftrain.core.tuning import LoraConfig
from weftrain.exchange.huggingface.config import layout_of
from weftrain.exchange.layouts import foreign_tensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
# keys of adapter_config.json that would make another function of the same tensors, and the values that do not
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


def write_adapter(folder: Path, weights: Mapping[str, Tensor], recipe: Recipe, base: str | None) -> int:
    """Write a recipe's adapters. weights: canonical name -> fp32 tensor, of which the adapters are read. base: name or
    path of the Hugging Face model that they belong to, for peft. Returns the bytes of the tensors. Raises
    CheckpointError.
    """
    lora, names = _lora(recipe), _foreign_names(recipe)
    modules = sorted({name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in names.values()})
    config: dict[str, Any] = {
        "alpha_pattern": {},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": {},
        "target_modules": modules,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = {
        foreign: weights[name].float().contiguous() for name, foreign in sorted(names.items(), key=lambda pair: pair[1])
    }
    if folder.exists() or folder.is_symlink():
        raise CheckpointError(f"{folder}: exists: choose another name, or move it away")
    written = os_errors_as(CheckpointError, f"{folder}: cannot be written", "check the disk and its permissions")
    with written, fsops.temporary_tree(folder) as temporary:
        with fsops.FileWriter(temporary / TENSORS) as file:
            file.write(pack_header({name: ("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}))
            for tensor in tensors.values():
                file.write(tensor_memory(tensor))
            file.sync()
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        fsops.write_bytes(temporary / CONFIG, text.encode())
        fsops.rename(temporary, folder)
    return sum(tensor.nbytes for tensor in tensors.values())


def read_adapter(folder: Path, recipe: Recipe) -> LazyTensors:
    """Canonical name of each of the recipe's adapters -> fp32 tensor, from a folder of peft.

    Raises CheckpointError for an adapter of another kind, rank, scale, targets or shapes than the recipe's.
    """
    lora, names = _lora(recipe), _foreign_names(recipe)
    _check_config(folder, lora)
    with _errors(folder / TENSORS), open_regular(folder / TENSORS) as file:
        layout = read_header(file, foreign=True)
    specs = {spec.name: spec for spec in recipe.parameters}
    wanted = {foreign: specs[name] for name, foreign in names.items()}
    for problem, found in (("unknown", layout.keys() - wanted.keys()), ("missing", wanted.keys() - layout.keys())):
        if found:
            first, more = min(found), f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise CheckpointError(
                f"{folder / TENSORS}: tensor '{first}'{more}: {problem} by the recipe's tuning.lora.targets: make them "
                "name the modules that the adapter has"
            )
    for foreign, spec in wanted.items():
        if tuple(layout[foreign].shape) != spec.shape or layout[foreign].dtype not in ("F32", "BF16", "F16"):
            found_is = f"{layout[foreign].dtype} {list(layout[foreign].shape)}"
            raise CheckpointError(
                f"{folder / TENSORS}: tensor '{foreign}' is {found_is}, the recipe's {spec.name} is "
                f"{list(spec.shape)}: the adapter is of another model"
            )

    def read(name: str) -> Tensor:
        with _errors(folder / TENSORS), open_regular(folder / TENSORS) as file:
            return read_tensor(file, layout[names[name]]).to(DTYPES["F32"])

    return LazyTensors({name: meta(specs[name].shape) for name in names}, read)


def _lora(recipe: Recipe) -> LoraConfig:
    if recipe.tuning.lora is None:
        raise CheckpointError("the recipe has no adapters: give it the section tuning.lora")
    return recipe.tuning.lora


def _foreign_names(recipe: Recipe) -> dict[str, str]:
    """Canonical name of each adapter -> peft's. Raises CheckpointError for a family without such modules."""
    family = layout_of(recipe.model)
    alone = {
        foreign.parameters[0]: foreign.name.removesuffix(".weight")
        for foreign in foreign_tensors(recipe.model, family)
        if len(foreign.parameters) == 1 and not foreign.transposed
    }

    def name(spec: ParameterSpec) -> str:
        module, _, part = spec.name.rpartition(".")
        if f"{module}.weight" not in alone:
            raise CheckpointError(
                f"{module}: '{family}' of Hugging Face has no linear module of its own for it, so peft cannot hold its "
                "adapter: export merged weights with to-huggingface"
            )
        return f"{_PREFIX}{alone[f'{module}.weight']}.{_PARTS[part]}"

    return {spec.name: name(spec) for spec in recipe.parameters if is_adapter(spec)}


def _check_config(folder: Path, lora: LoraConfig) -> None:
    where = folder / CONFIG
    with _errors(where):
        config = parse_json(read_plain(where, "record"))
        if not isinstance(config, dict):
            raise ValueError("is not a JSON object")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type is {config.get('peft_type')!r:.40}: only LORA is read")
    for key, mine in (("r", lora.rank), ("lora_alpha", lora.alpha)):
        if config.get(key) != mine:
            name = "rank" if key == "r" else "alpha"
            raise CheckpointError(
                f"{where}: {key} is {config.get(key)!r:.40}, the recipe's tuning.lora.{name} is {mine:g}: make them "
                "equal"
            )
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain and config.get(key) != plain[0]:
            raise CheckpointError(f"{where}: {key} is {config[key]!r:.60}, which is not read: merge it with peft first")


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}: name a folder that peft wrote") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}: take another copy of the adapter") from error
