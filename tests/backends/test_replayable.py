"""`numerics: replayable`: the same bits in any backend and layout and on any number of processes, dropout on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from replayable_runs import differing, prepare, rows_of, train

from weftrain.backends.common.registry import find_backends
from weftrain.backends.cuda.degrees import degrees
from weftrain.backends.cuda.options import CudaOptions
from weftrain.core.backend import Job, Plan
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.run.prepare import prepare_run

Tiny = Callable[..., Recipe]
CPU = torch.device("cpu")


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


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("cerebras", "precision.numerics=replayable", "numerics=fast"),
        ("cerebras", "model.dropout=0.1", "dropout=0"),
        ("streaming", "model.dropout=0.1", "dropout=0"),
    ],
)
def test_a_backend_without_it_refuses_it(name: str, override: str, words: str, tiny_recipe: Tiny) -> None:
    backend = find_backends()[name]
    recipe = tiny_recipe("crystal", override)
    with pytest.raises(BackendError, match=words):
        prepare_run(backend, Job(recipe, Plan(0, 1), backend.options()))


@pytest.mark.parametrize(
    ("options", "ranks", "words"),
    [
        (
            {"tensor_parallel": 2},
            2,
            "tensor_parallel is 2: .* set precision.tensor_parts=2, .*, or tensor_parallel=1, or .*numerics=fast",
        ),
        ({"context_parallel": 2}, 2, "context_parallel is 2"),
        (
            {"parallel": "hsdp", "shard_group": 2},
            6,
            "6 ranks in shard groups of 2 are 3 groups: .*set backend.options.shard_group, or parallel=fsdp",
        ),
        ({"parallel": "ddp", "reduce": "bfloat16"}, 2, "reduce is bfloat16: the tree adds in fp32"),
        ({"reduce_every_micro_batch": True}, 2, "set it to false"),
    ],
)
def test_what_would_depend_on_the_layout_is_refused_by_name(
    options: dict[str, Any], ranks: int, words: str, tiny_recipe: Tiny
) -> None:
    recipe = replayable(tiny_recipe, "float32", ranks, "batch.global_batch_size=12")
    with pytest.raises(BackendError, match=f"^precision.numerics is replayable, and .*{words}"):
        degrees(CudaOptions.model_validate(options), recipe, ranks, ranks)


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


LORA = "{rank: 4, alpha: 8, dropout: 0.1, targets: ['layers.*.attention.*_proj']}"
PAIRS = ("name=pairs", "batch.micro_batch_size=2", "objective={name: dpo, beta: 0.3, reference: base}")


# On four ranks one of each kind is enough: there is an hsdp group of two groups of two.
CASES = {
    "float32": ("float32", ()),
    "bfloat16": ("bfloat16", ()),
    "dpo": ("float32", PAIRS),
    "frozen": ("bfloat16", ("tuning.freeze=[embedding, 'layers.0', '*_norm']",)),
    "Muon": ("float32", ("optimizer.name=muon", "optimizer.muon={scale: spectral}")),
    "adapters": ("float32", (f"tuning.lora={LORA}",)),
    # runs of three micro-batches, of which a rank has four: what it adds by itself is no subtree
    "a batch of 12": ("float32", ("batch.global_batch_size=12",)),
}


@pytest.mark.prove
@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        *((2, case) for case in ("bfloat16", "dpo", "Muon")),
        (3, "a batch of 12"),
        (4, "Muon"),
        *(pytest.param(2, case, marks=pytest.mark.soak) for case in ("float32", "frozen", "adapters")),
        *(pytest.param(4, case, marks=pytest.mark.soak) for case in ("float32", "frozen")),
    ],
)
def test_the_same_bits_on_one_rank_and_on_several_and_across_a_resume(case: str, ranks: int, tiny_recipe: Tiny) -> None:
    """Dropout on; number of ranks, layout and backend change in the middle, both ways; loss and norm too."""
    from ranks import world_of

    from weftrain.backends.cuda.rendezvous import leave

    compute, more = CASES[case]
    alone = replayable(tiny_recipe, compute, 1, *more)
    layouts: list[dict[str, Any]] = [
        {"parallel": "ddp"},
        {},
        {"parallel": "hsdp", "shard_group": ranks if ranks % 2 else ranks // 2},
    ]
    leave()  # a world that an earlier test may have left
    torch.set_num_threads(1)
    half, first = train("local", alone, 0, 2)
    straight, rest = train("local", alone, 2, 4, half)
    leave()
    halves = []
    with world_of(ranks):
        for layout in layouts:
            told = [f"backend.options.{name}={value}" for name, value in layout.items()]
            several = replayable(tiny_recipe, compute, ranks, "backend.options.parallel=fsdp", *more, *told)
            whole, seen = train("cuda", several, 0, 4)
            grown, grown_seen = train("cuda", several, 2, 4, half)
            assert (layout, seen, grown_seen) == (layout, first + rest, rest)
            for found in (whole, grown):
                assert differing(found, straight) == [], layout
            halves.append(train("cuda", several, 0, 2)[0])
    for halfway in halves:
        shrunk, shrunk_seen = train("cuda", replayable(tiny_recipe, compute, 1, *more), 2, 4, halfway)
        assert shrunk_seen == rest
        assert differing(shrunk, straight) == []
    leave()


@pytest.mark.parametrize("compute", ["float32", pytest.param("bfloat16", marks=pytest.mark.soak)])
@pytest.mark.parametrize("family", ["crystal", pytest.param("amber", marks=pytest.mark.soak)])
def test_streaming_has_the_bits_of_the_local_backend(
    compute: str, family: str, tiny_recipe: Tiny, tmp_path: Path
) -> None:
    """Six micro-batches, which is no power of two; a tied head and one of its own; and a restart in the other."""
    recipe = tiny_recipe(
        family,
        f"precision.compute={compute}",
        "precision.numerics=replayable",
        "batch.global_batch_size=6",
        "batch.micro_batch_size=1",
    )
    half, first = train("local", recipe, 0, 2)
    straight, rest = train("local", recipe, 2, 4, half)
    whole, seen = train("streaming", recipe, 0, 4, folder=tmp_path / "whole")
    shifted, later = train("streaming", recipe, 2, 4, half, folder=tmp_path / "shifted")
    assert (seen, later) == (first + rest, rest)
    assert differing(whole, straight) == differing(shifted, straight) == []
    plain = Recipe.model_validate(recipe.model_dump() | {"precision": {"compute": compute}})
    assert differing(train("local", plain, 0, 4)[0], straight), (
        "a plain sum has the tree's bits: the test shows nothing"
    )


@pytest.mark.parametrize("source", ["cpp", "torch"])
def test_a_fused_cross_entropy_in_chunks_has_the_same_bits_on_every_backend(
    source: str, tiny_recipe: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that adds the head's gradient over chunks of a micro-batch's tokens, of which there are three here."""
    from weftrain.kernels.cpp_ops import linear_cross_entropy as cpp
    from weftrain.kernels.torch_ops import linear_cross_entropy as torch_op

    monkeypatch.setattr(cpp, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(torch_op, "_CPU_CHUNK_ELEMENTS", 64 * 97)
    tokens, vocabulary = torch.zeros(130, 1), torch.zeros(97, 1)
    assert len(cpp._chunks(130, 97)) == len(torch_op._chunks(tokens, vocabulary)) == 3
    batch = ("batch.global_batch_size=20", "batch.micro_batch_size=10", "model.dropout=0")
    more = (*batch, f"kernels.pins={{linear_cross_entropy: {source}}}")
    wanted, seen = train("local", replayable(tiny_recipe, "bfloat16", 1, *more), 0, 2)
    for name, layout in (("streaming", "ddp"), ("cuda", "ddp"), ("cuda", "fsdp")):
        recipe = replayable(tiny_recipe, "bfloat16", 1, *more, f"backend.options.parallel={layout}")
        state, found = train(name, recipe, 0, 2, folder=tmp_path)
        assert (differing(state, wanted), found) == ([], seen), (name, layout)
    monkeypatch.undo()
    one_chunk, _ = train("local", replayable(tiny_recipe, "bfloat16", 1, *more), 0, 2)
    assert differing(one_chunk, wanted), "one chunk has the bits of three: the test shows nothing"
