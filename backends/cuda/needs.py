"""Bytes that a rank of the cuda backend holds at the worst moment of a step, by part."""

from __future__ import annotations

from typing import NamedTuple

from weftrain.backends.common.device_memory import (
    FRAGMENTS,
    ITEM,
    PROGRAM_BYTES,
    Sizes,
    activations,
    adapter_elements,
    frozen_bytes,
    gradient_sums,
    head_bytes,
    mask_bytes,
    rotary_bytes,
    trains_head,
)
from weftrain.backends.cuda.degrees import Degrees
from weftrain.backends.cuda.options import CudaOptions
from weftrain.backends.cuda.stage_share import StageShare, shares_of
from weftrain.core.config import Recipe
from weftrain.core.parameters import PLANES
from weftrain.core.prediction import Needs


def needs(recipe: Recipe, options: CudaOptions, shape: Degrees, device_type: str) -> Needs:
    """Bytes on one rank's device at the worst moment, by part; of a pipeline, on the rank that needs most.
    tests/backends/cuda/test_needs.py holds them to what an allocator hands out.
    """
    found = needs_of_ranks(recipe, options, shape, device_type)
    return max(found, key=lambda one: one.total_memory_bytes)


def needs_of_ranks(recipe: Recipe, options: CudaOptions, shape: Degrees, device_type: str) -> list[Needs]:
    """The same of each rank of a pipeline, in order."""
    return [_needs(recipe, options, shape, device_type, share) for share in shares_of(recipe, options)]


def _needs(recipe: Recipe, options: CudaOptions, shape: Degrees, device_type: str, share: StageShare) -> Needs:
    model, item = recipe.model, ITEM[recipe.precision.compute]
    blocks, outer, _ = share.sizes(recipe)
    ddp = options.parallel == "ddp"
    every, owned, squared = (_owned(share.sizes(recipe, plane), shape, ddp) for plane in PLANES)
    frozen_norms = share.sizes(recipe).norms - share.sizes(recipe, "exp_avg").norms
    frozen = every - owned - frozen_norms  # what computes in bf16 is there in bf16 alone
    in_fp32 = owned + frozen_norms + (frozen if item == 4 else 0)
    on_device = 0 if options.cpu_offload else 1
    parts = {
        "program": PROGRAM_BYTES[device_type],
        "weights, fp32": 4 * in_fp32 * on_device,
        "optimizer": 4 * (owned + squared) * on_device,
    }
    if ddp:
        parts["compute copies"] = item * (blocks + outer) if item < 4 else 0
    elif item < 4 and frozen:
        parts["frozen weights, bf16"] = item * frozen * on_device
    tokens = recipe.batch.micro_batch_size * recipe.data.sequence_length // shape.sequence
    kept, at_work = activations(
        *(model, item, options.activation_checkpointing, options.compile, shape.tensor, shape.sequence),
        adapters=adapter_elements(recipe),
        parts=recipe.precision.tensor_parts,
    )
    if (experts := model.experts) is not None and shape.expert > 1:  # the rows that are sent, and that arrive
        at_work += 2 * item * experts.top_k * model.hidden_size
    stream, head = 4 * model.hidden_size, head_bytes(recipe, tokens, device_type) * share.head
    masks = tokens * mask_bytes(recipe)
    at_work += mask_bytes(recipe) if options.activation_checkpointing != "none" else 0
    everything = tokens * (kept * share.kept_layers + stream * share.kept_streams)
    without = everything - tokens * kept * share.in_a_pass  # the micro-batch that is passed back
    held = _replicated if ddp else _sharded
    at_head, in_last_block, behind_it, in_first_block, at_end = held(recipe, options, shape, share, owned * on_device)
    moments = [
        {**at_head, "activations": everything, "head": head},
        {**at_head, "activations": everything, "dropout masks": masks},
        {**in_last_block, "activations": everything, "one block at work": tokens * at_work},
        {**behind_it, "activations": everything - tokens * kept, "one block at work": tokens * at_work},
        {**in_first_block, "activations": without + tokens * kept, "one block at work": tokens * at_work},
        {**at_end, "activations": without},
    ]
    worst = max(moments, key=lambda moment: sum(moment.values()))
    if frozen_layers := frozen_bytes(recipe):
        parts["frozen layers"] = frozen_layers if ddp else frozen_layers // (shape.shard * shape.sequence) * on_device
    parts |= worst
    if share.put_off:
        parts["gradients put off"] = share.put_off * tokens * (share.in_a_pass * at_work + stream)
    if share.streams:
        parts["pipeline buffers"] = share.streams * tokens * stream
    parts["rotary tables"] = rotary_bytes(model)
    parts["fragments"] = int((FRAGMENTS - 1) * (sum(worst.values()) + parts.get("compute copies", 0)))
    return Needs(parts, 0)


