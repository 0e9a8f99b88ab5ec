"""One device's share of a step: the chain of what it computes, its gathers ahead of it and its reductions behind it."""

from __future__ import annotations

from collections.abc import Iterable

from weftrain.backends.common.device_memory import PROGRAM_BYTES, rotary_bytes
from weftrain.backends.cuda.simulation.events import COMPUTE, REPLICATE, SHARD, Task
from weftrain.backends.cuda.simulation.layout import OUTER
from weftrain.backends.cuda.simulation.schedules import Action
from weftrain.backends.cuda.simulation.tasks import Tasks
from weftrain.backends.cuda.simulation.work import PASSES, Segment

_KEPT = -1  # in place of a gather's task: the weights are there


class Chain:
    """Adds a device's tasks to a step, action by action."""

    def __init__(self, step: Tasks, number: int, plan: list[Action]) -> None:
        self.step, self.number, self.layout = step, number, step.layout
        self.stages = range(number, len(step.stages), step.layout.pipeline)  # of the model, that this device has
        self.gathers = not self.layout.whole and self.layout.parts > 1
        self.last: int | None = None  # the newest task of the chain
        self.before: int | None = None  # the last task of the layer before the newest
        self.uses = [use for action in plan for use in self._parts(action)]
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
        step, tensor = self.step, self.layout.tensor
        elements = sum(step.sizes.layers[layer] for stage in self.stages for layer in step.stages[stage])
        owned = elements / tensor / self.layout.parts
        owned += self._elements(OUTER) / (1 if self.layout.whole else self.layout.parts * tensor)
        seconds = step.rates.passes_s(PASSES[step.program.fusion].update * owned)
        after = sorted({task for task in (*self.arrived, self.last) if task is not None})
        step.add(Task(self.number, COMPUTE, "optimizer", seconds, tuple(after)), {"optimizer": seconds})
        self.held = {
            "program": PROGRAM_BYTES["cuda"],
            "weights, fp32": int(4 * owned),
            "optimizer": int(8 * owned),
            "rotary tables": rotary_bytes(step.recipe.model),
        }

    # actions

    def _stage(self, action: Action) -> int:
        return action.chunk * self.layout.pipeline + self.number

    def _layers(self, action: Action) -> list[int]:
        return list(self.step.stages[self._stage(action)])

    def _ends(self, action: Action) -> bool:
        """Whether the action's stage has the embedding or the head."""
        return self._stage(action) in (0, len(self.step.stages) - 1)

    def _computes_loss(self, action: Action) -> bool:
        return self._stage(action) == len(self.step.stages) - 1

    def _parts(self, action: Action) -> list[tuple[Action, int]]:
        """The parts of the model whose weights are gathered for an action, in order."""
        layers = self._layers(action)
        if action.kind == "forward":
            return [(action, part) for part in ([OUTER] if self._ends(action) else []) + layers]
        return [(action, part) for part in reversed(layers)] if action.kind == "backward" else []

    def _receive(self, task: int) -> int:
        """What a neighbouring stage sends."""
        step, sender = self.step, self.step.tasks[task].device
        if sender == self.number:
            return task
        size = step.program.item * step.tokens * step.recipe.model.hidden_size
        seconds = step.rates.send_s(size, self.layout.size > step.rates.devices_per_node)
        return step.add(Task(sender, f"send to {self.number}", "send activations", seconds, (task,)))

    def _forward(self, action: Action, received: list[int]) -> None:
        step = self.step
        if self._ends(action):
            received = [*received, *self._gather_until(OUTER)]
        kept = int(step.activations.kept * step.tokens)
        for layer in self._layers(action):
            after = [*received, *self._gather_until(layer)]
            name, received = f"forward of layer {layer}", []
            self._compute(step.forwards[layer], name, after, {"activations": kept}, self._freed(layer))
        if self._computes_loss(action):
            held = {"head": step.head_bytes}
            self._compute([step.head[0]], "forward of the head", received, held)

    def _backward(self, action: Action, received: list[int]) -> None:
        step = self.step
        if self._computes_loss(action):
            held = {"head": step.head_bytes}
            self._compute([step.head[1]], "backward of the head", received, {}, held)
            received = []
        kept, working = int(step.activations.kept * step.tokens), int(step.activations.at_work * step.tokens)
        layers = self._layers(action)
        for layer in reversed(layers):
            after = [*received, *self._gather_until(layer)]
            received = []
            takes = {"one block at work": working, **self._new_gradient(layer)}
            frees = {"activations": kept, "one block at work": working, **self._freed(layer)}
            if layer == layers[0] and self._ends(action):
                takes |= self._new_gradient(OUTER, takes)
                frees |= self._freed(OUTER, frees)
            self._compute(step.backwards[layer], f"backward of layer {layer}", after, takes, frees)
            if not step.splits_backward:
                self._reduce(layer)
        if self._ends(action) and not step.splits_backward:
            self._reduce(OUTER)

    def _weights(self, action: Action) -> None:
        for layer in reversed(self._layers(action)):
            self._compute(self.step.weights[layer], f"weights of layer {layer}", [])
            self._reduce(layer)
        if self._ends(action):
            self._reduce(OUTER)

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

    def _elements(self, part: int) -> float:
        """Of a part of the model on a rank, were it not sharded: of embedding and head those that the device has."""
        sizes = self.step.sizes
        if part != OUTER:
            return sizes.layers[part] / self.layout.tensor
        last = len(self.step.stages) - 1
        return sizes.embedding * (0 in self.stages) + sizes.head * (last in self.stages)

    def _gather_until(self, part: int) -> list[int]:
        """Issue the gathers of this use and of the next, which runs beside this one's computation."""
        if not self.gathers:
            return []
        while self.issued < min(self.used + 2, len(self.uses)):
            self._gather(*self.uses[self.issued])
            self.issued += 1
        self.used += 1
        if (task := self.gathered[part]) == _KEPT:
            return []
        return [self._copy(part, 2 * self.step.program.gather_item, "copy gathered weights", task)]

    def _gather(self, action: Action, part: int) -> None:
        if self.layout.keeps and part in self.gathered:
            self.gathered[part] = _KEPT
            return
        step, tensor = self.step, self.layout.tensor
        size = step.program.gather_item * self._elements(part)
        ranks, apart = (self.layout.parts * tensor, 1) if part == OUTER else (self.layout.parts, tensor)
        seconds = step.rates.ring_s(size, ranks, apart)
        after = () if self.before is None else (self.before,)
        held = {"gathered weights": int(size)}
        self.gathered[part] = step.add(Task(self.number, SHARD, f"gather {_called(part)}", seconds, after, held))

    def _freed(self, part: int, also: dict[str, int] | None = None) -> dict[str, int]:
        if not self.gathers or self.layout.keeps:
            return {}
        size = int(self.step.program.gather_item * self._elements(part))
        return {"gathered weights": size + (also or {}).get("gathered weights", 0)}

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

    def _new_gradient(self, part: int, also: dict[str, int] | None = None) -> dict[str, int]:
        """The whole gradient of a part of the model, where it is not there yet."""
        if part in self.summed:
            return {}
        if self._sums:
            self.summed.add(part)
        return {"gradients": self._gradient_bytes(part) + (also or {}).get("gradients", 0)}

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
        size, last, parts = item * self._elements(part), self.last, layout.parts
        parts, apart = (parts * layout.tensor, 1) if part == OUTER and not layout.whole else (parts, layout.tensor)
        freed = {"gradients": self._gradient_bytes(part)}
        if parts > 1:
            last = self._copy(part, step.program.item + item, "copy gradients", last)
            seconds = step.rates.ring_s(size, parts, apart)
            name = f"scatter gradients of {_called(part)}"
            own = {"gradients": int(4 * self._elements(part) / parts)}
            last = step.add(Task(self.number, SHARD, name, seconds, (last,), own, freed))
            size /= parts
        replicas = layout.replicate * (layout.shard * layout.context if layout.whole else 1)
        if replicas > 1:
            apart = layout.tensor * (1 if layout.whole else layout.shard * layout.context)
            seconds = step.rates.all_reduce_s(size, replicas, apart)
            last = step.add(Task(self.number, REPLICATE, f"sum gradients of {_called(part)}", seconds, (last,)))
        self.arrived.append(last)


def _called(part: int) -> str:
    return "embedding and head" if part == OUTER else f"layer {part}"
