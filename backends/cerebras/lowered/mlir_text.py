"""Reads a lowered step from the generic textual form that `torch-cirh-opt --mlir-print-op-generic` prints.

This reads the output of one compiler, not MLIR at large. It refuses what it does not know and names the line: in a
graph that is half understood, every count and every comparison would be a guess.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weftrain.backends.cerebras.lowered.graph import (
    ELEMENT_BYTES,
    Argument,
    Dense,
    Frame,
    Graph,
    GraphError,
    GraphOp,
    Location,
    TensorType,
)


def read_graph(path: Path) -> Graph:
    """The graph in a file of the generic form. Raises GraphError: unreadable, empty, cut short, or a form that is not
    known.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise GraphError(f"{path}: cannot be read: {error}; lower the recipe again") from error
    return parse_graph(text, str(path))


def parse_graph(text: str, origin: str = "graph") -> Graph:
    """See read_graph. origin: what messages call the text."""
    try:
        return _parse(text, origin)
    except GraphError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise GraphError(f"{origin}: cannot be read: {error}") from None


def _parse(text: str, origin: str) -> Graph:
    if not text.strip():
        raise GraphError(f"{origin}: empty: the compiler failed without saying so (its exit code is 0 then, too)")
    lines = text.splitlines()
    locations = _locations(lines)
    head = next((index for index, line in enumerate(lines) if line.lstrip().startswith("^bb0(")), None)
    tail = next((index for index, line in enumerate(lines) if line.lstrip().startswith("}) {arg_attrs")), None)
    if head is None or tail is None:
        raise GraphError(f"{origin}: no function with arguments: the file is cut short, or not in the generic form")
    ops: list[GraphOp] = []
    outputs: tuple[str, ...] = ()
    output_types: tuple[TensorType, ...] = ()
    for index in range(head + 1, tail):
        if lines[index].strip():
            op = _op(lines[index], index + 1, locations, origin)
            if op.kind == "return":
                outputs, output_types = op.operands, op.operand_types
            else:
                ops.append(op)
    if not outputs:
        raise GraphError(f"{origin}: nothing is returned: the file is cut short")
    try:
        attributes = _Reader(lines[tail].lstrip().removeprefix("}) ")).dictionary()
    except _UnknownError as error:
        raise GraphError(f"{origin}:{tail + 1}: cannot be read: {error}") from None
    arguments = _arguments(lines[head], attributes.get("arg_attrs", ()), origin)
    names = {
        index: item["cs.output_name"]
        for index, item in enumerate(attributes.get("res_attrs", ()))
        if "cs.output_name" in item
    }
    graph = Graph(arguments, tuple(ops), outputs, output_types, names)
    _check_wiring(graph, origin)
    return graph


_ARGUMENT = re.compile(r"(%arg\d+): (tensor<[^>]*>)")
_OP = re.compile(r'\s*(?:(%\d+)(?::(\d+))? = )?"(?:cirh|std)\.(\w+)"\(([^)]*)\) ?')
_LOCATION = re.compile(r'(#loc\d+) = loc\((?:"([^"]*)"\(|(unknown))')
_FRAME = re.compile(r'"([^"]*)"\("([^"]*)":(\d+):\d+\)')


def _arguments(line: str, attributes: Any, origin: str) -> tuple[Argument, ...]:
    found = _ARGUMENT.findall(line)
    if len(found) != len(attributes):
        raise GraphError(f"{origin}: {len(found)} arguments and attributes for {len(attributes)}: the file is damaged")
    return tuple(
        Argument(
            name,
            _type(spelled),
            given.get("tf.resource_name"),
            given.get("cs.input_name"),
            given.get("tf.aliasing_output"),
        )
        for (name, spelled), given in zip(found, attributes, strict=True)
    )


