"""`precision.tensor_parts`: linear maps in parts, with the bits of one process on any tensor degree that divides them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import apart
from replayable_runs import differing, prepare, rows_of, train

from weftrain.backends.cuda.degrees import Degrees, degrees
from weftrain.backends.cuda.options import CudaOptions
from weftrain.core import parts
from weftrain.core.backend import State
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError, RecipeError
from weftrain.core.initialization import draw
from weftrain.core.model import Decoder, kernel_specs
from weftrain.core.order.batch import Batch
from weftrain.kernels import select

Tiny = Callable[..., Recipe]
Trained = tuple[State, list[tuple[float, float]]]
STEPS = 2


def in_parts(tiny_recipe: Tiny, family: str, compute: str, replicas: int = 1, **options: Any) -> Recipe:
    """Rows of 13 tokens, which no degree divides, and weights of which a part begins at no multiple of 64 bytes."""
    demo, more = FAMILIES[family]
    options = {"device": "cpu", "threads": 1, "parallel": "fsdp", **options}
    told = ", ".join(f"{name}: {str(value).lower()}" for name, value in options.items())
    return tiny_recipe(
        demo,
        f"precision={{compute: {compute}, numerics: replayable, tensor_parts: 4}}",
        "model.num_heads=4",
        "model.hidden_size=40",
        "model.intermediate_size=68",
        "optimizer.clip_norm=0.05",
        "batch.global_batch_size=4",
        "batch.micro_batch_size=1",
        f"batch.replicas={replicas}",
        "backend.name=cuda",
        f"backend.options={{{told}}}",
        *more,
    )


FAMILIES = {
    "crystal": ("crystal", ("model.rotary_dim=4", "model.dropout=0.1")),
    # heads that share keys, norms of each head that all parts share, and biases before and behind the parts
    "qwen": (
        "qwen",
        (
            "model.num_heads=8",
            "model.num_kv_heads=4",
            "model.qkv_bias=true",
            "model.linear_bias=true",
            "model.dropout=0.1",
        ),
    ),
    "llama": ("llama", ("model.num_kv_heads=4", "model.head_dim=12", "model.rotary_dim=12")),
}


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], Trained]:
    """What one process trains."""
    return {}


def wanted(alone: dict[tuple[str, str], Trained], tiny_recipe: Tiny, family: str, compute: str) -> Trained:
    torch.set_num_threads(1)
    if (family, compute) not in alone:
        alone[family, compute] = train("local", in_parts(tiny_recipe, family, compute), 0, STEPS)
        assert all(norm > 0.05 for _, norm in alone[family, compute][1]), "nothing is clipped"
    return alone[family, compute]


def soak(*values: Any, **named: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.soak, **named)


@pytest.mark.parametrize(
    ("family", "compute", "replicas", "options"),
    [
        ("crystal", "bfloat16", 2, {"tensor_parallel": 2, "activation_checkpointing": "full"}),
        ("qwen", "bfloat16", 1, {"tensor_parallel": 4}),
        ("crystal", "float32", 2, {"tensor_parallel": 2, "parallel": "hsdp", "shard_group": 1}),
        ("llama", "float32", 1, {"tensor_parallel": 2, "pipeline_parallel": 2}),
        soak("crystal", "float32", 4, {"parallel": "ddp"}),
        soak("qwen", "float32", 2, {"tensor_parallel": 2, "activation_checkpointing": "selective"}),
        soak("qwen", "float32", 2, {"tensor_parallel": 2, "cpu_offload": True}),
        soak("llama", "bfloat16", 2, {"parallel": "ddp", "pipeline_parallel": 2}),
    ],
)
def test_any_tensor_degree_has_the_bits_of_one_process(
    family: str,
    compute: str,
    replicas: int,
    options: dict[str, Any],
    tiny_recipe: Tiny,
    four_ranks: None,
    alone: dict[tuple[str, str], Trained],
) -> None:
    """Losses, norms, weights and both moments; dropout, clipping, biases and norms of heads among them."""
    state, seen = wanted(alone, tiny_recipe, family, compute)
    found, found_seen = train("cuda", in_parts(tiny_recipe, family, compute, replicas, **options), 0, STEPS)
    assert (found_seen, differing(found, state)) == (seen, [])


@pytest.mark.soak
@pytest.mark.parametrize(
    ("family", "more"),
    [
        pytest.param("crystal", ("optimizer.name=muon", "optimizer.muon={scale: spectral}"), id="muon"),
        pytest.param(
            "qwen", ("tuning.freeze=[embedding, 'layers.0', '*_norm', 'layers.1.ffn.down_proj']",), id="frozen"
        ),
        pytest.param(
            "crystal",
            ("name=pairs", "batch.micro_batch_size=2", "objective={name: dpo, beta: 0.3, reference: base}"),
            id="dpo",
        ),
        pytest.param("qwen", ("model.feed_forward=gelu", "model.residual=parallel"), id="gelu"),
    ],
)
def test_other_ways_to_train_have_the_bits_of_one_process(
    family: str, more: tuple[str, ...], tiny_recipe: Tiny, four_ranks: None
) -> None:
    torch.set_num_threads(1)
    recipes = (
        in_parts(lambda demo, *given: tiny_recipe(demo, *given, *more), family, "bfloat16", *degree, **options)
        for degree, options in (((1,), {}), ((2,), {"tensor_parallel": 2}))
    )
    (state, seen), (found, found_seen) = (
        train(name, recipe, 0, STEPS) for name, recipe in zip(("local", "cuda"), recipes, strict=True)
    )
    assert (found_seen, differing(found, state)) == (seen, [])


def test_a_run_goes_on_at_any_tensor_degree(
    tiny_recipe: Tiny, four_ranks: None, alone: dict[tuple[str, str], Trained]
) -> None:
    state, seen = wanted(alone, tiny_recipe, "crystal", "float32")
    two = in_parts(tiny_recipe, "crystal", "float32", 2, tensor_parallel=2)
    half, first = train("cuda", two, 0, 1)
    for name, replicas, degree in (("local", 1, 1), ("cuda", 1, 4)):
        later = in_parts(tiny_recipe, "crystal", "float32", replicas, tensor_parallel=degree)
        found, rest = train(name, later, 1, STEPS, half)
        assert (first + rest, differing(found, state)) == (seen, [])


class HeldOut:
    """5 rows, of which the last round is not full."""

    name, sequence_length, num_rows, dataset_id = "held", 12, 5, "x"

    def rows(self, first: int, count: int) -> Batch:
        rng = np.random.default_rng(1)
        ids, mask = rng.integers(0, 97, (5, 13)), rng.random((5, 12)) > 0.5
        return Batch(ids[first : first + count], mask[first : first + count])


def test_gradients_and_held_out_losses_of_ranks_that_compute_the_same_are_counted_once(
    tiny_recipe: Tiny, four_ranks: None
) -> None:
    recipe = in_parts(tiny_recipe, "qwen", "float32", 2, tensor_parallel=2)
    batch, found = rows_of(recipe).rows(0, 0, 4), []
    for name in ("local", "cuda"):
        run = prepare(name, recipe if name == "cuda" else in_parts(tiny_recipe, "qwen", "float32"))
        held_out = run.evaluate(HeldOut())
        found.append((run.gradients(batch), held_out))
        run.close()
    (gradients, of_local), (others, of_ranks) = found
    assert (of_ranks.tokens, of_ranks.loss) == (of_local.tokens, pytest.approx(of_local.loss, rel=1e-6))
    assert others[0] == pytest.approx(gradients[0], rel=1e-6)
    assert all(torch.equal(gradient, others[1][name]) for name, gradient in gradients[1].items())


def test_streaming_has_the_bits_of_the_local_backend(tiny_recipe: Tiny, tmp_path: Path) -> None:
    recipe = in_parts(tiny_recipe, "llama", "bfloat16")
    wanted, seen = train("local", recipe, 0, STEPS)
    found, found_seen = train("streaming", recipe, 0, STEPS, folder=tmp_path)
    assert (found_seen, differing(found, wanted)) == (seen, [])


def test_another_order_of_the_parts_has_other_bits(tiny_recipe: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else no test here would show an order."""
    recipe = in_parts(tiny_recipe, "crystal", "float32")
    wanted, _ = train("local", recipe, 0, 1)
    monkeypatch.setattr(parts, "tree_total", lambda tensors: torch.stack(list(tensors)).sum(0))
    assert differing(train("local", recipe, 0, 1)[0], wanted)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_gradients_are_those_of_the_whole_in_float64(family: str, tiny_recipe: Tiny) -> None:
    recipe = in_parts(tiny_recipe, family, "float32")
    ids, losses, gradients = torch.from_numpy(rows_of(recipe).rows(0, 0, 2).ids), [], []
    for count in (1, 2, 4):
        uses = kernel_specs(recipe.model, "cpu", torch.float64, parts=count)
        model = Decoder(recipe.model, select(uses, ["reference"]), parts=count).double()
        with torch.no_grad():
            for spec in recipe.parameters:
                model.get_parameter(spec.name).copy_(draw(spec, recipe.model, 3) + 0.01)
        losses.append(model(ids[:, :-1], ids[:, 1:]))
        losses[-1].backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for loss, found in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=0.0)
        for name, gradient in found.items():
            assert apart(gradient, gradients[0][name]) < 1e-6, name  # the reference of a norm is in fp32


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["precision.tensor_parts=3"], "tensor_parts 3 is no power of two, .*: set it to 2"),
        (["precision.numerics=fast"], "tensor_parts 4 needs numerics: replayable"),
        (["model.num_heads=2"], "model.num_heads 2 is no multiple of precision.tensor_parts 4: set tensor_parts=2, or"),
        (["model.num_kv_heads=1"], "model.num_kv_heads 1 is no multiple .*: set tensor_parts=1, or another"),
        (["model.intermediate_size=70"], "model.intermediate_size 70 is no multiple .*: set tensor_parts=2, or"),
        (["model.qk_norm=full"], "qk_norm full, whose statistics .*: set model.qk_norm=per_head, or .*tensor_parts=1"),
        (["backend.options.compile=true"], "backend.options.compile true: .*: set compile=false"),
        (["tuning.lora={rank: 4, alpha: 8, dropout: 0, targets: ['*_proj']}"], "tuning.lora: .*: set tensor_parts=1"),
    ],
)
def test_what_is_not_computed_in_parts_is_refused_with_a_remedy(
    overrides: list[str], words: str, tiny_recipe: Tiny
) -> None:
    four = "precision={compute: float32, numerics: replayable, tensor_parts: 4}"
    with pytest.raises(RecipeError, match=words):
        tiny_recipe(
            "crystal", four, "model.num_heads=4", "model.intermediate_size=68", "model.rotary_dim=4", *overrides
        )


