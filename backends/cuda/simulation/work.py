"""What one device computes of a layer, as segments: kernels' seconds by kind, and the collectives between them.

Elementwise kernels are counted by the bytes that they read and write; how many there are depends on how they are fused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

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
    sums: float  # of gradients that several products give: a stream element
    logits: tuple[float, float]
    update: float  # of a parameter: norm, clipping and AdamW, with weights, moments and gradients of fp32


# eager: each operation of torch by itself, as released models are written: an RMSNorm casts to fp32, squares, averages,
# scales, casts back and multiplies. kernels: one kernel a norm, rotation, activation and loss, as those of Triton here.
# compiled: a residual sum and its norm are one kernel besides.
PASSES = {
    "eager": Passes((38, 70), (3, 4), (20, 22), (10, 18), (6, 8), 18, (14, 14), 44),
    "kernels": Passes((10, 14), (2, 3), (4, 4), (6, 10), (4, 6), 12, (2, 4), 36),
    "compiled": Passes((8, 8), (2, 3), (4, 4), (6, 12), (4, 8), 6, (6, 6), 36),
}


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
    """A device's share of a layer: tokens of a micro-batch that it has outside of linear maps, ranks that share a row.
    The tensor ranks are neighbours, the context ranks `tensor` apart.
    """

    tokens: float
    row: int  # tokens of a whole row
    tensor: int
    context: int


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
        yield from self._half(True, self._attention_half(False, True))
        yield from self._half(False, self._feed_forward_half(False, True))

    def backward(self, part: Literal["whole", "inputs", "weights"] = "whole") -> Iterator[Segment]:
        """With what is computed again. inputs, weights: the two passes of zero bubble."""
        if part == "weights":
            yield _computed({"matrix products": self._weights_s(self._attention_maps() + self._inner_maps())})
            return
        products, attention, passes = self.program.recomputed
        if products or attention or passes:
            halves = (self._attention_half(False, True), self._feed_forward_half(False, True))
            again = {
                "matrix products": products * sum(half["matrix products"] for half in halves),
                "attention": attention * halves[0]["attention"],
                "memory passes": passes * sum(half["memory passes"] for half in halves),
            }
            yield _computed({"recomputed": sum(again.values())})
            if products == 1.0:  # what it reads is gathered again
                yield from self._collectives(4, 2)
        yield from self._half(False, self._feed_forward_half(True, part == "whole"))
        yield from self._half(True, self._attention_half(True, part == "whole"))

    def _half(self, attention: bool, kinds: dict[str, float]) -> Iterator[Segment]:
        """Gather the tokens of the tensor ranks, compute, scatter the sums; heads change ranks around attention."""
        yield from self._collectives(1, int(attention))
        yield _computed(kinds)
        yield from self._collectives(1, int(attention))

    def _collectives(self, tensor: int, context: int) -> Iterator[Segment]:
        split, rates = self.split, self.rates
        size = self.program.item * self.rows * self.hidden
        if tensor and split.tensor > 1:
            yield Segment("tensor", tensor * rates.ring_s(size, split.tensor), {})
        if context and split.context > 1:
            of_heads = (
                self.program.item * self.rows * (self.queries + self.keys)
            )  # q, k and v out, the result back: half of them
            yield Segment("context", context * rates.all_to_all_s(of_heads, split.context, split.tensor), {})

    def _attention_half(self, backward: bool, weights: bool) -> dict[str, float]:
        """weights: with their gradients, in a backward."""
        moved = self.queries + self.keys
        normed = 0.0 if self.model.qk_norm == "none" else moved * self.passes.norm[backward]
        moved = self._norm_bytes(backward) + self.rows * (moved * self.passes.rotary[backward] + normed)
        return {
            "matrix products": self._maps_s(self._attention_maps(), backward, weights),
            "attention": self._attention_s(backward),
            "memory passes": self.rates.passes_s(moved),
        }

    def _feed_forward_half(self, backward: bool, weights: bool) -> dict[str, float]:
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
    return Segment("compute", sum(kinds.values()), {kind: seconds for kind, seconds in kinds.items() if seconds})