def _op(line: str, number: int, locations: Mapping[str, Location], origin: str) -> GraphOp:
    match = _OP.match(line)
    if match is None:
        raise GraphError(f"{origin}:{number}: not an op in the generic form: {line.strip()[:120]}")
    name, count, kind, operands = match.groups()
    reader = _Reader(line, match.end())
    try:
        attributes = reader.dictionary() if reader.peek("{") else {}
        reader.take(":")
        operand_types = reader.types()
        reader.take("->")
        result_types = reader.types()
        reader.take("loc(")
        location = locations.get(reader.word(), Location())
    except _UnknownError as error:
        raise GraphError(f"{origin}:{number}: {kind}: cannot be read: {error}") from None
    if count is not None and int(count) != len(result_types):
        raise GraphError(f"{origin}:{number}: {kind} has {count} results, its types say otherwise")
    if name is None:
        results: tuple[str, ...] = ()
    elif count is None:
        results = (name,)
    else:
        results = tuple(f"{name}#{index}" for index in range(int(count)))
    names = tuple(operand.strip() for operand in operands.split(",") if operand.strip())
    if len(names) != len(operand_types) or len(results) != len(result_types):
        raise GraphError(
            f"{origin}:{number}: {kind} has {len(names)} operands and {len(results)} results, its types say otherwise"
        )
    return GraphOp(kind, results, names, attributes, operand_types, result_types, location, number)


def _check_wiring(graph: Graph, origin: str) -> None:
    known = {argument.name: argument.type for argument in graph.arguments}
    for op in graph.ops:
        for operand, spelled in zip(op.operands, op.operand_types, strict=True):
            if known.get(operand) != spelled:
                raise GraphError(
                    f"{origin}:{op.line}: {op.kind} uses {operand} as {spelled}, which is "
                    f"{known.get(operand, 'not defined before')}"
                )
        known.update(zip(op.results, op.result_types, strict=True))
    for output, spelled in zip(graph.outputs, graph.output_types, strict=True):
        if known.get(output) != spelled:
            raise GraphError(f"{origin}: output {output} is {known.get(output, 'not defined')}, returned as {spelled}")
    for argument in graph.arguments:
        if argument.aliasing_output is not None and argument.aliasing_output >= len(graph.outputs):
            raise GraphError(
                f"{origin}: {argument.state} is replaced by output {argument.aliasing_output} of {len(graph.outputs)}"
            )


def _locations(lines: list[str]) -> dict[str, Location]:
    found = {}
    for line in lines:
        if not line.startswith("#loc"):
            continue
        match = _LOCATION.match(line)
        if match is None:
            continue  # a location without a name says nothing that is used
        label, name, _ = match.groups()
        scope, _, aten = (name or "").rpartition("/")
        frames = tuple(Frame(function, file, int(number)) for function, file, number in _FRAME.findall(line))
        found[label] = Location(scope, aten, frames)
    return found


def _type(text: str) -> TensorType:
    *shape, element = text.removeprefix("tensor<").removesuffix(">").split("x")
    if element not in ELEMENT_BYTES or not all(size.isdigit() for size in shape):
        raise _UnknownError(f"the type {text}")
    return TensorType(tuple(map(int, shape)), element)


class _UnknownError(ValueError):
    """Something in a line that the reader does not know."""