def _owned(sizes: Sizes, shape: Degrees, ddp: bool) -> int:
    """Parameters of these that a rank keeps."""
    if ddp:
        return sizes.blocks // shape.tensor + sizes.outer + sizes.norms
    return sizes.blocks // (shape.shard * shape.row_ranks) + sizes.outer // (shape.shard * shape.sequence) + sizes.norms


Moment = dict[str, int]


def _replicated(
    recipe: Recipe, options: CudaOptions, shape: Degrees, share: StageShare, owned: int
) -> tuple[Moment, ...]:
    """DDP's gradients in the five moments of `needs`: its buckets hold them all the time."""
    item = ITEM[recipe.precision.compute]
    blocks, outer, _ = share.sizes(recipe, "exp_avg")
    fp32 = max(gradient_sums(recipe), item < 4 and ITEM[options.reduce] == 4)  # sums, and what is exchanged
    return ({"gradients": item * (blocks + outer) + 4 * (blocks + outer) * fp32},) * 5


def _sharded(recipe: Recipe, options: CudaOptions, shape: Degrees, share: StageShare, owned: int) -> tuple[Moment, ...]:
    """FSDP's whole weights and gradients in the five moments of `needs`: while the head computes, in the last block's
    backward, in that of the block before, while the last block's gradients are reduced, in the first block's, and when
    embedding and head are reduced. owned: parameters whose gradients stay on the device.
    """
    model, item, reduced = recipe.model, ITEM[recipe.precision.compute], ITEM[options.reduce]
    outer = share.sizes(recipe).outer
    layers, in_blocks = share.layers, sum(gathered_blocks(recipe, shape, share))
    gathered_outer, trained = outer, share.sizes(recipe, "exp_avg")
    outer, whole_block = trained.outer, in_blocks // layers
    a_block = sum(gathered_blocks(recipe, shape, share, "exp_avg")) // layers  # of it what has a gradient
    # of a block at work
    inner = model.intermediate_size // shape.tensor
    if model.experts is not None:
        inner = model.experts.count * model.experts.intermediate_size // shape.expert
    first_product = item * min(a_block, model.hidden_size * inner)
    gathers = shape.stage_ranks > 1 or item < 4

    ahead = options.gather_blocks_ahead

    def moment(whole_blocks: int, sharded: int, whole: int) -> Moment:
        gathered = in_blocks if not options.reshard_after_forward else min(whole_blocks, layers) * whole_block
        return {
            "gathered weights": item * (gathered + gathered_outer) * gathers,
            "gradients": 4 * sharded,
            "whole gradients": whole,
        }

    head = item * model.vocab_size * model.hidden_size * trains_head(recipe) * share.head
    accumulates, before = recipe.batch.accumulation_steps > 1, 0
    of_outer, sums, a_sum = head, 0, 0
    if accumulates and options.reduce_every_micro_batch:
        before = owned
    elif accumulates:  # whole sums of the micro-batches before; a block's is freed as its part of the reduced one comes
        each = max(item, reduced) * gradient_sums(recipe)
        of_outer, a_sum = each * outer, each * a_block
        sums = layers * a_sum + of_outer
    # what FSDP copies the gradients into, to send them; alone, a rank keeps it as its own part
    leaving = reduced * a_block * (shape.shard * shape.sequence > 1)
    if shape.pipeline > 1 and sums:  # they are sent after the last pass, when nothing else is left of it
        passing = moment(1 + ahead, before, sums + first_product)
        return moment(ahead, before, sums), passing, passing, passing, moment(0, owned // layers, sums + leaving)
    return (
        moment(ahead, before, sums),
        moment(1 + ahead, before, (sums or of_outer) + first_product),
        moment(1 + ahead, before or owned // layers, max(sums - a_sum, of_outer) + first_product + leaving),
        moment(2, owned - owned // layers, a_sum + of_outer + first_product + leaving),
        moment(0, owned, max(item * outer, of_outer) + reduced * outer),
    )


class Gathered(NamedTuple):
    """Parameters of all blocks that FSDP gathers on a rank."""

    experts: int  # that the rank has a part of
    shared: int  # of the experts of all tokens; as experts they are not cut by tensor parallelism
    others: int


def gathered_blocks(recipe: Recipe, shape: Degrees, share: StageShare, plane: str = "weights") -> Gathered:
    """plane: of Sizes.of."""
    own = [
        spec for spec in recipe.parameters if plane in spec.planes and (share.names is None or spec.name in share.names)
    ]
    experts = sum(spec.size for spec in own if len(spec.shape) == 3)
    shared = sum(spec.size for spec in own if ".ffn.shared." in spec.name)
    others = share.sizes(recipe, plane).blocks - experts - shared
    return Gathered(experts // shape.expert, shared, others // shape.tensor)
