"""What one pass over the model computes. The executor loads the records' weights and calls the pass with each event.

The autograd graph is cut at every block: a block's input is a leaf, and its backward is a call of its own, so its
weights need to be present only during that call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weftrain.backends.common.decoder import HEAD_USE, call
from weftrain.backends.common.step import Rows, present
from weftrain.backends.common.sums import TreeSum
from weftrain.backends.streaming.communicator import Communicator, Finish, Gradients
from weftrain.backends.streaming.schedule import Event
from weftrain.backends.streaming.store.layout import Record
from weftrain.core.experts import MixtureOfExperts, bias_directions
from weftrain.core.model import Decoder
from weftrain.core.objectives import loss_of
from weftrain.core.state_losses import added, with_ids


@dataclass(frozen=True)
class Computation:
    """What a pass computes with."""

    model: Decoder
    segments: Sequence[nn.Module]  # one a record
    parameters: Mapping[str, nn.Parameter]  # the executor's
    call: Callable[..., Tensor]  # calls a block or the head in training: plain or compiled
    norms: Callable[[Sequence[Tensor]], Tensor]  # the norm of each of some gradients
    keep_activations: bool  # False: only a block's input is kept, and the block runs again in backward
    accumulate: bool  # the global batch has several micro-batches: their gradients are added in fp32
    saved_tensors: Callable[
        [Record], AbstractContextManager[Any]
    ]  # decides where autograd keeps what it saves of a block
    first_trained: int = 0  # record before which nothing is trained
    tree: TreeSum | None = None  # the shape of the tree in which micro-batches are added; None: one after another


class Pass:
    """One pass. finish: receives each record's gradients; None: an evaluation, without gradients.

    divisor: in training, what the sums that the head returns are divided by. Those of an evaluation are not.
    """

    def __init__(
        self,
        computation: Computation,
        rows: list[Rows],
        communicator: Communicator,
        finish: Finish | None = None,
        divisor: int = 1,
    ) -> None:
        self._with, self._rows, self._communicator, self._divisor = computation, rows, communicator, divisor
        self._store_gradients, self._training = finish, finish is not None
        self._x: list[Tensor] = []  # for each micro-batch: the residual stream, and in backward its gradient
        # record -> for each micro-batch (input, output); the output is None if it is recomputed
        self._graphs: dict[int, list[tuple[Tensor | None, Tensor | None]]] = {}
        # The current record's gradients, not in a tree: the sum so far, or on ranks above 0 each micro-batch's own.
        self._parts: list[Gradients] = []
        self._tree = self._new_tree()
        self._head_use: Tensor | None = None
        # In the tree a tied weight's two uses are added for each micro-batch, as autograd does where it has both: the
        # head's gradient of each is kept until the embedding's comes.
        self._head_uses: list[Tensor] = []
        self._states = computation.model.state_loss if self._training else None
        if self._states is not None:
            self._rows = [one._replace(extras=with_ids(one.extras, one.ids)) for one in rows]
        # for each micro-batch: boundary -> what the loss of the state there returned, and behind them the head's
        self._sums: list[dict[int, Tensor]] = [{} for _ in rows]
        self.losses: list[Tensor] = []  # for each micro-batch: their sum, in training over the divisor
        self.norms: dict[str, Tensor] = {}

    def __call__(self, event: Event) -> None:
        match event.kind:
            case "forward":
                self._forward(event.record)
            case "loss":
                self._loss(event.record)
            case "backward":
                self._backward(event.record)
            case "spool":
                self._spool(event.record)

    def end(self) -> None:
        """After the last event."""
        if self._training:
            in_order = [[sums[boundary] for boundary in sorted(sums)] for sums in self._sums]
            self.losses = [added(sums) / self._divisor for sums in in_order]
        self._communicator.finish_reductions()

    def _forward(self, record: Record) -> None:
        graphs, differentiates = list[tuple[Tensor | None, Tensor | None]](), self._training
        if record.index < self._with.first_trained:
            differentiates = False
        else:
            self._graphs[record.index] = graphs
        with torch.set_grad_enabled(differentiates):
            if record.index == 0:
                outputs = [self._with.segments[0](rows.ids) for rows in self._rows]
                graphs += [(None, output) for output in outputs]
            else:
                outputs = []
                for x, rows in zip(self._x, self._rows, strict=True):
                    x_in = x.detach().requires_grad_(differentiates)
                    with self._with.saved_tensors(record):
                        outputs.append(self._block(record, x_in, rows))
                    graphs.append((x_in, outputs[-1] if self._with.keep_activations else None))
        self._x = [output.detach() for output in outputs]
        if not differentiates:
            graphs.clear()
            for number, state in enumerate(self._x):  # no backward comes to them
                self._state_loss(record.index, number, state)

    def _loss(self, record: Record) -> None:
        head, tied = self._with.segments[record.index], self._with.model.tied_weight()
        if not self._training:
            with torch.no_grad():
                each = zip(self._x, self._rows, strict=True)
                self.losses = [head(x, rows.labels, tied, rows.extras) for x, rows in each]
            return
        leaves = self._leaves(record)
        if tied is not None and tied.requires_grad:
            tied = leaves[HEAD_USE] = nn.Parameter(tied.detach())
        for number, rows in enumerate(self._rows):
            x_in = self._x[number].detach().requires_grad_()
            sums = self._with.call(head, x_in, rows.labels, tied, rows.extras)
            self._x[number] = self._differentiate(loss_of(sums / self._divisor), x_in, leaves, None, number)
            self._sums[number][record.index] = sums.detach()

    def _backward(self, record: Record) -> None:
        leaves, graphs = self._leaves(record), self._graphs.pop(record.index)
        for number, rows in enumerate(self._rows):
            x_in, output = graphs[number]
            graphs[number] = (None, None)
            if output is None:
                assert x_in is not None
                output = self._block(record, x_in, rows)
            gradient = self._gradient(record.index, number, output)
            self._x[number] = self._differentiate(output, x_in, leaves, gradient, number)

    def _gradient(self, boundary: int, number: int, output: Tensor) -> Tensor:
        """Of what a record gave: that of all that follows, and that of the loss of this state itself."""
        following, state = self._x[number], output.detach().requires_grad_()
        sums = self._state_loss(boundary, number, state)
        if sums is None:
            return following
        (own,) = torch.autograd.grad(loss_of(sums / self._divisor), state)
        return own if self._states is not None and boundary == self._states.last else following + own

    def _state_loss(self, boundary: int, number: int, state: Tensor) -> Tensor | None:
        """What the loss of the state at a boundary returns; None if there is none."""
        if self._states is None or not self._states.reads(boundary):
            return None
        rows = self._rows[number]
        sums = self._states(boundary, state, rows.labels, rows.extras)
        self._sums[number][boundary] = sums.detach()
        return sums

    def _spool(self, record: Record) -> None:
        tied = self._with.model.tied_weight() if record.index == len(self._with.segments) - 1 else None
        used = tied is not None and tied.requires_grad and self._with.tree is None
        names = [*self._leaves(record), *([HEAD_USE] if used else [])]
        found, self._parts, tree, self._tree = self._parts, [], self._tree, self._new_tree()
        if not names:
            self._finish(record, {})
            return
        if tree is not None:
            found = tree.partial_sums()
        self._communicator.reduce(record, [present(part, names) for part in found], self._finish, self._with.tree)

    def _new_tree(self) -> TreeSum | None:
        """For this rank's micro-batches of a record."""
        shape = self._with.tree
        return None if shape is None else TreeSum(shape.count, self._communicator.micro_batches(shape.count).start)

    def _finish(self, record: Record, gradients: Gradients) -> None:
        """Store the sum over all micro-batches, and its norms."""
        if HEAD_USE in gradients:
            self._head_use = gradients.pop(HEAD_USE)
        if record.index == 0 and self._head_use is not None:
            gradients["embedding.weight"] += self._head_use
        if gradients:
            self.norms |= zip(gradients, self._with.norms(list(gradients.values())).unbind(), strict=True)
        if (stored := gradients | self._bias_directions(record)) and self._store_gradients is not None:
            self._store_gradients(record, stored)  # nothing of a tied head beside a frozen norm

    def _bias_directions(self, record: Record) -> Gradients:
        """What moves the bias of a record's router, by name, once all micro-batches came by in backward."""
        ffn, experts = getattr(self._with.segments[record.index], "ffn", None), self._with.model.config.experts
        if experts is None or not isinstance(ffn, MixtureOfExperts) or ffn.router.bias is None:
            return {}
        assert ffn.tally.total is not None
        return {f"{record.name}.ffn.router.bias": bias_directions(experts, ffn.tally.total).float()}

    def _leaves(self, record: Record) -> dict[str, Tensor]:
        """What is trained of a record."""
        return {spec.name: self._with.parameters[spec.name] for spec in record.specs if spec.trained}

    def _block(self, record: Record, x: Tensor, rows: Rows) -> Tensor:
        run = self._with.call if self._training else call
        rotary = self._with.model.rotary(x.shape[1])[record.index - 1]  # segment 0 is the embedding
        return run(self._with.segments[record.index], x, rotary, rows.document_start)

    def _differentiate(
        self, output: Tensor, x: Tensor | None, leaves: dict[str, Tensor], gradient: Tensor | None, number: int
    ) -> Tensor:
        """Returns the gradient of x. Those of `leaves`, of micro-batch `number` of this rank, are added to the sum, in
        the order of micro-batches, or kept apart until the sum of the ranks before this one arrives.
        """
        inputs = [*([] if x is None else [x]), *leaves.values()]
        found = list(torch.autograd.grad(output, inputs, gradient, allow_unused=True))
        of_x = torch.empty(0) if x is None else found.pop(0)
        parts = {name: part for name, part in zip(leaves, found, strict=True) if part is not None}
        if self._with.tree is not None and HEAD_USE in parts:
            self._head_uses.append(parts.pop(HEAD_USE))
        elif self._head_uses and "embedding.weight" in parts:
            parts["embedding.weight"] = parts["embedding.weight"] + self._head_uses[number]
        if self._tree is not None:
            for name, part in parts.items():
                self._tree.add(name, part)
        elif self._communicator.rank > 0 or not self._parts:
            first = self._communicator.rank == 0 and self._with.accumulate
            self._parts.append({name: part.float() for name, part in parts.items()} if first else parts)
        else:
            for name, part in parts.items():
                self._parts[0][name] += part
        return of_x
