"""A test oracle: interprets a lowered step in plain torch, so that what the compiler was given can be held against the
local backend.

What a reader would get wrong: this is *our own reading* of the ops, from their names, types and use, and no simulator
of the hardware. It says what the graph means if the ops mean what we think; it says nothing of the machine's rounding,
order of sums or speed. What it does not know it refuses: an op, an attribute of a known op, an index out of range. It
runs tiny models; a value is let go after its last use, so what is held is about what the step itself must hold. The
file is long because every op is a function of a few lines, and they belong together.

Readings that are not obvious, each held to torch by tests/backends/cerebras/lowered/test_oracle.py:
  LayerNorm(x, bias, weight), LayerNormGrad(dy, x, bias, weight) -> (dx, dbias, dweight); over the last axis
  SparseSoftmaxCrossEntropyWithLogits(logits, labels) -> (loss [N], softmax - one-hot [N, V]); a label of -100 gives 0
  Slice(x, begin, size) but StridedSlice(x, begin, end, stride); Clamp(x, low, high); ScatterNd(base, indices, updates)
  adds
  GeluGrad(dy, x): of the exact GELU
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weftrain.backends.cerebras.lowered.graph import MODEL_PREFIX, Dense, Graph, GraphError, GraphOp, TensorType
from weftrain.core.config import OptimizerConfig
from weftrain.core.model_config import ModelConfig
from weftrain.core.optim import parameter_groups
from weftrain.core.rotary import rotary_tables

OPTIMIZER_PREFIX = "state.optimizer.state."
SCHEDULER_PREFIX = "state.schedulers."
IGNORED_LABEL = -100

_DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i1": torch.bool,
}


@dataclass(frozen=True)
class StepOutcome:
    """state: what persists, by the graph's own names, to be fed to the next step. outputs: what is handed out, by its
    name.

    Tensors may share memory with those that went in; none of them was changed.
    """

    state: dict[str, Tensor]
    outputs: dict[str, Tensor]


def run_step(
    graph: Graph, state: Mapping[str, Tensor], inputs: Sequence[Tensor], *, float64: bool = False
) -> StepOutcome:
    """One step. state: every `state...` argument of the graph. inputs: the others, in order.

    float64: every floating type is computed as float64 and no cast rounds; constants stay as the compiler rounded them.
    That separates rounding from meaning. Raises GraphError for state or inputs that do not fit, and for whatever the
    oracle does not know.
    """
    values = _bind(graph, state, inputs, float64)
    last_use = _last_uses(graph)
    for index, op in enumerate(graph.ops):
        values.update(_results(op, [values[name] for name in op.operands], float64))
        for name in {*op.operands, *op.results}:
            if last_use.get(name, index) == index:
                del values[name]
    outputs = [values[name] for name in graph.outputs]
    after = {}
    for argument in graph.arguments:
        if argument.state is not None:
            replaced = argument.aliasing_output
            after[argument.state] = state[argument.state] if replaced is None else outputs[replaced]
    return StepOutcome(after, {name: outputs[index] for index, name in graph.output_names.items()})


def initial_state(
    graph: Graph, model: ModelConfig, optimizer: OptimizerConfig, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state before the first step: canonical weights, rotary tables, zero moments, counters at 0.

    `beta1_power` and `beta2_power` start at beta, not at 1: the step reads beta^t and multiplies afterwards.
    """
    parameters = dict(weights)
    for kind, (cos, sin) in rotary_tables(model).items():
        before = "scaled_" if kind == "scaled" else ""
        parameters |= {f"{before}cos": cos, f"{before}sin": sin}
    if unknown := sorted(parameters.keys() - graph.parameters.keys()):
        raise GraphError(
            f"the graph has no '{unknown[0]}' (of {len(unknown)}): it was lowered from another model, lower the recipe "
            "again"
        )
    powers = {"beta1_power": optimizer.beta1, "beta2_power": optimizer.beta2}
    state = {}
    for argument in graph.arguments:
        name = argument.state
        if name is None:
            continue
        last = name.rpartition(".")[2]
        dtype = _DTYPES[argument.type.element]
        if name.startswith(MODEL_PREFIX) and name.removeprefix(MODEL_PREFIX) in parameters:
            held = parameters[name.removeprefix(MODEL_PREFIX)]
            # a table goes as far as a sequence needs
            state[name] = held[: argument.type.shape[0]] if last.endswith(("cos", "sin")) else held
        elif name.startswith(OPTIMIZER_PREFIX) and last in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros(argument.type.shape, dtype=dtype)
        elif name.startswith(OPTIMIZER_PREFIX) and last in powers:
            state[name] = torch.tensor(powers[last], dtype=dtype)
        elif name.startswith(SCHEDULER_PREFIX) and last == "last_epoch":
            state[name] = torch.zeros(argument.type.shape, dtype=dtype)
        else:
            raise GraphError(
                f"state '{name}' has no initial value here: give its weight, or teach initial_state what it starts from"
            )
    return state