def test_a_recipe_without_parts_is_written_as_before(tiny_recipe: Tiny) -> None:
    assert tiny_recipe("crystal").model_dump(mode="json")["precision"].keys() == {"compute", "numerics"}


@pytest.mark.parametrize(
    ("options", "ranks", "words"),
    [
        ({"tensor_parallel": 8}, 8, "tensor_parts 4 is no multiple of .*tensor_parallel 8: .* 1, 2, 4 .. up to 4"),
        ({"tensor_parallel": 3}, 3, "tensor_parts 4 is no multiple of .*tensor_parallel 3"),
        ({"tensor_parallel": 2, "context_parallel": 2}, 4, "context_parallel is 2"),
        ({"tensor_parallel": 2, "float8": True}, 2, "tensor_parts is 4 .*float8: .*: set float8=none"),
    ],
)
def test_what_would_depend_on_the_layout_is_refused_by_name(
    options: dict[str, Any], ranks: int, words: str, tiny_recipe: Tiny
) -> None:
    recipe = in_parts(tiny_recipe, "crystal", "bfloat16")
    with pytest.raises(BackendError, match=f"^precision.numerics is replayable, and .*{words}"):
        degrees(CudaOptions.model_validate(options), recipe, ranks, ranks)


def test_tensor_ranks_of_parts_have_the_same_tokens(tiny_recipe: Tiny) -> None:
    recipe = in_parts(tiny_recipe, "crystal", "float32", 2)
    found = degrees(CudaOptions(tensor_parallel=2), recipe, 4, 4)
    assert found == Degrees(1, 2, 1, 2, copies=2)
    assert (found.row_ranks, found.sequence) == (2, 1)
