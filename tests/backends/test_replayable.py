"""`numerics: replayable`: the same bits for any number of processes, dropout on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from weftrain.backends.common.registry import find_backends
from weftrain.core.backend import Job, Plan, Run, State
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.order.batch import BatchSource
from weftrain.core.order.synthetic import synthetic_source
from weftrain.core.run.prepare import prepare_run

Tiny = Callable[..., Recipe]
CPU = torch.device("cpu")


def prepare(name: str, recipe: Recipe, start: int = 0, steps: int = 4, **options: Any) -> Run:
    backend = find_backends()[name]
    if name == "cuda":  # its other ranks take the options from the recipe
        return backend.prepare(Job(recipe, Plan(start, steps), backend.options.model_validate(recipe.backend.options)))
    return backend.prepare(
        Job(recipe, Plan(start, steps), backend.options(device="cpu", threads=1, huge_pages=False, **options))
    )


def rows_of(recipe: Recipe) -> BatchSource:
    return synthetic_source(
        recipe.model.vocab_size, recipe.data.sequence_length, 32, recipe.batch.global_batch_size, seed=5
    )


def replayable(tiny_recipe: Tiny, compute: str, replicas: int, *more: str) -> Recipe:
    return tiny_recipe(
        "crystal",
        f"precision.compute={compute}",
        "precision.numerics=replayable",
        "model.dropout=0.1",
        "batch.global_batch_size=8",
        "batch.micro_batch_size=1",
        f"batch.replicas={replicas}",
        "schedule.steps=4",
        "backend.name=cuda",
        "backend.options={device: cpu, threads: 1, huge_pages: false, parallel: ddp}",
        *more,
    )


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_accumulating_in_the_tree_is_accumulating(compute: str, tiny_recipe: Tiny) -> None:
    tolerance = 1e-6 if compute == "float32" else 2e-2
    tree = replayable(tiny_recipe, compute, 1)
    plain = Recipe.model_validate(tree.model_dump() | {"precision": {"compute": compute}})
    batch = rows_of(tree).rows(0, 0, 8)
    one, other = prepare("local", tree).gradients(batch), prepare("local", plain).gradients(batch)
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    for name, gradient in one[1].items():
        assert float((gradient - other[1][name]).norm() / other[1][name].norm()) < tolerance, name


def test_a_step_leaves_nothing_in_the_tree_of_the_next(tiny_recipe: Tiny) -> None:
    recipe = replayable(tiny_recipe, "float32", 1)
    run, batch = prepare("local", recipe), rows_of(recipe).rows(0, 0, 8)
    first, second = run.gradients(batch), run.gradients(batch)
    assert first[0] == second[0]
    assert all(torch.equal(gradient, second[1][name]) for name, gradient in first[1].items())


@pytest.mark.parametrize("name", ["streaming", "cerebras"])
def test_a_backend_without_it_refuses_it(name: str, tiny_recipe: Tiny) -> None:
    backend = find_backends()[name]
    for override, words in (("precision.numerics=replayable", "numerics=fast"), ("model.dropout=0.1", "dropout=0")):
        recipe = tiny_recipe("crystal", override)
        with pytest.raises(BackendError, match=words):
            prepare_run(backend, Job(recipe, Plan(0, 1), backend.options()))


def test_fsdp_refuses_it(tiny_recipe: Tiny) -> None:
    backend = find_backends()["cuda"]
    job = Job(
        replayable(tiny_recipe, "float32", 1), Plan(0, 1), backend.options(device="cpu", threads=1, huge_pages=False)
    )
    with pytest.raises(BackendError, match="parallel=ddp"):
        backend.prepare(job)


# Dropout


def test_evaluation_drops_nothing_and_training_does(tiny_recipe: Tiny) -> None:
    recipe, without = tiny_recipe("amber", "model.dropout=0.3"), tiny_recipe("amber")
    batch = rows_of(recipe).rows(0, 0, 4)
    dropping, plain = prepare("local", recipe), prepare("local", without)
    assert dropping.gradients(batch)[0] != plain.gradients(batch)[0]
    assert dropping.gradients(batch)[0] == dropping.gradients(batch)[0]
    logits = [run.model.logits(torch.from_numpy(batch.ids[:, :-1])) for run in (dropping, plain)]  # type: ignore[attr-defined]
    assert torch.equal(*logits)


def test_recomputation_drops_the_same(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber", "model.dropout=0.3")
    batch = rows_of(recipe).rows(0, 0, 4)
    plain, again = prepare("local", recipe), prepare("local", recipe, activation_checkpointing="full")
    for name, gradient in plain.gradients(batch)[1].items():
        assert torch.equal(gradient, again.gradients(batch)[1][name]), name


# Processes


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.prove)])
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


LORA = "{rank: 4, alpha: 8, dropout: 0.1, targets: ['layers.*.attention.*_proj']}"
PAIRS = ("name=pairs", "batch.micro_batch_size=2", "objective={name: dpo, beta: 0.3, reference: base}")


@pytest.mark.prove
@pytest.mark.parametrize(
    ("compute", "more"),
    [
        ("float32", ()),
        ("bfloat16", ()),
        ("float32", PAIRS),
        ("bfloat16", ("tuning.freeze=[embedding, 'layers.0', '*_norm']",)),
        ("float32", (f"tuning.lora={LORA}",)),
    ],
    ids=["float32", "bfloat16", "dpo", "frozen", "adapters"],
)
def test_the_same_bits_on_one_rank_and_on_several_and_across_a_resume(
    compute: str, more: tuple[str, ...], ranks: int, tiny_recipe: Tiny
) -> None:
    """Dropout on; the number changes in the middle, both ways; loss and norm too."""
    from ranks import source_of, world_of

    from weftrain.backends.cuda.rendezvous import leave

    def train(
        recipe: Recipe, start: int, stop: int, state: State | None = None
    ) -> tuple[State, list[tuple[float, float]]]:
        run = prepare("cuda", recipe, start, stop)
        if state is not None:
            run.import_state(state)
        seen = [(float(result.loss), float(result.grad_norm)) for result in run.train(source_of(recipe))]
        found = run.export_state()
        copied = State(found.step, found.optimizer_updates, {name: found.tensors[name] for name in found.tensors})
        run.close()
        return copied, seen

    alone, several = (replayable(tiny_recipe, compute, count, *more) for count in (1, ranks))
    leave()  # a world that an earlier test may have left
    torch.set_num_threads(1)
    half, first = train(alone, 0, 2)
    straight, rest = train(alone, 2, 4, half)
    leave()
    with world_of(ranks):
        whole, seen = train(several, 0, 4)
        grown, grown_seen = train(several, 2, 4, half)
        half_several, _ = train(several, 0, 2)
    shrunk, _ = train(alone, 2, 4, half_several)
    leave()
    assert seen == first + rest
    assert grown_seen == rest
    for other in (whole, grown, shrunk):
        for name, tensor in straight.tensors.items():
            assert torch.equal(tensor, other.tensors[name]), name
