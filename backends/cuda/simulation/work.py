"""What one device computes of a layer, as segments: kernels' seconds by kind, and the collectives between them.

Elementwise kernels are counted by the bytes that they read and write; how many there are depends on how they are fused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from weftrain.backends.cuda.simulation.events import COMPUTE
from weftrain.backends.cuda.simulation.rates import Rates
from weftrain.core.model_config import ModelConfig

Fusion = Literal["eager", "kernels", "compiled"]


class Passes(NamedTuple):
    """Bytes an element that elementwise kernels read and write, forward and backward. A residual stream of 4 bytes an
    element costs `stream` times more for each byte that it is wider than 2.
    """

    norm: tuple[float, float]  # and the residual sum before it
    stream: tuple[float, float]
    rotary: tuple[float, float]
    swiglu: tuple[float, float]
    gelu: tuple[float, float]
    dispatch: tuple[float, float]  # a row to an expert and back to its token: an element of it
    sums: float  # of gradients that several products give: a stream element
    logits: tuple[float, float]
    update: float  # of a parameter: norm, clipping and AdamW, with weights, moments and gradients of fp32


# eager: each operation of torch by itself, as released models are written: an RMSNorm casts to fp32, squares, averages,
# scales, casts back and multiplies. kernels: one kernel a norm, rotation, activation and loss, as those of Triton here.
# compiled: a residual sum and its norm are one kernel besides. Rows for experts are copied to their order and back (8),
# and added up token by token in fp32 (10); backward makes gradients of rows and of weights (14), and the same copies.
# None of it is compiled.
PASSES = {
    "eager": Passes((38, 70), (3, 4), (20, 22), (10, 18), (6, 8), (18, 22), 18, (14, 14), 44),
    "kernels": Passes((10, 14), (2, 3), (4, 4), (6, 10), (4, 6), (18, 22), 12, (2, 4), 36),
    "compiled": Passes((8, 8), (2, 3), (4, 4), (6, 12), (4, 8), (18, 22), 6, (6, 6), 36),
}


# of a router's score: softmax, the choice and the losses, forward or backward, several passes of 4 bytes
_CHOICE_BYTES = 40


@dataclass(frozen=True)
class Program:
    """How a step is programmed, where layouts and recipes leave it open."""

    fusion: Fusion = "kernels"
    item: int = 2  # bytes of an element that products read and write
    stream_item: int = 4  # bytes of an element of the residual stream
    # of a block's forward that backward computes again: products, attention, elementwise passes
    recomputed: tuple[float, float, float] = (0.0, 0.0, 0.0)
    reduce_item: int = 4  # bytes of an element of a gradient that is summed across ranks
    gather_item: int = 2  # bytes of an element of a weight that is gathered
    copies: bool = True  # gathered weights and gradients pass through a buffer, as FSDP2's do

    @property
    def recomputes(self) -> Literal["none", "selective", "full"]:
        """What of a layer's activations is kept, as in backend.options.activation_checkpointing."""
        return "full" if self.recomputed[0] == 1 else "selective" if any(self.recomputed) else "none"


class Segment(NamedTuple):
    """stream: 'compute', or the group that a collective is of. kinds: seconds of computation by kind."""

    stream: str
    seconds: float
    kinds: dict[str, float]


@dataclass(frozen=True)
class Split:
    """A device's share of a layer: tokens of a micro-batch that it has outside of linear maps, ranks that share a row,
    and ranks with other experts. The tensor ranks are neighbours, so are those of experts, the context ranks `tensor`
    apart.
    """

    tokens: float
    row: int  # tokens of a whole row
    tensor: int
    context: int
    expert: int = 1


