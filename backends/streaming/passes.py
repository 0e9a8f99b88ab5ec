"""One pass over the model: what is computed with a record while it is there. The engine brings records and calls these
by event.

What a reader would get wrong: the graph is cut at every block. A block's input is a leaf of its own, and its backward
is asked for by itself, so that its weights need to be there only then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weftrain.backends.common.step import HEAD_USE, call, present
from weftrain.backends.streaming.fabric import Alone, Gradients
from weftrain.backends.streaming.store.layout import Record

if TYPE_CHECKING:
    from weftrain.backends.streaming.engine import StreamingRun

Rows = tuple[Tensor, Tensor, Tensor | None]  # ids, labels, document_start of one micro-batch


class Pass:
    """One pass over the model: what is computed with a record while it is there. sink None: evaluation, without
    gradients.

    divisor: of the sum of token losses, in training. The losses of an evaluation are sums.
    """

    def __init__(
        self,
        run: StreamingRun,
        rows: list[Rows],
        sink: Callable[[Record, Gradients], None] | None,
        fabric: Alone,
        divisor: int = 1,
    ) -> None:
        self._run, self._rows, self._sink, self.fabric, self._divisor = run, rows, sink, fabric, divisor
        self._training = sink is not None
        self._keeps = run._options.activations == "keep"
        self._x: list[Tensor] = []  # of each micro-batch: the residual stream, and on the way back its gradient
        # record -> (input, output, or None to compute it again)
        self._graphs: dict[int, list[tuple[Tensor | None, Tensor | None]]] = {}
        # Of the record at hand: the sum so far; on a rank that adds to another's sum, each micro-batch by itself.
        self._parts: list[Gradients] = []
        self._head_use: Tensor | None = None
        self.losses: list[Tensor] = []
        self.norms: dict[str, Tensor] = {}

    def forward(self, record: Record) -> None:
        graphs = self._graphs[record.index] = []
        with torch.set_grad_enabled(self._training):
            if record.index == 0:
                outputs = [self._run._segments[0](ids) for ids, _, _ in self._rows]
                graphs += [(None, output) for output in outputs]
            else:
                outputs = []
                for x, rows in zip(self._x, self._rows, strict=True):
                    x_in = x.detach().requires_grad_(self._training)
                    with self._run._saved_where():
                        outputs.append(self._block(record, x_in, rows))
                    graphs.append((x_in, outputs[-1] if self._keeps else None))
        self._x = [output.detach() for output in outputs]
        if not self._training:
            graphs.clear()

    def loss(self, record: Record) -> None:
        run = self._run
        head, leaves = run._segments[record.index], self._leaves(record)
        tied = run._model.tied_weight()
        if not self._training:
            with torch.no_grad():
                self.losses = [head(x, labels, tied) for x, (_, labels, _) in zip(self._x, self._rows, strict=True)]
            return
        if tied is not None:
            tied = leaves[HEAD_USE] = nn.Parameter(tied.detach())
        for number, (_, labels, _) in enumerate(self._rows):
            x_in = self._x[number].detach().requires_grad_()
            loss = run._run_head(head, x_in, labels, tied) / self._divisor
            self._x[number] = self._differentiate(loss, x_in, leaves, None)
            self.losses.append(loss.detach())

    def backward(self, record: Record) -> None:
        leaves, graphs = self._leaves(record), self._graphs.pop(record.index)
        for number, rows in enumerate(self._rows):
            x_in, output = graphs[number]
            graphs[number] = (None, None)
            if output is None:
                assert x_in is not None
                output = self._block(record, x_in, rows)
            self._x[number] = self._differentiate(output, x_in, leaves, self._x[number])

    def spool(self, record: Record) -> None:
        tied = record.index == len(self._run._segments) - 1 and self._run._model.tied_weight() is not None
        names = [*self._leaves(record), *([HEAD_USE] if tied else [])]
        parts, self._parts = [present(part, names) for part in self._parts], []
        self.fabric.reduce(record, parts, self._finish)

    def _finish(self, record: Record, gradients: Gradients) -> None:
        """With the sum over all micro-batches."""
        if HEAD_USE in gradients:
            self._head_use = gradients.pop(HEAD_USE)
        if record.index == 0 and self._head_use is not None:
            gradients["embedding.weight"] += self._head_use
        self.norms |= {name: self._run._grad_norm([gradient]) for name, gradient in gradients.items()}
        assert self._sink is not None
        self._sink(record, gradients)

    def _leaves(self, record: Record) -> dict[str, nn.Parameter]:
        return dict(self._run._leaves[record.index])

    def _block(self, record: Record, x: Tensor, rows: Rows) -> Tensor:
        run = self._run
        block = run._run_block if self._training else call
        return block(run._segments[record.index], x, *run._model.rotary(x.shape[1]), rows[2])

    def _differentiate(
        self, output: Tensor, x: Tensor | None, leaves: Mapping[str, Tensor], gradient: Tensor | None
    ) -> Tensor:
        """The gradient of x; those of `leaves` are added to the sum, in the order of micro-batches, or kept for when
        the sum comes.
        """
        inputs = [*([] if x is None else [x]), *leaves.values()]
        found = list(torch.autograd.grad(output, inputs, gradient, allow_unused=True))
        of_x = torch.empty(0) if x is None else found.pop(0)
        parts = {name: part for name, part in zip(leaves, found, strict=True) if part is not None}
        if self.fabric.rank > 0 or not self._parts:
            first = self.fabric.rank == 0 and self._run._micro_batches > 1
            self._parts.append({name: part.float() for name, part in parts.items()} if first else parts)
        else:
            for name, part in parts.items():
                self._parts[0][name] += part
        return of_x
