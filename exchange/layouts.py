"""Weights in foreign layouts from and to the canonical names of core/parameters.py, bit for bit.

A layout is a family of Hugging Face by its model_type, or `cerebras` (Model Zoo 1.9); their names are data, in
exchange/families.py. `import_weights` and `export_weights` give one tensor at a time, so a model is never in memory as
a whole; `import_lazily` reads a tensor when it is asked for.

Cerebras rotates interleaved pairs only, so the rows of a rotate-half model's q and k stand in another order there.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from weftrain.core.errors import CheckpointError
from weftrain.core.formats.lazy_tensors import LazyTensors, meta, meta_of
from weftrain.core.model_config import ModelConfig
from weftrain.core.parameters import ParameterSpec, Role, parameter_specs
from weftrain.exchange.families import FAMILIES, NAMES
from weftrain.exchange.family import EXPERT, Names
from weftrain.exchange.modelzoo.params_schema import SAID_FIELDS

Layout = str  # a model_type of FAMILIES, or "cerebras": the keys of NAMES


@dataclass(frozen=True)
class ForeignTensor:
    """A tensor of a foreign file and the canonical parameters in it, which share its output axis: side by side, or one
    head of each after another, where `interleaved_heads` is not 0. The matrices of all experts are one parameter, and a
    tensor of the file each.
    """

    name: str
    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # canonical, [out, in] or [out]
    transposed: bool  # stored [in, out]
    rotated_heads: int  # heads whose rows are reordered from rotate-half to interleaved pairs; 0: none
    copies: tuple[str, ...]  # other names under which the file may hold the same tensor
    interleaved_heads: int = 0
    expert: int | None = None  # of its one parameter, [experts, out, in], it is this expert's matrix

    @property
    def shape(self) -> tuple[int, ...]:
        outputs = (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])
        return outputs[::-1] if self.transposed else outputs

    @property
    def is_as_canonical(self) -> bool:
        """Whether it holds the elements of one parameter in the canonical order."""
        one = len(self.parameters) == 1 and self.expert is None
        return one and not self.transposed and not self.rotated_heads


def foreign_tensors(config: ModelConfig, layout: Layout) -> tuple[ForeignTensor, ...]:
    """Every tensor of a foreign file of this model, in execution order. Raises CheckpointError where the layout cannot
    hold the model.
    """
    check_fit(config, layout)
    names = NAMES[layout]
    found: dict[str, list[ParameterSpec]] = {}
    for spec in parameter_specs(config):
        module, _, kind = spec.name.rpartition(".")  # kind: weight or bias
        found.setdefault(f"{_foreign_module(module, names)}.{kind}", []).append(spec)
    second_names = dict(names.copies)
    if config.tie_embeddings:
        second_names["embedding"] = names.outer["head"]
    result = []
    for name, specs in found.items():
        module, _, kind = specs[0].name.rpartition(".")
        if EXPERT in name:
            result += [_of_expert(name, specs[0], expert) for expert in range(specs[0].shape[0])]
            continue
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(module.rpartition(".")[2], 0)
        result.append(
            ForeignTensor(
                name=name,
                parameters=tuple(spec.name for spec in specs),
                shapes=tuple(spec.shape for spec in specs),
                transposed=names.transposed and specs[0].role in (Role.MATRIX, Role.OUTPUT_MATRIX),
                rotated_heads=heads if layout == "cerebras" and not config.rotary_interleaved else 0,
                copies=(f"{second_names[module]}.{kind}",) if module in second_names else (),
                interleaved_heads=config.num_heads if names.by_head and len(specs) > 1 else 0,
            )
        )
    return tuple(result)


def _of_expert(name: str, spec: ParameterSpec, expert: int) -> ForeignTensor:
    return ForeignTensor(
        name.replace(EXPERT, str(expert)), (spec.name,), (spec.shape[1:],), False, 0, (), expert=expert
    )


def _whole(tensors: Iterable[ForeignTensor]) -> Iterator[list[ForeignTensor]]:
    """The tensors in their order: each alone, and all experts of a parameter together."""
    for _, group in groupby(tensors, key=lambda foreign: foreign.parameters):
        yield list(group)


def import_weights(
    weights: Mapping[str, Tensor], config: ModelConfig, layout: Layout, without: Container[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Foreign tensors -> (canonical name, tensor), each read once, in execution order.

    without: the foreign tensors that are not read.

    Buffers (`attn.bias`, `attn.masked_bias`, `rotary_emb.inv_freq`) are skipped; copies of one tensor under a second
    name (a tied head) must be equal. Raises CheckpointError at once for unknown and missing names, and while reading
    for a wrong shape or a copy that differs.
    """
    wanted = _expected(weights, config, layout)  # raises at once
    groups = (group for group in _whole(wanted) if any(foreign.name not in without for foreign in group))
    return (pair for group in groups for pair in _imported(group, weights))


