"""One device's share of a step: the chain of what it computes, its gathers ahead of it and its reductions behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from weftrain.backends.common.device_memory import PROGRAM_BYTES, rotary_bytes
from weftrain.backends.cuda.simulation.events import COMPUTE, REPLICATE, SHARD, Task
from weftrain.backends.cuda.simulation.layout import OUTER
from weftrain.backends.cuda.simulation.schedules import Action
from weftrain.backends.cuda.simulation.tasks import Tasks
from weftrain.backends.cuda.simulation.work import PASSES, Segment


class Use(NamedTuple):
    """Of the weights of a part of the model, by an action. gathers: they are not there yet. frees: they are not there
    after it.
    """

    part: int
    gathers: bool
    frees: bool


class Cut(NamedTuple):
    """Elements that ranks share, so many of them and so far apart; a rank's, were they not cut."""

    elements: float
    parts: int
    apart: int


class Chain:
    """Adds a device's tasks to a step, action by action."""

    def __init__(self, step: Tasks, number: int, plan: list[Action]) -> None:
        self.step, self.number, self.layout = step, number, step.layout
        self.stages = self.layout.stages(number)  # of the model, that this device has
        self.gathers = not self.layout.whole and self.layout.parts > 1
        self.last: int | None = None  # the newest task of the chain
        self.before: int | None = None  # the last task of the layer before the newest
        self.uses = list(self._uses(plan)) if self.gathers else []
        self.used, self.issued = 0, 0
        self.gathered: dict[int, int] = {}  # layer -> the task that gathered it last
        self.summed: set[int] = set()  # layers whose sums of gradients are there
        self.backwards: dict[int, int] = {}  # layer -> how many micro-batches were differentiated
        self.late: list[int] = []  # layers whose gradients are exchanged at the end
        self.arrived: list[int] = []  # tasks that end with a layer's gradients

    def act(self, action: Action) -> None:
        step = self.step
        received = [self._receive(step.ends[need]) for need in step.needed(self.number, action)]
        if action.kind == "forward":
            self._forward(action, received)
        elif action.kind == "backward":
            self._backward(action, received)
        else:
            self._weights(action)
        assert self.last is not None
        step.ends[(action.kind, action.micro_batch, self._stage(action))] = self.last

    def finish(self) -> None:
        """The optimizer, after every gradient has arrived."""
        for part in self.late:
            self._exchange(part)
        step = self.step
        layers = [layer for stage in self.stages for layer in step.stages[stage]]
        owned = sum(cut.elements / cut.parts for part in (*layers, OUTER) for cut in self._cuts(part))
        seconds = step.rates.passes_s(PASSES[step.program.fusion].update * owned)
        after = sorted({task for task in (*self.arrived, self.last) if task is not None})
        step.add(Task(self.number, COMPUTE, "optimizer", seconds, tuple(after)), {"optimizer": seconds})
        self.held = {
            "program": PROGRAM_BYTES["cuda"],
            "weights, fp32": int(4 * owned),
            "optimizer": int(8 * owned),
            "rotary tables": rotary_bytes(step.recipe.model),
        }
        if borders := sum((stage > 0) + (stage < len(step.stages) - 1) for stage in self.stages):
            stream = 4 * step.recipe.model.hidden_size * int(step.tokens)  # torch's schedules have one for each
            self.held["pipeline buffers"] = borders * self.layout.micro_batches(step.recipe) * stream

    # actions

    def _stage(self, action: Action) -> int:
        return self.stages[action.chunk]

    def _layers(self, action: Action) -> list[int]:
        return list(self.step.stages[self._stage(action)])

    def _ends(self, action: Action) -> bool:
        """Whether the action's stage has the embedding or the head."""
        return self._stage(action) in (0, len(self.step.stages) - 1)

    def _computes_loss(self, action: Action) -> bool:
        return self._stage(action) == len(self.step.stages) - 1

    def _parts(self, action: Action) -> list[int]:
        """The parts of the model whose weights an action reads, in order."""
        if action.kind == "weights":
            return []
        layers = self._layers(action) if action.kind == "forward" else self._layers(action)[::-1]
        return [OUTER, *layers] if self._ends(action) else layers

    def _uses(self, plan: Sequence[Action]) -> Iterator[Use]:
        """As FSDP2 has it: a layer's weights are freed after its forward, if asked, and after its backward; embedding
        and head after a backward, whichever micro-batch's.
        """
        there: set[int] = set()
        for action in plan:
            for part in self._parts(action):
                frees = action.kind == "backward" or (part != OUTER and self.layout.reshard)
                yield Use(part, part not in there, frees)
                (there.discard if frees else there.add)(part)

    def _receive(self, task: int) -> int:
        """What a neighbouring stage sends."""
        step, sender = self.step, self.step.tasks[task].device
        if sender == self.number:
            return task
        size = step.program.stream_item * step.tokens * step.recipe.model.hidden_size
        seconds = step.rates.send_s(size, self.layout.size > step.rates.devices_per_node)
        return step.add(Task(sender, f"send to {self.number}", "send activations", seconds, (task,)))

    def _forward(self, action: Action, received: list[int]) -> None:
        step = self.step
        if self._ends(action):
            received = [*received, *self._gather_until(OUTER)[0]]
        for layer in self._layers(action):
            gathered, freed = self._gather_until(layer)
            name, after, received = f"forward of layer {layer}", [*received, *gathered], []
            self._compute(step.forwards[layer], name, after, self._activations, freed)
        if self._computes_loss(action):
            held = {"head": step.head_bytes}
            self._compute([step.head[0]], "forward of the head", received, held)

    def _backward(self, action: Action, received: list[int]) -> None:
        step, freed_outer = self.step, dict[str, int]()
        if self._ends(action):
            gathered, freed_outer = self._gather_until(OUTER)
            received = [*received, *gathered]
        if self._computes_loss(action):
            held = {"head": step.head_bytes}
            self._compute([step.head[1]], "backward of the head", received, {}, held)
            received = []
        working = {"one block at work": int(step.activations.at_work * step.tokens)}
        layers = self._layers(action)
        for layer in reversed(layers):
            gathered, freed = self._gather_until(layer)
            after, received = [*received, *gathered], []
            takes, frees = dict(working), _sum(working, freed)
            if layer == layers[0]:
                frees = _sum(frees, freed_outer)
            if not step.splits_backward:
                takes, frees = _sum(takes, self._new_gradient(layer)), _sum(frees, self._activations)
                if layer == layers[0] and self._ends(action):
                    takes = _sum(takes, self._new_gradient(OUTER))
            self._compute(step.backwards[layer], f"backward of layer {layer}", after, takes, frees)
            if not step.splits_backward:
                self._reduce(layer)
        if self._ends(action) and not step.splits_backward:
            self._reduce(OUTER)

    def _weights(self, action: Action) -> None:
        """What a layer keeps is read until now, as far as the gradients of weights read it."""
        layers = self._layers(action)
        for layer in reversed(layers):
            takes = self._new_gradient(layer)
            if layer == layers[0] and self._ends(action):
                takes = _sum(takes, self._new_gradient(OUTER))
            self._compute(self.step.weights[layer], f"weights of layer {layer}", [], takes, self._activations)
            self._reduce(layer)
        if self._ends(action):
            self._reduce(OUTER)

    @property
    def _activations(self) -> dict[str, int]:
        """Of a layer, from its forward to its backward."""
        return {"activations": int(self.step.activations.kept * self.step.tokens)}

    def _compute(
        self,
        segments: Iterable[Segment],
        name: str,
        after: list[int],
        takes: dict[str, int] | None = None,
        frees: dict[str, int] | None = None,
    ) -> None:
        """The segments one after another. takes: when the first begins, frees: when the last ends."""
        self.before = self.last
        every = list(segments)
        for number, segment in enumerate(every):
            waits = ([] if self.last is None else [self.last]) + (after if number == 0 else [])
            first, last = number == 0, number == len(every) - 1
            self.last = self.step.add(
                Task(
                    self.number,
                    segment.stream,
                    name if segment.stream == COMPUTE else f"tokens between {segment.stream} ranks",
                    segment.seconds,
                    tuple(dict.fromkeys(waits)),
                    takes or {} if first else {},
                    frees or {} if last else {},
                ),
                segment.kinds,
            )

    # weights

    def _cuts(self, part: int) -> list[Cut]:
        """Of a part of the model: of embedding and head those that the device has. Blocks are cut over the ranks of a
        tensor rank's place, embedding, head and experts over all that compute tokens of their own.
        """
        sizes, layout = self.step.sizes, self.layout
        every = 1 if layout.whole else layout.parts * layout.tensor
        if part == OUTER:
            last = len(self.step.stages) - 1
            first, has_head = 0 in self.stages, last in self.stages
            of_head = sizes.head or (0 if first else sizes.embedding)  # a tied weight is on both stages
            return [Cut(sizes.embedding * first + of_head * has_head, every, 1)]
        blocks = Cut(sizes.layers[part] / layout.tensor, layout.parts, layout.tensor)
        if not sizes.experts[part]:
            return [blocks]
        expert = layout.expert
        return [blocks, Cut(sizes.experts[part] / expert, every // expert, expert)]

    def _elements(self, part: int) -> float:
        """Of a part of the model on a rank, were it not sharded."""
        return sum(cut.elements for cut in self._cuts(part))

    def _gather_until(self, part: int) -> tuple[list[int], dict[str, int]]:
        """Issue the gathers of this use and of the next, which runs beside this one's computation. What the computation
        waits for, and what it frees.
        """
        if not self.gathers:
            return [], {}
        while self.issued < min(self.used + 2, len(self.uses)):
            if (use := self.uses[self.issued]).gathers:
                self._gather(use.part)
            self.issued += 1
        use = self.uses[self.used]
        assert use.part == part
        self.used += 1
        freed = {"gathered weights": self._gathered_bytes(part)} if use.frees else {}
        if not use.gathers:
            return [], freed
        copied = 2 * self.step.program.gather_item
        return [self._copy(part, copied, "copy gathered weights", self.gathered[part])], freed

    def _gather(self, part: int) -> None:
        step = self.step
        seconds = sum(
            step.rates.ring_s(step.program.gather_item * cut.elements, cut.parts, cut.apart) for cut in self._cuts(part)
        )
        after = () if self.before is None else (self.before,)
        held = {"gathered weights": self._gathered_bytes(part)}
        self.gathered[part] = step.add(Task(self.number, SHARD, f"gather {_called(part)}", seconds, after, held))

    def _gathered_bytes(self, part: int) -> int:
        return int(self.step.program.gather_item * self._elements(part))

    def _copy(self, part: int, bytes_an_element: float, name: str, after: int) -> int:
        """A pass over a part's weights or gradients, in the chain."""
        step = self.step
        seconds = step.rates.passes_s(bytes_an_element * self._elements(part)) if step.program.copies else 0.0
        waits = (after,) if self.last is None or self.last == after else (self.last, after)
        self.last = step.add(Task(self.number, COMPUTE, name, seconds, waits), {"copies of weights": seconds})
        return self.last

    # gradients

    @property
    def _sums(self) -> bool:
        """Whether whole gradients of several micro-batches are summed before ranks exchange them."""
        return self.step.micro_batches > 1 and not self.layout.reduce_every_micro_batch

    def _gradient_bytes(self, part: int) -> int:
        return int((4 if self._sums else self.step.program.item) * self._elements(part))

    def _new_gradient(self, part: int) -> dict[str, int]:
        """The whole gradient of a part of the model, where it is not there yet."""
        if part in self.summed:
            return {}
        if self._sums:
            self.summed.add(part)
        return {"gradients": self._gradient_bytes(part)}

    def _reduce(self, part: int) -> None:
        """Exchange a part's gradients after each micro-batch, or after the last."""
        self.backwards[part] = self.backwards.get(part, 0) + 1
        if not (self.layout.reduce_every_micro_batch or self.backwards[part] == self.step.micro_batches):
            return
        if self.layout.overlaps:
            self._exchange(part)
        else:
            self.late.append(part)

    def _exchange(self, part: int) -> None:
        step, layout, item = self.step, self.layout, self.step.program.reduce_item
        assert self.last is not None
        last, cuts = self.last, self._cuts(part)
        owned = sum(cut.elements / cut.parts for cut in cuts)
        freed = {"gradients": self._gradient_bytes(part)}
        if any(cut.parts > 1 for cut in cuts):
            last = self._copy(part, step.program.item + item, "copy gradients", last)
            seconds = sum(step.rates.ring_s(item * cut.elements, cut.parts, cut.apart) for cut in cuts)
            name = f"scatter gradients of {_called(part)}"
            own = {"gradients": int(4 * owned)}
            last = step.add(Task(self.number, SHARD, name, seconds, (last,), own, freed))
        replicas = layout.replicate * (layout.shard * layout.context if layout.whole else 1)
        if replicas > 1:
            apart = layout.tensor * (1 if layout.whole else layout.shard * layout.context)
            seconds = step.rates.all_reduce_s(item * owned, replicas, apart)
            last = step.add(Task(self.number, REPLICATE, f"sum gradients of {_called(part)}", seconds, (last,)))
        self.arrived.append(last)


def _called(part: int) -> str:
    return "embedding and head" if part == OUTER else f"layer {part}"


def _sum(*parts: Mapping[str, int]) -> dict[str, int]:
    """Bytes by part of the memory."""
    found: Counter[str] = Counter()
    for one in parts:
        found.update(one)
    return dict(found)