def parameter_order(model: ModelConfig, optimizer: OptimizerConfig) -> tuple[str, ...]:
    """Canonical names in the order in which the optimizer's state counts them: through the parameter groups."""
    return tuple(name for group in parameter_groups(model, optimizer) for name in group.parameters)


def weights_of(state: Mapping[str, Tensor], order: Iterable[str]) -> dict[str, Tensor]:
    """Canonical name -> weight."""
    return {name: state[MODEL_PREFIX + name] for name in order}


def moments_of(state: Mapping[str, Tensor], order: Iterable[str], which: str = "exp_avg") -> dict[str, Tensor]:
    """Canonical name -> moment: 'exp_avg' or 'exp_avg_sq'. order: of `parameter_order`."""
    return {name: state[f"{OPTIMIZER_PREFIX}{index}.{which}"] for index, name in enumerate(order)}


# -- values
# ----------------------------------------------------------------------------------------------------


def _dtype(spelled: TensorType) -> torch.dtype:
    if spelled.element not in _DTYPES:
        raise GraphError(f"the oracle has no dtype for {spelled}")
    return _DTYPES[spelled.element]


def _widened(spelled: TensorType) -> TensorType:
    """The type that stands in for another under float64."""
    return TensorType(spelled.shape, "f64") if _dtype(spelled).is_floating_point else spelled


def _bind(graph: Graph, state: Mapping[str, Tensor], inputs: Sequence[Tensor], float64: bool) -> dict[str, Tensor]:
    wanted = {argument.state for argument in graph.arguments if argument.state is not None}
    if wanted != state.keys():
        missing, unknown = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
        raise GraphError(
            f"state does not fit the graph: missing {missing[:3]}, unknown {unknown[:3]}; is it of another recipe?"
        )
    given, count = iter(inputs), sum(argument.state is None for argument in graph.arguments)
    if len(inputs) != count:
        raise GraphError(f"{len(inputs)} inputs given, the graph takes {count}")
    values = {}
    for argument in graph.arguments:
        tensor = next(given) if argument.state is None else state[argument.state]
        dtype = _dtype(_widened(argument.type) if float64 else argument.type)
        if tuple(tensor.shape) != argument.type.shape or tensor.dtype not in (_dtype(argument.type), dtype):
            name = argument.state or argument.input_name
            raise GraphError(f"'{name}' is {tensor.dtype} {list(tensor.shape)}, the graph takes {argument.type}")
        values[argument.name] = tensor.detach().to(dtype)
    return values


def _last_uses(graph: Graph) -> dict[str, int]:
    """Name of a value -> index of the last op that reads it; what is returned outlives them all."""
    last = {name: index for index, op in enumerate(graph.ops) for name in op.operands}
    return last | {name: len(graph.ops) for name in graph.outputs}


