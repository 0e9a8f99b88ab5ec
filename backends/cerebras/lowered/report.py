"""What a lowered graph holds, counted, and held against what the recipe says it must hold.

The compiler may exit with 0 and leave half a step. So a graph is taken for whole only
after its matrix products have exactly the FLOPs of our own formula, each layer has the ops of every other, and every
parameter is read and replaced.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from weftrain.backends.cerebras.lowered.graph import STATE_PREFIX, Dense, Graph, GraphOp
from weftrain.core.config import Recipe
from weftrain.core.model_config import ModelConfig
from weftrain.core.parameters import Role, flops_per_token, parameter_count, parameter_specs

PRODUCTS = ("MatMul", "DotGeneral")
# they compute nothing
MOVES = ("Const", "Reshape", "Transpose", "BroadcastInDim", "Slice", "StridedSlice", "Concat", "pad", "Cast")
_MODULES = ("embedding", "attention_norm", "attention", "ffn_norm", "ffn", "final_norm")
PARTS = (
    *_MODULES[:3],
    "attention products",
    *_MODULES[3:5],
    "residual",
    "final_norm",
    "head",
    "loss",
    "clip",
    "update",
    "schedule",
)
_LAYER = re.compile(r"layers\.(\d+)")


@dataclass(frozen=True)
class ParameterUse:
    """Ops that read a parameter in each pass, through casts; updated: an output replaces it, and both of its
    moments.
    """

    name: str
    shape: tuple[int, ...]
    element: str
    forward: int
    backward: int
    update: int
    updated: bool


@dataclass
class PassWork:
    """FLOPs of matrix products; bytes if every op read its operands and wrote its results (a compiler fuses: it is an
    upper bound).
    """

    ops: int = 0
    flops: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class LoweringReport:
    recipe: str
    vendor_version: str
    structure: str  # hash of what would run
    histogram: Mapping[str, int]
    parameters: tuple[ParameterUse, ...]
    parameter_count: int
    work: Mapping[str, Mapping[str, PassWork]]  # part of the model -> pass -> work
    flops: int
    formula_flops: int
    precision: Mapping[str, Mapping[str, int]]  # kind -> element type of the result -> ops
    outputs: tuple[str, ...]
    problems: tuple[str, ...]
    seconds: float = 0.0
    peak_bytes: int = 0
    phases: Mapping[str, float] = field(default_factory=dict)

    def uses_by_role(self) -> list[tuple[str, int, ParameterUse]]:
        """(name without its layer, how many tensors are used alike, one of them); a role that differs between layers
        comes apart.
        """
        found: dict[tuple[str, int, int, int], list[ParameterUse]] = defaultdict(list)
        for use in self.parameters:
            found[_LAYER.sub("layers.*", use.name), use.forward, use.backward, use.update].append(use)
        return [(key[0], len(uses), uses[0]) for key, uses in found.items()]

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def golden(self) -> dict[str, Any]:
        """What must not change unseen: no path, time or machine."""
        return {
            "vendor_version": self.vendor_version,
            "structure": self.structure,
            "parameters": self.parameter_count,
            "matrix_flops": self.flops,
            "ops": dict(self.histogram),
            "precision": {kind: dict(counts) for kind, counts in self.precision.items() if kind not in MOVES},
            "outputs": list(self.outputs),
        }


def make_report(
    graph: Graph, recipe: Recipe, parameter_names: Sequence[str], vendor_version: str, **measured: Any
) -> LoweringReport:
    """Count and check. parameter_names: in the order of the optimizer's state, which names its tensors by number."""
    uses = tuple(_uses(graph, parameter_names))
    work = _work(graph)
    flops = sum(part.flops for passes in work.values() for part in passes.values())
    formula = flops_per_token(_without_windows(recipe.model), recipe.data.sequence_length) * recipe.tokens_per_step
    precision: dict[str, Counter[str]] = defaultdict(Counter)
    for op in graph.ops:
        precision[op.kind][op.result_types[0].element] += 1
    named = tuple(sorted(graph.output_names.values()))
    return LoweringReport(
        recipe=recipe.name,
        vendor_version=vendor_version,
        structure=graph.structure_hash(),
        histogram=graph.histogram(),
        parameters=uses,
        parameter_count=sum(_size(use.shape) for use in uses),
        work=work,
        flops=flops,
        formula_flops=formula,
        precision={kind: dict(counts) for kind, counts in sorted(precision.items())},
        outputs=named,
        problems=tuple(_problems(graph, recipe, uses, flops, formula)),
        **measured,
    )


def _without_windows(model: ModelConfig) -> ModelConfig:
    """A window masks scores that are computed all the same: the lowered products are those of whole rows of keys."""
    kinds = tuple(kind.model_copy(update={"window": None}) for kind in model.layer_pattern)
    return model.model_copy(update={"layer_pattern": kinds})


