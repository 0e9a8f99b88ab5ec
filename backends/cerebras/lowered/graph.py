"""The lowered step as data: a graph of typed ops, with the module and source line that each came from.

`mlir_text.py` reads it from what the compiler prints; `report.py` counts it and holds it against the recipe.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from weftrain.core.errors import BackendError

ELEMENT_BYTES = {
    "f32": 4,
    "bf16": 2,
    "f16": 2,
    "f64": 8,
    "i64": 8,
    "i32": 4,
    "i16": 2,
    "i8": 1,
    "i1": 1,
    "si64": 8,
    "si32": 4,
    "ui8": 1,
}
STATE_PREFIX = "state."
MODEL_PREFIX = "state.model."


class GraphError(BackendError):
    """A graph that is not what this reader, or the oracle, knows."""


@dataclass(frozen=True)
class TensorType:
    """Static shape and element type as MLIR spells it: f32, bf16, i64, i1 ..."""

    shape: tuple[int, ...]
    element: str

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.size * ELEMENT_BYTES[self.element]

    def __str__(self) -> str:
        return f"tensor<{'x'.join([*map(str, self.shape), self.element])}>"


@dataclass(frozen=True)
class Dense:
    """A constant tensor: `values` holds one value where all are equal, else all of them in row-major order."""

    type: TensorType
    values: tuple[int | float | bool, ...]

    def as_tuple(self) -> tuple[int | float | bool, ...]:
        """Every value, a splat written out: for the small tensors that carry shapes and axes."""
        return self.values * self.type.size if len(self.values) == 1 else self.values


@dataclass(frozen=True)
class Frame:
    """A line of source that an op came from."""

    function: str
    file: str
    line: int


@dataclass(frozen=True)
class Location:
    """scope: 'layers.0.attention.fwd', 'layers.0.ffn.bwd' or '' outside of modules. aten: the torch op before
    lowering.
    """

    scope: str = ""
    aten: str = ""
    frames: tuple[Frame, ...] = ()  # innermost first

    @property
    def module(self) -> str:
        return self.scope.removesuffix(".fwd").removesuffix(".bwd")


@dataclass(frozen=True)
class GraphOp:
    """One op. `results` are the names by which later operands mean them: '%5', or '%5#0', '%5#1' where there are
    several.
    """

    kind: str  # without the dialect: 'MatMul'
    results: tuple[str, ...]
    operands: tuple[str, ...]
    attributes: Mapping[str, Any]
    operand_types: tuple[TensorType, ...]
    result_types: tuple[TensorType, ...]
    location: Location
    line: int  # of the text, 1-based


@dataclass(frozen=True)
class Argument:
    """state: 'state.model.layers.0...' for what persists, None for an input. aliasing_output: index of the output that
    replaces it.
    """

    name: str
    type: TensorType
    state: str | None = None
    input_name: str | None = None
    aliasing_output: int | None = None


@dataclass(frozen=True)
class Graph:
    """One step: arguments in, ops in order, outputs (names of values) out."""

    arguments: tuple[Argument, ...]
    ops: tuple[GraphOp, ...]
    outputs: tuple[str, ...]
    output_types: tuple[TensorType, ...]
    output_names: Mapping[int, str] = field(default_factory=dict)  # cs.output_name of outputs that are handed out

    @cached_property
    def by_result(self) -> dict[str, GraphOp]:
        return {result: op for op in self.ops for result in op.results}

    @cached_property
    def parameters(self) -> dict[str, Argument]:
        """Model state by its name within the model: parameters and buffers."""
        return {
            argument.state.removeprefix(MODEL_PREFIX): argument
            for argument in self.arguments
            if argument.state is not None and argument.state.startswith(MODEL_PREFIX)
        }

    def histogram(self) -> dict[str, int]:
        """Ops by kind, most frequent first, names in order where equal."""
        counts = Counter(op.kind for op in self.ops)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def structure_hash(self) -> str:
        """SHA-256 over kinds, attributes, types and wiring, with no location, line or path: what would run, not where
        it was written.
        """
        digest = hashlib.sha256()
        number: dict[str, int] = {}
        for argument in self.arguments:
            number[argument.name] = len(number)
            digest.update(
                f"{argument.state or argument.input_name} {argument.type} {argument.aliasing_output}\n".encode()
            )
        for op in self.ops:
            operands = [number[operand] for operand in op.operands]
            for result in op.results:
                number[result] = len(number)
            attributes = sorted((key, repr(value)) for key, value in op.attributes.items() if key != "cs.internal")
            digest.update(f"{op.kind} {operands} {attributes} {[str(result) for result in op.result_types]}\n".encode())
        digest.update(repr(([number[output] for output in self.outputs], sorted(self.output_names.items()))).encode())
        return digest.hexdigest()
