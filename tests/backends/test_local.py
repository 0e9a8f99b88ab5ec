"""The local backend's own options: activation checkpointing and torch.compile change memory and speed, not what is
computed.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from families import FAMILIES
from float64_reference import initial, reference, relative, state_with
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from weftrain.backends import local
from weftrain.backends.common import copies
from weftrain.backends.common.registry import get_backend
from weftrain.backends.common.sums import OrderedSum
from weftrain.core.backend import Job, Plan, Run
from weftrain.core.config import Recipe
from weftrain.core.dropout import row_keys
from weftrain.core.errors import BackendError
from weftrain.core.model_config import ModelConfig
from weftrain.core.order.batch import Batch, BatchSource
from weftrain.core.order.synthetic import synthetic_source


def prepare(recipe: Recipe, **options: object) -> Run:
    backend = get_backend("local")
    chosen = backend.options.model_validate({**recipe.backend.options, **options})
    return backend.prepare(Job(recipe, Plan(0, recipe.schedule.steps), chosen))


def gradients(recipe: Recipe) -> tuple[float, dict[str, torch.Tensor]]:
    run = prepare(recipe)
    source = synthetic_source(
        recipe.model.vocab_size, recipe.data.sequence_length, 12, recipe.batch.global_batch_size, 5
    )
    return run.gradients(source.rows(0, 0, recipe.batch.global_batch_size))


class Counted(TorchDispatchMode):
    """How often each aten op ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.calls[function.overloadpacket.__name__] += 1
        return function(*arguments, **(options or {}))