def _results(op: GraphOp, operands: list[Tensor], float64: bool) -> Iterator[tuple[str, Tensor]]:
    """Evaluates an op and checks each result against its declared type: (name of the value, value)."""
    if op.kind not in _OPS:
        raise _refuse(op, "the oracle does not know this op")
    function, known = _OPS[op.kind]
    if odd := sorted(op.attributes.keys() ^ known):
        raise _refuse(
            op, f"the oracle {'does not know' if odd[0] in op.attributes else 'misses'} the attribute '{odd[0]}'"
        )
    if float64:
        op = replace(op, result_types=tuple(_widened(spelled) for spelled in op.result_types))
    try:
        found = function(op, *operands)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise _refuse(op, f"cannot be evaluated: {' '.join(str(error).split())[:200]}") from error
    results = found if isinstance(found, tuple) else (found,)
    if len(results) != len(op.results):
        raise _refuse(op, f"{len(results)} results, {len(op.results)} declared")
    for name, result, spelled in zip(op.results, results, op.result_types, strict=True):
        if tuple(result.shape) != spelled.shape or result.dtype != _dtype(spelled):
            raise _refuse(op, f"gives {result.dtype} {list(result.shape)}, declared {spelled}")
        yield name, result


def _refuse(op: GraphOp, what: str) -> GraphError:
    return GraphError(f"line {op.line}: {op.kind}: {what}")


def _numbers(op: GraphOp, name: str) -> list[int]:
    value = op.attributes[name]
    if not isinstance(value, Dense):
        raise _refuse(op, f"'{name}' is not a tensor of numbers")
    return [int(number) for number in value.as_tuple()]


def _only(op: GraphOp, **wanted: object) -> None:
    """Attributes of which one value alone is known."""
    for name, value in wanted.items():
        if op.attributes[name] != value:
            raise _refuse(op, f"the oracle knows {name} = {value} only, not {op.attributes[name]}")


# -- ops
# ----------------------------------------------------------------------------------------------------


def _const(op: GraphOp) -> Tensor:
    value, spelled = op.attributes["value"], op.result_types[0]
    if not isinstance(value, Dense) or value.type.shape != spelled.shape:
        raise _refuse(op, "its value is not a tensor of its shape")
    held = torch.tensor(value.values, dtype=_DTYPES[value.type.element]).to(_DTYPES[spelled.element])
    # A splat is held once, whatever its shape.
    return held.reshape(()).expand(spelled.shape) if len(value.values) == 1 else held.reshape(spelled.shape)


def _cast(op: GraphOp, x: Tensor) -> Tensor:
    _only(op, Truncate=False)
    dtype = _DTYPES[op.result_types[0].element]
    if x.is_floating_point() and not dtype.is_floating_point:
        raise _refuse(op, "from float to integer: how it rounds is not known")
    return x.to(dtype)


def _transpose(op: GraphOp, x: Tensor, order: Tensor) -> Tensor:
    return x.permute(order.tolist())


def _broadcast(op: GraphOp, x: Tensor) -> Tensor:
    """Axis i of x becomes axis dimensions[i] of the result; all others, and those of size 1, are repeated."""
    shape, dimensions = op.result_types[0].shape, _numbers(op, "broadcast_dimensions")
    if len(dimensions) != x.dim() or sorted(set(dimensions)) != dimensions:
        raise _refuse(op, f"broadcast_dimensions {dimensions} of a tensor with {x.dim()} axes")
    placed = [1] * len(shape)
    for size, dimension in zip(x.shape, dimensions, strict=True):
        placed[dimension] = size
    return x.reshape(placed).expand(shape)


