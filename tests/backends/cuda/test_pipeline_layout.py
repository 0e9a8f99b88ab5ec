"""Which layers a stage has, what a pipeline is refused, and what is predicted of torch's schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch_schedules import passes

from weftrain.backends.cuda.degrees import degrees
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.pipeline import schedule_class
from weftrain.backends.cuda.pipeline_layout import (
    bubble_share,
    in_flight,
    layers_of_stages,
    parameters_of_stage,
    put_off,
    rank_of_stage,
    stage_count,
    stages_of_rank,
)
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError

Tiny = Callable[..., Recipe]
ZERO_BUBBLE: dict[str, Any] = {
    "pipeline_parallel": 2,
    "pipeline_schedule": "interleaved_zero_bubble",
    "pipeline_virtual_stages": 2,
    "parallel": "ddp",
}
EXPERTS = "{count: 4, top_k: 2, intermediate_size: 24}"


def options_of(ranks: int, schedule: str = "1f1b", each: int = 1, **more: Any) -> CudaOptions:
    parallel = "ddp" if schedule in ("interleaved_zero_bubble", "zbv") else "fsdp"
    return CudaOptions(
        **{"parallel": parallel, **more},
        pipeline_parallel=ranks,
        pipeline_schedule=schedule,
        pipeline_virtual_stages=each,
    )


def test_the_head_counts_with_the_last_stage(tiny_recipe: Tiny) -> None:
    """Of 7 layers the last of 3 stages has fewer where the head is large, and no stage more than another where not."""
    small = tiny_recipe("amber", "model.num_layers=7", "model.tie_embeddings=false")
    assert [len(one) for one in layers_of_stages(small, options_of(3))] == [2, 3, 2]
    large = tiny_recipe("amber", "model.num_layers=7", "model.tie_embeddings=false", "model.vocab_size=2000")
    assert [len(one) for one in layers_of_stages(large, options_of(3))] == [3, 3, 1]
    given = layers_of_stages(small, options_of(2, pipeline_layers=[5, 2]))
    assert given == [range(5), range(5, 7)]


def test_every_parameter_is_of_one_stage(tiny_recipe: Tiny) -> None:
    recipe, options = tiny_recipe("amber", "model.num_layers=9"), options_of(2, "interleaved_1f1b", 2)
    names = [name for stage in range(4) for name in parameters_of_stage(stage, recipe, options)]
    assert names == [spec.name for spec in recipe.parameters]
    tied = tiny_recipe("amber", "model.num_layers=9", "model.tie_embeddings=true")
    names = [name for stage in range(4) for name in parameters_of_stage(stage, tied, options)]
    names.remove("embedding.weight")  # of the first stage; the last one's is left
    assert sorted(names) == sorted(spec.name for spec in tied.parameters)


@pytest.mark.parametrize(
    ("schedule", "owners"), [("interleaved_1f1b", [0, 1, 2, 0, 1, 2]), ("zbv", [0, 1, 2, 2, 1, 0])]
)
def test_who_has_which_stage(schedule: str, owners: list[int]) -> None:
    options = options_of(3, schedule, 2)
    assert [rank_of_stage(stage, options) for stage in range(6)] == owners
    assert sorted(stage for rank in range(3) for stage in stages_of_rank(rank, options)) == list(range(6))


@pytest.mark.parametrize(
    ("options", "words", "told"),
    [
        (
            {"pipeline_parallel": 3},
            [],
            "with pipeline_virtual_stages 1 that makes 3 stages for model.num_layers 2: each stage has a layer at "
            "least: set a smaller pipeline_parallel or pipeline_virtual_stages",
        ),
        (
            {"pipeline_parallel": 2, "pipeline_schedule": "interleaved_1f1b", "pipeline_virtual_stages": 2},
            [],
            "with pipeline_virtual_stages 2 that makes 4 stages for model.num_layers 2",
        ),
        (ZERO_BUBBLE, ["model.num_layers=3"], "with pipeline_virtual_stages 2 that makes 4 stages"),
        (
            ZERO_BUBBLE,
            ["model.num_layers=4", f"model.experts={EXPERTS}"],
            "interleaved_zero_bubble goes through a block's graph twice, and model.experts has routers, which count "
            "their tokens in it: set pipeline_schedule=interleaved_1f1b",
        ),
        (
            {"pipeline_parallel": 2},
            ["tuning={freeze: [embedding, layers.0]}"],
            "tuning trains nothing in stage 0 of 2, layers 0 to 0, .*: let it train something in each, set a smaller",
        ),
        (
            {"pipeline_parallel": 2},
            ["tuning={lora: {rank: 4, alpha: 8, dropout: 0.0, targets: ['layers.0.*_proj']}}"],
            "tuning trains nothing in stage 1 of 2, layers 1 to 1, .* set a smaller pipeline_parallel, or leave tuning out",
        ),
        (
            ZERO_BUBBLE,
            ["model.num_layers=4", "tuning={freeze: [embedding]}"],
            "tuning freezes parameters, and pipeline_schedule interleaved_zero_bubble takes the gradients of all",
        ),
        (
            {"pipeline_parallel": 2, "pipeline_schedule": "gpipe"},
            ["batch.micro_batch_size=8"],
            "set a smaller micro_batch_size, a larger global_batch_size, or a smaller pipeline_parallel",
        ),
        ({"pipeline_parallel": 2}, ["batch.micro_batch_size=8"], "makes 1 micro-batches of a step, fewer than the 2"),
        (
            {"pipeline_parallel": 2},
            ["model.tie_embeddings=true", "precision.numerics=replayable"],
            "model.tie_embeddings is true with precision.numerics replayable: .* set model.tie_embeddings=false, "
            "precision.numerics=fast, or set pipeline_parallel=1",
        ),
        (
            {**ZERO_BUBBLE, "pipeline_schedule": "zbv"},
            ["model.tie_embeddings=true", "model.num_layers=4"],
            "with pipeline_schedule zbv, in which one rank has the first and the last stage: set model.tie_emb",
        ),
        ({"pipeline_parallel": 2, "pipeline_layers": [2, 1]}, [], r"pipeline_layers \[2, 1\] add up to 3"),
        (
            {"pipeline_parallel": 2, "pipeline_schedule": "interleaved_1f1b"},
            ["batch.micro_batch_size=1", "batch.global_batch_size=5"],
            "makes 5 micro-batches of a step, and pipeline_schedule interleaved_1f1b takes them in 2 equal rounds",
        ),
        (
            {"pipeline_parallel": 2},
            ["objective={name: random_matching, forget: [any], forget_weight: 0.7}"],
            "random_matching has losses of states between blocks",
        ),
        (
            {"pipeline_parallel": 2},
            ["objective={name: rmu, forget: [any], layer: 0, steering: 2.0, retain_weight: 3.0}"],
            "rmu has losses of states between blocks.*: take another objective, or set pipeline_parallel=1",
        ),
    ],
)
def test_what_a_pipeline_cannot_train(options: dict[str, Any], words: list[str], told: str, tiny_recipe: Tiny) -> None:
    batch = ["batch.global_batch_size=8", "batch.micro_batch_size=1"]
    recipe = tiny_recipe("amber", "model.tie_embeddings=false", *batch, *words)
    with pytest.raises(BackendError, match=told) as raised:
        degrees(CudaOptions.model_validate(options), recipe, options["pipeline_parallel"], 8)
    assert str(raised.value).startswith(f"backend.options.pipeline_parallel is {options['pipeline_parallel']}, and ")
    assert "\n" not in str(raised.value)


def test_a_node_that_has_several_stages_shards_within_each(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("amber", "model.tie_embeddings=false", "batch.replicas=2", "batch.micro_batch_size=1")
    found = degrees(CudaOptions(parallel="hsdp", pipeline_parallel=2), recipe, 4, 4)
    assert (found.replicate, found.shard, found.stage_ranks) == (1, 2, 2)


def test_ranks_that_stages_do_not_divide(tiny_recipe: Tiny) -> None:
    with pytest.raises(BackendError, match="6 ranks are no multiple of tensor_parallel x context_parallel x pipeline"):
        degrees(CudaOptions(pipeline_parallel=4), tiny_recipe("amber"), 6, 8)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"pipeline_virtual_stages": 2}, "pipeline_virtual_stages is 2, and pipeline_schedule 1f1b has one stage"),
        ({"pipeline_schedule": "zbv", "parallel": "ddp"}, "has 2 a rank: set it to 2"),
        ({"pipeline_schedule": "interleaved_zero_bubble"}, "needs parallel=ddp"),
        ({"pipeline_schedule": "zbv", "pipeline_virtual_stages": 2, "parallel": "hsdp"}, "zbv needs parallel=ddp"),
        ({**ZERO_BUBBLE, "compile": True}, "interleaved_zero_bubble goes through a block's graph twice, which compile"),
        ({**ZERO_BUBBLE, "activation_checkpointing": "selective"}, "or set pipeline_schedule=interleaved_1f1b"),
        ({**ZERO_BUBBLE, "float8": True}, "leave them at false and none"),
        ({"cuda_graphs": True, "compile": True, "parallel": "ddp"}, "a graph's next replay overwrites"),
        ({"bucket_mib": 50, "parallel": "ddp"}, "bucket_mib needs parallel=ddp without a pipeline"),
        ({"pipeline_schedule": "1b1f"}, "'interleaved_zero_bubble' or 'zbv'"),
        ({"pipeline_layers": [1, 1, 1]}, "has 3 numbers for 2 ranks with 1 stages each"),
        ({"pipeline_parallel": 1, "pipeline_schedule": "gpipe"}, "need pipeline_parallel above 1"),
        ({"memory_copies_every_steps": 5}, "the copies know no stages"),
    ],
)
def test_options_that_contradict_each_other(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CudaOptions.model_validate({"pipeline_parallel": 2, **wrong})


# Of torch's schedules


def played(options: CudaOptions, micro_batches: int) -> tuple[float, list[float]]:
    """The share of the time in which ranks wait, and what each rank keeps at most: passes between forward and the end
    of their backward, and a half for each whose gradients of weights are put off, about what those gradients take.
    """
    ranks, last = options.pipeline_parallel, stage_count(options) - 1
    left = {rank: list(reversed(order)) for rank, order in passes(options, micro_batches).items()}
    ended: dict[tuple[str, int, int], int] = {}
    time, busy = [0] * ranks, 0
    kept, most = [0.0] * ranks, [0.0] * ranks
    while any(left.values()):
        before = sum(map(len, left.values()))
        for rank, order in left.items():
            while order:
                kind, stage, at = order[-1]
                needed = {"F": [("F", stage - 1, at)] * (stage > 0), "W": [("B", stage, at)]}.get(
                    kind, [("F", stage, at), *[("B", stage + 1, at)] * (stage < last)]
                )
                if not all(one in ended for one in needed):
                    break
                took = 2 if kind == "B" else 1
                time[rank] = max([time[rank], *(ended[one] for one in needed)]) + took
                busy += took
                ended["B" if kind == "I" else kind, stage, at] = time[rank]
                kept[rank] += {"F": 1, "B": -1, "I": 0.5, "W": -1.5}[kind]
                most[rank] = max(most[rank], kept[rank])
                order.pop()
        assert sum(map(len, left.values())) < before, "the order waits for itself"
    return 1 - busy / ranks / max(time), most


@pytest.mark.parametrize(
    ("schedule", "ranks", "each", "micro_batches"),
    [
        ("1f1b", 4, 1, 8),
        ("gpipe", 4, 1, 8),
        ("interleaved_1f1b", 2, 2, 4),
        ("interleaved_1f1b", 4, 2, 4),
        ("interleaved_1f1b", 4, 3, 12),
        ("interleaved_zero_bubble", 4, 1, 8),
        ("interleaved_zero_bubble", 4, 2, 16),
        ("interleaved_zero_bubble", 4, 3, 12),
        ("zbv", 2, 2, 8),
        ("zbv", 4, 2, 16),
    ],
)
def test_bubble_and_micro_batches_under_way(schedule: str, ranks: int, each: int, micro_batches: int) -> None:
    options = options_of(ranks, schedule, each)
    bubble, kept = played(options, micro_batches)
    assert bubble_share(options, micro_batches) == pytest.approx(bubble, abs=1e-9)
    computed = [
        sum(in_flight(options, rank, micro_batches)) + put_off(options, rank, micro_batches) / 2
        for rank in range(ranks)
    ]
    # of zbv's last rank, that puts off all it has, one activation more than there is
    spare = schedule == "zbv"
    assert computed[:-1] == kept[:-1]
    assert kept[-1] <= computed[-1] <= kept[-1] + spare


def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.1"))
    with pytest.raises(BackendError, match=r"pipeline_parallel is 2, and torch 2\.10\.1 has schedules that were not"):
        schedule_class(CudaOptions(pipeline_parallel=2))
