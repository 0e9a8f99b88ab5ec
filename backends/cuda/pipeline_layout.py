"""Which layers the stages of a pipeline have, which ranks have the stages, and what a pipeline cannot do.

Stages are numbered in the order of the layers. The first has the embedding, the last the final norm, the head and the
loss. Nothing of this needs a process group: the planner reads it too.
"""

from __future__ import annotations

from typing import Any

from weftrain.backends.cuda.options import CudaOptions
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.parameters import Role


def stage_count(options: CudaOptions) -> int:
    return options.pipeline_parallel * options.pipeline_virtual_stages


def layers_of_stages(recipe: Recipe, options: CudaOptions) -> list[range]:
    """The layers of each stage, in order: as `pipeline_layers` says, else so that the slowest stage is the fastest
    possible. The head counts as its share of a layer's matrix products; an embedding is read, which costs no product.
    """
    counts = options.pipeline_layers or _balanced(recipe, stage_count(options))
    ends = [sum(counts[: stage + 1]) for stage in range(len(counts))]
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]


def _balanced(recipe: Recipe, stages: int) -> list[int]:
    """Each layer in turn goes to the stage with the least to do, of several to the last: the first ones keep the
    activations of the most micro-batches.
    """
    head = head_layers(recipe)
    counts, costs = [1] * stages, [1.0] * (stages - 1) + [1.0 + head]
    for _ in range(recipe.model.num_layers - stages):
        least = min(reversed(range(stages)), key=lambda stage: costs[stage])
        counts[least] += 1
        costs[least] += 1
    return counts


def head_layers(recipe: Recipe) -> float:
    """How many layers' matrix products the head's is."""
    blocks = sum(spec.size for spec in recipe.parameters if spec.name.startswith("layers.") and len(spec.shape) > 1)
    return recipe.model.vocab_size * recipe.model.hidden_size * recipe.model.num_layers / blocks


def stage_of_turn(rank: int, turn: int, ranks: int, schedule: str) -> int:
    """The stage that a pipeline rank has in a turn: they take turns, and with zbv turn back at the last rank."""
    return turn * ranks + (ranks - 1 - rank if schedule == "zbv" and turn % 2 else rank)


def rank_of_stage(stage: int, options: CudaOptions) -> int:
    """The pipeline rank that has a stage."""
    turn, place = divmod(stage, options.pipeline_parallel)
    # turning back twice is going on: what maps ranks to places maps places to ranks
    return stage_of_turn(place, turn, options.pipeline_parallel, options.pipeline_schedule) % options.pipeline_parallel


def stages_of_rank(rank: int, options: CudaOptions) -> list[int]:
    of_options = options.pipeline_parallel, options.pipeline_schedule
    return [stage_of_turn(rank, turn, *of_options) for turn in range(options.pipeline_virtual_stages)]


def parameters_of_stage(stage: int, recipe: Recipe, options: CudaOptions) -> list[str]:
    """Canonical names, in execution order. A tied embedding is in the first and in the last stage, which has it for the
    head (tied_embedding.py).
    """
    layers, last = layers_of_stages(recipe, options)[stage], stage_count(options) - 1
    prefixes = [f"layers.{layer}." for layer in layers]
    prefixes += ["embedding."] * (stage == 0 or (recipe.model.tie_embeddings and stage == last))
    prefixes += ["final_norm.", "head."] * (stage == last)
    return [spec.name for spec in recipe.parameters if spec.name.startswith(tuple(prefixes))]


def pipeline_numerics(options: CudaOptions) -> dict[str, Any]:
    """For a fingerprint."""
    return {
        "pipeline_schedule": options.pipeline_schedule,
        "pipeline_virtual_stages": options.pipeline_virtual_stages,
        "pipeline_layers": options.pipeline_layers,
    }