def _slice(op: GraphOp, x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    end = (begin + size).tolist()
    return _stepped(op, x, begin.tolist(), end, [1] * x.dim())


def _strided_slice(op: GraphOp, x: Tensor, begin: Tensor, end: Tensor, stride: Tensor) -> Tensor:
    _only(op, begin_mask=0, end_mask=0, ellipsis_mask=0, new_axis_mask=0, shrink_axis_mask=0)
    return _stepped(op, x, begin.tolist(), end.tolist(), stride.tolist())


def _stepped(op: GraphOp, x: Tensor, begin: list[int], end: list[int], stride: list[int]) -> Tensor:
    if any(not 0 <= first <= last <= size for first, last, size in zip(begin, end, x.shape, strict=True)):
        raise _refuse(op, f"{begin} to {end} lies outside of {list(x.shape)}")
    return x[tuple(slice(*bounds) for bounds in zip(begin, end, stride, strict=True))]


def _concat(op: GraphOp, *parts: Tensor) -> Tensor:
    return torch.cat(parts, op.attributes["axis"])


def _split(op: GraphOp, x: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = torch.split(x, _numbers(op, "split_sizes"), op.attributes["axis"])
    return parts


def _pad(op: GraphOp, x: Tensor) -> Tensor:
    """low, then the elements with `interior` more between each two of them, then high."""
    _only(op, padding_mode="CONSTANT")
    fill = op.attributes["constant_values"]
    if not isinstance(fill, Dense) or len(set(fill.values)) != 1:
        raise _refuse(op, "more than one constant")
    padded = x.new_full(op.result_types[0].shape, fill.values[0])
    places = []
    edges = zip(
        _numbers(op, "edge_padding_low"),
        _numbers(op, "edge_padding_high"),
        _numbers(op, "interior_padding"),
        strict=True,
    )
    for size, whole, (low, high, interior) in zip(x.shape, padded.shape, edges, strict=True):
        covered = (size - 1) * (interior + 1) + 1 if size else 0
        if min(low, high, interior) < 0 or low + covered + high != whole:
            raise _refuse(op, f"{low} + {size} elements with {interior} between + {high} is not {whole}")
        places.append(slice(low, low + covered, interior + 1))
    padded[tuple(places)] = x
    return padded


def _gather(op: GraphOp, table: Tensor, indices: Tensor) -> Tensor:
    _only(op, axis=0, batch_dims=0, is_sparse=False)
    _check_range(op, indices, table.shape[0])
    return table[indices]


def _scatter(op: GraphOp, base: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """indices [..., k]: each row names an element of the first k axes of base, to which its row of updates is
    *added*.
    """
    columns = indices.unbind(-1)
    for axis, column in enumerate(columns):
        _check_range(op, column, base.shape[axis])
    return base.clone().index_put_(columns, updates, accumulate=True)


def _check_range(op: GraphOp, indices: Tensor, size: int) -> None:
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        raise _refuse(
            op,
            f"{int(indices.min())} to {int(indices.max())} lies outside of 0..{size - 1}, and what the op does then is "
            "not known",
        )


def _check_internal(op: GraphOp) -> None:
    """What the compiler notes for itself on a product: an id, which means nothing here."""
    if noted := op.attributes["cs.internal"].keys() - {"cs.dotgeneral_id"}:
        raise _refuse(op, f"the oracle does not know the note '{min(noted)}'")


def _matmul(op: GraphOp, a: Tensor, b: Tensor) -> Tensor:
    _check_internal(op)
    if a.dim() != 2 or b.dim() != 2:
        raise _refuse(op, "of other than two matrices")
    return torch.mm(a.T if op.attributes["transpose_a"] else a, b.T if op.attributes["transpose_b"] else b)


def _dot_general(op: GraphOp, a: Tensor, b: Tensor) -> Tensor:
    """Batching axes first, then the free axes of a, then those of b; summed over the contracting ones."""
    _check_internal(op)
    sides = []
    for side, x in (("lhs", a), ("rhs", b)):
        batch, contracted = _numbers(op, f"{side}_batching_dimensions"), _numbers(op, f"{side}_contracting_dimensions")
        free = [axis for axis in range(x.dim()) if axis not in (*batch, *contracted)]
        shapes = [[x.shape[axis] for axis in axes] for axes in (batch, free, contracted)]
        sides.append((x.permute([*batch, *free, *contracted]), shapes))
    (a, (a_batch, a_free, a_contracted)), (b, (b_batch, b_free, b_contracted)) = sides
    if (a_batch, a_contracted) != (b_batch, b_contracted):
        raise _refuse(op, f"batch {a_batch} with {b_batch}, contracted {a_contracted} with {b_contracted}")
    flat = [_flat(a_batch), -1, _flat(a_contracted)]
    product = torch.bmm(a.reshape(flat), b.reshape(flat).transpose(1, 2))
    return product.reshape([*a_batch, *a_free, *b_free])


def _flat(sizes: list[int]) -> int:
    return int(torch.Size(sizes).numel())


def _reduce(op: GraphOp, x: Tensor) -> Tensor:
    _only(op, reduce_kind="ADD")
    dimensions, kept = _numbers(op, "dimensions"), _numbers(op, "keep_dims")
    if not dimensions or kept not in ([], dimensions):
        raise _refuse(op, f"over {dimensions} with {kept} kept")
    return x.sum(dimensions, keepdim=bool(kept))


def _l2_norm(op: GraphOp, x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=_numbers(op, "dims"), keepdim=op.attributes["keepdim"])


def _clamp(op: GraphOp, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return x.clamp(low, high)


def _select(op: GraphOp, condition: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    if not condition.shape == chosen.shape == other.shape or condition.dtype != torch.bool:
        raise _refuse(op, "operands of different shapes, or no condition")
    return torch.where(condition, chosen, other)


_DIRECTIONS = {
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}


def _compare(op: GraphOp, a: Tensor, b: Tensor) -> Tensor:
    direction = op.attributes["comparison_direction"]
    if direction not in _DIRECTIONS:
        raise _refuse(op, f"the oracle does not know the direction '{direction}'")
    found: Tensor = _elementwise(_DIRECTIONS[direction])(op, a, b)
    return found


def _arange(op: GraphOp, start: Tensor, stop: Tensor, step: Tensor) -> Tensor:
    _only(op, dim=0)
    return torch.arange(int(start), int(stop), int(step), dtype=start.dtype)


def _softmax(op: GraphOp, x: Tensor) -> Tensor:
    return torch.softmax(x, op.attributes["axis"])


def _cross_entropy(op: GraphOp, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """logits [N, V], labels [N] -> loss [N] and its gradient [N, V], both 0 where the label is -100.

    No attribute says so. But the compiler makes this op of torch's nll_loss where ignore_index is -100, and writes a
    mask where it is not.
    """
    _only(op, axis=1)
    borne = labels != IGNORED_LABEL
    _check_range(op, labels[borne], logits.shape[1])
    rows, labels = torch.arange(len(labels)), labels * borne
    log_probabilities = torch.log_softmax(logits, 1)
    gradient = log_probabilities.exp()
    gradient[rows, labels] -= 1
    return -log_probabilities[rows, labels] * borne, gradient * borne[:, None]


def _statistics(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(variance + epsilon) and 1 / sqrt(variance + epsilon), over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + epsilon)
    return centred * scale, scale


def _layer_norm(op: GraphOp, x: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    return _statistics(x, op.attributes["epsilon"])[0] * weight + bias


def _layer_norm_grad(
    op: GraphOp, gradient: Tensor, x: Tensor, bias: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    normed, scale = _statistics(x, op.attributes["epsilon"])
    weighted = gradient * weight
    along = (weighted * normed).mean(-1, keepdim=True)
    to_x = scale * (weighted - weighted.mean(-1, keepdim=True) - normed * along)
    rows = tuple(range(x.dim() - 1))
    return to_x, gradient.sum(rows), (gradient * normed).sum(rows)


def _gelu(op: GraphOp, x: Tensor) -> Tensor:
    _only(op, approximation="NONE")
    return torch.nn.functional.gelu(x)


def _gelu_grad(op: GraphOp, gradient: Tensor, x: Tensor) -> Tensor:
    """The derivative of x (1 + erf(x / sqrt 2)) / 2, times the gradient."""
    _only(op, approximation="NONE")
    cumulative = (1 + torch.erf(x * 0.5**0.5)) / 2
    density = torch.exp(-x * x / 2) * (0.5 / torch.pi) ** 0.5
    return gradient * (cumulative + x * density)


def _elementwise(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of one or two operands, which must agree in shape and dtype: every broadcast is an op of its own."""

    def apply(op: GraphOp, *operands: Tensor) -> Tensor:
        if any((operand.shape, operand.dtype) != (operands[0].shape, operands[0].dtype) for operand in operands):
            raise _refuse(op, f"operands of different types: {', '.join(map(str, op.operand_types))}")
        return function(*operands)

    return apply


_Evaluate = Callable[..., Tensor | tuple[Tensor, ...]]
_DIMENSIONS = {f"{side}_{which}_dimensions" for side in ("lhs", "rhs") for which in ("batching", "contracting")}
_MASKS = {f"{which}_mask" for which in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")}
_PADDING = {"padding_mode", "constant_values", "edge_padding_low", "edge_padding_high", "interior_padding"}

# kind -> how it is evaluated, and the attributes that it must have, no more and no less.
_OPS: dict[str, tuple[_Evaluate, set[str]]] = {
    "Const": (_const, {"value"}),
    "Cast": (_cast, {"Truncate"}),
    "Reshape": (lambda op, x: x.reshape(op.result_types[0].shape), set()),
    "Transpose": (_transpose, set()),
    "BroadcastInDim": (_broadcast, {"broadcast_dimensions"}),
    "Slice": (_slice, set()),
    "StridedSlice": (_strided_slice, _MASKS),
    "Concat": (_concat, {"axis"}),
    "Split": (_split, {"axis", "split_sizes"}),
    "pad": (_pad, _PADDING),
    "Gather": (_gather, {"axis", "batch_dims", "is_sparse"}),
    "ScatterNd": (_scatter, set()),
    "MatMul": (_matmul, {"transpose_a", "transpose_b", "cs.internal"}),
    "DotGeneral": (_dot_general, {*_DIMENSIONS, "cs.internal"}),
    "Reduce": (_reduce, {"dimensions", "keep_dims", "reduce_kind"}),
    "L2Norm": (_l2_norm, {"dims", "keepdim"}),
    "Clamp": (_clamp, set()),
    "Select": (_select, set()),
    "Compare": (_compare, {"comparison_direction"}),
    "Arange": (_arange, {"dim"}),
    "Softmax": (_softmax, {"axis"}),
    "SparseSoftmaxCrossEntropyWithLogits": (_cross_entropy, {"axis"}),
    "LayerNorm": (_layer_norm, {"epsilon"}),
    "LayerNormGrad": (_layer_norm_grad, {"epsilon"}),
    "Add": (_elementwise(operator.add), set()),
    "Sub": (_elementwise(operator.sub), set()),
    "Mul": (_elementwise(operator.mul), set()),
    "Div": (_elementwise(operator.truediv), set()),
    "Pow": (_elementwise(torch.pow), set()),
    "And": (_elementwise(torch.logical_and), set()),
    "Or": (_elementwise(torch.logical_or), set()),
    "Sqrt": (_elementwise(torch.sqrt), set()),
    "Rsqrt": (_elementwise(torch.rsqrt), set()),
    "Reciprocal": (_elementwise(torch.reciprocal), set()),
    "Sigmoid": (_elementwise(torch.sigmoid), set()),
    "Cos": (_elementwise(torch.cos), set()),
    "Tanh": (_elementwise(torch.tanh), set()),
    "Gelu": (_gelu, {"approximation"}),
    "GeluGrad": (_gelu_grad, {"approximation"}),
}
