"""A graph is taken for a recipe's step only whole: each way in which it can be another is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from lowered_graphs import recipe_of_graph, stored_graph
from oracle import parameter_order

from weftrain.backends.cerebras.lowered.graph import Graph
from weftrain.backends.cerebras.lowered.report import LoweringReport, make_report, part_of, product_flops
from weftrain.core.config import Recipe
from weftrain.core.parameters import flops_per_token, parameter_count

NAMES = ("crystal_float32", "crystal_bfloat16", "amber_float32", "amber_bfloat16")
Tiny = Callable[..., Recipe]


def report_of(graph: Graph, recipe: Recipe) -> LoweringReport:
    return make_report(graph, recipe, parameter_order(recipe.model, recipe.optimizer), "2.10.0")


@pytest.fixture
def crystal(tiny_recipe: Tiny) -> tuple[Graph, Recipe]:
    return stored_graph("crystal_float32"), recipe_of_graph("crystal_float32", tiny_recipe)


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_step_has_no_problems_and_the_formulas_flops(name: str, tiny_recipe: Tiny) -> None:
    recipe = recipe_of_graph(name, tiny_recipe)
    report = report_of(stored_graph(name), recipe)
    assert report.problems == ()
    assert report.flops == flops_per_token(recipe.model, recipe.data.sequence_length) * recipe.tokens_per_step
    assert report.parameter_count == parameter_count(recipe.model)
    assert sum(report.histogram.values()) == len(stored_graph(name).ops)
    assert sum(entry.ops for passes in report.work.values() for entry in passes.values()) == len(stored_graph(name).ops)
    assert sum(sum(counts.values()) for counts in report.precision.values()) == len(stored_graph(name).ops)
    products = {part for part, passes in report.work.items() if any(entry.flops for entry in passes.values())}
    assert products == {"attention", "attention products", "ffn", "head"}
    wanted = {"bf16"} if name.endswith("bfloat16") else {"f32"}
    assert set(report.precision["MatMul"]) == set(report.precision["DotGeneral"]) == wanted
    assert set(report.precision["Softmax"]) == {"f32"}
    assert json.loads(json.dumps(report.as_json()))["structure"] == report.structure


@pytest.mark.parametrize(
    "name", ["grouped_heads", "norms_of_heads", "kinds_of_layers", "parallel_gelu", "offset_and_softcap"]
)
def test_a_step_of_an_open_family_has_no_problems_and_hides_what_a_window_does(name: str, tiny_recipe: Tiny) -> None:
    recipe = recipe_of_graph(name, tiny_recipe)
    model, length = recipe.model, recipe.data.sequence_length
    report = report_of(stored_graph(name), recipe)
    assert report.problems == ()
    hidden = sum(length - (model.kind_of(layer).window or length) for layer in range(model.num_layers))
    saved = 12 * model.num_heads * model.head_dim * hidden * recipe.tokens_per_step
    assert report.flops == flops_per_token(model, length) * recipe.tokens_per_step + saved
    assert bool(saved) == (name in ("kinds_of_layers", "offset_and_softcap"))


def test_layers_are_held_against_those_of_their_kind(tiny_recipe: Tiny) -> None:
    """Layer 2 of three has no rotary positions; as a recipe of one kind the graph is refused."""
    recipe, graph = recipe_of_graph("kinds_of_layers", tiny_recipe), stored_graph("kinds_of_layers")
    alike = recipe_of_graph("kinds_of_layers", tiny_recipe, "model.layer_pattern=[{}]")
    assert "the forward pass of layers [2] has other ops than that of layer 0" in problems(graph, alike)
    assert problems(graph, recipe) == ""


def test_where_a_parameter_is_read(crystal: tuple[Graph, Recipe]) -> None:
    uses = {use.name: use for use in report_of(*crystal).parameters}
    embedding, query, bias = (
        uses["embedding.weight"],
        uses["layers.0.attention.q_proj.weight"],
        uses["layers.1.ffn.up_proj.bias"],
    )
    # the lookup and the tied head; the head's gradient for its input
    assert (embedding.forward, embedding.backward) == (2, 1)
    assert (query.forward, query.backward) == (1, 1)
    assert (bias.forward, bias.backward) == (1, 0)
    assert query.update > bias.update  # weight decay reads a matrix once more
    assert all(use.updated for use in uses.values())


def test_gradient_work_is_twice_the_forward_work(crystal: tuple[Graph, Recipe]) -> None:
    for part in ("attention", "attention products", "ffn", "head"):
        work = report_of(*crystal).work[part]
        assert work["backward"].flops == 2 * work["forward"].flops


def problems(graph: Graph, recipe: Recipe) -> str:
    return "; ".join(report_of(graph, recipe).problems)


def test_another_depth_is_named(crystal: tuple[Graph, Recipe], tiny_recipe: Tiny) -> None:
    graph, recipe = crystal
    deeper = recipe.model_copy(update={"model": recipe.model.model_copy(update={"num_layers": 3})})
    found = problems(graph, deeper)
    assert "parameter layers.2.attention.q_proj.weight is not in the graph" in found
    assert "ops of layers [0, 1] for a model of 3 layers" in found
    assert "2 Softmax where a model of 3 layers has 3" in found
    assert "matrix products have" in found


def test_another_width_is_named(crystal: tuple[Graph, Recipe]) -> None:
    graph, recipe = crystal
    wider = recipe.model_copy(update={"model": recipe.model.model_copy(update={"intermediate_size": 71})})
    assert "layers.0.ffn.gate_proj.weight is [70, 48] in the graph and [71, 48] in the model" in problems(graph, wider)


@pytest.mark.parametrize("state", ["state.model.layers.1.ffn.down_proj.weight", "state.optimizer.state.3.exp_avg_sq"])
def test_a_parameter_or_moment_that_is_handed_back_as_it_came(state: str, crystal: tuple[Graph, Recipe]) -> None:
    graph, recipe = crystal
    argument = next(argument for argument in graph.arguments if argument.state == state)
    assert argument.aliasing_output is not None
    outputs = list(graph.outputs)
    outputs[argument.aliasing_output] = argument.name
    assert "the update is missing" in problems(replace(graph, outputs=tuple(outputs)), recipe)


def test_a_parameter_that_the_forward_pass_does_not_read(crystal: tuple[Graph, Recipe]) -> None:
    graph, recipe = crystal
    bias, other = (graph.parameters[f"layers.{layer}.ffn.up_proj.bias"].name for layer in (0, 1))
    ops = tuple(
        replace(
            op,
            operands=tuple(
                other if operand == bias and part_of(op)[1] == "forward" else operand for operand in op.operands
            ),
        )
        for op in graph.ops
    )
    assert "parameter layers.0.ffn.up_proj.bias is not read in the forward pass" in problems(
        replace(graph, ops=ops), recipe
    )


@pytest.mark.parametrize("kind", ["MatMul", "DotGeneral", "Softmax", "Gather", "SparseSoftmaxCrossEntropyWithLogits"])
def test_a_missing_op_is_named(kind: str, crystal: tuple[Graph, Recipe]) -> None:
    graph, recipe = crystal
    gone = next(index for index, op in enumerate(graph.ops) if op.kind == kind)
    found = problems(
        replace(graph, ops=(*graph.ops[:gone], replace(graph.ops[gone], kind="Other"), *graph.ops[gone + 1 :])), recipe
    )
    assert f" {kind} where a model of 2 layers has " in found


def test_a_layer_unlike_the_others_is_named(crystal: tuple[Graph, Recipe]) -> None:
    graph, recipe = crystal
    extra = next(op for op in graph.ops if op.kind == "Sigmoid" and op.location.scope == "layers.1.ffn.fwd")
    found = problems(replace(graph, ops=(*graph.ops, replace(extra, results=("%x",)))), recipe)
    assert "the forward pass of layers [1] has other ops than that of layer 0" in found


def test_a_missing_output_is_named(crystal: tuple[Graph, Recipe]) -> None:
    graph, recipe = crystal
    without = {index: name for index, name in graph.output_names.items() if name != "output_grad_norm"}
    assert problems(replace(graph, output_names=without), recipe) == "the output 'grad_norm' is missing"


def test_flops_of_one_product(crystal: tuple[Graph, Recipe]) -> None:
    graph, recipe = crystal
    tokens, model = recipe.tokens_per_step, recipe.model
    query = next(op for op in graph.ops if op.kind == "MatMul" and op.location.scope == "layers.0.attention.q_proj.fwd")
    scores = next(op for op in graph.ops if op.kind == "DotGeneral")
    assert product_flops(query) == 2 * tokens * model.hidden_size**2
    assert product_flops(scores) == 2 * tokens * recipe.data.sequence_length * model.hidden_size
    assert product_flops(next(op for op in graph.ops if op.kind == "Mul")) == 0