class _Reader:
    """Reads one line from left to right."""

    _TOKENS = re.compile(r'[\w.#+-]+|"(?:[^"\\]|\\.)*"')

    def __init__(self, text: str, at: int = 0) -> None:
        self.text, self.at = text, at

    def _skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at] == " ":
            self.at += 1

    def peek(self, literal: str) -> bool:
        self._skip()
        return self.text.startswith(literal, self.at)

    def take(self, literal: str) -> None:
        if not self.peek(literal):
            raise _UnknownError(f"'{literal}' expected at '{self.text[self.at : self.at + 40]}'")
        self.at += len(literal)

    def word(self) -> str:
        self._skip()
        match = self._TOKENS.match(self.text, self.at)
        if match is None:
            raise _UnknownError(f"a word expected at '{self.text[self.at : self.at + 40]}'")
        self.at = match.end()
        return match.group()

    def types(self) -> tuple[TensorType, ...]:
        """One type, or several in parentheses."""
        return tuple(self._type_list()) if self.peek("(") else (self.type(),)

    def _type_list(self) -> Iterator[TensorType]:
        self.take("(")
        while not self.peek(")"):
            yield self.type()
            if not self.peek(")"):
                self.take(",")
        self.take(")")

    def type(self) -> TensorType:
        self._skip()
        end = self.text.find(">", self.at) + 1
        if not self.peek("tensor<") or not end:
            raise _UnknownError(f"a tensor type expected at '{self.text[self.at : self.at + 40]}'")
        found = _type(self.text[self.at : end])
        self.at = end
        return found

    def dictionary(self) -> dict[str, Any]:
        self.take("{")
        found: dict[str, Any] = {}
        while not self.peek("}"):
            name = self.word()
            if self.peek("="):
                self.take("=")
                found[name] = self.value()
            else:
                found[name] = True  # a unit attribute is there or not
            if not self.peek("}"):
                self.take(",")
        self.take("}")
        return found

    def value(self) -> Any:
        if self.peek("{"):
            return self.dictionary()
        if self.peek("["):
            self.take("[")
            items = []
            while not self.peek("]"):
                items.append(self.value())
                if not self.peek("]"):
                    self.take(",")
            self.take("]")
            return tuple(items)
        if self.peek("dense<"):
            return self._dense()
        if self.peek("("):  # a function type
            operands = self.types()
            self.take("->")
            return operands, self.types()
        word = self.word()
        if word.startswith('"'):
            return word[1:-1]
        if word in ("true", "false"):
            return word == "true"
        if not self.peek(":"):
            return word
        self.take(":")
        return _number(word, self.word())

    def _dense(self) -> Dense:
        self.take("dense<")
        depth, end = 1, self.at
        while depth and end < len(self.text):
            depth += {"<": 1, ">": -1}.get(self.text[end], 0)
            end += 1
        body = self.text[self.at : end - 1]
        self.at = end
        self.take(":")
        found = self.type()
        if body.startswith('"0x'):
            return Dense(found, _from_hexadecimal(body.strip('"'), found))
        words = re.findall(r"[\w.+-]+", body)
        values = tuple(_number(word, found.element) for word in words)
        if len(values) not in (1, found.size):
            raise _UnknownError(f"{len(values)} values of a {found}")
        return Dense(found, values)


_FORMATS = {
    "f32": "<f",
    "f64": "<d",
    "f16": "<e",
    "i64": "<q",
    "si64": "<q",
    "i32": "<i",
    "si32": "<i",
    "i16": "<h",
    "i8": "<b",
    "ui8": "<B",
}


def _from_hexadecimal(body: str, spelled: TensorType) -> tuple[int | float | bool, ...]:
    data, width = bytes.fromhex(body[2:]), ELEMENT_BYTES[spelled.element]
    if spelled.element not in _FORMATS or len(data) not in (width, width * spelled.size):
        raise _UnknownError(f"{len(data)} bytes of a {spelled}")
    return tuple(value for (value,) in struct.iter_unpack(_FORMATS[spelled.element], data))


def _number(word: str, element: str) -> int | float | bool:
    """A number as MLIR prints it: decimal, or the bits of a float in hexadecimal where decimal cannot say it (NaN,
    infinity).
    """
    if element == "i1":
        if word not in ("true", "false"):
            raise _UnknownError(f"'{word}' as i1")
        return word == "true"
    if "f" not in element:
        return int(word)
    if not word.startswith("0x"):
        return float(word)
    bits = int(word, 16)
    if element == "bf16":
        return float(struct.unpack("<f", struct.pack("<I", bits << 16))[0])
    pack = {"f32": "<I", "f64": "<Q", "f16": "<H"}[element]
    return float(struct.unpack(_FORMATS[element], struct.pack(pack, bits))[0])
