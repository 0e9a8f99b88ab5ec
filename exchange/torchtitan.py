"""A model's weights as a torchtitan checkpoint: a folder of torch.distributed.checkpoint (DCP), which torchtitan loads
with `--checkpoint.initial_load_path`, for its `llama3` and `qwen3` models.

torch writes the folder; `.metadata` in it is a pickle, as every DCP folder's is, so weftrain writes such folders and
opens none. `model.json` beside it names the sizes that torchtitan's own model config must have.

What a reader would get wrong: torchtitan's Llama rotates interleaved pairs and its Qwen 3 rotates halves, so the rows
of a rotate-half Llama's q and k stand in another order there. Of a tied matrix torchtitan wants both names.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import WriteItem

from weftrain.core.errors import CheckpointError, one_line, os_errors_as
from weftrain.core.formats import fsops
from weftrain.core.formats.canonical import canonical_json
from weftrain.core.formats.lazy_tensors import LazyTensors, meta
from weftrain.core.model_config import ModelConfig
from weftrain.core.parameters import ParameterSpec, parameter_specs

Names = Literal["0.3", "0.2"]
NAMES: tuple[Names, ...] = ("0.3", "0.2")  # releases of torchtitan with tensor names of their own, newest first
DTYPES = (torch.float32, torch.bfloat16)
SIZES = "model.json"

# Canonical module -> torchtitan's; the head and q, k and v have other names in 0.2 and before.
_MODULES = {
    "embedding": "tok_embeddings",
    "final_norm": "norm",
    "attention_norm": "attention_norm",
    "attention.o_proj": "attention.wo",
    "attention.q_norm": "attention.q_norm",
    "attention.k_norm": "attention.k_norm",
    "ffn_norm": "ffn_norm",
    "ffn.gate_proj": "feed_forward.w1",
    "ffn.up_proj": "feed_forward.w3",
    "ffn.down_proj": "feed_forward.w2",
}
_HEAD = {"0.3": "lm_head", "0.2": "output"}
_QKV = {"0.3": "attention.qkv_linear.w", "0.2": "attention.w"}
# Of the model's later fields, those that torchtitan's models have too.
_HELD = ("num_kv_heads", "head_dim", "qk_norm", "rotary_scaling")


def check_fit(config: ModelConfig) -> None:
    """Raises CheckpointError, naming every field, for a model that torchtitan's llama3 and qwen3 do not compute."""
    norms, scaling = config.qk_norm == "per_head", config.rotary_scaling
    scales = (config.mup, config.embedding_scale, config.logits_scale)
    needs = {
        "norm: rms_norm": config.norm == "rms_norm",
        "linear_bias: false": not config.linear_bias,
        f"rotary_dim: {config.head_dim}": config.rotary_dim == config.head_dim,
        "attention_scale: inverse_sqrt_head_dim (see weftrain.exchange.fold_mup.fold)": config.attention_scale
        == "inverse_sqrt_head_dim",
        "no mup and no scales (see weftrain.exchange.fold_mup.fold)": all(scale is None for scale in scales),
        "qk_norm: none (llama3) or per_head (qwen3)": config.qk_norm != "full",
        "rotary_interleaved: false with qk_norm": not (norms and config.rotary_interleaved),
        "no rotary_scaling, or llama3's without qk_norm": scaling is None or (scaling.kind == "llama3" and not norms),
    }
    unmet = [need for need, met in needs.items() if not met]
    unmet += [f"the default of {key}" for key in config.later_fields() if key not in _HELD]
    if unmet:
        raise CheckpointError(f"torchtitan's llama3 and qwen3 cannot hold this model: they need {'; '.join(unmet)}")


def export_tensors(
    weights: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype, names: Names = "0.3"
) -> LazyTensors:
    """Canonical name -> tensor as torchtitan's name -> tensor of `dtype`, rounded to nearest even, read when asked for.

    Raises CheckpointError: the model does not fit, or `weights` has not exactly its tensors.
    """
    check_fit(config)
    if different := sorted(set(weights) ^ {spec.name for spec in parameter_specs(config)}):
        raise CheckpointError(
            f"canonical weights: tensor '{different[0]}' is missing, or not the model's: is this the right model?"
        )
    places: dict[str, ParameterSpec] = {}
    for spec in parameter_specs(config):
        places[_foreign_name(spec.name, names)] = spec
        if spec.name == "embedding.weight" and config.tie_embeddings:
            places[_foreign_name("head.weight", names)] = spec

    def read(name: str) -> Tensor:
        spec = places[name]
        tensor = weights[spec.name]
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(
                f"tensor '{spec.name}' has shape {list(tensor.shape)}, the config makes it {list(spec.shape)}"
            )
        heads = _paired_heads(spec.name, config)
        if heads:  # first halves, then second halves -> pairs
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        return tensor.to(dtype).contiguous()

    return LazyTensors({name: meta(spec.shape, dtype) for name, spec in places.items()}, read)