def test_recomputation_gives_the_same_bits_and_selective_runs_no_product_twice(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    found = {}
    for kind in ("none", "selective", "full"):
        more = (f"backend.options.activation_checkpointing={kind}", "kernels.preferences=[torch,reference]")
        with Counted() as counted:
            found[kind] = *gradients(tiny_recipe("crystal", *more)), counted.calls
    loss, plain, _ = found["none"]
    for kind in ("selective", "full"):
        loss_again, recomputed, _ = found[kind]
        assert loss_again == loss
        assert all(torch.equal(recomputed[name], plain[name]) for name in plain)
    products, norms = ({kind: calls[name] for kind, (_, _, calls) in found.items()} for name in ("addmm", "add"))
    assert products["none"] == products["selective"] < products["full"]  # the maps have biases
    assert norms["none"] < norms["selective"] == norms["full"]


def test_a_gradient_is_added_to_the_sums_as_soon_as_it_is_there(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no time does more than one gradient stand beside the sums of the micro-batches."""
    most, add = 0, OrderedSum.add

    def watched(sums: OrderedSum, name: str, part: torch.Tensor) -> None:
        nonlocal most
        most = max(most, sum(leaf.grad is not None for leaf in run._leaves.values()))
        add(sums, name, part)

    monkeypatch.setattr(OrderedSum, "add", watched)
    recipe = tiny_recipe("crystal", "batch.micro_batch_size=1", "batch.global_batch_size=3")
    run: Any = prepare(recipe)
    run.gradients(synthetic_source(97, recipe.data.sequence_length, 12, 3, 5).rows(0, 0, 3))
    assert most == 1


def test_all_blocks_share_one_graph(tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs from layer to layer must not be read in a block: beyond 8 graphs torch.compile runs eagerly, without
    a word.
    """
    # graphs are captured, no code is generated
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for layers, dropout in ((12, 0.0), (32, 0.1)):
        torch._dynamo.reset()
        counters.clear()
        overrides = (f"model.num_layers={layers}", f"model.dropout={dropout}", "backend.options.compile=true")
        gradients(tiny_recipe("crystal", *overrides, "batch.global_batch_size=2", "batch.micro_batch_size=2"))
        assert counters["stats"]["unique_graphs"] == 2, (layers, dropout)  # a block's and the head's


def test_one_graph_for_each_kind_of_layer(tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    recipe = tiny_recipe(
        "amber", "backend.options.compile=true", "batch.global_batch_size=2", "batch.micro_batch_size=2"
    )
    for name, layers, kinds in (("qwen3", 12, 1), ("olmo3", 20, 2)):
        torch._dynamo.reset()
        counters.clear()
        model = ModelConfig.model_validate(FAMILIES[name].ours.model_dump() | {"num_layers": layers})
        gradients(recipe.model_copy(update={"model": model}))
        assert counters["stats"]["unique_graphs"] == kinds + 1, name


def test_compiled_blocks_share_their_graphs_around_experts(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    graphs = set()
    for layers in (3, 12):
        torch._dynamo.reset()
        counters.clear()
        more = [f"model.num_layers={layers}", "batch.global_batch_size=2", "batch.micro_batch_size=2"]
        loss, plain = gradients(tiny_recipe("moe", *more))
        loss_compiled, compiled = gradients(tiny_recipe("moe", *more, "backend.options.compile=true"))
        assert loss_compiled == loss
        assert all(torch.equal(compiled[name], gradient) for name, gradient in plain.items())
        graphs.add(counters["stats"]["unique_graphs"])
    assert len(graphs) == 1  # those of a dense block, of one with experts before and behind them, and the head's
    words = "activation_checkpointing selective and model.experts given"
    with pytest.raises(BackendError, match=words):
        prepare(tiny_recipe("moe"), compile=True, activation_checkpointing="selective")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_model_family_with_documents_and_dropout(name: str, tiny_recipe: Callable[..., Recipe]) -> None:
    """Against float64, with documents that begin within the windows and beyond; recomputed blocks have the same bits."""
    family = FAMILIES[name].ours
    recipe = tiny_recipe("amber", "batch.micro_batch_size=2", "kernels.preferences=[cpp, torch, reference]")
    recipe = recipe.model_copy(update={"model": family.model_copy(update={"dropout": 0.2})})
    start = np.where(np.arange(13) < 2, 0, 2).astype(np.int32)[None].repeat(4, 0)
    start[1] = np.where(np.arange(13) < 9, 0, 9)
    batch = Batch(np.random.default_rng(0).integers(0, 97, (4, 14)), document_start=start)
    weights, keys = initial(recipe, 4.0), row_keys(recipe.seed, 0, 0, 4, 4, torch.device("cpu"))
    wanted_loss, wanted = reference(recipe, weights, batch, keys)
    found = []
    for recomputed in ("none", "selective"):
        run = prepare(recipe, threads=1, activation_checkpointing=recomputed)
        run.import_state(state_with(weights))
        found.append(run.gradients(batch))
    assert found[0][0] == found[1][0] == pytest.approx(wanted_loss, rel=2e-5)
    for key, gradient in wanted.items():
        assert torch.equal(found[0][1][key], found[1][1][key])
        if not key.endswith("k_proj.bias"):  # zero but for rotation
            assert relative(found[0][1][key], gradient) < 2e-5, key


@pytest.mark.parametrize("name", FAMILIES)
def test_every_model_family_learns_and_repeats_its_bits(name: str, tiny_recipe: Callable[..., Recipe]) -> None:
    more = ("precision.compute=bfloat16", "precision.numerics=replayable", "batch.micro_batch_size=2")
    recipe = tiny_recipe("amber", *more, "data.synthetic_rows=4")
    model = FAMILIES[name].ours.model_copy(update={"dropout": 0.05})
    recipe, found = recipe.model_copy(update={"model": model}), []
    source = synthetic_source(97, 13, 4, 4, 5)
    for _ in range(2):
        run = prepare(recipe, threads=1)
        losses = [float(result.loss) for result in run.train(source)]
        state = run.export_state()
        found.append((losses, {key: state.tensors[key] for key in state.tensors}))
    assert found[0][0] == found[1][0]
    assert found[0][0][-1] < found[0][0][0] - 0.1
    assert all(torch.equal(tensor, found[1][1][key]) for key, tensor in found[0][1].items())


@pytest.mark.prove
@pytest.mark.parametrize("family", ["crystal", "moe"])
def test_compiled_gradients_agree_with_eager_ones(family: str, tiny_recipe: Callable[..., Recipe]) -> None:
    loss, plain = gradients(tiny_recipe(family))
    options = ["backend.options.compile=true", "backend.options.activation_checkpointing=full"]
    for given in (options[:1], options):
        loss_compiled, compiled = gradients(tiny_recipe(family, *given))
        assert abs(loss_compiled - loss) < 1e-5 * loss
        for name, gradient in plain.items():  # fp32, other orders of summation
            assert (compiled[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-6, name


def test_threads_of_the_job_come_before_those_of_the_options(tiny_recipe: Callable[..., Recipe]) -> None:
    backend = get_backend("local")
    recipe = tiny_recipe("amber", "backend.options.threads=1")
    for asked, threads in ((None, 1), (2, 2)):
        job = Job(recipe, Plan(0, 1), backend.options.model_validate(recipe.backend.options), threads=asked)
        assert backend.prepare(job).fingerprint().threads == threads


def test_the_clock_of_a_step_and_the_wait_for_rows(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """result comes before the one wait of a step, end after the update was launched; a copy is no wait for rows."""
    recipe, happened = tiny_recipe("amber", "schedule.steps=2", "kernels.preferences=[reference]"), []
    run = cast(local.LocalRun, prepare(recipe))
    now, copy, happens, update = 0.0, copies.to_device, local.step_happens, run.update

    def passing(seconds: float) -> None:
        nonlocal now
        now += seconds

    class Source:
        def __init__(self) -> None:
            self.source = synthetic_source(recipe.model.vocab_size, recipe.data.sequence_length, 12, 4, 5)

        def rows(self, *where: int) -> Batch:
            passing(0.25)
            return self.source.rows(*where)

    class Clock:
        def begin(self) -> None:
            happened.append("begin")

        def result(self) -> None:
            happened.append("result")

        def end(self) -> float:
            happened.append("end")
            return 7.0

    monkeypatch.setattr(local.time, "perf_counter", lambda: now)
    monkeypatch.setattr(copies, "to_device", lambda *given: (passing(8.0), copy(*given))[1])
    monkeypatch.setattr(local, "step_happens", lambda *given: (happened.append("wait"), happens(*given))[1])
    monkeypatch.setattr(run, "update", lambda *given: (happened.append("update"), update(*given))[1])
    monkeypatch.setattr(run, "_step_clock", Clock())
    results = list(run.train(cast(BatchSource, Source())))
    assert happened == ["begin", "result", "wait", "update", "end"] * 2
    reads = recipe.batch.accumulation_steps
    assert [(result.step_ms, result.data_wait_ms) for result in results] == [(7.0, 250.0 * reads)] * 2
