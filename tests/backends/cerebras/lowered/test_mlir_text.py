"""The reader of the compiler's output: what it knows it reads exactly, and what it does not know it refuses with the
line.
"""

from __future__ import annotations

import contextlib
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftrain.backends.cerebras.lowered.graph import GraphError
from weftrain.backends.cerebras.lowered.mlir_text import parse_graph, read_graph

SMALL = """#loc0 = loc(unknown)
"builtin.module"() ( {
  "builtin.func"() ( {
  ^bb0(%arg0: tensor<2x3xf32> loc(unknown), %arg1: tensor<2xi64> loc(unknown)):  // no predecessors
    %0 = "cirh.Const"() {value = dense<VALUE> : tensor<TYPE>} : () -> tensor<TYPE> loc(#loc1)
    %1:2 = "cirh.Pair"(%arg0, %arg0) {flag, name = "a b", nested = {x = [1 : i64, -2 : i64], y = true}} : (tensor<2x3xf32>, tensor<2x3xf32>) -> (tensor<2x3xf32>, tensor<f32>) loc(#loc2)
    "std.return"(%1#0, %1#1) : (tensor<2x3xf32>, tensor<f32>) -> () loc(#loc0)
  }) {arg_attrs = [{tf.aliasing_output = 0 : i64, tf.resource_name = "state.model.w"}, {cs.input_name = "input_0"}], res_attrs = [{}, {cs.output_name = "output_loss"}], type = (tensor<2x3xf32>, tensor<2xi64>) -> (tensor<2x3xf32>, tensor<f32>)} : () -> () loc(#loc0)
}) : () -> () loc(#loc0)
#loc1 = loc("layers.0.ffn.fwd/aten::mul"(callsite("f"("/a/b.py":7:0) at "g"("c.py":8:0))))
#loc2 = loc("aten::div"(unknown))
"""


def small(value: str = "1.5", spelled: str = "2xf32") -> str:
    return SMALL.replace("VALUE", value).replace("TYPE", spelled)


def test_a_small_graph_is_read_whole() -> None:
    graph = parse_graph(small())
    weight, ids = graph.arguments
    assert (weight.state, weight.aliasing_output, weight.type.shape) == ("state.model.w", 0, (2, 3))
    assert (ids.input_name, ids.type.element) == ("input_0", "i64")
    pair = graph.ops[1]
    assert pair.results == ("%1#0", "%1#1")
    assert pair.attributes == {"flag": True, "name": "a b", "nested": {"x": (1, -2), "y": True}}
    assert graph.output_names == {1: "output_loss"}
    location = graph.ops[0].location
    assert (location.scope, location.module, location.aten) == ("layers.0.ffn.fwd", "layers.0.ffn", "aten::mul")
    assert [(frame.function, frame.file, frame.line) for frame in location.frames] == [
        ("f", "/a/b.py", 7),
        ("g", "c.py", 8),
    ]


@pytest.mark.parametrize(
    ("value", "spelled", "wanted"),
    [
        ("1.5", "2xf32", (1.5, 1.5)),
        ("[1, -2]", "2xi64", (1, -2)),
        ("[[1, 2], [3, 4]]", "2x2xi32", (1, 2, 3, 4)),
        ("true", "1xi1", (True,)),
        ("", "0xi64", ()),
        ("0xFF800000", "1xf32", (-math.inf,)),
        ("0x3FC0", "1xbf16", (1.5,)),
        ('"0x0000803F00000040"', "2xf32", (1.0, 2.0)),
    ],
)
def test_numbers_as_the_compiler_prints_them(value: str, spelled: str, wanted: tuple[float, ...]) -> None:
    assert parse_graph(small(value, spelled)).ops[0].attributes["value"].as_tuple() == wanted


def test_nan() -> None:
    (value,) = parse_graph(small("0x7FC00000", "1xf32")).ops[0].attributes["value"].as_tuple()
    assert math.isnan(value)


def test_a_constant_of_any_size_costs_nothing() -> None:
    assert parse_graph(small("0.0", "999999999999x99xf32")).ops[0].result_types[0].size > 10**13


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("%arg0, %arg0)", "%arg0, %arg9)", "uses %arg9 as tensor<2x3xf32>, which is not defined before"),
        (
            "(tensor<2x3xf32>, tensor<2x3xf32>) -> (t",
            "(tensor<2x3xf32>, tensor<2x4xf32>) -> (t",
            "which is tensor<2x3xf32>",
        ),
        ("%1:2", "%1:3", "3 results, its types say otherwise"),
        ("%1:2", "%1:99999999999", "its types say otherwise"),
        ("tensor<2xf32>", "tensor<2xf8>", "the type tensor<2xf8>"),
        ('"std.return"(%1#0, %1#1)', '"std.return"(%1#0, %7)', "%7"),
        ("cirh.Pair", "other.Pair", "not an op in the generic form"),
        ("aliasing_output = 0", "aliasing_output = 9", "is replaced by output 9 of 2"),
    ],
)
def test_what_does_not_fit_is_refused(old: str, new: str, words: str) -> None:
    assert old in small()
    with pytest.raises(GraphError, match=re.escape(words)):
        parse_graph(small().replace(old, new))


@pytest.mark.parametrize("text", ["", " \n", "module {", "\n".join(small().splitlines()[:5])])
def test_a_text_without_a_function_is_refused(text: str) -> None:
    with pytest.raises(GraphError):
        parse_graph(text)


def test_a_file_that_is_missing_or_no_text(tmp_path: pytest.TempPathFactory) -> None:
    path = tmp_path / "graph.mlir"  # type: ignore[operator]
    with pytest.raises(GraphError, match="cannot be read"):
        read_graph(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GraphError, match="cannot be read"):
        read_graph(path)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(small())), st.integers(0, len(small())))
def test_any_part_left_out_is_a_graph_or_an_error_of_one_kind(first: int, second: int) -> None:
    begin, end = sorted((first, second))
    with contextlib.suppress(GraphError):
        parse_graph(small()[:begin] + small()[end:])
