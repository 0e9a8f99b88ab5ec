"""What the devices of a simulated step share while its tasks are added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from weftrain.backends.common.device_memory import Activations, activations, head_bytes
from weftrain.backends.cuda.simulation.events import Task
from weftrain.backends.cuda.simulation.layout import Layout, sizes_of, stages_of
from weftrain.backends.cuda.simulation.rates import Rates
from weftrain.backends.cuda.simulation.schedules import Action
from weftrain.backends.cuda.simulation.work import Program, Split, head_s, layer_of
from weftrain.core.config import Recipe


class Tasks:
    """What all devices of a step share: the work of each layer, and the tasks so far, in the order of issue."""

    def __init__(self, recipe: Recipe, layout: Layout, program: Program, rates: Rates, micro_batches: int) -> None:
        self.recipe, self.layout, self.program, self.rates = recipe, layout, program, rates
        self.micro_batches = micro_batches
        self.splits_backward = layout.splits_backward
        self.tasks: list[Task] = []
        self.kinds: list[Mapping[str, float]] = []  # of each task, seconds of computation by kind
        self.ends: dict[tuple[str, int, int], int] = {}  # (kind, micro-batch, stage) -> the action's last task
        model, row = recipe.model, recipe.data.sequence_length
        self.sizes, self.stages = sizes_of(recipe), stages_of(model.num_layers, layout)
        self.tokens = recipe.batch.micro_batch_size * row / (layout.context * layout.tensor)
        split = Split(self.tokens, row, layout.tensor, layout.context, layout.expert)
        kinds = [(model.kind_of(layer), model.experts_of(layer) is None) for layer in range(model.num_layers)]
        of_kind = {kind: layer_of(model, kinds.index(kind), split, program, rates) for kind in dict.fromkeys(kinds)}
        every = [of_kind[kind] for kind in kinds]
        part: Literal["inputs", "whole"] = "inputs" if self.splits_backward else "whole"
        self.forwards = [list(layer.forward()) for layer in every]
        self.backwards = [list(layer.backward(part)) for layer in every]
        self.weights = [list(layer.backward("weights")) for layer in every]
        self.head = head_s(model, self.tokens, program, rates)
        self.head_bytes = head_bytes(recipe, int(self.tokens), "cuda")
        compiled, ranks = program.fusion == "compiled", layout.context * layout.tensor
        kept, at_work = activations(model, program.item, program.recomputes, compiled, layout.tensor, ranks)
        if model.experts is not None and layout.expert > 1:  # the rows that are sent, and that arrive
            at_work += 2 * program.item * model.experts.top_k * model.hidden_size
        self.activations = Activations(kept, at_work)

    def needed(self, device: int, action: Action) -> Iterator[tuple[str, int, int]]:
        """The actions of other stages that this one reads the results of."""
        stage = self.layout.stages(device)[action.chunk]
        if action.kind == "forward" and stage:
            yield ("forward", action.micro_batch, stage - 1)
        if action.kind == "backward" and stage < len(self.stages) - 1:
            yield ("backward", action.micro_batch, stage + 1)

    def add(self, task: Task, kinds: Mapping[str, float] | None = None) -> int:
        self.tasks.append(task)
        self.kinds.append(kinds or {})
        return len(self.tasks) - 1