def _imported(group: list[ForeignTensor], weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    if group[0].expert is None:
        return import_tensor(group[0], weights)
    return iter([(group[0].parameters[0], _stacked(group, weights))])


def _stacked(group: list[ForeignTensor], weights: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([_outputs(foreign, weights) for foreign in group])


def import_lazily(weights: Mapping[str, Tensor], config: ModelConfig, layout: Layout) -> LazyTensors:
    """Canonical name -> tensor; each access reads the foreign tensor that holds it. Raises CheckpointError at once for
    wrong names and shapes, and while reading for a copy that differs.
    """
    metas, places = {}, {}
    for group in _whole(_expected(weights, config, layout)):
        for foreign in group:
            for name in (foreign.name, *(copy for copy in foreign.copies if copy in weights)):
                _check_shape(name, meta_of(weights, name), foreign.shape)
        dtype = meta_of(weights, group[0].name).dtype
        for index, (name, shape) in enumerate(zip(group[0].parameters, group[0].shapes, strict=True)):
            whole = shape if group[0].expert is None else (len(group), *shape)
            metas[name], places[name] = meta(whole, dtype), (group, index)

    def read(name: str) -> Tensor:
        group, index = places[name]
        if group[0].expert is not None:
            return _stacked(group, weights)
        return _parameter(group[0], index, _outputs(group[0], weights))

    return LazyTensors(metas, read)


def in_float32(tensors: LazyTensors) -> LazyTensors:
    """The same tensors, each converted to fp32 when it is read; exact from bf16, fp16 and fp32."""
    return LazyTensors({name: meta(tensors.meta(name).shape) for name in tensors}, lambda name: tensors[name].float())


def is_buffer(name: str) -> bool:
    """Whether a foreign tensor is a buffer, which no layout counts as a weight."""
    return any(name.endswith(f".{buffer}") for names in NAMES.values() for buffer in names.buffers)


def export_weights(weights: Mapping[str, Tensor], config: ModelConfig, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Canonical tensors -> (foreign name, tensor), in execution order. Only the Cerebras layout repeats a tensor under
    its second name. Raises CheckpointError as `import_weights` does.
    """
    wanted = foreign_tensors(config, layout)
    _check_names(set(weights), {name for foreign in wanted for name in foreign.parameters}, "canonical weights")
    return (pair for group in _whole(wanted) for pair in _exported(group, weights, repeat=layout == "cerebras"))


def _exported(group: list[ForeignTensor], weights: Mapping[str, Tensor], repeat: bool) -> Iterator[tuple[str, Tensor]]:
    if group[0].expert is None:
        return _export(group[0], weights, repeat)
    name, whole = group[0].parameters[0], weights[group[0].parameters[0]]  # read once
    _check_shape(name, whole, (len(group), *group[0].shape))
    return ((foreign.name, whole[foreign.expert].contiguous()) for foreign in group)


def _expected(weights: Mapping[str, Tensor], config: ModelConfig, layout: Layout) -> tuple[ForeignTensor, ...]:
    """The foreign tensors of this model. Raises CheckpointError unless `weights` holds exactly their names."""
    wanted = foreign_tensors(config, layout)
    optional = {copy for foreign in wanted for copy in foreign.copies}
    _check_names(
        set(weights) - _buffers(config, NAMES[layout]) - optional,
        {foreign.name for foreign in wanted},
        f"{layout} weights",
    )
    return wanted


def import_tensor(foreign: ForeignTensor, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The (canonical name, tensor) pairs of one foreign tensor."""
    outputs = _outputs(foreign, weights)
    for index, name in enumerate(foreign.parameters):
        yield name, _parameter(foreign, index, outputs)


def _outputs(foreign: ForeignTensor, weights: Mapping[str, Tensor]) -> Tensor:
    """A foreign tensor as [out, in]. Raises CheckpointError where its shape is wrong or a copy differs."""
    tensor = weights[foreign.name]
    _check_shape(foreign.name, tensor, foreign.shape)
    for copy in foreign.copies:
        if copy in weights and not torch.equal(weights[copy], tensor):
            raise CheckpointError(
                f"tensor '{copy}' differs from '{foreign.name}', which it should repeat; is the file of an untied "
                "model?"
            )
    return tensor.t() if foreign.transposed else tensor


def _parameter(foreign: ForeignTensor, index: int, outputs: Tensor) -> Tensor:
    if foreign.interleaved_heads:
        rows = outputs.unflatten(0, (foreign.interleaved_heads, len(foreign.shapes), -1))[:, index].flatten(0, 1)
    else:
        rows = outputs.split([shape[0] for shape in foreign.shapes])[index]
    return _swap_pairs(rows, foreign.rotated_heads, to_interleaved=False).contiguous()


def _export(foreign: ForeignTensor, weights: Mapping[str, Tensor], repeat: bool) -> Iterator[tuple[str, Tensor]]:
    rows = []
    for name, shape in zip(foreign.parameters, foreign.shapes, strict=True):
        parameter = weights[name]
        _check_shape(name, parameter, shape)
        rows.append(_swap_pairs(parameter, foreign.rotated_heads, to_interleaved=True))
    if foreign.interleaved_heads:
        heads = [part.unflatten(0, (foreign.interleaved_heads, 1, -1)) for part in rows]
        outputs = torch.cat(heads, 1).flatten(0, 2)
    else:
        outputs = torch.cat(rows) if len(rows) > 1 else rows[0]
    tensor = (outputs.t() if foreign.transposed else outputs).contiguous()
    yield foreign.name, tensor
    if repeat:
        for copy in foreign.copies:
            yield copy, tensor


def _swap_pairs(rows: Tensor, heads: int, to_interleaved: bool) -> Tensor:
    """Rows [H D, ...] of q or k from rotate-half order (first halves, then second halves) to interleaved pairs, or
    back.
    """
    if not heads:
        return rows
    pair_first = (heads, 2, -1) if to_interleaved else (heads, -1, 2)
    return rows.unflatten(0, pair_first).transpose(1, 2).flatten(0, 2)


def _foreign_module(module: str, names: Names) -> str:
    if module.startswith("layers."):
        _, layer, inner = module.split(".", 2)
        return f"{names.layers}.{layer}.{names.inner[inner]}"
    return names.outer[module]


def _buffers(config: ModelConfig, names: Names) -> set[str]:
    return {f"{names.layers}.{layer}.{name}" for layer in range(config.num_layers) for name in names.buffers}


def check_fit(config: ModelConfig, layout: Layout) -> None:
    """Raises CheckpointError for a model that the foreign code would compute differently."""
    if layout not in NAMES:
        raise CheckpointError(f"unknown layout '{layout}'; there is {', '.join(NAMES)}")
    unmet = FAMILIES[layout].unmet(config) if layout in FAMILIES else _unmet_by_cerebras(config)
    if unmet:
        raise CheckpointError(f"layout {layout} cannot hold this model: it needs {'; '.join(unmet)}")


def _unmet_by_cerebras(config: ModelConfig) -> list[str]:
    needs = {
        f"rotary_interleaved: true or rotary_dim: {config.head_dim}": config.rotary_interleaved
        or config.rotary_dim == config.head_dim,
        "rope_theta: 10000": config.rope_theta == 10000,
        "num_kv_heads: 1 or num_heads (its groups take query heads in turn)": config.num_kv_heads
        in (1, config.num_heads),
    }
    unmet = [need for need, met in needs.items() if not met]
    return unmet + [f"the default of {key}" for key in config.later_fields() if key not in SAID_FIELDS]


def _check_names(given: set[str], wanted: set[str], what: str) -> None:
    for problem, names in (("unknown", sorted(given - wanted)), ("missing", sorted(wanted - given))):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise CheckpointError(
                f"{what}: {problem} tensors {', '.join(names[:4])}{more}; is this the right model and layout?"
            )


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"tensor '{name}' has shape {list(tensor.shape)}, the config makes it {list(shape)}; is this the right "
            "model?"
        )
