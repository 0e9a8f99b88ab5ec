"""What a rank sends and how long a step takes, before anything is started, and what to change where memory is short.

Memory (needs.py) and traffic are computed from what the backend does; a step's time is predicted from speeds that
were measured or come from a data sheet, by a model with few constants, each with its reason
(docs/train-on-a-cluster.md).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from weftrain.backends.common.device_memory import (
    ITEM,
    Sizes,
    Widths,
    available,
    largest_parts,
)
from weftrain.backends.cuda.degrees import Degrees, degrees
from weftrain.backends.cuda.float8 import share_of_products
from weftrain.backends.cuda.needs import gathered_blocks, needs, needs_of_ranks
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.pipeline_layout import bubble_share, layers_of_stages, slowest_rank
from weftrain.backends.cuda.stage_share import StageShare, shares_of
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.flops import training_flops
from weftrain.core.formats.units import gib
from weftrain.core.model_config import ModelConfig
from weftrain.core.muon import muon_flops
from weftrain.core.parameters import flops_per_token
from weftrain.core.prediction import Prediction, Speeds

if TYPE_CHECKING:
    import torch


# The time model. Share of the peak that a large bf16 matrix multiply reaches in a long run, which a power limit lowers
# on the newer devices, and of the bandwidth that an elementwise pass reaches. Attention's products run at a lower share
# than plain ones.
MATMUL_SHARE = 0.75
ATTENTION_SHARE = 0.40
BANDWIDTH_SHARE = 0.80
LINK_SHARE = 0.70
# Passes over tensors of [tokens, hidden], [tokens, all queries], [tokens, all keys] and [tokens, intermediate] in a
# block's forward and backward, the first of 4 bytes an element and the others of the compute dtype: norms, rotation,
# residual sums, SwiGLU (or GELU) and their gradients; a compiled block fuses about half of them.
_STREAM_PASSES, _HIDDEN_PASSES, _QUERY_PASSES, _KEY_PASSES = 22, 8, 8, 8
_INNER_PASSES = {"swiglu": 16, "gelu": 6}
_QK_NORM_PASSES = 6  # over queries and keys, where they are normed
_COMPILED = 0.55
_LAUNCH_S = 6e-6  # a kernel launch that nothing hides, in an eager block of about 120 of them
_LAUNCHES_A_BLOCK = 120


def _keys_seen(model: ModelConfig, tokens: int) -> float:
    """By a query of a row of so many tokens, on average and summed over the layers."""
    windows = [min(model.kind_of(layer).window or tokens, tokens) for layer in range(model.num_layers)]
    return sum(window * (1 - window / (2 * tokens)) for window in windows)


def degrees_of(recipe: Recipe, options: CudaOptions, speeds: Speeds | None = None) -> Degrees:
    """The degrees on speeds.devices, or on as many as the recipe asks for. Raises BackendError."""
    group = options.tensor_parallel * options.context_parallel * options.pipeline_parallel
    size = recipe.batch.replicas * group if speeds is None or speeds.devices is None else speeds.devices
    return degrees(options, recipe, size, 8 if speeds is None else speeds.devices_per_node)


_MUON = "Muon's matrices"
_TO_EXPERTS = "tokens to experts"
_STREAMS = "streams between stages"
_TIES = "gradient of the tied embedding between stages"
_BUBBLE = "pipeline bubble"
# before it is there a block, a stage or the update cannot go on
_WAITED_FOR = ("tokens between tensor ranks", "heads between context ranks", _TO_EXPERTS, _MUON, _STREAMS, _TIES)


def traffic(recipe: Recipe, options: CudaOptions, shape: Degrees) -> dict[str, int]:
    """Bytes that a rank sends in a step, by purpose, of a pipeline the rank that sends most; ring algorithms are
    assumed.
    """
    found = [_traffic(recipe, options, shape, share) for share in shares_of(recipe, options)]
    return max(found, key=lambda sent: sum(sent.values()))


def _traffic(recipe: Recipe, options: CudaOptions, shape: Degrees, share: StageShare) -> dict[str, int]:
    item, reduced = ITEM[recipe.precision.compute], ITEM[options.reduce]
    outer, of_gradients = share.sizes(recipe).outer, share.sizes(recipe, "exp_avg")
    micro = recipe.batch.accumulation_steps
    found: dict[str, int] = {}

    def ring(size: float, ranks: int) -> float:
        return size * (ranks - 1) / ranks

    ddp = options.parallel == "ddp"
    if share.streams:  # as many streams leave a stage as reach it
        tokens = recipe.batch.micro_batch_size * recipe.data.sequence_length // shape.sequence
        found[_STREAMS] = share.streams * tokens * 4 * recipe.model.hidden_size
    ties = recipe.model.tie_embeddings and shape.pipeline > 1 and (share.embedding or share.head)
    if ties and of_gradients.outer:
        found[_TIES] = 4 * of_gradients.outer // (1 if ddp else shape.shard * shape.sequence)
    specs = [spec for spec in recipe.parameters if spec.trained and spec.optimizer == "muon"]
    if muons := sum(spec.size for spec in specs if share.names is None or spec.name in share.names):
        # momenta gathered in fp32 where they are cut, and what one rank computed sent to all
        parts = 1 if ddp else shape.shard * shape.row_ranks
        found[_MUON] = int(ring(4 * muons, parts) + ring(4 * muons, shape.stage_ranks))
    if ddp:
        found["sum gradients"] = int(
            2 * ring(reduced * (of_gradients.blocks + of_gradients.outer) + 4 * of_gradients.norms, shape.data)
        )
        return found
    in_blocks, everywhere = shape.shard * shape.context, shape.shard * shape.sequence
    times = micro * (2 if options.reshard_after_forward else 1)
    reductions = micro if options.reduce_every_micro_batch else 1

    def cut(plane: str) -> float:
        """Parameters of the blocks that a rank sends to gather or scatter all of them."""
        of = gathered_blocks(recipe, shape, share, plane)
        of_mixtures = ring(of.experts, everywhere // shape.expert) + ring(of.shared, everywhere)
        return of_mixtures + ring(of.others, in_blocks)

    found["gather weights"] = int(times * item * cut("weights") + micro * ring(item * outer, everywhere))
    found["scatter gradients"] = int(
        reductions * reduced * (cut("exp_avg") + ring(of_gradients.outer, everywhere))
        + 2 * ring(4 * of_gradients.norms, shape.stage_ranks // shape.copies)
    )
    if shape.replicate > 1:
        own = of_gradients.blocks / shape.tensor / in_blocks + of_gradients.outer / everywhere
        found["sum over replicas"] = int(reductions * 2 * ring(reduced * own, shape.replicate))
    tokens = micro * recipe.batch.micro_batch_size * recipe.data.sequence_length * share.layers
    again, of = (1 if options.activation_checkpointing == "none" else 2), Widths.of(recipe.model, shape.sequence)
    experts, sparse = recipe.model.experts, 0.0  # the part of the layers that has experts
    if experts is not None:
        sparse = 1 - experts.dense_layers / recipe.model.num_layers
    if shape.copies > 1:
        # the fp32 sums of its parts to each other rank, twice in a block's forward, and in its backward
        found["tokens between tensor ranks"] = (1 + again) * 2 * 4 * tokens * of.hidden * (shape.tensor - 1)
    elif shape.tensor > 1:
        # a gather and a scatter of [tokens, hidden] around attention and around a dense feed-forward, in a block's
        # forward, and in its backward
        between = (4 - 2 * sparse) * ring(item * tokens * of.hidden / shape.context, shape.tensor)
        if (copies := shape.tensor // recipe.model.num_kv_heads) > 1:  # and k and v of the head that ranks share
            between += 2 * ring(item * tokens * recipe.model.head_dim / shape.context, copies)
        found["tokens between tensor ranks"] = int((1 + again) * between)
    if shape.context > 1:  # q, k, v out and the result back
        width = 2 * of.queries + 2 * of.keys
        sent = ring(item * tokens * width / shape.sequence, shape.context)
        found["heads between context ranks"] = int((1 + again) * sent)
    if experts is not None and shape.expert > 1:  # there and back; loads taken to be even
        rows = experts.top_k * tokens * sparse / shape.sequence
        found[_TO_EXPERTS] = int((1 + again) * 2 * ring(item * rows * of.hidden, shape.expert))
    return found


def predict(
    recipe: Recipe, options: CudaOptions, shape: Degrees, speeds: Speeds, device_type: str = "cuda"
) -> Prediction:
    """A step on `shape.size` devices: computation, and the communication that does not overlap with it."""
    parts = _computing_parts(recipe, options, shape, speeds)
    working = sum(parts.values())
    # of a pipeline, the rank that what it sends holds up most: the others wait for it
    each = [_traffic(recipe, options, shape, share) for share in shares_of(recipe, options)]
    timed = [_step_s(recipe, shape, speeds, working, sent) for sent in each]
    slowest = max(range(len(timed)), key=lambda rank: timed[rank][0])
    sent, (step_s, beside_s, exposed_s) = each[slowest], timed[slowest]
    parts["communication"] = beside_s + exposed_s
    if shape.pipeline > 1:  # in the passes of the micro-batches; the optimizer follows them
        share, passes = bubble_share(options, recipe.batch.accumulation_steps), step_s - parts["optimizer"]
        parts[_BUBBLE] = passes * share / (1 - share)
        step_s += parts[_BUBBLE]
    if beside_s > working:
        limit = "communication"
    else:
        limit = max(("matrix products", "attention", "memory passes", "optimizer"), key=lambda name: parts[name])
    held = needs(recipe, options, shape, device_type)
    notes = pipeline_notes(recipe, options, shape, device_type) | _float8_notes(recipe, options, shape, speeds)
    return Prediction(step_s, limit, parts, held, sent, notes=notes)


def _step_s(
    recipe: Recipe, shape: Degrees, speeds: Speeds, working_s: float, sent: Mapping[str, int]
) -> tuple[float, float, float]:
    """Seconds of a step in which a rank computes for working_s and sends so much, without a pipeline's waits; and of
    what it sends, the seconds that run beside the arithmetic, but for the first gather and the last scatter, and those
    that it waits for. Raises BackendError.
    """
    beside_s, exposed_s = 0.0, 0.0
    for name, size in sent.items():
        link = _link(name, shape, speeds)
        if link is None:
            raise BackendError("a prediction for several devices needs the speed of the links between them")
        seconds = size / (link * LINK_SHARE)
        if name in _WAITED_FOR:
            exposed_s += seconds
        else:
            beside_s += seconds
    edge = beside_s / max(1, recipe.model.num_layers * recipe.batch.accumulation_steps)
    return max(working_s, beside_s) + exposed_s + edge, beside_s, exposed_s


def _float8_notes(recipe: Recipe, options: CudaOptions, shape: Degrees, speeds: Speeds) -> dict[str, str]:
    """Which peak the prediction and MFU divide by."""
    if (float8 := options.in_float8) is None:
        return {}
    share = share_of_products(recipe.model, float8, shape.tensor)
    return {
        "float8": f"{share:.0%} of the matrix products are in eight bits ({float8.scaling}), predicted at twice the "
        f"{speeds.matmul_flops / 1e12:.0f} TFLOP/s of {recipe.precision.compute}; MFU divides by the latter"
    }


def pipeline_notes(recipe: Recipe, options: CudaOptions, shape: Degrees, device_type: str) -> dict[str, str]:
    """Of a pipeline, in words: its stages, the share of the time in which a rank waits, and what each rank holds."""
    if shape.pipeline == 1:
        return {}
    micro_batches = recipe.batch.accumulation_steps
    layers = " + ".join(str(len(one)) for one in layers_of_stages(recipe, options))
    each = [gib(one.total_memory_bytes) for one in needs_of_ranks(recipe, options, shape, device_type)]
    bubble = bubble_share(options, micro_batches)
    return {
        "pipeline": f"{options.pipeline_schedule}, {micro_batches} micro-batches, stages of {layers} layers",
        "pipeline bubble": f"{bubble:.1%} of the passes; the slowest rank computes "
        f"{slowest_rank(recipe, options):.3f} x the mean",
        "memory of the pipeline's ranks": ", ".join(each),
    }


def _computing_parts(recipe: Recipe, options: CudaOptions, shape: Degrees, speeds: Speeds) -> dict[str, float]:
    """Seconds of a step by part, without communication."""
    model = recipe.model
    tokens = recipe.tokens_per_step / shape.size  # of a rank
    item = ITEM[recipe.precision.compute]
    blocks, *_ = Sizes.of(recipe)
    length = recipe.data.sequence_length
    of_matrices, of_all = (training_flops(recipe, row_length).total for row_length in (0, length))
    products = of_matrices * tokens
    # the share of attention's gradients that something trained asks for, of the keys that a query sees
    share = (of_all - of_matrices) / (flops_per_token(model, length) - flops_per_token(model, 0))
    attention = share * 12.0 * model.num_heads * model.head_dim * _keys_seen(model, length) * tokens
    if shape.pipeline > 1:  # a rank computes its layers; the others wait for the one that has most to do
        tokens *= (slowest := slowest_rank(recipe, options))
        products, attention = products * slowest, attention * slowest
    recomputed = {"none": 0.0, "selective": 0.0, "full": 1.0}[options.activation_checkpointing]
    block_share = blocks / (blocks + model.vocab_size * model.hidden_size)
    products *= 1 + (shape.copies - 1) * (1 - block_share)  # ranks with the same tokens compute the head each
    products *= 1 + recomputed / 3 * block_share
    attention *= 1 + recomputed / 3.5
    of = Widths.of(recipe.model, shape.sequence)
    hidden = of.hidden * shape.copies
    narrow = _HIDDEN_PASSES * hidden + _QUERY_PASSES * of.queries + _KEY_PASSES * of.keys
    narrow += _QK_NORM_PASSES * of.normed + _INNER_PASSES[model.feed_forward] * of.inner
    passes = tokens * model.num_layers * (4 * _STREAM_PASSES * hidden + item * narrow)
    passes *= (_COMPILED if options.compile else 1.0) * (1 + 0.4 * (options.activation_checkpointing != "none"))
    trained = Sizes.of(recipe, "exp_avg")
    owned = (trained.blocks + trained.outer) / shape.pipeline
    owned /= 1 if options.parallel == "ddp" else shape.shard * shape.row_ranks
    bandwidth = speeds.memory_bandwidth * BANDWIDTH_SHARE
    if options.in_float8 is not None:  # eight bits at twice the rate of sixteen, on every device that has them
        products *= 1 - share_of_products(model, options.in_float8, shape.tensor) / 2
    parts = {
        "matrix products": products / (speeds.matmul_flops * (speeds.matmul_share or MATMUL_SHARE)),
        "attention": attention / (speeds.matmul_flops * (speeds.attention_share or ATTENTION_SHARE)),
        "memory passes": passes / bandwidth,
        "optimizer": owned * (30 + item) / bandwidth
        + muon_flops(recipe.parameters, recipe.optimizer.muon) / shape.size / (speeds.matmul_flops * MATMUL_SHARE),
    }
    if not options.compile:
        of_a_rank = model.num_layers / shape.pipeline
        launches = _LAUNCH_S * _LAUNCHES_A_BLOCK * of_a_rank * 3 * recipe.batch.accumulation_steps
        parts["launches"] = max(0.0, launches - sum(parts.values()))
    return parts


def _link(name: str, shape: Degrees, speeds: Speeds) -> float | None:
    """Bytes a second of one device's sends for `name`. A ring over whole nodes enters each by all of its network cards
    at once, so that a card carries a share of it; replicas of a shard meet by one card each.
    """
    ranks = {
        "tokens between tensor ranks": shape.tensor,
        "heads between context ranks": shape.sequence,
        _TO_EXPERTS: shape.expert,
        "sum over replicas": shape.stage_ranks,
        _STREAMS: shape.size,
        _TIES: shape.size,
    }
    reaches = ranks.get(name, shape.stage_ranks if name == "sum gradients" else shape.shard * shape.row_ranks)
    node = speeds.node_link_bandwidth or speeds.link_bandwidth
    if reaches <= speeds.devices_per_node or speeds.link_bandwidth is None:
        return node
    if name in ("sum over replicas", _STREAMS, _TIES):
        return speeds.link_bandwidth
    through = speeds.link_bandwidth * speeds.devices_per_node
    return through if node is None else min(node, through)


def check_memory(recipe: Recipe, options: CudaOptions, shape: Degrees, device: torch.device) -> None:
    """Refuse, before anything is allocated, what does not fit. Raises BackendError, with what would."""
    import os

    wanted = needs(recipe, options, shape, device.type)
    capacity, where = available(device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if wanted.total_memory_bytes <= capacity:
        return
    told = largest_parts(wanted.memory_bytes)
    remedy = "; ".join(remedies(recipe, options, shape, device.type, capacity))
    raise BackendError(
        f"a rank needs about {gib(wanted.total_memory_bytes)} ({told}), and {where} has {gib(capacity)}: "
        f"what would fit: {remedy}"
    )


def outlook(
    recipe: Recipe, options: CudaOptions, shape: Degrees, device_type: str
) -> tuple[Mapping[str, int], list[str]]:
    """What a rank was computed to need, and settings that need less."""
    held = needs(recipe, options, shape, device_type)
    least = 0.97 * held.total_memory_bytes
    less = [words for words, total in alternatives(recipe, options, shape, device_type) if total < least]
    return held.memory_bytes, [*less[:3], "more devices", "the streaming backend"]


def remedies(
    recipe: Recipe, options: CudaOptions, shape: Degrees, device_type: str, capacity_bytes: float
) -> tuple[str, ...]:
    """Settings that fit into so much memory on the same devices, cheapest first; then other ways."""
    found: dict[str, str] = {}  # kind -> the first of it that fits: the largest micro-batch
    for words, total in alternatives(recipe, options, shape, device_type):
        if total <= capacity_bytes:
            found.setdefault(re.sub(r"micro_batch_size=\d+", "", words), words)
    if (replicas := _replicas_that_fit(recipe, options, shape, device_type, capacity_bytes)) is not None:
        found["more"] = f"batch.replicas={replicas} on {replicas * shape.row_ranks * shape.pipeline} devices"
    return (*list(found.values())[:5], *(() if found else ("more or larger devices",)), "the streaming backend")


def _replicas_that_fit(
    recipe: Recipe, options: CudaOptions, shape: Degrees, device_type: str, capacity_bytes: float
) -> int | None:
    """The smallest larger number of data-parallel replicas that fits; None where more of them do not help."""
    batch = recipe.batch
    for replicas in range(batch.replicas + 1, min(batch.global_batch_size, 4096) + 1):
        if (
            batch.global_batch_size % (replicas * batch.micro_batch_size)
            or options.parallel != "fsdp"
            or replicas * shape.sequence % shape.expert
        ):
            continue
        more = recipe.model_copy(update={"batch": batch.model_copy(update={"replicas": replicas})})
        if more.batch.accumulation_steps < shape.pipeline:
            break
        wider = dataclasses.replace(shape, shard=replicas)
        if needs(more, options, wider, device_type).total_memory_bytes <= capacity_bytes:
            return replicas
    return None


def alternatives(recipe: Recipe, options: CudaOptions, shape: Degrees, device_type: str) -> Iterator[tuple[str, int]]:
    """Settings that need less, in the order of what they cost, and the bytes that a rank needs with each."""

    def total(changed_recipe: Recipe, **changes: object) -> int:
        changed = options.model_copy(update=changes)
        new = shape
        if changes.get("parallel") == "fsdp":
            new = dataclasses.replace(shape, replicate=1, shard=shape.data)
        return needs(changed_recipe, changed, new, device_type).total_memory_bytes

    smaller_ones = [
        recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro_batch_size": micro})})
        for micro in range(recipe.batch.micro_batch_size - 1, 0, -1)
        if recipe.batch.global_batch_size % (micro * recipe.batch.replicas) == 0
    ]
    for smaller in smaller_ones:
        yield f"batch.micro_batch_size={smaller.batch.micro_batch_size}", total(smaller)
    if options.zero_bubble:
        return  # such a schedule needs ddp, and recomputes nothing
    if options.parallel == "ddp":
        yield "backend.options.parallel=fsdp", total(recipe, parallel="fsdp")
    for kind in ("selective", "full"):
        if options.activation_checkpointing == "none" or (options.activation_checkpointing, kind) == (
            "selective",
            "full",
        ):
            fsdp = {"parallel": "fsdp"} if options.parallel == "ddp" else {}
            yield (
                f"{'backend.options.parallel=fsdp ' if fsdp else ''}backend.options.activation_checkpointing={kind}",
                total(recipe, activation_checkpointing=kind, **fsdp),
            )
    if options.activation_checkpointing != "full":
        for smaller in smaller_ones:
            yield (
                f"batch.micro_batch_size={smaller.batch.micro_batch_size} "
                "backend.options.activation_checkpointing=full",
                total(smaller, activation_checkpointing="full"),
            )
    others = ["cpu_offload"] if options.parallel != "ddp" else []
    if options.parallel != "ddp" and not options.reduce_every_micro_batch and recipe.batch.accumulation_steps > 1:
        others.insert(0, "reduce_every_micro_batch")
    for name in others:
        yield f"backend.options.{name}=true", total(recipe, **{name: True})
        if options.activation_checkpointing != "full":
            words = f"backend.options.{name}=true backend.options.activation_checkpointing=full"
            yield words, total(recipe, **{name: True}, activation_checkpointing="full")