class Layer:
    """The work of one layer of a model on a device."""

    def __init__(self, model: ModelConfig, layer: int, split: Split, program: Program, rates: Rates) -> None:
        self.model, self.split, self.program, self.rates = model, split, program, rates
        self.passes = PASSES[program.fusion]
        tensor = split.tensor
        self.hidden = model.hidden_size
        self.queries = model.num_heads * model.head_dim / tensor
        self.keys = max(model.num_kv_heads, tensor * split.context) * model.head_dim / tensor
        self.inner = model.intermediate_size / tensor
        self.rows = split.tokens * tensor  # tokens that a linear map reads
        window = min(model.kind_of(layer).window or split.row, split.row)
        seen = window * (1 - window / (2 * split.row))  # keys of a query on average
        self.window = window
        # two products; each rank has all of its row's tokens for its share of the heads
        self.attention_flops = 4.0 * self.rows * self.queries * seen

    def forward(self) -> Iterator[Segment]:
        yield from self._attention_half(False)
        yield from self._feed_forward_half(False)

    def backward(self, part: Literal["whole", "inputs", "weights"] = "whole") -> Iterator[Segment]:
        """With what is computed again. inputs, weights: the two passes of zero bubble."""
        if part == "weights":
            yield _computed({"matrix products": self._weights_s(self._attention_maps()) + self._inner_weights_s()})
            return
        yield from self._again()
        yield from self._feed_forward_half(True, part == "whole")
        yield from self._attention_half(True, part == "whole")

    def _again(self) -> Iterator[Segment]:
        """What is computed again before a backward pass."""
        products, attention, passes = self.program.recomputed
        if not (products or attention or passes):
            return
        seconds: Counter[str] = Counter()
        halves = [*self._attention_half(False), *self._feed_forward_half(False)]
        for segment in halves:
            seconds.update(segment.kinds)
        parts = {"matrix products": products, "attention": attention, "memory passes": passes}
        yield _computed({"recomputed": sum(part * seconds[kind] for kind, part in parts.items())})
        if products == 1.0:  # what it reads is sent again
            yield from (segment for segment in halves if segment.stream != COMPUTE)

    def _attention_half(self, backward: bool, weights: bool = True) -> Iterator[Segment]:
        """Gather the tokens of the tensor ranks, compute, scatter the sums; heads change ranks around attention.
        weights: with their gradients, in a backward.
        """
        yield from self._between_tensor_ranks()
        yield from self._between_context_ranks()
        yield _computed(self._attention_kinds(backward, weights))
        yield from self._between_tensor_ranks()
        yield from self._between_context_ranks()

    def _feed_forward_half(self, backward: bool, weights: bool = True) -> Iterator[Segment]:
        yield from self._between_tensor_ranks()
        yield _computed(self._feed_forward_kinds(backward, weights))
        yield from self._between_tensor_ranks()

    def _between_tensor_ranks(self) -> Iterator[Segment]:
        if self.split.tensor > 1:
            size = self.program.item * self.rows * self.hidden
            yield Segment("tensor", self.rates.ring_s(size, self.split.tensor), {})

    def _between_context_ranks(self) -> Iterator[Segment]:
        """q, k and v out, the result back: half of them."""
        if self.split.context > 1:
            of_heads = self.program.item * self.rows * (self.queries + self.keys)
            yield Segment("context", self.rates.all_to_all_s(of_heads, self.split.context, self.split.tensor), {})

    def _attention_kinds(self, backward: bool, weights: bool) -> dict[str, float]:
        moved = self.queries + self.keys
        normed = 0.0 if self.model.qk_norm == "none" else moved * self.passes.norm[backward]
        moved = self._norm_bytes(backward) + self.rows * (moved * self.passes.rotary[backward] + normed)
        return {
            "matrix products": self._maps_s(self._attention_maps(), backward, weights),
            "attention": self._attention_s(backward),
            "memory passes": self.rates.passes_s(moved),
        }

    def _feed_forward_kinds(self, backward: bool, weights: bool) -> dict[str, float]:
        return {
            "matrix products": self._maps_s(self._inner_maps(), backward, weights),
            "memory passes": self.rates.passes_s(self._norm_bytes(backward) + self._inner_bytes(backward)),
        }

    def _attention_maps(self) -> list[tuple[float, float]]:
        """Linear maps [out, in]."""
        into = [(self.queries, self.hidden), (self.keys, self.hidden), (self.keys, self.hidden)]
        return [*into, (self.hidden, self.queries)]

    def _inner_maps(self) -> list[tuple[float, float]]:
        up: list[tuple[float, float]] = [(self.inner, self.hidden)] * (2 if self.model.feed_forward == "swiglu" else 1)
        return [*up, (self.hidden, self.inner)]

    def _maps_s(self, maps: list[tuple[float, float]], backward: bool, weights: bool) -> float:
        """Forward, or the gradients of the maps' inputs and, if asked, of their weights."""
        item, rates = self.program.item, self.rates
        if not backward:
            return sum(rates.matmul_s(self.rows, out, into, item) for out, into in maps)
        found = sum(rates.matmul_s(self.rows, into, out, item) for out, into in maps)
        return found + (self._weights_s(maps) if weights else 0.0)

    def _inner_weights_s(self) -> float:
        return self._weights_s(self._inner_maps())

    def _weights_s(self, maps: list[tuple[float, float]]) -> float:
        return sum(self.rates.matmul_s(out, into, self.rows, self.program.item) for out, into in maps)

    def _attention_s(self, backward: bool) -> float:
        """Backward has five products where forward has two."""
        flops = self.attention_flops * (2.5 if backward else 1.0)
        return self.rates.attention_s(flops, self.window, backward)

    def _norm_bytes(self, backward: bool) -> float:
        """Of a norm, the sum into the stream, and backward the sums of gradients."""
        wider = self.passes.stream[backward] * (self.program.stream_item - 2)
        return self.split.tokens * self.hidden * (self.passes.norm[backward] + wider + backward * self.passes.sums / 2)

    def _inner_bytes(self, backward: bool) -> float:
        of = self.passes.swiglu if self.model.feed_forward == "swiglu" else self.passes.gelu
        return self.rows * self.inner * of[backward]


