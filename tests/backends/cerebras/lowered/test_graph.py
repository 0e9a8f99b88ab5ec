"""The structure hash of a graph: unchanged by where a step was written, changed by whatever would run otherwise."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from lowered_graphs import GRAPHS, stored_graph, stored_text

from weftrain.backends.cerebras.lowered.graph import Graph
from weftrain.backends.cerebras.lowered.mlir_text import parse_graph


@pytest.mark.parametrize("name", GRAPHS)
def test_structure_is_what_would_run_and_not_where_it_was_written(name: str) -> None:
    graph = stored_graph(name)
    elsewhere = parse_graph(re.sub(r"loc\(#loc\d+\)", "loc(#loc0)", stored_text(name)))
    assert elsewhere.structure_hash() == graph.structure_hash()


def test_structure_sees_every_change() -> None:
    graph = stored_graph("crystal_float32")
    compare = next(index for index, op in enumerate(graph.ops) if op.kind == "Compare")
    changed: list[Graph] = [
        replace(
            graph,
            ops=(
                *graph.ops[:compare],
                replace(graph.ops[compare], attributes={"comparison_direction": "GE"}),
                *graph.ops[compare + 1 :],
            ),
        ),
        replace(graph, ops=(*graph.ops[:compare], replace(graph.ops[compare], kind="And"), *graph.ops[compare + 1 :])),
        replace(
            graph,
            ops=(
                *graph.ops[:compare],
                replace(graph.ops[compare], operands=graph.ops[compare].operands[::-1]),
                *graph.ops[compare + 1 :],
            ),
        ),
        replace(graph, outputs=graph.outputs[::-1]),
        replace(graph, output_names={}),
        replace(graph, arguments=(replace(graph.arguments[0], state="state.model.other"), *graph.arguments[1:])),
    ]
    hashes = {graph.structure_hash(), *(other.structure_hash() for other in changed)}
    assert len(hashes) == len(changed) + 1