def check_pipeline(options: CudaOptions, recipe: Recipe) -> None:
    """Raises BackendError, with the values and the remedy, for a recipe that such a pipeline cannot train."""
    for wrong in (
        _unsupported(options, recipe),
        _wrong_layers(options, recipe.model.num_layers),
        _wrong_batch(options, recipe),
        _idle_stage(options, recipe),
    ):
        if wrong is not None:
            raise BackendError(f"backend.options.pipeline_parallel is {options.pipeline_parallel}, and {wrong}")


def _unsupported(options: CudaOptions, recipe: Recipe) -> str | None:
    model, alone = recipe.model, "or set pipeline_parallel=1"
    if model.tie_embeddings and recipe.precision.numerics == "replayable":
        return (
            "model.tie_embeddings is true with precision.numerics replayable: the gradients of the weight's two uses "
            "are added once a step, and by one process in each micro-batch: set model.tie_embeddings=false, "
            f"precision.numerics=fast, {alone}"
        )
    if model.tie_embeddings and options.pipeline_schedule == "zbv":
        return (
            "model.tie_embeddings is true with pipeline_schedule zbv, in which one rank has the first and the last "
            "stage: set model.tie_embeddings=false, or pipeline_schedule=1f1b with pipeline_virtual_stages=1"
        )
    if model.experts is not None and options.zero_bubble:
        return (
            f"pipeline_schedule {options.pipeline_schedule} goes through a block's graph twice, and model.experts has "
            "routers, which count their tokens in it: set pipeline_schedule=interleaved_1f1b"
        )
    if "hidden_states" in recipe.objective.features:
        return (
            f"objective {recipe.objective.name} has losses of states between blocks, which are not passed between "
            f"stages: take another objective, {alone}"
        )
    frozen = any(not spec.trained for spec in recipe.parameters if spec.role is not Role.ROUTER_BIAS)
    if frozen and options.zero_bubble:
        return (
            f"tuning freezes parameters, and pipeline_schedule {options.pipeline_schedule} takes the gradients of all "
            "weights apart from those of inputs: set pipeline_schedule=interleaved_1f1b, or leave tuning out"
        )
    return None


def _idle_stage(options: CudaOptions, recipe: Recipe) -> str | None:
    """Of a stage that trains nothing. Below all that is trained it has no backward pass, which the schedules do not
    know.
    """
    trained, layers = {spec.name for spec in recipe.parameters if spec.trained}, layers_of_stages(recipe, options)
    for stage, own in enumerate(layers):
        if trained.isdisjoint(parameters_of_stage(stage, recipe, options)):
            return (
                f"tuning trains nothing in stage {stage} of {len(layers)}, layers {own.start} to {own.stop - 1}, and "
                "the schedules know no stage without gradients: let it train something in each, set a smaller "
                "pipeline_parallel, or leave tuning out"
            )
    return None


def _wrong_layers(options: CudaOptions, layers: int) -> str | None:
    stages, given = stage_count(options), options.pipeline_layers
    if layers < stages:
        return (
            f"with pipeline_virtual_stages {options.pipeline_virtual_stages} that makes {stages} stages for "
            f"model.num_layers {layers}: each stage has a layer at least: set a smaller pipeline_parallel or "
            "pipeline_virtual_stages"
        )
    if given is not None and sum(given) != layers:
        return (
            f"pipeline_layers {given} add up to {sum(given)}, and model.num_layers is {layers}: give all layers, "
            "or leave it out"
        )
    return None