def _foreign_name(name: str, names: Names) -> str:
    module, _, kind = name.rpartition(".")
    prefix = ""
    if module.startswith("layers."):
        _, layer, module = module.split(".", 2)
        prefix = f"layers.{layer}."
    if module in ("attention.q_proj", "attention.k_proj", "attention.v_proj"):
        module = _QKV[names] + module.removeprefix("attention.")[0]
    else:
        module = _HEAD[names] if module == "head" else _MODULES[module]
    return f"{prefix}{module}.{kind}"


def _paired_heads(name: str, config: ModelConfig) -> int:
    """Heads whose rows change from rotate-half's order to that of interleaved pairs; 0 for what keeps its order."""
    if config.qk_norm == "per_head" or config.rotary_interleaved:
        return 0
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    return heads.get(name.split(".")[-2], 0)


def sizes(config: ModelConfig) -> dict[str, Any]:
    """What torchtitan's config of this model must say, in torchtitan's words."""
    rope: dict[str, Any] = {"theta": config.rope_theta, "max_seq_len": config.max_position_embeddings}
    if config.rotary_scaling is not None:
        given = config.rotary_scaling.model_dump(exclude={"kind"})
        rope |= {"scaling": "llama", "scaling_factor": given.pop("factor"), **given}
    return {
        "model": "qwen3" if config.qk_norm == "per_head" else "llama3",
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "enable_weight_tying": config.tie_embeddings,
        "norm_eps": config.norm_eps,
        "rope": rope,
    }


class _LatePlanner(dcp.DefaultSavePlanner):
    """Plans with tensors on the device `meta` and reads each when its turn to be written comes."""

    def __init__(self, tensors: LazyTensors) -> None:
        super().__init__()
        self._tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._tensors[write_item.index.fqn]


class _Writer(dcp.FileSystemWriter):
    """Writes one file, and no name of a temporary folder into the metadata: equal arguments give equal bytes."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id="", save_id="")


def write_torchtitan(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    names: Names = "0.3",
    source: Mapping[str, Any] | None = None,
) -> int:
    """Write a model's folder; it appears whole and durable, or not at all. Returns the tensors' bytes.

    weights: canonical name -> tensor, each read once (a tied matrix twice), when its turn comes. source: further keys
    of model.json. Raises CheckpointError: the folder exists, the disk is full or fails, or torchtitan cannot hold the
    model.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"{folder}: dtype {dtype} is not written; there is {', '.join(map(str, DTYPES))}")
    tensors = export_tensors(weights, config, dtype, names)
    metas = {name: tensors.meta(name) for name in tensors}
    total = sum(one.nbytes for one in metas.values())
    if folder.exists() or folder.is_symlink():
        raise CheckpointError(f"{folder}: exists: choose another name, or move it away")
    if (free := fsops.free_bytes(folder.parent)) < total:
        raise CheckpointError(
            f"{folder}: the disk is full: {total:,} bytes needed, {free:,} free: make room, then write again"
        )
    written = os_errors_as(CheckpointError, f"{folder}: cannot be written", "check the disk and its permissions")
    with written, fsops.temporary_tree(folder) as temporary:
        _save(folder, temporary, tensors, metas)
        about = {**sizes(config), "dtype": str(dtype).removeprefix("torch."), "names": names, **(source or {})}
        fsops.write_bytes(temporary / SIZES, canonical_json(about) + b"\n")
        fsops.rename(temporary, folder)
    return total


def _save(folder: Path, temporary: Path, tensors: LazyTensors, metas: Mapping[str, Tensor]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that there is one process, as is meant
            dcp.save(dict(metas), storage_writer=_Writer(temporary), planner=_LatePlanner(tensors), no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, (CheckpointError, OSError)):
            raise cause from error
        raise CheckpointError(f"{folder}: torch cannot write it: {one_line(cause)}") from error
