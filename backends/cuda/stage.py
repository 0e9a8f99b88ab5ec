"""One stage of a pipeline: consecutive segments of the decoder, whose parameters keep their canonical names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from weftrain.backends.cuda.parallel import Layers, blocks_of
from weftrain.core.blocks import Block
from weftrain.core.dropout import EMBEDDING_PLACE, at_place, block_place
from weftrain.core.model import Decoder, Head
from weftrain.core.objectives import Extras
from weftrain.core.rotary import Rotary


class RankTokens(NamedTuple):
    """The tokens of a micro-batch that this rank computes, [B, T / context / tensor], as `Decoder.forward` has them."""

    ids: Tensor
    labels: Tensor
    document_start: Tensor | None
    extras: Extras | None
    rotary: Sequence[Rotary | None]  # of each layer


class MicroBatch(NamedTuple):
    """What all stages are given of a micro-batch. divisor: of what the head returns."""

    tokens: RankTokens
    dropout_keys: Tensor | None
    divisor: float = 1.0


class Part(NamedTuple):
    """What is called as one module: the whole model, or one of a rank's pipeline stages."""

    module: nn.Module
    blocks: Sequence[Block]
    parameters: frozenset[str]  # canonical names


def whole_part(model: Layers) -> Part:
    return Part(model, blocks_of(model), frozenset(name for name, _ in model.named_parameters()))


class Stage(nn.Module):
    """The layers `layers` of a decoder, with the embedding before the first and the head behind the last. Where
    embeddings are tied the last stage has the embedding's weight too, for the head.

    The schedule passes the residual stream alone from stage to stage; all else that a stage needs of a micro-batch it
    finds in `micro_batches`, which are set before a step, at `number`, which is set before each forward pass.
    """

    def __init__(self, decoder: Decoder, layers: range) -> None:
        super().__init__()
        count = decoder.config.num_layers
        self.first, self.last = layers.start == 0, layers.stop == count
        tied = decoder.config.tie_embeddings
        self.embedding = decoder.embedding if self.first or (self.last and tied) else None
        self.layers = nn.ModuleDict({str(layer): decoder.layers[layer] for layer in layers})
        self.final_norm = decoder.final_norm if self.last else None
        self.head = decoder.head if self.last else None
        # in a tuple it is not registered: its modules are the two above, under their own names
        self._head_segment = (cast(Head, decoder.segments()[-1]),) if self.last else ()
        self.micro_batches: Sequence[MicroBatch] = ()
        self.number = 0
        self.returned: list[Tensor] = []  # by the head for each micro-batch, over its divisor; of the last stage

    @property
    def blocks(self) -> list[Block]:
        return [cast(Block, block) for block in self.layers.values()]

    def forward(self, x: Tensor) -> Tensor:
        """int64 ids [B, T] for the first stage, else the residual stream [B, T, C] -> the residual stream, or of the
        last stage what the head returns, over the divisor.
        """
        tokens, keys, divisor = self.micro_batches[self.number]
        if self.first and self.embedding is not None:
            x = self.embedding(x, at_place(keys, EMBEDDING_PLACE))
        for name, block in self.layers.items():
            layer = int(name)
            x = block(x, tokens.rotary[layer], tokens.document_start, at_place(keys, block_place(layer)))
        if not self._head_segment:
            return x
        tied = None if self.embedding is None else self.embedding.weight
        sums: Tensor = self._head_segment[0](x, tokens.labels, tied, tokens.extras) / divisor
        self.returned.append(sums.detach())
        return sums

    @torch.no_grad()
    def evaluated(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """One forward pass apart from a step."""
        self.micro_batches, self.number = [micro_batch], 0
        found: Tensor = self(x)
        self.micro_batches, self.returned = (), []
        return found
