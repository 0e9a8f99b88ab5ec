"""What a run needs in the memory of one device, computed before anything is allocated, and what memory a device has.

The largest of a few moments of a step counts: when the head is computed all activations are there, when the first
block's backward runs all gradients are. tests/backends/common/test_device_memory.py holds the sums to what an allocator
hands out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import psutil

from weftrain.backends.common.sums import blocks_of
from weftrain.core.config import Recipe
from weftrain.core.errors import BackendError
from weftrain.core.formats.units import gib
from weftrain.core.model_config import ModelConfig
from weftrain.core.parameters import FP32_ROLES, Role
from weftrain.kernels.registry import DEFAULT_PREFERENCES, default_preferences

if TYPE_CHECKING:
    import torch

ITEM = {"float32": 4, "bfloat16": 2}
PROGRAM_BYTES = {"cpu": 500 << 20, "cuda": 1 << 30}  # interpreter and torch; a CUDA context with NCCL's buffers
_MASK_BYTES = 56  # seven int64 of an element are alive at once in core/dropout.py
_LARGEST_TRIED = 4096  # sequences of a micro-batch
FRAGMENTS = 1.06  # of what is allocated and freed again: the allocator's blocks are rounded up and do not always fit


class Sizes(NamedTuple):
    """Numbers of parameters."""

    blocks: int  # in blocks without what is in norms
    outer: int  # in embedding and head
    norms: int  # and in routers: what is in fp32, and whole on every rank

    @classmethod
    def of(cls, recipe: Recipe, plane: str = "weights", names: Collection[str] | None = None) -> Sizes:
        """Of what has a plane of the state: 'exp_avg' for what is trained, 'exp_avg_sq' for what AdamW trains. names:
        of these parameters; None: of all.
        """
        blocks = outer = norms = 0
        for spec in recipe.parameters:
            if plane not in spec.planes or (names is not None and spec.name not in names):
                continue
            if spec.role in FP32_ROLES:
                norms += spec.size
            elif spec.role in (Role.EMBEDDING, Role.HEAD):
                outer += spec.size
            else:
                blocks += spec.size
        return cls(blocks, outer, norms)


class Widths(NamedTuple):
    """Elements a token of a block's tensors, over all ranks that share a row."""

    hidden: int
    queries: int  # as many as attention's result has
    keys: int  # and as many values; a head counts on every rank that it is copied to
    normed: int  # of q and k, where they are normed
    inner: int
    dispatched: int  # of the rows that experts read and of those that they give, which stand one after another

    @classmethod
    def of(cls, model: ModelConfig, sequence_ranks: int = 1) -> Widths:
        queries = model.num_heads * model.head_dim
        keys = max(model.num_kv_heads, sequence_ranks) * model.head_dim
        normed = 0 if model.qk_norm == "none" else queries + keys
        inner, dispatched = model.intermediate_size, 0
        if (experts := model.experts) is not None:
            inner = (experts.top_k + experts.shared) * experts.intermediate_size
            dispatched = 2 * experts.top_k * model.hidden_size
        return cls(model.hidden_size, queries, keys, normed, inner, dispatched)


class Activations(NamedTuple):
    """Bytes a token."""

    kept: int  # of a block, from its forward to its backward
    at_work: int  # beside these, while a block's backward runs: what is computed again, and gradients