class ExpertLayer(Layer):
    """A layer with a mixture of experts, of whole matrices on any number of tensor ranks: each rank sends the rows of
    its own tokens. All experts are taken to get equally many.
    """

    def __init__(self, model: ModelConfig, layer: int, split: Split, program: Program, rates: Rates) -> None:
        super().__init__(model, layer, split, program, rates)
        experts = model.experts_of(layer)
        assert experts is not None
        self.experts = experts
        self.here = experts.count // split.expert  # experts of this rank
        self.sent = split.tokens * experts.top_k  # rows that leave, and that arrive
        self.shared = experts.shared * experts.intermediate_size

    def _feed_forward_half(self, backward: bool, weights: bool = True) -> Iterator[Segment]:
        yield _computed(self._token_kinds(backward, weights))
        yield from self._between_expert_ranks()
        yield _computed(self._row_kinds(backward, weights))
        yield from self._between_expert_ranks()

    def _between_expert_ranks(self) -> Iterator[Segment]:
        if self.split.expert > 1:
            size = self.program.item * self.sent * self.hidden
            yield Segment("expert", self.rates.all_to_all_s(size, self.split.expert), {})

    def _token_kinds(self, backward: bool, weights: bool) -> dict[str, float]:
        """Norm, router and its choice, shared experts, and the order of the rows."""
        tokens, rates, item = self.split.tokens, self.rates, self.program.item
        routed = rates.matmul_s(tokens, self.experts.count, self.hidden, 4) * (1 + backward)
        moved = self._norm_bytes(backward) + tokens * self.experts.count * _CHOICE_BYTES
        moved += self.sent * self.hidden * self.passes.dispatch[backward]
        for out, into in self._shared_maps():
            if not backward:
                routed += rates.matmul_s(tokens, out, into, item)
                continue
            routed += rates.matmul_s(tokens, into, out, item)
            routed += rates.matmul_s(out, into, tokens, item) if weights else 0.0
        moved += tokens * self.shared * self.passes.swiglu[backward]
        return {"matrix products": routed, "memory passes": rates.passes_s(moved)}

    def _row_kinds(self, backward: bool, weights: bool) -> dict[str, float]:
        """The experts' products."""
        rows, item, inner = self.sent / self.here, self.program.item, self.experts.intermediate_size
        seconds = 0.0
        for out, into in _swiglu_maps(self.hidden, inner):
            shape = (into, out) if backward else (out, into)
            seconds += self.rates.grouped_s(self.here, rows, *shape, item)
        if backward and weights:
            seconds += self._grouped_weights_s()
        moved = self.sent * inner * self.passes.swiglu[backward]
        moved += 2 * (self.split.expert > 1) * 2 * item * self.sent * self.hidden  # rows of all ranks, by expert
        return {"matrix products": seconds, "memory passes": self.rates.passes_s(moved)}

    def _grouped_weights_s(self) -> float:
        rows, maps = self.sent / self.here, _swiglu_maps(self.hidden, self.experts.intermediate_size)
        return sum(self.rates.grouped_s(self.here, out, into, rows, self.program.item) for out, into in maps)

    def _inner_weights_s(self) -> float:
        of_shared = sum(
            self.rates.matmul_s(out, into, self.split.tokens, self.program.item) for out, into in self._shared_maps()
        )
        return self._grouped_weights_s() + of_shared

    def _shared_maps(self) -> list[tuple[float, float]]:
        return _swiglu_maps(self.hidden, self.shared) if self.shared else []


def _swiglu_maps(hidden: float, inner: float) -> list[tuple[float, float]]:
    """Linear maps [out, in]."""
    return [(inner, hidden), (inner, hidden), (hidden, inner)]


def layer_of(model: ModelConfig, layer: int, split: Split, program: Program, rates: Rates) -> Layer:
    kind = Layer if model.experts_of(layer) is None else ExpertLayer
    return kind(model, layer, split, program, rates)


def head_s(model: ModelConfig, tokens: float, program: Program, rates: Rates) -> tuple[Segment, Segment]:
    """The head and the loss, forward and backward; every rank computes its own tokens' logits."""
    vocabulary, hidden = model.vocab_size, model.hidden_size
    logits = PASSES[program.fusion].logits
    found = []
    for backward in (False, True):
        products = rates.matmul_s(tokens, vocabulary, hidden, program.item)
        if backward:
            products = rates.matmul_s(tokens, hidden, vocabulary, program.item)
            products += rates.matmul_s(vocabulary, hidden, tokens, program.item)
        moved = rates.passes_s(tokens * vocabulary * logits[backward])
        found.append(_computed({"head": products + moved}))
    return found[0], found[1]


def _computed(kinds: dict[str, float]) -> Segment:
    return Segment(COMPUTE, sum(kinds.values()), {kind: seconds for kind, seconds in kinds.items() if seconds})