def _wrong_batch(options: CudaOptions, recipe: Recipe) -> str | None:
    batch, ranks = recipe.batch, options.pipeline_parallel
    micro = batch.accumulation_steps
    made = (
        f"batch.global_batch_size {batch.global_batch_size} / (replicas {batch.replicas} x micro_batch_size "
        f"{batch.micro_batch_size}) makes {micro} micro-batches of a step"
    )
    if micro < ranks:
        return (
            f"{made}, fewer than the {ranks} ranks that they pass through: set a smaller micro_batch_size, a larger "
            "global_batch_size, or a smaller pipeline_parallel"
        )
    if options.pipeline_schedule.startswith("interleaved") and micro % (micro // ranks):
        return (
            f"{made}, and pipeline_schedule {options.pipeline_schedule} takes them in {micro // ranks} equal rounds: "
            f"make it a multiple of {ranks}, or set pipeline_schedule=1f1b"
        )
    return None


def bubble_share(options: CudaOptions, micro_batches: int) -> float:
    """The part of a pipeline's time in which a rank waits, of equal stages with backward passes of twice a forward one:
    (p - 1) / (m + p - 1) of GPipe and 1F1B, (p - 1) / (v m + p - 1) with v stages a rank (arXiv 2104.04473, section
    2.2). The zero-bubble schedules fill two thirds of the wait with gradients of weights (arXiv 2401.10241; torch's zbv
    too, and only with 2 p - 1 micro-batches or more). tests/backends/cuda/test_pipeline_layout.py counts it in torch's
    own schedules.
    """
    ranks, each = options.pipeline_parallel, options.pipeline_virtual_stages
    waits = (ranks - 1) * (1 / 3 if options.zero_bubble else 1)
    return waits / (each * micro_batches + waits)


def in_flight(options: CudaOptions, rank: int, micro_batches: int) -> list[int]:
    """Of each stage of a pipeline rank, in order: micro-batches whose activations it keeps when the rank keeps those of
    the most. Counted in torch's schedules by the same test.
    """
    ranks = options.pipeline_parallel
    if options.pipeline_schedule == "gpipe":
        return [micro_batches]
    if options.pipeline_schedule == "1f1b":
        return [min(micro_batches, ranks - rank)]
    if options.pipeline_schedule == "zbv":
        first = min(micro_batches, 2 * ranks - rank)
        return [first, min(micro_batches, 2 * ranks - first)]
    return _in_flight_interleaved(options, rank, micro_batches)


def put_off(options: CudaOptions, rank: int, micro_batches: int) -> int:
    """Backward passes of a pipeline rank through one of its stages that wait for their gradients of weights when it
    keeps the most: of the zero-bubble schedules, which put them off. With zbv the last rank puts off all but one; the
    others have put off more only when they keep less.
    """
    if not options.zero_bubble:
        return 0
    ranks, each = options.pipeline_parallel, options.pipeline_virtual_stages
    if options.pipeline_schedule == "zbv":
        return min(2 * ranks - 1, each * micro_batches) if rank == ranks - 1 else 1
    return min(rank + 1, each * micro_batches)


def _in_flight_interleaved(options: CudaOptions, rank: int, micro_batches: int) -> list[int]:
    ranks, each = options.pipeline_parallel, options.pipeline_virtual_stages
    of_a_round = micro_batches // max(1, micro_batches // ranks)
    # passes before the first backward one, and how many gradients of weights are put off
    hop, waiting = (1, rank) if options.zero_bubble else (2, 0)
    warm = min((each - 1) * of_a_round + hop * (ranks - 1 - rank), each * micro_batches)
    live, most = [0] * each, [0] * each
    for at in range(each * micro_batches + warm):
        if at < each * micro_batches:
            stage = at // of_a_round % each
            live[stage] += 1
            most = max(most, live[:], key=sum)
        if (ended := at - warm - waiting) >= 0:
            live[each - 1 - ended // of_a_round % each] -= 1
    return most


def slowest_rank(recipe: Recipe, options: CudaOptions) -> float:
    """What the pipeline rank with the most to do computes, over the mean of all."""
    head = head_layers(recipe)
    layers, ranks = layers_of_stages(recipe, options), options.pipeline_parallel
    costs = [float(sum(len(layers[stage]) for stage in stages_of_rank(rank, options))) for rank in range(ranks)]
    costs[rank_of_stage(len(layers) - 1, options)] += head
    return max(costs) * ranks / sum(costs)