def _problems(graph: Graph, recipe: Recipe, uses: Sequence[ParameterUse], flops: int, formula: int) -> Iterator[str]:
    """Every way in which the graph is not the recipe's step."""
    model = recipe.model
    wanted = {spec.name: spec.shape for spec in parameter_specs(model)}
    found = {use.name: use.shape for use in uses}
    for name in sorted(wanted.keys() - found.keys()):
        yield f"parameter {name} is not in the graph"
    for name in sorted(wanted.keys() & found.keys()):
        if wanted[name] != found[name]:
            yield f"parameter {name} is {list(found[name])} in the graph and {list(wanted[name])} in the model"
    total = sum(_size(use.shape) for use in uses)
    if total != parameter_count(model):
        yield f"the graph's parameters have {total:,} elements and the model's {parameter_count(model):,}"
    for use in uses:
        for name, number in (("forward", use.forward), ("update", use.update)):
            if not number:
                yield f"parameter {use.name} is not read in the {name} pass"
        if not use.updated:
            yield f"parameter {use.name}, or one of its moments, is handed back as it came: the update is missing"
    if flops != formula:
        yield (
            f"matrix products have {flops:,} FLOPs; 6 x parameters in products + 12 x layers x heads x head "
            f"dimension x sequence gives {formula:,}"
        )
    counts = Counter(op.kind for op in graph.ops)
    matrices = sum(spec.role in (Role.MATRIX, Role.OUTPUT_MATRIX) for spec in parameter_specs(model))
    for kind, number, why in (
        ("Softmax", model.num_layers, "one a layer"),
        ("DotGeneral", 6 * model.num_layers, "two forward and four backward a layer"),
        ("MatMul", 3 * (matrices + 1), "three for each projection of a layer, and for the head"),
        ("SparseSoftmaxCrossEntropyWithLogits", 1, "the loss"),
        ("Gather", 1, "the embedding"),
    ):
        if counts[kind] != number:
            yield f"{counts[kind]} {kind} where a model of {model.num_layers} layers has {number} ({why})"
    layers = _layers(graph)
    if sorted(layers) != list(range(model.num_layers)):
        yield f"ops of layers {sorted(layers)} for a model of {model.num_layers} layers"
    for first in range(len(model.layer_pattern)):
        alike = [layer for layer in sorted(layers) if model.kind_of(layer) == model.kind_of(first)]
        if odd := [layer for layer in alike if layers[layer] != layers[alike[0]]]:
            yield f"the forward pass of layers {odd} has other ops than that of layer {alike[0]}"
    for name in ("loss", "grad_norm"):
        if f"output_{name}" not in graph.output_names.values():
            yield f"the output '{name}' is missing"


def _layers(graph: Graph) -> dict[int, Counter[str]]:
    """Layer -> kinds of its own forward ops. Constants and masks are shared between layers and stand in the first that
    needs them.
    """
    layers: dict[int, Counter[str]] = defaultdict(Counter)
    for op in graph.ops:
        match = _LAYER.match(op.location.scope)
        if (
            match
            and op.location.scope.endswith(".fwd")
            and op.kind in (*PRODUCTS, "Softmax", "Sigmoid", "Gelu", "LayerNorm", "Concat", "Mul")
        ):
            layers[int(match.group(1))][op.kind] += 1
    return dict(layers)


def part_of(op: GraphOp) -> tuple[str, str]:
    """(part of the model, pass) of an op, by the scope that it was traced in; program.py names those outside of
    modules.
    """
    scope = op.location.scope
    for suffix, name in ((".fwd", "forward"), (".bwd", "backward")):
        if scope.endswith(suffix):
            path = _LAYER.sub("", scope.removesuffix(suffix)).strip(".")
            for part in _MODULES:
                if path == part or path.startswith(f"{part}."):
                    return ("attention products" if part == "attention" and op.kind == "DotGeneral" else part), name
            return ("head" if path.startswith("Head") else path or "residual"), name
    return scope or "loss", "update" if scope in ("clip", "update", "schedule") else "forward"


def _work(graph: Graph) -> dict[str, dict[str, PassWork]]:
    work: dict[str, dict[str, PassWork]] = defaultdict(lambda: defaultdict(PassWork))
    for op in graph.ops:
        part, name = part_of(op)
        entry = work[part][name]
        entry.ops += 1
        entry.flops += product_flops(op)
        entry.num_bytes += (
            sum(spelled.num_bytes for spelled in (*op.operand_types, *op.result_types)) if op.kind != "Const" else 0
        )
    order = {part: number for number, part in enumerate(PARTS)}
    return {part: dict(work[part]) for part in sorted(work, key=lambda part: (order.get(part, len(order)), part))}


def product_flops(op: GraphOp) -> int:
    """Two for each multiply-add of a matrix product, 0 for every other op."""
    if op.kind == "MatMul":
        left = op.operand_types[0].shape
        return 2 * op.result_types[0].size * (left[-2] if op.attributes["transpose_a"] else left[-1])
    if op.kind == "DotGeneral":
        contracted = op.attributes["lhs_contracting_dimensions"]
        assert isinstance(contracted, Dense)
        return (
            2
            * op.result_types[0].size
            * _size(tuple(op.operand_types[0].shape[int(axis)] for axis in contracted.as_tuple()))
        )
    return 0


def _uses(graph: Graph, parameter_names: Sequence[str]) -> Iterator[ParameterUse]:
    readers: dict[str, list[GraphOp]] = defaultdict(list)
    for op in graph.ops:
        for operand in set(op.operands):
            readers[operand].append(op)
    states = {argument.state: argument for argument in graph.arguments if argument.state is not None}
    parameters = graph.parameters
    for number, name in enumerate(parameter_names):
        if name not in parameters:
            continue
        argument = parameters[name]
        passes = Counter(part_of(op)[1] for op in _through_casts(argument.name, readers))
        moments = [
            states.get(f"{STATE_PREFIX}optimizer.state.{number}.{moment}") for moment in ("exp_avg", "exp_avg_sq")
        ]
        replaced = [
            state is not None
            and state.aliasing_output is not None
            and graph.outputs[state.aliasing_output] != state.name
            for state in (argument, *moments)
        ]
        yield ParameterUse(
            name,
            argument.type.shape,
            argument.type.element,
            passes["forward"],
            passes["backward"],
            passes["update"],
            all(replaced),
        )


def _through_casts(value: str, readers: Mapping[str, Sequence[GraphOp]]) -> Iterator[GraphOp]:
    for op in readers[value]:
        if op.kind == "Cast":
            yield from _through_casts(op.results[0], readers)
        else:
            yield op


def _size(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