def adapter_elements(recipe: Recipe) -> int:
    """Elements a token that autograd keeps of a block's adapters, on average: what A gives, and with dropout a mask
    of what it reads and the masked.
    """
    lora, a_matrices = recipe.tuning.lora, [spec.shape for spec in recipe.parameters if spec.role is Role.LORA_A]
    if lora is None:
        return 0
    of_each = [rank + (2 * into if lora.dropout else 0) for rank, into in a_matrices]
    return -(-sum(of_each) // recipe.model.num_layers)


def mask_bytes(recipe: Recipe) -> int:
    """Bytes a token of the 64-bit numbers that the masks of adapters' dropout are computed from, at their most."""
    widest = [spec.shape[1] for spec in recipe.parameters if spec.role is Role.LORA_A]
    dropout = 0.0 if recipe.tuning.lora is None else recipe.tuning.lora.dropout
    return _MASK_BYTES * max(widest) if dropout else 0


def trains_head(recipe: Recipe) -> bool:
    """Whether the head's weight has a gradient."""
    return any(spec.trained for spec in recipe.parameters if spec.name == _head_weight(recipe))


def _head_weight(recipe: Recipe) -> str:
    return "embedding.weight" if recipe.model.tie_embeddings else "head.weight"


def activations(
    model: ModelConfig,
    item: int,
    recomputes: str,
    compiled: bool,
    tensor: int = 1,
    ranks: int = 1,
    adapters: int = 0,
    parts: int = 1,
) -> Activations:
    """What autograd keeps of a block, with kernels that keep their inputs alone. item: bytes of the compute dtype.
    tensor, ranks: degrees of tensor parallelism, and of all that share a row. adapters: of `adapter_elements`. parts:
    precision.tensor_parts; if they are several, tensor ranks have the same tokens, and divide what is within the parts.
    """
    of, copies = Widths.of(model, ranks), tensor if parts > 1 else 1
    inner = (2 if model.feed_forward == "swiglu" else 1) * of.inner // copies
    # what both norms read is the residual stream in fp32; their results are cast, or rounded, for the products
    products = (2 * of.queries + 2 * of.keys + of.dispatched) // copies + inner
    # tokens of the other tensor ranks, for attention and for a dense feed-forward
    gathered = (1 if model.experts is not None else 2) * of.hidden * (tensor - 1) if copies == 1 else 0
    products += adapters
    within = products + (of.inner + of.normed) // copies
    everything = 2 * 4 * of.hidden + item * (2 * of.hidden + within + gathered)
    gradients = 4 * of.hidden + item * (inner + of.hidden)
    if parts > 1:  # sums of parts in fp32, one a level of the tree, and those of all tensor ranks
        gradients += 4 * of.hidden * (parts.bit_length() + copies)
    if recomputes == "none":
        # the compiler keeps what is cheaper to keep than to compute again
        return Activations(everything - (item * of.inner if compiled else 0), gradients)
    kept = 4 * of.hidden + (item * (products + 2 * of.hidden) if recomputes == "selective" else 0)
    return Activations(kept, gradients + everything - 4 * of.hidden)


def rotary_bytes(model: ModelConfig) -> int:
    """Tables of cos and sin in fp32, by position; one pair with the recipe's scaling and one without, if both turn."""
    scaled = model.rotary_scaling is not None
    tables = {kind.rotary if scaled else "unscaled" for kind in model.layer_pattern if kind.rotary != "none"}
    return len(tables) * 4 * model.max_position_embeddings * model.rotary_dim


# Of the head's logits, which exist for some tokens at a time: their most, and bytes of each at work; then bytes of each
# element of the weight's gradient, which is summed over chunks in fp32. torch makes several passes over the logits.
_HEADS = {"triton": (1 << 28, 2, 8), "torch on cpu": (1 << 24, 14, 10), "torch on cuda": (1 << 27, 14, 10)}


def head_bytes(recipe: Recipe, tokens: int, device_type: str) -> int:
    """While the head computes: a chunk of logits, hidden states and their gradient, and the gradient of the weight."""
    model, item = recipe.model, ITEM[recipe.precision.compute]
    given, op = recipe.kernels.preferences, "linear_cross_entropy"
    order = default_preferences(op, device_type, False) if tuple(given) == DEFAULT_PREFERENCES else given
    fused = device_type == "cuda" and "triton" in order and "torch" not in order[: order.index("triton")]
    most, of_logit, of_weight = _HEADS["triton" if fused else f"torch on {device_type}"]
    logits = min(tokens * model.vocab_size, most) * of_logit
    rows = model.vocab_size if trains_head(recipe) else 0
    return logits + model.hidden_size * (tokens * (4 + 2 * item) + rows * of_weight)


def alone_needs(recipe: Recipe, recomputes: str, compiled: bool, device_type: str) -> dict[str, int]:
    """Bytes by part, at the worst moment, of a run whose whole model is on one device.

    A frozen weight that computes in bf16 is there in bf16 alone; where the device is the host, its fp32 values are
    counted too, which are kept unless bf16 holds them exactly.
    """
    model, item, sizes = recipe.model, ITEM[recipe.precision.compute], Sizes.of(recipe)
    tokens = recipe.batch.micro_batch_size * recipe.data.sequence_length
    matrices, everything, trained = sizes.blocks + sizes.outer, sum(sizes), Sizes.of(recipe, "exp_avg")
    narrow = matrices - trained.blocks - trained.outer if item < 4 and device_type != "cpu" else 0  # in bf16 alone
    more = {"adapters": adapter_elements(recipe), "parts": recipe.precision.tensor_parts}
    of_block = activations(model, item, recomputes, compiled, **more)
    summed = 4 * sum(trained) * gradient_sums(recipe)
    head_weight = item * model.vocab_size * model.hidden_size * trains_head(recipe)
    a_gradient = item * (0 if summed else trained.blocks + trained.outer)
    layers = model.num_layers
    stream, masks = 4 * model.hidden_size * tokens, mask_bytes(recipe) * tokens
    again = masks if recomputes != "none" else 0
    moments = [
        {"activations": of_block.kept * tokens * layers + stream, "dropout masks": masks},
        {"activations": of_block.kept * tokens * layers + stream, "head": head_bytes(recipe, tokens, device_type)},
        {
            "activations": of_block.kept * tokens * layers + stream,
            "one block at work": of_block.at_work * tokens + again,
            "gradients": head_weight,
        },
        {
            "activations": of_block.kept * tokens + stream,
            "one block at work": of_block.at_work * tokens + again,
            "gradients": a_gradient,
        },
        {"activations": stream, "gradients": a_gradient + (head_weight if summed else 0)},
    ]
    worst = max(moments, key=lambda moment: sum(moment.values()))
    moving = sum(worst.values()) + summed
    return {
        "program": PROGRAM_BYTES[device_type],
        "weights, fp32": 4 * (everything - narrow),
        "optimizer": 4 * (sum(trained) + sum(Sizes.of(recipe, "exp_avg_sq"))),
        "compute copies": item * matrices if item < 4 else 0,
        **({"frozen layers": frozen} if (frozen := frozen_bytes(recipe)) else {}),
        **worst,
        "gradients": worst.get("gradients", 0) + summed,
        "rotary tables": rotary_bytes(model),
        "fragments": int((FRAGMENTS - 1) * moving),
    }


def frozen_bytes(recipe: Recipe) -> int:
    """Of the first layers of the model that the run began with (frozen_layers.py); 0 where none are kept."""
    return sum(frozen_sizes(recipe))


def frozen_sizes(recipe: Recipe) -> list[int]:
    """The bytes of each: the embedding, and the blocks that the objective reads."""
    if not recipe.objective.keeps_first_model:
        return []
    kept = ("embedding.", *(f"layers.{layer}." for layer in range(recipe.objective.ends_at or 0)))
    narrow = 4 if recipe.precision.compute == "float32" else 2
    sizes = dict.fromkeys(kept, 0)
    for spec in recipe.parameters:
        for prefix in kept:
            if spec.name.startswith(prefix):
                sizes[prefix] += spec.size * (4 if spec.role in FP32_ROLES else narrow)
    return list(sizes.values())


def gradient_sums(recipe: Recipe) -> int:
    """Full sets of fp32 sums of gradients: none without accumulation; in a tree one a level (`sums.TreeSum`)."""
    count = recipe.batch.accumulation_steps
    if count == 1 or recipe.precision.numerics != "replayable":
        return int(count > 1)
    ranks = recipe.batch.replicas
    if ranks & (ranks - 1) == 0:
        return most_sums(count)
    parts = [range(rank * count, (rank + 1) * count) for rank in range(ranks)]
    return max(len(blocks_of(ranks * count, part.start, at + 1)) for part in parts for at in part)


def most_sums(count: int) -> int:
    """Of the same parameter that a tree over so many contributions keeps at one time, the newest one not counted."""
    pairs = count & -count
    return pairs.bit_length() - 1 + (pairs < count)


def largest_micro_batch(recipe: Recipe, needed: Callable[[Recipe], int], capacity_bytes: float) -> int:
    """Sequences of the largest micro-batch that fits; 0: none does. It may not divide the global batch. needed: bytes
    of the run by a recipe. The recipe's own is tried first: a smaller one can need more, since it accumulates; so can
    one below all rows of a replica. Between these two and above them more sequences need more: it is sought by halves.
    """

    def fits(micro: int) -> bool:
        batch = recipe.batch.model_copy(update={"micro_batch_size": micro})
        return needed(recipe.model_copy(update={"batch": batch})) <= capacity_bytes

    fitting, without = recipe.batch.micro_batch_size, _LARGEST_TRIED + 1
    if not fits(fitting):
        return next((micro for micro in range(fitting - 1, 0, -1) if fits(micro)), 0)
    rows = recipe.batch.global_batch_size // recipe.batch.replicas
    if fitting < rows < without:
        fitting, without = (rows, without) if fits(rows) else (fitting, rows)
    while fitting + 1 < without:
        middle = (fitting + without) // 2
        fitting, without = (middle, without) if fits(middle) else (fitting, middle)
    return fitting


def alternatives(recipe: Recipe, recomputes: str, compiled: bool, device_type: str) -> Iterator[tuple[str, int]]:
    """Settings with which a run alone on a device needs less, in the order of what they cost, and the bytes then."""
    batch = recipe.batch
    smaller = [
        recipe.model_copy(update={"batch": batch.model_copy(update={"micro_batch_size": micro})})
        for micro in range(batch.micro_batch_size - 1, 0, -1)
        if batch.global_batch_size % micro == 0
    ]
    kinds = ("none", "selective", "full")
    for kind in kinds[kinds.index(recomputes) :]:
        words = [] if kind == recomputes else [f"backend.options.activation_checkpointing={kind}"]
        for changed in (recipe, *smaller):
            settings = words + [f"batch.micro_batch_size={changed.batch.micro_batch_size}"] * (changed is not recipe)
            if settings:
                yield " ".join(settings), sum(alone_needs(changed, kind, compiled, device_type).values())


def remedies(
    recipe: Recipe, recomputes: str, compiled: bool, device_type: str, capacity_bytes: float
) -> tuple[str, ...]:
    """What fits into so much memory: of each kind of setting the largest micro-batch, then other ways."""
    found: dict[str, str] = {}
    for words, total in alternatives(recipe, recomputes, compiled, device_type):
        if total <= capacity_bytes:
            found.setdefault(words.partition("batch.")[0], words)
    return (*found.values(), "the cuda backend on several devices", "the streaming backend")


def check_memory(recipe: Recipe, recomputes: str, compiled: bool, device: torch.device) -> None:
    """Refuse, before anything is allocated, what does not fit a GPU. Raises BackendError, with what would."""
    needed = alone_needs(recipe, recomputes, compiled, device.type)
    capacity, where = available(device, 1)
    if (total := sum(needed.values())) > capacity:
        fits = "; ".join(remedies(recipe, recomputes, compiled, device.type, capacity))
        raise BackendError(
            f"the run needs about {gib(total)} ({largest_parts(needed)}), and {where} has {gib(capacity)}: "
            f"what would fit: {fits}"
        )


def available(device: torch.device, ranks: int) -> tuple[float, str]:
    """Bytes of memory that one of `ranks` processes on this machine can have, and whose they are."""
    import torch

    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1]), torch.cuda.get_device_name(device)
    return psutil.virtual_memory().available / ranks, "this machine's memory, divided by its ranks"


def largest_parts(parts: Mapping[str, int]) -> str:
    """'optimizer 50.2 GiB, weights 25.1 GiB': those of at least 128 MiB, the largest first."""
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {gib(size)}" for name, size in ordered if size >= 1 << 27) or "all below 0.1 GiB"
